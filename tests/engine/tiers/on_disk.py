"""An engine with a tier on disk, in a process of its own, so that it can be killed and started again.

on_disk.py MODEL FOLDER CAPACITY   reads one JSON object a line: {"do": "turn", "session", "salt", "prompt"}, {"do":
"release", "session"}, {"do": "quarantine"}, {"do": "empty"}, {"do": "die", "after"}, {"do": "settle"}; answers each
with one. After "empty" nothing but the disk has anything. After "die" it is killed as soon as it has read, or removed,
a file. Its keys come over the socket that HOLDFAST_KEY_SOCKET names.
"""

import json
import os
import signal
import sys
import time
from glob import glob
from pathlib import Path
from typing import Any, cast

from appliance.engine.inside.disk.files import ChunkFiles
from appliance.engine.inside.disk.store import DiskStatus
from appliance.engine.protocol import Lease, TurnEnd, disk_tier, lease_params
from tests.engine.in_process import EngineInProcess

DRAM_BYTES = 4 << 20
_DEADLINE_S = 30.0


def main(model: Path, folder: Path, capacity_bytes: int) -> None:
    disk = disk_tier(str(folder), capacity_bytes, 3600.0)
    engine = EngineInProcess(model, dram_bytes=DRAM_BYTES, disk=disk)
    _say(ready=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "turn":
            _say(**_turn(engine, order))
        elif order["do"] == "release":
            engine.report([order["session"]])
            _say(**_settled(engine, folder))
        elif order["do"] == "quarantine":
            cast("Any", engine.connector)._tiers.quarantine()
            _say(**_settled(engine, folder))
        elif order["do"] == "empty":
            engine.connector.release_all()
            assert engine.scheduler.reset_prefix_cache(reset_connector=True)
            _say(**_settled(engine, folder))
        elif order["do"] == "die":
            _die_after(order["after"])
            _say(ready=True)
        else:
            _say(**_settled(engine, folder))


def _turn(engine: EngineInProcess, order: dict[str, Any]) -> dict[str, Any]:
    lease = Lease(session=order["session"], tenant="acme", idle_timeout_s=60.0, turn=f"turn-{engine.steps}")
    answer = engine.turn(order["prompt"], salt=order["salt"], transfer=lease_params(lease), max_tokens=8)
    account = engine.ended(TurnEnd(lease.session, lease.tenant, lease.turn, "other", 8, 60.0))
    assert account is not None
    return {"cached": answer.cached_tokens, "token_ids": answer.token_ids, "reason": account.reason}


def _die_after(name: str) -> None:
    act = getattr(ChunkFiles, name)

    def act_and_die(*arguments: Any) -> None:
        act(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(ChunkFiles, name, act_and_die)


def _settled(engine: EngineInProcess, folder: Path) -> dict[str, Any]:
    """Step until nothing moves any more; how the tier stands."""
    tiers = cast("Any", engine.connector)._tiers
    (tier,) = tiers.secondary_tiers
    deadline = time.monotonic() + _DEADLINE_S
    while tiers.has_pending_work():
        assert time.monotonic() < deadline
        engine.core.step_fn()
    status = tier.store.status()
    # What was dropped goes a moment later, and `glob` passes over a folder that goes meanwhile.
    while len(paths := [Path(name) for name in glob(f"{folder}/**/*~*/*", recursive=True)]) != status.chunks:  # noqa: PTH207
        assert time.monotonic() < deadline
        time.sleep(0.001)
    files = b"".join(path.read_bytes() for path in paths)
    size = tier.block_size_bytes
    memory = bytes(tier._memory)
    rows = [row for start in range(0, len(memory), size) if any(row := memory[start + 100 : start + 132])]
    return {
        "rows": len(rows),
        "rows_in_plaintext": sum(row in files for row in rows),
        **_told(status),
    }


def _told(status: DiskStatus) -> dict[str, Any]:
    return {"chunks": status.chunks, "loaded": status.loaded_chunks, "faults": status.faults, "on": status.on}


def _say(**told: Any) -> None:
    os.write(1, json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
