"""What the retention policy learned, from one life of the engine to the next.

Rules:

- One small file, 0600, replaced as a whole: who reads it finds what was written last, or what was written before.
- It holds counts of gaps by class; nothing of any session or tenant.
- A file that cannot be read or written costs what was learned, never the engine: the log names it.
- It is written seldom: what a crash loses are some minutes of lessons.
"""

import json
import logging
import os
from pathlib import Path
from typing import Final

from appliance.engine.inside.retention import RetentionPolicy

WRITE_EVERY_S: Final = 300.0
_MOST_BYTES: Final = 1 << 20
_logger = logging.getLogger(f"vllm.{__name__}")


class Lessons:
    """The file of one policy.

    Args:
        path: the file; None: nothing is kept.
        policy: whose lessons they are; it is taught at once what the file holds.
        now: seconds, of the clock that `write_if_due` is told.
    """

    def __init__(self, path: Path | None, policy: RetentionPolicy, now: float) -> None:
        self._path = path
        self._policy = policy
        self._due = now + WRITE_EVERY_S
        if path is not None:
            self._read(path)

    def write_if_due(self, now: float) -> None:
        """Write them down if the last time is long ago."""
        if now >= self._due:
            self._due = now + WRITE_EVERY_S
            self.write()

    def write(self) -> None:
        """Write them down. Blocks for a millisecond; nothing is synced: lessons may be lost."""
        if self._path is None:
            return
        half_written = self._path.with_name(f"{self._path.name}.new")
        try:
            half_written.unlink(missing_ok=True)
            descriptor = os.open(half_written, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(self._policy.lessons(), file, separators=(",", ":"))
            half_written.replace(self._path)
        except OSError as error:
            _logger.warning("What retention learned cannot be written to %s: %s", self._path, type(error).__name__)

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._policy.learn(json.loads(file.read(_MOST_BYTES)))
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError, TypeError, AttributeError) as error:
            _logger.warning(
                "What retention learned is ignored: %s is damaged, or another version's (%s)",
                path,
                type(error).__name__,
            )
