"""Random bytes that are drawn from the system many at a time.

Each call of the system lets another thread run, and whoever draws waits until that one lets go of the interpreter.

Rule: for identifiers, and for what is mixed with what it is used for. Never for a key, nor a nonce under a lasting one:
what was drawn and not given out yet is there twice in a machine that was cloned, or after a fork.
"""

import os
from collections.abc import Callable

_AHEAD_BYTES = 4096
_ID_BYTES = 16


class DrawnAhead:
    """Gives out random bytes, none of them twice; to one thread at a time.

    Args:
        random_bytes: where they come from.
    """

    def __init__(self, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        self._random_bytes = random_bytes
        self._drawn = b""
        self._given = 0

    def __call__(self, count: int) -> bytes:
        """The next `count` bytes."""
        begin, end = self._given, self._given + count
        if end > len(self._drawn):
            self._drawn = self._random_bytes(max(count, _AHEAD_BYTES))
            begin, end = 0, count
        self._given = end
        return self._drawn[begin:end]


class RandomIds:
    """Gives out identifiers of 32 hexadecimal digits that say nothing, cannot be guessed, and are there once."""

    def __init__(self) -> None:
        self._drawn = DrawnAhead()

    def __call__(self) -> str:
        """The next one."""
        return self._drawn(_ID_BYTES).hex()
