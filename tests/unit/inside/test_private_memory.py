"""Memory with KV in it is locked where that is allowed; where it is not, that is said and nothing fails."""

import ctypes
import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.engine.inside.private_memory import keep_private

PAGES = 4


def in_a_child(said: Callable[[], str]) -> str:
    """What a child of this process says; what it does to its own limits and rights ends with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, said().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


def flags_of(address: int) -> list[str]:
    """The flags of the mapping that has an address, as /proc/self/smaps has them (proc(5))."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(f"{address:x}-".rjust(9, "0")))
    return next(line for line in lines[at:] if line.startswith("VmFlags:")).split()


def memory() -> tuple[mmap.mmap, int]:
    there = mmap.mmap(-1, PAGES * mmap.PAGESIZE)
    return there, ctypes.addressof(ctypes.c_char.from_buffer(there))


def test_the_pages_are_locked_as_they_are_used_and_in_no_core() -> None:
    def said() -> str:
        there, address = memory()
        why = keep_private(address + 100, 2 * mmap.PAGESIZE)  # not at the beginning of a page
        there[0] = 1
        flags = flags_of(address)
        return f"{why} {'lo' in flags} {'dd' in flags}"

    assert in_a_child(said) == " True True"


def test_what_may_not_be_locked_is_said_and_still_in_no_core() -> None:
    def said() -> str:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)  # who has no right to pin memory
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: or it could not read about itself
        there, address = memory()
        why = keep_private(address, len(there))
        return f"{why}; {'dd' in flags_of(address)}"

    assert in_a_child(said) == "Operation not permitted (RLIMIT_MEMLOCK); True"


def test_what_is_no_memory_is_refused() -> None:
    with pytest.raises(OSError, match="MADV_DONTDUMP"):
        keep_private(0, mmap.PAGESIZE)
