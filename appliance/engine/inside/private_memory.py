"""Memory with KV in it that the kernel writes nowhere: not to swap, not to a core.

Rules:

- Pages are locked as they come to be used: to lock memory takes no time, and none that would not be used.
- What may not be locked is left as it is, and said: whether swap in plaintext is borne is decided before each start of
  an engine (`vault.plaintext_swap`, `api/server.py`), not here.
"""

import ctypes
import mmap
import os
from typing import Final

_MLOCK_ONFAULT: Final = 1  # mlock2(2)
_libc = ctypes.CDLL(None, use_errno=True)


def keep_private(address: int, size_bytes: int) -> str:
    """Keep the pages that lie in some memory out of swap and of cores.

    Returns:
        Why they may be swapped; empty: they may not.

    Raises:
        OSError: that is no memory of this process.
    """
    begin = address - address % mmap.PAGESIZE
    size = ctypes.c_size_t(address + size_bytes - begin)
    if _libc.madvise(ctypes.c_void_p(begin), size, mmap.MADV_DONTDUMP) != 0:
        raise OSError(ctypes.get_errno(), "madvise(MADV_DONTDUMP) failed")
    if _libc.mlock2(ctypes.c_void_p(begin), size, _MLOCK_ONFAULT) != 0:
        return f"{os.strerror(ctypes.get_errno())} (RLIMIT_MEMLOCK)"
    return ""
