"""How `holdfast audit status` reads: whether the log is whole, how old its checkpoint is, how far behind each SIEM."""

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
    witnessed_by=None,
    witnessed_age_s=None,
    retention_days=400,
    retention_overridden=False,
    retention_held=None,
    oldest_kept=0,
    oldest_kept_time_s=1_800_000_000.0,
    whole=True,
    checked_age_s=7200.0,
    checked_size=1400,
    check_error=None,
    exports=[],
    exports_error=None,
    alarm=None,
    restored=None,
    directory="/somewhere/audit",
    error=None,
)


GONE = types.AuditError(code="audit_export_unreachable", message="it takes no events", cause="refused", remedy="See")
WELL = types.AuditExport(
    name="archive", url="file:///batches", to="/batches", format="ocsf", connected=True, sent=9, delivered=9,
    of_this_log=True, lag_entries=0, lag_s=0.0, waits_for="", error=None,
)  # fmt: skip
DOWN = WELL.model_copy(update={"name": "soc", "connected": False, "lag_entries": 7, "lag_s": 90.5, "error": GONE})


def text(monkeypatch: pytest.MonkeyPatch, **different: object) -> str:
    """What the command prints."""
    status = STATUS.model_copy(update=different)
    monkeypatch.setattr(Console, "admin", lambda _: SimpleNamespace(audit_status=lambda: status))
    done = CliRunner().invoke(holdfast, ["audit", "status"])
    assert done.exit_code == 0, done.output
    return done.stdout


def rows(monkeypatch: pytest.MonkeyPatch, **different: object) -> dict[str, str]:
    """What the command prints, by the names of its rows; of a name with several lines, the first."""
    lines = text(monkeypatch, **different).splitlines()
    return {line[:17].rstrip(): line[17:] for line in reversed(lines)}


def test_the_first_screenful_says_whether_the_log_is_whole_its_checkpoint_and_how_far_behind_each_siem_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = text(
        monkeypatch, exports=[WELL, DOWN], witnessed_size=1200, witnessed_by="witness.example", witnessed_age_s=86_400.0
    )
    assert shown.splitlines()[:6] == [
        "whole            yes, checked 2 h ago: 1400 entries; 120 came since",
        "last checkpoint  42 s ago, of 1500 entries",
        "SIEM             archive: has everything",
        "                 soc: 7 entries, 1 min 30 s behind; FAILS: it takes no events: refused",
        "                   Next: See",
        "witnessed        1 d ago by witness.example, of 1200 entries",
    ]


def test_the_last_checkpoint_has_its_age_and_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(monkeypatch)["last checkpoint"] == "42 s ago, of 1500 entries"
    assert rows(monkeypatch, checkpoint_age_s=None, checkpoint_size=0)["last checkpoint"] == "none yet"


def test_a_log_that_is_not_whole_is_told_from_one_of_which_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"checked_size": 0, "check_error": GONE}
    assert rows(monkeypatch, whole=False, **wrong)["whole"] == "NO, see alarm; last checked 2 h ago"
    assert rows(monkeypatch, whole=None, **wrong)["whole"] == "not known, see alarm; checked 2 h ago"
    assert rows(monkeypatch, whole=False, checked_age_s=None, checked_size=0)["whole"] == "NO, see alarm"
    never = rows(monkeypatch, whole=None, checked_age_s=None, checked_size=0)["whole"]
    assert (
        never
        == "not known: it was not checked since the start; `holdfast audit verify`, with its witnesses, does it now"
    )


def test_that_there_is_no_siem_or_that_it_is_not_known_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(monkeypatch)["SIEM"] == "none; `holdfast audit export add` sends the log to one"
    assert rows(monkeypatch, exports_error=GONE)["SIEM"] == "nothing is exported: refused"
    waiting = WELL.model_copy(update={"lag_entries": 2, "lag_s": 3.0, "waits_for": "the vault is sealed"})
    assert rows(monkeypatch, exports=[waiting])["SIEM"] == "archive: 2 entries, 3 s behind; the vault is sealed"


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
    assert rows(monkeypatch, witnesses=[well.model_copy(update=different)])[""] == f"other-node: {told}"
    assert "" not in rows(monkeypatch)
