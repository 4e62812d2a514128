"""What tells this replica, a gateway and the engine that it starts, from others that share its database.

Rules:

- Drawn once and kept in the state directory: a replica that is started again is the same one. A backup has it not, so
  what is put back elsewhere is another; what is put back in its own place goes on as what it was.
- Where it cannot be kept or read it is not known, and nothing is said of which replica a turn ran on.
"""

import logging
import os
import re
from pathlib import Path
from typing import Final

from appliance.audit.files import write_whole

REPLICA_FILE: Final = "replica"
_ID: Final = re.compile(r"[0-9a-f]{16}\n?")
_LOG = logging.getLogger("holdfast.gateway")


def replica_of(state_dir: Path) -> str | None:
    """This replica's id, 16 hexadecimal digits, made if there is none yet; None: it is not known. Blocks."""
    path = state_dir / REPLICA_FILE
    try:
        try:
            said = path.read_text("ascii")
        except FileNotFoundError:
            said = os.urandom(8).hex()
            write_whole(path, f"{said}\n".encode())
    except (OSError, UnicodeDecodeError) as error:
        _LOG.warning("which replica this is is not known: %s: %s", path, error)
        return None
    if not _ID.fullmatch(said):
        _LOG.warning("which replica this is is not known: %s holds something else; remove it", path)
        return None
    return said.strip()
