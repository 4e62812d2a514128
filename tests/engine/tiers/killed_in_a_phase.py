"""An engine that is killed in the middle of what it does: killed_in_a_phase.py MODEL store|load|reclaim|close."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from appliance.engine.inside.chunks import ChunkOrder
from appliance.engine.inside.connector import CopyingWorker
from appliance.engine.inside.leases import LeaseTable
from appliance.engine.protocol import Lease, lease_params
from tests.engine.in_process import BLOCK, EngineInProcess, words

# What has just been decided or copied, and not yet been acted on.
PHASES: dict[str, tuple[type, str]] = {
    "store": (CopyingWorker, "submit_store"),
    "load": (CopyingWorker, "submit_load"),
    "reclaim": (LeaseTable, "reclaim"),
    "close": (ChunkOrder, "released"),
}


def main(model: Path, phase: str) -> None:
    engine = EngineInProcess(model, dram_bytes=4 << 20)
    of, name = PHASES[phase]
    act = getattr(of, name)

    def act_and_die(*arguments: Any, **named: Any) -> None:
        act(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(of, name, act_and_die)
    for seed in (1, 2, 3, 4, 5, 1):  # more than the device holds, and the first once more
        lease = Lease(f"session-{seed}", "tenant", 0.0)
        engine.turn(words(seed, 10 * BLOCK + 5), salt="salt", transfer=lease_params(lease), max_tokens=2)
    if phase == "close":
        engine.report(release=["session-1"])
    engine.turn(words(9, 28 * BLOCK), salt="cold")  # more than is free


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
