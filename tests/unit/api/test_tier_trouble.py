"""A tier that is out of use: told to administrators, and no reason to send anybody away."""

from types import SimpleNamespace
from typing import Any

from api.admin import status, types
from api.health import Health

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
