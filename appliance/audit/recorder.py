"""What a producer records events with: seals them, hands them to the appender, and waits until they are on the disk.

Rules:

- What `record` ended well for is in the log. When it raises, whatever the event was to allow does not happen.
- An appender that was lost is started again; what it had not answered for is handed over once more, and not repeated in
  the log if it was there already. That takes at most `_WAIT_S`: then the caller is told.
- What waits is bounded: by how far back a new appender looks for it.
- What anybody can cause without a key is counted and told once in a while, so that nobody fills the disk: `count`. So
  is what a known caller can cause at any rate; strangers take the place of no known caller, and where there are more of
  those than can be told apart they are told by their tenants.
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
from appliance.vault import KeyMissing, VaultSealed

_WAIT_S: Final = 10.0
_SENT_TOGETHER: Final = 16  # appends in a frame: the appender works at these while the next are sealed
_ALONE_BYTES: Final = 32 << 10  # a longer append has a frame of its own
_PATIENCE_S: Final = 3.0  # with an appender that does not start: its predecessor may be ending
_SWEEP_S: Final = 1.0
_TAGS: Final = 8192  # of actors and sessions, remembered
_MOST_COUNTED: Final = 64  # kinds of counted events between two tellings: of strangers, and of known callers
_TELL_EVERY_S: Final = 60.0
_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 5.0

_APPENDS: Final = frozenset({protocol.APPEND, protocol.APPEND_AGAIN})
_AGAIN: Final = {
    protocol.APPEND: protocol.APPEND_AGAIN,
    protocol.APPEND_PRIVILEGED: protocol.APPEND_AGAIN_PRIVILEGED,
}
_APPENDING: Final = frozenset({*_AGAIN.keys(), *_AGAIN.values()})

Connect = Callable[[asyncio.Protocol], Awaitable[None]]


class AuditUnavailable(HoldfastError):
    """An event could not be recorded, and what it stands for does not happen."""

    code: ClassVar[str] = "audit_unavailable"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class _Alike(NamedTuple):
    """What counted events have in common that are told as one."""

    known: bool
    event_class: int
    tenant_id: str
    actor_id: str
    source: str
    reason: str
    key_id: str

    @classmethod
    def of(cls, event: Event) -> "_Alike":
        kind, identifier = event.target
        return cls(
            known=event.kind.scope is Scope.TENANT,
            event_class=event.kind.number,
            tenant_id=event.tenant_id,
            actor_id=event.actor.id,
            source=event.source,
            reason=event.reason,
            key_id=identifier if kind == "key" else event.details.get("key_id", ""),
        )


class _Asked:
    """What one frame asks, and who waits for its answer: of appends, several.

    Attributes:
        entries: how many each of them appends; 0 for what is no append.
        weight: all of them together; what is no append counts as one.
    """

    __slots__ = ("answers", "bodies", "entries", "kind", "number", "until", "weight")

    def __init__(self, kind: int, number: int, until: float) -> None:
        self.kind = kind
        self.number = number
        self.until = until
        self.weight = 0
        self.bodies: list[bytes] = []
        self.entries: list[int] = []
        self.answers: list[asyncio.Future[Any]] = []

    def add(self, body: bytes, entries: int, answer: "asyncio.Future[Any]") -> None:
        self.bodies.append(body)
        self.entries.append(entries)
        self.answers.append(answer)
        self.weight += max(1, entries)

    def frame(self) -> bytes:
        return protocol.pack(self.kind, self.number, b"".join(self.bodies))

    @property
    def is_over(self) -> bool:
        """Nobody waits any more."""
        return all(answer.done() for answer in self.answers)

    def succeed(self, body: bytes) -> None:
        """Give everybody the answer; to an append, the sequence of its own last entry."""
        if self.kind not in _APPENDING:
            _give(self.answers[0], body)
            return
        (last,) = protocol.SEQUENCE.unpack(body)
        for answer, entries in zip(reversed(self.answers), reversed(self.entries), strict=True):
            _give(answer, last)
            last -= entries

    def fail(self, error: AuditUnavailable) -> None:
        for answer in self.answers:
            if not answer.done():
                answer.set_exception(error)


def _give(answer: "asyncio.Future[Any]", result: bytes | int) -> None:
    if not answer.done():
        answer.set_result(result)


class _Connection(asyncio.Protocol):
    """The connection with one appender."""

    def __init__(self, recorder: "Recorder") -> None:
        self._recorder = recorder
        self._received = bytearray()
        self.unanswered = 0  # frames
        self.transport: asyncio.WriteTransport | None = None
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)
        # uvloop keeps back what is below the mark until the loop comes round: the appender would wait for that long.
        self.transport.set_write_buffer_limits(0)

    def send(self, frame: bytes) -> None:
        """Write a frame if the appender is there still. If it is not, its successor is sent whatever waits."""
        self.unanswered += 1
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(frame)

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            for message in protocol.take_messages(self._received):
                self.unanswered -= 1
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
        self._waiting: dict[int, _Asked] = {}  # by number
        self._waiting_entries = 0
        self._gathering: _Asked | None = None  # appends that are not sent yet, and others may join
        self._connection: _Connection | None = None
        self._signing_key = b""
        self._counted: dict[_Alike, Event] = {}
        self._counts: dict[_Alike, int] = {}
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

    def record(self, *events: Event, privileged: bool = False) -> "asyncio.Future[int]":
        """Append events together. They are on their way when this returns, and on the disk when the future is done.

        Its result is the sequence of the last one. Cancelled, what was sent already is written all the same.

        Args:
            privileged: an administrator's doing, which a full disk does not stop.

        Raises:
            ValueError: together they are longer than a frame.
            What the future raises:
            AuditUnavailable: says which file and why.
            VaultSealed: an event of a tenant's, and there is no key to seal it with.
        """
        kind = protocol.APPEND_PRIVILEGED if privileged else protocol.APPEND
        try:
            body = protocol.pack_drafts([self._sealed(event) for event in events])
            return self._ask(kind, body, entries=len(events))
        except HoldfastError as error:
            failed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed

    def count(self, event: Event) -> None:
        """Note what is not to be an entry each time: `tell_counted` records it, once for all that are alike.

        Warns:
            UndeclaredName: its class has no `count`.
        """
        self._count(event, 1)

    def _count(self, event: Event, times: int) -> None:
        alike = _Alike.of(event)
        if alike not in self._counts and sum(each.known is alike.known for each in self._counts) >= _MOST_COUNTED:
            event = _of_others(event)
            alike = _Alike.of(event)
        if alike not in self._counted:
            self._counted[alike] = replace(event, counts={**event.counts, "count": 0})
        self._counts[alike] = self._counts.get(alike, 0) + times

    async def tell_counted(self, *, at_once: bool = False) -> None:
        """Record what was counted, if it is time, or `at_once`; each by itself, as the vault may be sealed to some.

        Raises:
            HoldfastError: why one of them could not be recorded; what could not stays counted.
        """
        if not self._counts or (not at_once and self._monotonic() < self._told_at + _TELL_EVERY_S):
            return
        counted, counts = self._counted, self._counts
        self._counted, self._counts = {}, {}
        self._told_at = self._monotonic()
        telling = {
            alike: self.record(replace(event, counts={**event.counts, "count": counts[alike]}))
            for alike, event in counted.items()
        }
        failure: HoldfastError | None = None
        for alike, told in telling.items():
            try:
                await told
            except HoldfastError as error:
                failure = error
                event = counted[alike]
                if isinstance(error, KeyMissing):
                    # Of a tenant that was shredded meanwhile, how often it was can still be told.
                    event = replace(_of_others(event), tenant_id="")
                self._count(event, counts[alike])
        if failure is not None:
            raise failure

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

    def _ask(self, kind: int, body: bytes, *, entries: int = 0) -> "asyncio.Future[Any]":
        if len(body) > protocol.MAX_FRAME_BYTES:
            raise ValueError(f"{entries} events of {len(body)} bytes do not fit into a frame: record fewer at once")
        if self._waiting_entries + max(1, entries) > protocol.MOST_UNANSWERED:
            raise _lost(f"{self._waiting_entries} events wait already")
        if self._connection is None and self._impatient() and self.error is not None:
            raise _refused(self.error)
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._waiting_entries += max(1, entries)
        together = kind == protocol.APPEND and len(body) <= _ALONE_BYTES
        if self._gathering is not None and together:
            self._gathering.add(body, entries, answer)
            if len(self._gathering.bodies) == _SENT_TOGETHER:
                self._send_gathered()
            return answer
        self._send_gathered()
        asked = self._new_asked(kind, loop)
        asked.add(body, entries, answer)
        if together and self._connection is not None and self._connection.unanswered:
            # The appender has others to work at: whoever comes before the loop is round goes along.
            self._gathering = asked
            loop.call_soon(self._send_gathered)
        elif self._connection is not None:
            self._connection.send(asked.frame())
        return answer

    def _new_asked(self, kind: int, loop: asyncio.AbstractEventLoop) -> _Asked:
        if not self._sweeping:
            self._sweeping = True
            loop.call_later(_SWEEP_S, self._sweep)
        self._numbers += 1
        asked = self._waiting[self._numbers] = _Asked(kind, self._numbers, loop.time() + _WAIT_S)
        return asked

    def _send_gathered(self) -> None:
        gathered, self._gathering = self._gathering, None
        if gathered is not None and self._connection is not None:
            self._connection.send(gathered.frame())

    def _forget(self, number: int) -> _Asked | None:
        asked = self._waiting.pop(number, None)
        if asked is not None:
            self._waiting_entries -= asked.weight
        return asked

    def _sweep(self) -> None:
        """End the waiting of those whose time is up, or who gave up: one timer for all of them."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for asked in list(self._waiting.values()):
            # Others may join what is not sent yet: it is swept once it is.
            if asked is not self._gathering and (asked.is_over or asked.until <= now):
                self._forget(asked.number)
                asked.fail(_lost(f"no answer in {_WAIT_S:g} s"))
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
        """A new connection: the key first, then whatever waits; each append by itself, as some may be in the log."""
        self._connection = connection
        self._gathering = None
        if self._signing_key:
            connection.send(protocol.pack(protocol.SIGNING_KEY, 0, self._signing_key))
        waiting, self._waiting, self._waiting_entries = self._waiting, {}, 0
        for asked in waiting.values():
            for body, entries, answer in zip(asked.bodies, asked.entries, asked.answers, strict=True):
                if answer.done():
                    continue
                self._numbers += 1
                kind = _AGAIN.get(asked.kind, asked.kind)
                again = self._waiting[self._numbers] = _Asked(kind, self._numbers, asked.until)
                again.add(body, entries, answer)
                self._waiting_entries += again.weight
                connection.send(again.frame())

    def _answered(self, message: protocol.Message) -> None:
        asked = self._forget(message.number)
        if message.kind == protocol.REFUSED:
            self.error = json.loads(message.body)
        elif asked is not None and asked.kind in _APPENDS:
            self.error = None
        if asked is None:
            return
        if message.kind == protocol.DONE:
            asked.succeed(message.body)
        else:
            asked.fail(_refused(json.loads(message.body)))

    def _impatient(self) -> bool:
        return self._failing_since is not None and self._monotonic() > self._failing_since + _PATIENCE_S

    def _cannot_connect(self, error: HoldfastError) -> None:
        """There is no appender to be had now; after a while, everybody who waits is told."""
        self.error = error.record()
        if self._failing_since is None:
            self._failing_since = self._monotonic()
        if not self._impatient():
            return
        self._gathering = None
        refused, self._waiting, self._waiting_entries = self._waiting, {}, 0
        for asked in refused.values():
            asked.fail(_refused(error.record()))


def _of_others(event: Event) -> Event:
    """A counted event without what tells it from others of its class and tenant."""
    return replace(
        event, actor=ANYONE, source="", target=("", ""), reason="others", request_id="", session_id="", details={}
    )


def spelled(event: Event, versions: Mapping[str, str]) -> bytes:
    """The event's record as `canonical` spells it. So does `to_json` of ordered names and whole numbers, faster."""
    record = event.record(versions)
    return canonical(record) if float in map(type, event.counts.values()) else to_json(record)


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
