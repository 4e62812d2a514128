"""How far a destination is, in a file that survives whatever ends the process.

Rules:

- It names what need not be sent again, never more: written after the fact, at once or not at all.
- One that cannot be read is none: everything is sent again, under the same stable ids.
"""

import json
from pathlib import Path
from typing import NamedTuple

from appliance.audit.files import write_whole


class Position(NamedTuple):
    """Where in which history of the log.

    Attributes:
        next: the next entry to send.
        checkpoint: the size of the last checkpoint that was sent.
        leaf: the hash of the entry before `next`, hexadecimal; empty: it is not known.
    """

    next: int = 0
    checkpoint: int = 0
    leaf: str = ""


class Cursor:
    """The file of one destination and one log. Blocks.

    Args:
        origin: another log's cursor says nothing about this one.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self._path = path
        self._origin = origin

    def load(self) -> Position:
        """The position, the beginning if there is none."""
        try:
            said = json.loads(self._path.read_bytes())
            position = Position(int(said["next"]), int(said["checkpoint"]), str(said.get("leaf", "")))
            known = said["origin"] == self._origin
        except (OSError, ValueError, KeyError, TypeError):
            return Position()
        return position if known and min(position.next, position.checkpoint) >= 0 else Position()

    def save(self, position: Position) -> None:
        """Put it in the place of the one before; it is on the disk when this returns.

        Raises:
            OSError: the one before is there still.
        """
        write_whole(self._path, json.dumps({"origin": self._origin, **position._asdict()}).encode())
