"""A destination of the audit log that is behind or takes nothing: in the metrics, `/readyz` and `holdfast status`."""

from types import SimpleNamespace
from typing import Any

import pytest

from api import server
from api.admin import status
from api.health import Health
from api.metrics import Metrics
from appliance.audit.siem.shipper import View
from appliance.errors import ErrorRecord

pytestmark = pytest.mark.anyio
GONE: ErrorRecord = {"code": "audit_export_unreachable", "message": "cannot send", "cause": "refused", "remedy": "look"}
WELL = View("well", "tls://a", "ocsf", True, 9, 9, True, 0, 0.0, "", None)
DOWN = View("down", "tls://b", "cef", False, 2, 2, True, 7, 90.5, "", GONE)


def services(*views: View, unreadable: ErrorRecord | None = None) -> Any:
    return SimpleNamespace(
        exports=SimpleNamespace(views=lambda: list(views), unreadable=unreadable),
        audit=SimpleNamespace(error=None, checkpoint_trouble="", checkpoint_age_s=None, alarms=""),
        metrics=Metrics(),
        lifecycle=SimpleNamespace(turns=()),
        waiting=SimpleNamespace(waiting=0),
        vault=SimpleNamespace(sealed=False),
        watch=SimpleNamespace(ready=True),
        store=SimpleNamespace(waiting_writes=0),
        kv=SimpleNamespace(fresh=lambda: None),
        ledger=SimpleNamespace(tenant_of=str),
        engine_process=None,
    )


def test_metrics_say_of_each_destination_how_far_behind_it_is_and_whether_it_fails() -> None:
    its = services(WELL, DOWN)
    server._observe(its)
    page = its.metrics.exposition().decode().splitlines()
    assert [line for line in page if line.startswith("holdfast_audit_export")] == [
        'holdfast_audit_export_lag_entries{destination="well"} 0.0',
        'holdfast_audit_export_lag_entries{destination="down"} 7.0',
        'holdfast_audit_export_lag_seconds{destination="well"} 0.0',
        'holdfast_audit_export_lag_seconds{destination="down"} 90.5',
        'holdfast_audit_export_failing{destination="well"} 0.0',
        'holdfast_audit_export_failing{destination="down"} 1.0',
    ]


def test_readyz_stays_ready_and_tells_administrators_which_destination_fails() -> None:
    its = services(WELL, DOWN)
    assert Health(its, in_full=True)._audit_part() == {"ready": True, "degraded": "down: cannot send: refused"}
    assert Health(its, in_full=False)._audit_part() == {"ready": True}
    assert Health(services(WELL), in_full=True)._audit_part() == {"ready": True}
    unread = Health(services(unreadable=GONE), in_full=True)._audit_part()
    assert unread == {"ready": True, "degraded": "nothing is exported: refused"}


async def test_status_tells_how_far_behind_a_destination_is_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def audit_status(_: object) -> Any:
        return SimpleNamespace(
            checkpoint_age_s=None, size=9, checkpoint_size=0, restored=None, error=None, alarm=None
        )  # fmt: skip

    monkeypatch.setattr(status, "audit_status", audit_status)
    part = await status._audit(services(WELL, DOWN))
    assert part.detail.endswith("; well has everything; down 7 entries, 90 s behind (refused)")
    assert part.state in status._SERVING
    unread = await status._audit(services(unreadable=GONE))
    assert (unread.state, unread.detail.endswith("; nothing is exported: refused")) == ("degraded", True)
