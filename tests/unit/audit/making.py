"""Logs for tests: keys that need no vault, a clock that is set by hand, and a log with a few bundles."""

import hashlib
import hmac
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from appliance.audit.entry import Draft, seal
from appliance.audit.events import TURN_ADMITTED, Actor, Event
from appliance.audit.log import AuditLog, Head, Stamp
from appliance.audit.notes import Checkpoint, SigningKey, sign_checkpoint

ORIGIN = "holdfast.example/node-1"
KEY = SigningKey(ORIGIN, b"s" * 32)
BOOT = b"b" * 16


class Keys:
    """AUDIT keys of every scope there could be, but those that were shredded."""

    def __init__(self) -> None:
        self.shredded: set[bytes] = set()

    def audit_key_id(self, scope: str) -> bytes:
        return hashlib.sha256(scope.encode()).digest()[:16]

    def audit_secret(self, key_id: bytes, label: str, *parts: bytes) -> bytes:
        if key_id in self.shredded:
            raise LookupError("shredded")
        return hmac.digest(key_id + label.encode(), b"".join(parts), "sha256")


_STARTS = itertools.count(1)


class Clock:
    """Both clocks; each look takes a millisecond, and each clock begins where none before it has been."""

    def __init__(self) -> None:
        started_ns = next(_STARTS) * 100_000_000_000
        self.wall_ns = 1_700_000_000_000_000_000 + started_ns
        self.monotonic_ns = started_ns

    def __call__(self) -> Stamp:
        self.wall_ns += 1_000_000
        self.monotonic_ns += 1_000_000
        return Stamp(self.wall_ns, self.monotonic_ns)


def real_clock() -> Stamp:
    return Stamp(time.time_ns(), time.monotonic_ns())


def event(number: int = 1) -> Event:
    return Event(
        TURN_ADMITTED,
        Actor("principal", f"pri_{number % 3}", "client"),
        tenant_id=f"ten_{number % 2}",
        source="127.0.0.1",
        request_id=f"req_{number}",
        session_id=f"ses_{number % 5}",
        counts={"prompt_bytes": number},
    )


def draft(number: int = 1, *, keys: Keys | None = None) -> Draft:
    """A sealed event whose nonce and salt follow from its number."""
    happened = event(number)
    return seal(
        happened.kind.number,
        happened.record({"holdfast": "0"}),
        keys=keys or Keys(),
        scope=happened.scope("system"),
        actor=happened.actor.id,
        session=happened.session_id,
        random=hashlib.sha256(b"random %d" % number).digest(),
    )


def drafts(numbers: Sequence[int]) -> list[Draft]:
    return [draft(number) for number in numbers]


def sign(head: Head) -> str:
    return sign_checkpoint(Checkpoint(ORIGIN, head.size, head.root), KEY)


def open_log(directory: Path, *, clock: Callable[[], Stamp] | None = None, boot_id: bytes = BOOT) -> AuditLog:
    return AuditLog.open(directory, boot_id=boot_id, clock=clock or Clock())


def make_log(directory: Path, size: int, *, batch: int = 50) -> None:
    """A published log of `size` entries, closed."""
    log = open_log(directory)
    for first in range(0, size, batch):
        log.append(drafts(range(first, min(size, first + batch))))
    log.publish(sign)
    log.close()
