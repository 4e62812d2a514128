"""Reading the files that a destination names: they may be anything, on a disk that does not answer.

Rules:

- What is no regular file is refused before it is opened for good: a FIFO has nobody who writes.
- Every reading has a deadline and a thread of its own, which a dead mount may hold for as long as it is dead. There is
  one such thread for each thing that is read, however often it is asked for; the process does not wait for it.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Final, TypeVar

from appliance.audit.files import open_regular
from appliance.audit.siem.transport import ExportUnusable

DEADLINE_S: Final = 20.0
MAX_FILE_BYTES: Final = 4 << 20  # a file with every public CA there is has a quarter of that
_T = TypeVar("_T")
_READING: Final[dict[tuple[Hashable, ...], asyncio.Future[Any]]] = {}


def check_regular(path: Path) -> None:
    """See that it is a regular file that can be read. Blocks.

    Raises:
        OSError: as `open_regular`, of at most `MAX_FILE_BYTES`.
    """
    os.close(open_regular(path, most=MAX_FILE_BYTES))


def in_own_thread(do: Callable[..., _T], *given: object) -> asyncio.Future[_T]:
    """Begin `do(*given)` in a thread that the process does not wait for; what it returns or raises."""
    loop = asyncio.get_running_loop()
    working = loop.create_future()
    working.add_done_callback(lambda done: done.cancelled() or done.exception())
    threading.Thread(target=_do, args=(loop, working, do, given), daemon=True).start()
    return working


async def read_in_time(deadline_s: float, read: Callable[..., _T], *given: Hashable) -> _T:
    """What `read(*given)` returns, or raises; several who ask for the same at once share it.

    Raises:
        ExportUnusable: it is not done within `deadline_s`.
    """
    loop = asyncio.get_running_loop()
    key = (loop, read, *given)
    reading = _READING.get(key)
    if reading is None:
        reading = _READING[key] = in_own_thread(read, *given)
        reading.add_done_callback(lambda _: _READING.pop(key))
    try:
        async with asyncio.timeout(deadline_s):
            result: _T = await asyncio.shield(reading)
            return result
    except TimeoutError:
        raise ExportUnusable(
            "the files of a destination cannot be read",
            cause=f"{', '.join(map(str, given))}: not read within {deadline_s:g} s",
            remedy="See that the disk or the mount they are on answers: `ls -l` shows it, or hangs too",
        ) from None


def _do(
    loop: asyncio.AbstractEventLoop, working: asyncio.Future[Any], do: Callable[..., Any], given: tuple[object, ...]
) -> None:
    try:
        result, error = do(*given), None
    except Exception as raised:  # whoever waits is told
        result, error = None, raised
    with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
        loop.call_soon_threadsafe(_tell, working, result, error)


def _tell(working: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if working.done():
        return
    if error is None:
        working.set_result(result)
    else:
        working.set_exception(error)
