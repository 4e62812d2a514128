"""A log that is not signed, or was found changed: in the metrics, `/readyz` and `holdfast status`."""

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest

from api import server
from api.admin import status
from api.health import Health
from tests.unit.api import test_export_trouble as exporting

pytestmark = pytest.mark.anyio
TROUBLE = "no checkpoint can be made: /state/audit/tile: No space left on device"


def services(*, trouble: str = "", alarms: str = "", age_s: float | None = 12.5) -> Any:
    its = exporting.services(exporting.DOWN)
    its.audit = SimpleNamespace(error=None, checkpoint_trouble=trouble, alarms=alarms, checkpoint_age_s=age_s)
    return its


def test_readyz_is_degraded_while_what_is_recorded_is_not_signed() -> None:
    its = services(trouble=TROUBLE)
    assert Health(its, in_full=True)._audit_part() == {
        "ready": True,
        "degraded": f"{TROUBLE}; down: cannot send: refused. look",
        "exports": {"down": {"lag_entries": 7, "lag_s": 90.5, "error": "audit_export_unreachable"}},
    }
    assert Health(its, in_full=False)._audit_part() == {"ready": True, "degraded": "what is recorded is not signed"}
    assert Health(services(), in_full=False)._audit_part() == {"ready": True}


@pytest.mark.parametrize("alarms", ["", "entry 7 and the tree differ: tile/0/000"])
def test_metrics_have_the_age_of_the_newest_checkpoint_and_one_gauge_for_every_alarm(alarms: str) -> None:
    def page(its: Any) -> dict[str, float]:
        server._observe(its)
        lines = its.metrics.exposition().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    seen = page(services(alarms=alarms))
    assert (seen["holdfast_audit_checkpoint_age_seconds"], seen["holdfast_audit_alarm"]) == (12.5, float(bool(alarms)))
    assert math.isnan(page(services(age_s=None))["holdfast_audit_checkpoint_age_seconds"])


async def test_status_says_why_no_checkpoint_can_be_made_and_how_old_the_last_one_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def audit_status(_: object) -> Any:
        return SimpleNamespace(
            checkpoint_age_s=400.0, size=9, checkpoint_size=7, restored=None, error=None, alarm=None, whole=None,
            checked_size=0, checked_age_s=None, witnessed_age_s=None, witnesses=[], exports=[], exports_error=None,
        )  # fmt: skip

    monkeypatch.setattr(status, "audit_status", audit_status)
    part = await status._audit(services(trouble=TROUBLE))
    assert part.state == "degraded"
    assert part.detail.startswith(f"{TROUBLE}; 9 entries, not known whether whole")
    assert "last checkpoint 7 min old, of 7 entries" in part.detail
    assert [trouble.what for trouble in part.troubles] == [TROUBLE]
    part = await status._audit(services())
    assert (part.state, part.detail.startswith("9 entries, ")) == ("ready", True)


async def test_readyz_answers_503_while_the_log_cannot_be_written_and_200_when_it_can_again() -> None:
    its = services()
    its.lifecycle.draining = False
    its.watch = SimpleNamespace(ready=True, detail="", summary="")
    its.kv.trouble = dict
    its.store = SimpleNamespace(check=lambda: asyncio.sleep(0))
    health = Health(its, in_full=False)
    assert (await health.readiness())[0] == 200
    its.audit.error = {
        "code": "audit_log_unwritable",
        "message": "",
        "cause": "/state/audit/journal: full",
        "remedy": "",
    }
    answered, body = await health.readiness()
    assert (answered, body["ready"]) == (503, False)
    assert body["parts"] == {
        "gateway": {"ready": True},
        "vault": {"ready": True},
        "audit": {"ready": False, "why": "its log cannot be written or signed"},
        "store": {"ready": True},
        "engine": {"ready": True},
    }
    its.audit.error = None
    assert (await health.readiness())[0] == 200
