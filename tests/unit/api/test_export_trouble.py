"""A destination of the audit log that is behind or takes nothing: in the metrics, `/readyz` and `holdfast status`."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from api import commands, server
from api.admin import status, types
from api.admin.views import export_view
from api.health import Health
from api.kv_counts import EngineCounts
from api.metrics import Metrics
from appliance.audit.siem.shipper import View
from appliance.engine.client import ModelCard
from appliance.errors import ErrorRecord

pytestmark = pytest.mark.anyio
GONE: ErrorRecord = {"code": "audit_export_unreachable", "message": "cannot send", "cause": "refused", "remedy": "look"}
WELL = View("well", "tls://a", "ocsf", True, 9, 9, True, 0, 0.0, "", None)
DOWN = View("down", "tls://b", "cef", False, 2, 2, True, 7, 90.5, "", GONE)


def services(*views: View, unreadable: ErrorRecord | None = None) -> Any:
    return SimpleNamespace(
        witnesses=SimpleNamespace(views=list, alarm=""),
        now=lambda: 0.0,
        exports=SimpleNamespace(
            views=lambda: list(views),
            unreadable=unreadable,
            names=[view.name for view in views],
            view={view.name: view for view in views}.__getitem__,
            destination=lambda _: SimpleNamespace(url="syslog+tls://siem"),
        ),
        audit=SimpleNamespace(error=None, checkpoint_trouble="", checkpoint_age_s=None, alarms=""),
        metrics=Metrics(),
        lifecycle=SimpleNamespace(turns=()),
        waiting=SimpleNamespace(waiting=0),
        vault=SimpleNamespace(sealed=False),
        watch=SimpleNamespace(ready=True, models=[ModelCard("demo", 100)]),
        store=SimpleNamespace(waiting_writes=0),
        kv=SimpleNamespace(fresh=lambda: None, counts=EngineCounts(str)),
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
        'holdfast_audit_export_error{code="audit_export_unreachable",destination="down"} 1.0',
    ]


def test_readyz_stays_ready_and_tells_administrators_which_destination_fails_why_and_what_to_do() -> None:
    its = services(WELL, DOWN)
    told = Health(its, in_full=True)._audit_part()
    assert (told["ready"], told["degraded"]) == (True, "down: cannot send: refused. look")
    assert told["exports"] == {
        "well": {"lag_entries": 0, "lag_s": 0.0, "error": None},
        "down": {"lag_entries": 7, "lag_s": 90.5, "error": "audit_export_unreachable"},
    }
    assert Health(its, in_full=False)._audit_part() == {"ready": True}, "who has no key learns nothing of where it goes"
    assert "degraded" not in Health(services(WELL), in_full=True)._audit_part()
    unread = Health(services(unreadable=GONE), in_full=True)._audit_part()
    assert unread == {"ready": True, "degraded": "nothing is exported: refused. look"}


async def test_status_tells_how_far_behind_a_destination_is_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def audit_status(its: Any) -> Any:
        exports = its.exports
        return SimpleNamespace(
            checkpoint_age_s=None, size=9, checkpoint_size=0, restored=None, error=None, alarm=None, whole=None,
            checked_size=0, checked_age_s=None, witnessed_age_s=None, witnesses=[],
            exports=[export_view(its, name) for name in exports.names],
            exports_error=status._told(exports.unreadable),
        )  # fmt: skip

    monkeypatch.setattr(status, "audit_status", audit_status)
    well = await status._audit(services(WELL))
    assert (well.state, well.troubles) == ("ready", [])
    part = await status._audit(services(WELL, DOWN))
    assert part.detail.endswith("; well has everything; down 7 entries, 90 s behind (refused)")
    assert part.state == "degraded", "to be seen, and it delays nothing but export"
    assert part.state in status._SERVING
    assert part.troubles == [types.Trouble(what="the export to down fails: cannot send: refused", remedy="look")]
    later = replace(DOWN, lag_entries=9, lag_s=99.0)
    assert commands._state(await status._audit(services(later))) == commands._state(part), "`up` says it once"
    unread = await status._audit(services(unreadable=GONE))
    assert (unread.state, unread.detail.endswith("; nothing is exported: refused")) == ("degraded", True)
    assert unread.troubles == [types.Trouble(what="nothing is exported: refused", remedy="look")]
