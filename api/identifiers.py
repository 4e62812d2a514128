"""Identifiers that say nothing and cannot be guessed, made cheaply.

Rule: an identifier is 128 bits of the system's randomness, and none is given out twice.
"""

import os
from collections.abc import Callable

_ID_BYTES = 16
_TOGETHER = 256  # identifiers from one call of the system


class RandomIds:
    """Gives out identifiers of 32 hexadecimal digits.

    Args:
        random_bytes: where randomness comes from.
    """

    def __init__(self, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        self._random_bytes = random_bytes
        self._left: list[str] = []

    def __call__(self) -> str:
        """The next one."""
        if not self._left:
            pool = self._random_bytes(_ID_BYTES * _TOGETHER).hex()
            width = 2 * _ID_BYTES
            self._left = [pool[place : place + width] for place in range(0, len(pool), width)]
        return self._left.pop()
