"""What a producer records events with: seals them, hands them to the appender, and waits until they are on the disk.

Rules:

- What `record` returned for is in the log. When it raises, whatever the event was to allow does not happen.
- An appender that was lost is started again; what it had not answered for is handed over once more, and not repeated in
  the log if it was there already. That takes at most `_WAIT_S`: then the caller is told.
- What waits is bounded. What anybody can cause without a key is counted and told once in a while, so that nobody fills
  the disk: `count`.
- While the vault is sealed there are no keys: what happens then is in plaintext, and holds no tenant's name.
"""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final, NamedTuple, cast

from pydantic_core import to_json

from appliance.audit import protocol
from appliance.audit.entry import AuditKeys, Draft, canonical, seal, search_tag
from appliance.audit.events import ANYONE, Event, Scope
from appliance.errors import ErrorRecord, Fault, HoldfastError
from appliance.vault import VaultSealed

_WAIT_S: Final = 10.0
_MOST_WAITING: Final = 4096
_SENT_TOGETHER: Final = 4  # frames: the appender works at these while the next are sealed
_PATIENCE_S: Final = 3.0  # with an appender that does not start: its predecessor may be ending
_SWEEP_S: Final = 1.0
_TAGS: Final = 8192  # of actors and sessions, remembered
_MOST_COUNTED: Final = 64  # kinds of counted events between two tellings
_TELL_EVERY_S: Final = 60.0
_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 5.0

Connect = Callable[[asyncio.Protocol], Awaitable[None]]


class AuditUnavailable(HoldfastError):
    """An event could not be recorded, and what it stands for does not happen."""

    code: ClassVar[str] = "audit_unavailable"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class _Waiting(NamedTuple):
    kind: int
    body: bytes
    answer: "asyncio.Future[bytes]"
    until: float


class _Connection(asyncio.Protocol):
    """The connection with one appender."""

    def __init__(self, recorder: "Recorder") -> None:
        self._recorder = recorder
        self._received = bytearray()
        self._unsent: list[bytes] = []
        self._unanswered = 0
        self.transport: asyncio.WriteTransport | None = None
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)
        # uvloop keeps back what is below the mark until the loop comes round: the appender would wait for that long.
        self.transport.set_write_buffer_limits(0)

    def send(self, frame: bytes) -> None:
        """Write a frame if the appender is there still: at once, unless it has others to work at.

        If it is not, its successor is sent whatever waits.
        """
        self._unsent.append(frame)
        if not self._unanswered or len(self._unsent) >= _SENT_TOGETHER:
            self._flush()
        elif len(self._unsent) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        frames, self._unsent = self._unsent, []
        self._unanswered += len(frames)
        if frames and self.transport is not None and not self.transport.is_closing():
            self.transport.write(b"".join(frames))

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            for message in protocol.take_messages(self._received):
                self._unanswered -= 1
                self._recorder._answered(message)
        except protocol.Malformed:
            if self.transport is not None:
                self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  (asyncio's signature)
        if not self.lost.done():
            self.lost.set_result(None)


class Recorder:
    """The way into a node's audit log.

    Args:
        keys: the AUDIT keys; None while the vault is sealed.
        system_scope: whose key seals what belongs to no tenant.
        versions: of what runs here, for every record.
    """

    def __init__(
        self,
        keys: Callable[[], AuditKeys | None],
        *,
        system_scope: str,
        versions: Mapping[str, str],
        random_bytes: Callable[[int], bytes] = os.urandom,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._system_scope = system_scope
        self._versions = dict(sorted(versions.items()))
        self._random_bytes = random_bytes
        self._monotonic = monotonic
        self._numbers = 0
        self._sweeping = False
        self._tags: dict[tuple[bytes, str, str], bytes] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._connection: _Connection | None = None
        self._signing_key = b""
        self._counted: dict[tuple[int, str, str, str], Event] = {}
        self._counts: dict[tuple[int, str, str, str], int] = {}
        self._told_at = -_TELL_EVERY_S
        self._failing_since: float | None = None
        self.error: ErrorRecord | None = None

    async def run(self, connect: Connect) -> None:
        """Stay connected until cancelled. `connect` starts an appender where there is none, and connects with it."""
        pause_s = _PAUSE_S
        while True:
            connection = _Connection(self)
            try:
                await connect(connection)
            except HoldfastError as error:
                self._cannot_connect(error)
            except OSError as error:
                self._cannot_connect(_lost(error.strerror or str(error)))
            else:
                pause_s = _PAUSE_S
                self._failing_since = None
                self.error = None
                self._taken_up(connection)
                try:
                    await connection.lost
                finally:
                    self._connection = None
                    if connection.transport is not None:
                        connection.transport.close()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def record(self, *events: Event, privileged: bool = False) -> int:
        """Append events together; the sequence of the last one. All are on the disk when this returns.

        Args:
            privileged: an administrator's doing, which a full disk does not stop.

        Raises:
            AuditUnavailable: says which file and why.
            VaultSealed: an event of a tenant's, and there is no key to seal it with.
        """
        return int(protocol.SEQUENCE.unpack(await self.begin(*events, privileged=privileged))[0])

    def begin(self, *events: Event, privileged: bool = False) -> "asyncio.Future[bytes]":
        """As `record`, for who has something else to do meanwhile: the events are on their way when this returns.

        The future is done when they are on the disk, and its result is the last one's sequence, packed; what `record`
        raises is the future's. Cancelled, they are written all the same.
        """
        kind = protocol.APPEND_PRIVILEGED if privileged else protocol.APPEND
        try:
            return self._ask(kind, protocol.pack_drafts([self._sealed(event) for event in events]))
        except HoldfastError as error:
            failed: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed

    def count(self, event: Event) -> None:
        """Note something that anybody can cause: `tell_counted` records it, once for all that are alike."""
        key = (event.kind.number, event.actor.id, event.source, event.reason)
        if key not in self._counts and len(self._counts) >= _MOST_COUNTED:
            event = replace(event, actor=ANYONE, tenant_id="", source="", reason="others", request_id="")
            key = (event.kind.number, "", "", "others")
        self._counted.setdefault(key, event)
        self._counts[key] = self._counts.get(key, 0) + 1

    async def tell_counted(self, *, at_once: bool = False) -> None:
        """Record what was counted, if it is time, or `at_once`.

        Raises:
            AuditUnavailable: it stays counted.
        """
        if not self._counts or (not at_once and self._monotonic() < self._told_at + _TELL_EVERY_S):
            return
        counted, counts = self._counted, self._counts
        self._counted, self._counts = {}, {}
        self._told_at = self._monotonic()
        try:
            await self.record(
                *(replace(event, counts={**event.counts, "count": counts[key]}) for key, event in counted.items())
            )
        except AuditUnavailable:
            for key, event in counted.items():
                self._counted.setdefault(key, event)
                self._counts[key] = self._counts.get(key, 0) + counts[key]
            raise

    async def sign_with(self, signing_key: bytes) -> None:
        """Hand the appender the key that signs checkpoints; again to each one that follows it."""
        self._signing_key = signing_key
        if self._connection is not None:
            await self._ask(protocol.SIGNING_KEY, signing_key)

    async def status(self) -> dict[str, Any]:
        """What the appender says of the log.

        Raises:
            AuditUnavailable: there is none.
        """
        said: dict[str, Any] = json.loads(await self._ask(protocol.STATUS, b""))
        return said

    async def checkpoint(self) -> dict[str, Any]:
        """Have a checkpoint made of all that there is; the status then."""
        said: dict[str, Any] = json.loads(await self._ask(protocol.CHECKPOINT, b""))
        return said

    # Private

    def _sealed(self, event: Event) -> Draft:
        keys = None if event.kind.scope is Scope.NOBODY else self._keys()
        scope = event.scope(self._system_scope)
        if keys is None and scope != self._system_scope:
            raise VaultSealed
        return seal(
            event.kind.number,
            spelled(event, self._versions),
            keys=keys,
            scope=scope,
            actor=event.actor.id,
            session=event.session_id,
            random=self._random_bytes(32),
            tag=self._tag,
        )

    def _ask(self, kind: int, body: bytes) -> "asyncio.Future[bytes]":
        if len(self._waiting) >= _MOST_WAITING:
            raise _lost(f"{_MOST_WAITING} events wait already")
        if self._connection is None and self._impatient() and self.error is not None:
            raise _refused(self.error)
        self._numbers += 1
        number = self._numbers
        loop = asyncio.get_running_loop()
        if not self._sweeping:
            self._sweeping = True
            loop.call_later(_SWEEP_S, self._sweep)
        answer = loop.create_future()
        self._waiting[number] = _Waiting(kind, body, answer, loop.time() + _WAIT_S)
        if self._connection is not None:
            self._connection.send(protocol.pack(kind, number, body))
        return answer

    def _sweep(self) -> None:
        """End the waiting of those whose time is up, or who gave up: one timer for all of them."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for number, waiting in list(self._waiting.items()):
            if waiting.answer.done():
                del self._waiting[number]
            elif waiting.until <= now:
                del self._waiting[number]
                waiting.answer.set_exception(_lost(f"no answer in {_WAIT_S:g} s"))
        self._sweeping = bool(self._waiting)
        if self._sweeping:
            loop.call_later(_SWEEP_S, self._sweep)

    def _tag(self, keys: AuditKeys, key_id: bytes, label: str, value: str) -> bytes:
        """`search_tag`, remembered: a session is told of again and again."""
        tag = self._tags.get((key_id, label, value))
        if tag is None:
            if len(self._tags) >= _TAGS:
                self._tags.clear()
            tag = self._tags[key_id, label, value] = search_tag(keys, key_id, label, value)
        return tag

    def _taken_up(self, connection: _Connection) -> None:
        """A new connection: the key first, then whatever waits."""
        self._connection = connection
        if self._signing_key:
            connection.send(protocol.pack(protocol.SIGNING_KEY, 0, self._signing_key))
        for number, waiting in self._waiting.items():
            if waiting.answer.done():
                continue
            kind = protocol.APPEND_AGAIN if waiting.kind == protocol.APPEND else waiting.kind
            connection.send(protocol.pack(kind, number, waiting.body))

    def _answered(self, message: protocol.Message) -> None:
        waiting = self._waiting.pop(message.number, None)
        if message.kind == protocol.REFUSED:
            self.error = json.loads(message.body)
        elif waiting is not None and waiting.kind == protocol.APPEND:
            self.error = None
        if waiting is None or waiting.answer.done():
            return
        if message.kind == protocol.DONE:
            waiting.answer.set_result(message.body)
        else:
            waiting.answer.set_exception(_refused(json.loads(message.body)))

    def _impatient(self) -> bool:
        return self._failing_since is not None and self._monotonic() > self._failing_since + _PATIENCE_S

    def _cannot_connect(self, error: HoldfastError) -> None:
        """There is no appender to be had now; after a while, everybody who waits is told."""
        self.error = error.record()
        if self._failing_since is None:
            self._failing_since = self._monotonic()
        if not self._impatient():
            return
        refused, self._waiting = self._waiting, {}
        for waiting in refused.values():
            if not waiting.answer.done():
                waiting.answer.set_exception(_refused(error.record()))


def spelled(event: Event, versions: Mapping[str, str]) -> bytes:
    """The event's record as `canonical` spells it. So does `to_json` of ordered names and whole numbers, faster."""
    record = event.record(versions)
    return canonical(record) if any(map(_is_fraction, event.counts.values())) else to_json(record)


def _is_fraction(value: float) -> bool:
    return not isinstance(value, int)


def _refused(record: Mapping[str, Any]) -> AuditUnavailable:
    return AuditUnavailable(
        "nothing is served that cannot be recorded", cause=str(record["cause"]), remedy=str(record["remedy"])
    )


def _lost(cause: str) -> AuditUnavailable:
    return AuditUnavailable(
        "nothing is served that cannot be recorded",
        cause=f"the audit log's appender does not answer: {cause}",
        remedy="It is started again by itself; `holdfast status` tells how it is, `holdfast logs gateway` why",
    )
