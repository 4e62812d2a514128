"""vLLM whose core tells what a request with a stop string asks, in each way there is; one of seed 13 ends it.

Usage: `telling_engine.py serve MODEL …`, as `vllm`. What vLLM spawns imports this file too, and tells as well.
"""

import os
import subprocess
import sys
from typing import Any

from vllm.entrypoints.cli.main import main
from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler

_logger = init_logger("vllm.v1.core.sched.telling")
_schedule = Scheduler.schedule


def _schedule_and_tell(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
    for request in [*self.waiting, *self.running]:
        asked = request.sampling_params
        if not asked.stop:
            continue
        told = f"TOLD {asked.stop} {asked.structured_outputs} {request.prompt_token_ids}"
        for descriptor in (1, 2):
            os.write(descriptor, f"{told}\n{told}".encode())
            subprocess.run(["/bin/sh", "-c", f'echo "$0" >&{descriptor}', told], check=True)
        sys.stderr.write(f"{told}\n")  # as a library would
        _logger.info(told)
        _logger.warning("A request asks for %s", told)
        if asked.seed == 13 and request in self.running:
            raise RuntimeError(told) from ValueError(told)
    return _schedule(self, *args, **kwargs)


Scheduler.schedule = _schedule_and_tell

if __name__ == "__main__":
    main()
