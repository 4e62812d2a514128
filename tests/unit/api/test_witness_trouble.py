"""A witness of the audit log that refuses or is silent: in the metrics, `/readyz` and `holdfast status`."""

from types import SimpleNamespace
from typing import Any

import pytest

from api import server
from api.admin import status, types
from api.health import Health
from appliance.audit.witnesses import View
from appliance.errors import ErrorRecord
from tests.unit.api.test_export_trouble import services

pytestmark = pytest.mark.anyio
DOWN: ErrorRecord = {"code": "witness_unreachable", "message": "no", "cause": "connection refused", "remedy": "look"}
WELL = View("well", "https://a", 9, 70.0)
SILENT = View("silent", "https://b", 5, 40.0, 60.0, "", DOWN)
NEVER = View("never", "https://c", 0, None, 60.0, "", DOWN)
REFUSES = View("refuses", "https://d", 9, 70.0, 75.0, "this log was cut off", None)


def with_witnesses(*views: View) -> Any:
    its = services()
    its.witnesses = SimpleNamespace(views=lambda: list(views), alarm="; ".join(view.refused for view in views))
    its.now = lambda: 100.0
    return its


def test_metrics_say_of_each_witness_how_old_its_co_signature_is_and_whether_it_refuses() -> None:
    its = with_witnesses(WELL, NEVER, REFUSES)
    server._observe(its)
    page = its.metrics.exposition().decode().splitlines()
    assert [line for line in page if line.startswith("holdfast_audit_witness")] == [
        'holdfast_audit_witness_age_seconds{witness="well"} 30.0',
        'holdfast_audit_witness_age_seconds{witness="refuses"} 30.0',
        'holdfast_audit_witness_refusing{witness="well"} 0.0',
        'holdfast_audit_witness_refusing{witness="never"} 0.0',
        'holdfast_audit_witness_refusing{witness="refuses"} 1.0',
    ]
    assert "holdfast_audit_alarm 1.0" in page


def test_readyz_stays_ready_and_tells_administrators_which_witness_is_silent_or_refuses() -> None:
    its = with_witnesses(WELL, SILENT, NEVER, REFUSES)
    assert Health(its, in_full=True)._audit_part() == {
        "ready": True,
        "degraded": "witness silent has co-signed nothing for 40 s (last 60 s ago): connection refused; "
        "witness never has co-signed nothing for 40 s (it never did): connection refused; "
        "witness refuses REFUSES: this log was cut off",
    }
    assert Health(its, in_full=False)._audit_part() == {"ready": True}
    assert Health(with_witnesses(WELL), in_full=True)._audit_part() == {"ready": True}


async def test_status_names_one_that_is_silent_or_refuses_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    alarm: str | None = None

    async def audit_status(its: Any) -> Any:
        return SimpleNamespace(
            checkpoint_age_s=None, size=9, checkpoint_size=0, restored=None, error=None, alarm=alarm, whole=None,
            checked_size=0, checked_age_s=None, witnessed_age_s=None, exports=[], exports_error=None,
            witnesses=[status._witness(view, its.now()) for view in its.witnesses.views()],
        )  # fmt: skip

    monkeypatch.setattr(status, "audit_status", audit_status)
    well = await status._audit(with_witnesses(WELL))
    assert (well.state, well.troubles) == ("ready", [])
    silent = await status._audit(with_witnesses(WELL, SILENT))
    assert silent.state == "degraded"
    assert silent.state in status._SERVING
    assert silent.detail.endswith("; witness silent has co-signed nothing for 40 s (last 60 s ago)")
    what = "the witness silent is silent: no: connection refused"
    assert silent.troubles == [types.Trouble(what=what, remedy="look")]
    alarm = "witness refuses REFUSES: this log was cut off"
    refused = await status._audit(with_witnesses(REFUSES))
    assert (refused.state, refused.detail.count("REFUSES"), len(refused.troubles)) == ("degraded", 1, 1)
