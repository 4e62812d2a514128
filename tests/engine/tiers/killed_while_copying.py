"""An engine that is killed in the middle of a copy: killed_while_copying.py MODEL store|load."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from appliance.engine.inside.connector import CopyingWorker
from appliance.engine.protocol import Lease, lease_params
from tests.engine.in_process import BLOCK, EngineInProcess, words


def main(model: Path, phase: str) -> None:
    engine = EngineInProcess(model, dram_bytes=4 << 20)
    copy = getattr(CopyingWorker, f"submit_{phase}")

    def copy_and_die(*arguments: Any) -> None:
        copy(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(CopyingWorker, f"submit_{phase}", copy_and_die)
    for seed in (1, 2, 3, 4, 5, 1):  # more than the device holds, and the first once more
        lease = Lease(f"session-{seed}", "tenant", 0.0)
        engine.turn(words(seed, 10 * BLOCK + 5), salt="salt", transfer=lease_params(lease), max_tokens=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
