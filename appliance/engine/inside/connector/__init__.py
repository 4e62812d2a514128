"""Retention and tiers on vLLM: the one package that touches vLLM's internals.

`StateConnector` is loaded as a KV connector: it moves no KV, and uses a connector's hooks to keep sessions' blocks on
the device (`device`). `TieredStateConnector` has the same hooks before vLLM's own connector (`tiered`), whose manager
(`dram`; `recalling` has it read ahead), memory (`memory`) and secondary tier (`disk`) are ours. `questions` is what the
front end asks, `amendments` what of vLLM's own is done otherwise.

Rules:

- Everything here runs in the thread of vLLM's scheduler: the block pool has no lock.
- What decides is elsewhere in `inside/`, and knows no vLLM.
- Written for one version of vLLM; `install` refuses another. tests/engine/test_contract.py holds what is relied on.
- vLLM finds the classes that it is told to load by their names here.
"""

from appliance.engine.inside.connector.device import LeaseRetention, StateConnector
from appliance.engine.inside.connector.disk import DiskTier
from appliance.engine.inside.connector.dram import SessionChunks
from appliance.engine.inside.connector.memory import CopyingWorker, TierSpec
from appliance.engine.inside.connector.questions import (
    connector_of,
    demote,
    install,
    kv_picture,
    lease_report,
    lease_tick,
    turns_ended,
)
from appliance.engine.inside.connector.tiered import TieredStateConnector
from appliance.engine.inside.connector.version import UnsupportedEngine, check_version

__all__ = [
    "CopyingWorker",
    "DiskTier",
    "LeaseRetention",
    "SessionChunks",
    "StateConnector",
    "TierSpec",
    "TieredStateConnector",
    "UnsupportedEngine",
    "check_version",
    "connector_of",
    "demote",
    "install",
    "kv_picture",
    "lease_report",
    "lease_tick",
    "turns_ended",
]
