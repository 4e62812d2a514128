"""The audit log: append-only, verifiable without a key, and witnessed on removable media.

A name is imported when it is first asked for: the appender does not pay for what only a gateway needs.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appliance.audit.events import Actor, Event, Outcome
    from appliance.audit.node import NodeAudit
    from appliance.audit.recorder import AuditUnavailable
else:

    def __getattr__(name: str) -> object:
        if name in __all__:
            import importlib

            for module in ("events", "recorder", "node"):
                found = vars(importlib.import_module(f"{__name__}.{module}")).get(name)
                if found is not None:
                    globals()[name] = found
                    return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Actor", "AuditUnavailable", "Event", "NodeAudit", "Outcome"]
