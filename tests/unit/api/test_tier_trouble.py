"""A tier that is out of use: told to administrators, and no reason to send anybody away."""

from types import SimpleNamespace
from typing import Any

from api.admin import kv, status, types
from api.health import Health
from api.kv_watch import Seen
from appliance.engine.picture import DISK_FAULTS, NOT_STORED, DiskPicture, KvPicture, TierPicture
from appliance.sessions import Sums

WHY = "it cannot be used now: Input/output error (EIO)"


def services(*, trouble: dict[str, str], ready: bool = True) -> Any:
    watch = SimpleNamespace(ready=ready, detail="serves demo", summary="it is starting")
    return SimpleNamespace(watch=watch, kv=SimpleNamespace(trouble=lambda: trouble), engine_process=None)


def disk(detail: str) -> types.TierSeen:
    state = "failed" if detail else "ok"
    return types.TierSeen.model_validate(
        {"tier": "disk", "state": state, "capacity_bytes": 9, "used_bytes": 3, "detail": detail}
    )


def test_readyz_stays_ready_and_tells_administrators_which_tier_is_out_of_use() -> None:
    broken = services(trouble={"disk": WHY})
    assert Health(broken, in_full=True)._engine_part() == {"ready": True, "degraded": f"KV in disk: {WHY}"}
    assert Health(broken, in_full=False)._engine_part() == {"ready": True}
    assert Health(services(trouble={}), in_full=True)._engine_part() == {"ready": True}
    assert Health(services(trouble={"disk": WHY}, ready=False), in_full=True)._engine_part()["ready"] is False


def test_status_calls_the_engine_degraded_and_names_the_tier() -> None:
    part = status._engine(services(trouble={}), [disk(WHY)])
    assert (part.state, part.detail) == ("degraded", f"KV in disk: {WHY}; serves demo")
    assert part.state in status._SERVING
    assert status._engine(services(trouble={}), [disk("")]).state == "ready"


def test_kv_status_says_of_a_tier_what_is_wrong_with_it() -> None:
    tiers = TierPicture("device", "ok", 1, 9, 3, 2, 1), TierPicture("disk", "failed", 1, 9, 3, 0, 1)
    none: dict[str, int] = dict.fromkeys(NOT_STORED, 0)
    error = DiskPicture(0, 0, 0, 0, 0, none, dict.fromkeys(DISK_FAULTS, 0), "Input/output error (EIO)", 0.5)
    picture = KvPicture(32, tiers, (), (), 0, 0, (), 0, 0, 0, "one", disk=error)
    assert [(each.tier, each.detail) for each in kv._tiers(Seen(1.0, picture, 0), Sums())] == [
        ("device", ""),
        ("disk", WHY),
    ]
