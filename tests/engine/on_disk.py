"""An engine with a tier on disk, in a process of its own, so that it can be killed and started again.

on_disk.py MODEL FOLDER   reads one JSON object a line: {"do": "turn", "session", "salt", "prompt"}, {"do": "release",
"session"}, {"do": "settle"}; answers each with one. Its keys come over the socket that HOLDFAST_KEY_SOCKET names.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from appliance.engine.protocol import Lease, disk_tier, lease_params
from tests.engine.in_process import EngineInProcess

DRAM_BYTES = 4 << 20
_DEADLINE_S = 30.0


def main(model: Path, folder: Path) -> None:
    disk = disk_tier(str(folder), 64 << 20, 3600.0)
    engine = EngineInProcess(model, dram_bytes=DRAM_BYTES, disk=disk)
    _say(ready=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "turn":
            _say(**_turn(engine, order))
        elif order["do"] == "release":
            engine.report([order["session"]])
            _say(**_settled(engine))
        else:
            _say(**_settled(engine))


def _turn(engine: EngineInProcess, order: dict[str, Any]) -> dict[str, Any]:
    lease = Lease(session=order["session"], tenant="acme", idle_timeout_s=60.0, turn=order["turn"])
    answer = engine.turn(order["prompt"], salt=order["salt"], transfer=lease_params(lease), max_tokens=8)
    return {"cached": answer.cached_tokens, "token_ids": answer.token_ids}


def _settled(engine: EngineInProcess) -> dict[str, Any]:
    """Step until nothing moves any more; how the tier stands."""
    (tier,) = engine.connector._tiers.secondary_tiers
    deadline = time.monotonic() + _DEADLINE_S
    while engine.connector._tiers.has_pending_work():
        assert time.monotonic() < deadline
        engine.core.step_fn()
    status = tier.store.status()
    return {"chunks": status.chunks, "loaded": status.loaded_chunks, "faults": status.faults, "on": status.on}


def _say(**told: Any) -> None:
    os.write(1, json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
