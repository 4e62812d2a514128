"""How `holdfast audit status` reads."""

from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from api.admin import types
from appliance.cli import Console, holdfast

STATUS = types.AuditStatus(
    size=1520,
    checkpoint_size=1500,
    checkpoint_age_s=42.0,
    signs=True,
    public_key="holdfast.1f+00000000+AAAA",
    witnessed_size=0,
    witnesses=[],
    retention_days=400,
    retention_overridden=False,
    retention_held=None,
    oldest_kept=0,
    oldest_kept_time_s=1_800_000_000.0,
    checked_age_s=7200.0,
    checked_size=1400,
    alarm=None,
    restored=None,
    directory="/somewhere/audit",
    error=None,
)


def rows(monkeypatch: pytest.MonkeyPatch, **different: object) -> dict[str, str]:
    """What the command prints, by the names of its rows."""
    status = STATUS.model_copy(update=different)
    monkeypatch.setattr(Console, "admin", lambda _: SimpleNamespace(audit_status=lambda: status))
    done = CliRunner().invoke(holdfast, ["audit", "status"])
    assert done.exit_code == 0, done.output
    return {line[:17].rstrip(): line[17:] for line in done.stdout.splitlines()}


def test_the_last_checkpoint_has_its_age_and_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(monkeypatch)["last checkpoint"] == "42 s ago, of 1500 entries"
    assert rows(monkeypatch, checkpoint_age_s=None, checkpoint_size=0)["last checkpoint"] == "none yet"


def test_a_check_says_when_it_was_and_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(monkeypatch)["checked"] == "2 h ago: 1400 entries are whole"
    assert rows(monkeypatch, checked_size=0)["checked"] == "2 h ago: NOT found whole, see alarm"
    never = rows(monkeypatch, checked_age_s=None, checked_size=0)["checked"]
    assert never == "not since the start; `holdfast audit verify` does it now"


@pytest.mark.parametrize(
    ("different", "told"),
    [
        ({}, "co-signed 1500 entries 30 s ago"),
        ({"size": 0, "cosigned_age_s": None}, "has co-signed nothing yet"),
        (
            {"silent_s": 90.0, "error": types.AuditError(code="c", message="m", cause="refused", remedy="r")},
            "co-signed 1500 entries 30 s ago; silent for 1 min 30 s: refused",
        ),
        (
            {"silent_s": 90.0, "refused": "this log was cut off"},
            "REFUSES: this log was cut off; co-signed 1500 entries 30 s ago",
        ),
    ],
)
def test_each_witness_says_what_it_co_signed_last_and_what_is_in_its_way(
    monkeypatch: pytest.MonkeyPatch, different: dict[str, object], told: str
) -> None:
    well = types.AuditWitness(
        name="other-node", url="https://a", size=1500, cosigned_age_s=30.0, silent_s=None, refused=None, error=None
    )
    assert rows(monkeypatch, witnesses=[well.model_copy(update=different)])["witness"] == f"other-node: {told}"
    assert "witness" not in rows(monkeypatch)
