"""What cannot be asked in time is unknown, and says why."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api.admin import status
from appliance.audit import AuditUnavailable, witnesses
from appliance.audit.checking import Checked
from appliance.audit.log import WITNESSED
from appliance.audit.notes import Algorithm, Checkpoint, SigningKey, VerifierKey, cosign, sign_checkpoint
from appliance.audit.siem.shipper import View
from appliance.errors import ErrorRecord

pytestmark = pytest.mark.anyio

LOG = SigningKey("holdfast.test", b"l" * 32)
WITNESS = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)


async def test_an_appender_that_does_not_answer_in_time_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_DEADLINE_S", 0.001)
    never = asyncio.Event()
    services: Any = SimpleNamespace(audit=SimpleNamespace(status=never.wait, error=None))
    with pytest.raises(AuditUnavailable) as told:
        await status.audit_status(services)
    assert told.value.cause == "its appender did not answer within 0.001 s"
    part = await status._audit(services)
    assert (part.state, "did not answer" in part.detail) == ("failed", True)


WRONG: ErrorRecord = {"code": "audit_log_tampered", "message": "altered", "cause": "entry 7", "remedy": "look"}


def node(
    directory: Path,
    checked: Checked | None,
    *,
    older: str = "",
    retention: str = "",
    error: str = "",
    refused: str = "",
) -> Any:
    """Services whose log was checked so, with one destination and one witness."""

    async def said() -> dict[str, Any]:
        return {
            "size": 20, "checkpoint_size": 15, "checkpoint_age_s": 42.0, "signs": True,
            "public_key": f"{LOG.verifier()}", "error": None
        }  # fmt: skip

    async def accepted() -> dict[VerifierKey, int]:
        return {WITNESS.verifier(): 12}

    failure: ErrorRecord | None = {**WRONG, "cause": error} if error else None
    view = View("soc", "tls://a", "ocsf", not error, 9, 9, True, 11, 200.0, "", failure)
    witness = witnesses.View("other-node", "https://a", 12, 1_000_000.0, refused=refused)
    return SimpleNamespace(
        now=lambda: 1_000_100.0,
        witnesses=SimpleNamespace(views=lambda: [witness], alarm=refused),
        audit=SimpleNamespace(
            status=said, accepted_witnesses=accepted, error=None, alarms=older, checkpoint_trouble="", older=older,
            restored="", directory=directory,
            retention=SimpleNamespace(days=400, held="", oldest=None, alarm=retention),
            checking=SimpleNamespace(last=checked, alarm=""),
        ),
        exports=SimpleNamespace(
            unreadable=None, names=["soc"], view=lambda _: view, views=lambda: [view],
            destination=lambda _: SimpleNamespace(url="syslog+tls://a"),
        ),
    )  # fmt: skip


async def test_one_view_has_the_check_the_checkpoint_the_siems_and_the_witness(tmp_path: Path) -> None:
    folder = tmp_path / WITNESSED
    folder.mkdir()
    older, newer = (sign_checkpoint(Checkpoint(LOG.name, size, bytes(32)), LOG) for size in (12, 15))
    (folder / "12").write_text(older + cosign(older, WITNESS, 1_000_000))
    (folder / "15").write_text(newer)
    seen = await status.audit_status(node(tmp_path, Checked(time.monotonic() - 60.0, 14, None, True)))
    assert (seen.whole, seen.checked_size, seen.check_error) == (True, 14, None)
    assert (seen.checkpoint_size, seen.checkpoint_age_s) == (15, 42.0)
    assert [(each.name, each.lag_entries, each.lag_s, each.error) for each in seen.exports] == [
        ("soc", 11, 200.0, None)
    ]
    assert (seen.witnessed_size, seen.witnessed_by, seen.witnessed_age_s) == (12, "witness.example", 100.0)
    detail = status._audit_detail(seen.model_copy(update={"checked_age_s": 60.0}))
    assert detail == (
        "20 entries, whole (14), checked 60 s ago; last checkpoint 42 s old, of 15 entries; "
        "co-signed by witness.example 100 s ago, 12 entries; soc 11 entries, 3 min behind"
    )


async def test_a_log_is_whole_only_if_a_check_found_it_so_and_nothing_says_otherwise(tmp_path: Path) -> None:
    well, wrong = Checked(0.0, 20, None, True), Checked(0.0, 0, WRONG, True)
    killed = Checked(0.0, 0, {**WRONG, "code": "audit_not_checked"}, False)
    for services, whole in (
        (node(tmp_path, None), None),
        (node(tmp_path, well), True),
        (node(tmp_path, wrong), False),
        (node(tmp_path, killed), None),
        (node(tmp_path, well, older="log"), False),
        (node(tmp_path, well, older="database"), True),
        (node(tmp_path, well, retention="bundles are gone"), False),
        (node(tmp_path, well, refused="it was cut off"), False),
    ):
        assert (await status.audit_status(services)).whole is whole
