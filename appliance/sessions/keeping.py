"""How long, how strictly and within what bounds a session's KV is kept, from the settings that apply to it.

A tenant's own word stands before the model's, and that before the appliance's.
"""

from dataclasses import dataclass

from appliance.identity import Tenant
from appliance.settings import SessionSettings, TenantRetention


@dataclass(frozen=True, slots=True)
class Keeping:
    """What the engine is told with each turn of a session. Shares and caps are fractions of each tier's blocks.

    Attributes:
        idle_timeout_s: how long the session's KV outranks others' after a turn.
        idle_timeout_after_tool_use_s: the same, where the turn ended because the model called a tool.
        strict: nothing is kept beyond the idle timeout.
    """

    idle_timeout_s: float
    idle_timeout_after_tool_use_s: float
    strict: bool = False
    tenant_share: float = 0.0
    tenant_cap: float = 1.0
    session_cap: float = 1.0

    def idle_timeout_after_s(self, stop: str) -> float:
        """The idle timeout of a turn that stopped so: one of the protocol's `STOPS`."""
        return self.idle_timeout_after_tool_use_s if stop == "tool_use" else self.idle_timeout_s


def keeping(settings: SessionSettings, tenant: Tenant | None, model: str) -> Keeping:
    """What applies to a tenant's sessions with a model."""
    own = TenantRetention() if tenant is None else settings.tenants.get(tenant.name, TenantRetention())
    idle_s = settings.idle_timeout_s_by_model.get(model, settings.idle_timeout_s)
    after_tool_use_s = settings.idle_timeout_after_tool_use_s_by_model.get(
        model, settings.idle_timeout_after_tool_use_s
    )
    if tenant is not None and tenant.idle_timeout_s is not None:
        idle_s = after_tool_use_s = tenant.idle_timeout_s
    return Keeping(
        idle_s if own.idle_timeout_s is None else own.idle_timeout_s,
        after_tool_use_s if own.idle_timeout_after_tool_use_s is None else own.idle_timeout_after_tool_use_s,
        strict=own.retention == "strict",
        tenant_share=own.kv_share,
        tenant_cap=own.kv_cap,
        session_cap=min(settings.session_kv_cap, own.session_kv_cap),
    )
