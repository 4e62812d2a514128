"""A disk whose syncs take at least so long, in this process and in the Python processes that it starts.

For what a figure depends on: how long this machine's disk takes is chance. The bytes are written and synced as ever;
who asked is let go later.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks.running import REPOSITORY

_SYNCS: Final = ("fdatasync", "fsync")
_SITE: Final = "from benchmarks.slow_disk import slow_down\nslow_down({seconds!r})\n"


def slow_down(seconds: float) -> None:
    """From now on a sync takes at least so long in this process."""
    for name in _SYNCS:
        setattr(os, name, _slower(getattr(os, name), seconds))


@contextlib.contextmanager
def slow_disk(seconds: float) -> Iterator[None]:
    """Within the block, here and in whatever Python process is started meanwhile."""
    as_it_was = {name: getattr(os, name) for name in _SYNCS}
    path = os.environ.get("PYTHONPATH")
    with tempfile.TemporaryDirectory(prefix="holdfast-slow-") as place:
        (Path(place) / "sitecustomize.py").write_text(_SITE.format(seconds=seconds))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (place, str(REPOSITORY), path)))
        slow_down(seconds)
        try:
            yield
        finally:
            for name, sync in as_it_was.items():
                setattr(os, name, sync)
            if path is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = path


def _slower(sync: Callable[[int], None], seconds: float) -> Callable[[int], None]:
    def slower(descriptor: int) -> None:
        until = time.perf_counter() + seconds
        sync(descriptor)
        time.sleep(max(0.0, until - time.perf_counter()))

    return slower
