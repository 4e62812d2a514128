"""The appender: the one process that writes a node's audit log.

    python -m appliance.audit.appender DIRECTORY

Standard input is the listening Unix socket; standard output tells the parent `ready`, or an error's record as JSON.

Rules:

- It takes drafts from producers, numbers them, and answers when they are on the disk. Whatever came meanwhile shares
  the next sync.
- It is the process that started it, and no other, that it takes anything from: not another of the same user either.
- It has no key but the one that signs checkpoints, which a producer hands over when the vault is open.
- A checkpoint is begun when `_CHECKPOINT_ENTRIES` entries are new, and of fewer when they are `_CHECKPOINT_S` old. What
  comes while one is written, or cannot be (it is tried again every `_TRY_AGAIN_S`), is taken and waits for the next.
  Without the key there is none. The status says so.
- It lives as long as somebody is connected, and ends when the last one has gone; where nobody has come yet, with its
  parent: nothing is left behind that holds the log.
- A producer that does not read its answers is cut off, not waited for.
"""

import contextlib
import json
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from concurrent import futures
from importlib.metadata import version
from pathlib import Path
from typing import Final

from appliance.audit import protocol
from appliance.audit.entry import Draft, seal
from appliance.audit.events import LOG_RECOVERED, SYSTEM, Event
from appliance.audit.log import AuditLog, Head, LogUnwritable, Publication, Stamp
from appliance.audit.protocol import Malformed, Message
from appliance.errors import ErrorRecord, HoldfastError
from appliance.vault.process import forbid_core_dumps

_CHECKPOINT_ENTRIES: Final = 1000
_CHECKPOINT_S: Final = 60.0
_MOST_CONNECTIONS: Final = 64
_MOST_UNREAD_BYTES: Final = 4 << 20
_RECEIVE_BYTES: Final = 1 << 18
_MOST_TOGETHER: Final = 4096  # entries to one sync
_FIRST_PRODUCER_S: Final = 30.0
_TRY_AGAIN_S: Final = 5.0
_AT_ONCE_S: Final = 400e-6
_CORE_TAKEN_S: Final = 25e-6  # a yield that took longer let somebody else run
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid: unix(7)
_AGAIN: Final = frozenset({protocol.APPEND_AGAIN, protocol.APPEND_AGAIN_PRIVILEGED})
_PRIVILEGED: Final = frozenset({protocol.APPEND_PRIVILEGED, protocol.APPEND_AGAIN_PRIVILEGED})
_APPENDS: Final = frozenset({protocol.APPEND}) | _AGAIN | _PRIVILEGED

Sign = Callable[[Head], str]


class _Producer:
    """A connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.descriptor = connection.fileno()
        self.gone = False
        self.received = bytearray()
        self.unsent = bytearray()
        self.blocked = False  # it is not reading as fast as it is answered


class Appender:
    """The loop over one log and one listening socket.

    Args:
        starter: the process that may connect.
        lifeline: the writing end of a pipe whose reader is the parent.
    """

    def __init__(
        self,
        log: AuditLog,
        listener: socket.socket,
        *,
        starter: int,
        monotonic: Callable[[], float],
        lifeline: int | None = None,
    ) -> None:
        self._log = log
        self._starter = starter
        self._lifeline = lifeline
        self._listener = listener
        self._monotonic = monotonic
        self._poll = select.epoll()
        self._producers: dict[int, _Producer] = {}  # by their descriptors
        self._sign: Sign | None = None
        self._vkey = ""
        # Until this run signs one, the checkpoint that is there is the last one's.
        self._published_at = None if log.found is None else monotonic() - log.found.age_s
        self._dirty_since: float | None = monotonic() if log.size else None
        self._try_again_at = 0.0
        self._error: ErrorRecord | None = None  # of the last append
        self._publication_error: ErrorRecord | None = None  # of the last checkpoint
        self._stopping = False
        self._answered_at = -_AT_ONCE_S  # when the last append was
        self._asked_at_once = False  # the last append came right after the answer to the one before
        # Tiles are written beside the loop: nobody's append waits for them.
        self._writing: futures.Future[None] | None = None
        self._publication: Publication | None = None
        self._writers = futures.ThreadPoolExecutor(1, thread_name_prefix="audit-tiles")
        self._asked_for: list[tuple[_Producer, int, int]] = []  # who waits for a checkpoint, and of what size
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Of a run that was killed: what it wrote and could not answer for.
        self._found = {nonce: sequence for sequence, nonce in log.recent_nonces(protocol.MOST_UNANSWERED)}

    def run(self) -> None:
        """Serve until the last producer has gone, or `stop`."""
        self._listener.setblocking(False)
        self._poll.register(self._listener, select.EPOLLIN)
        self._poll.register(self._wake, select.EPOLLIN)
        if self._lifeline is not None:
            self._poll.register(self._lifeline, select.EPOLLIN)
        idle_until = self._monotonic() + _FIRST_PRODUCER_S
        while not self._stopping and (self._producers or self._monotonic() < idle_until):
            messages: list[tuple[_Producer, Message]] = []
            for descriptor, events in self._next_events():
                producer = self._producers.get(descriptor)
                if producer is not None:
                    if events & select.EPOLLOUT:
                        self._send(producer)
                    if events & ~select.EPOLLOUT:
                        messages += [(producer, message) for message in self._receive(producer)]
                elif descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor == self._wake:
                    os.eventfd_read(self._wake)
                elif descriptor == self._lifeline:
                    # Nobody reads it any more, and nobody who was starting it will come.
                    self._poll.unregister(descriptor)
                    idle_until = 0.0
            self._answer(messages)
            self._conclude_publication()
            self._publish_when_due()
            if self._producers:
                idle_until = 0.0
        self._writers.shutdown()
        self._conclude_publication()
        if self._sign is not None and self._log.size > self._log.published.size:
            with contextlib.suppress(LogUnwritable):
                self._log.publish(self._sign)
        for producer in list(self._producers.values()):
            self._drop(producer)
        self._poll.close()

    def stop(self) -> None:
        """End after what is being done."""
        self._stopping = True

    def _next_events(self) -> list[tuple[int, int]]:
        """What there is to do; waits for it.

        A producer that asked right after its last answer will do so again, and waking this process would cost it as
        much as the sync. So this looks about for a moment before it sleeps: as long as nobody else wants the core.
        """
        if self._asked_at_once:
            now = self._monotonic()
            until = now + _AT_ONCE_S
            while now < until:
                if events := self._poll.poll(0):
                    return events
                os.sched_yield()
                yielded_at, now = now, self._monotonic()
                if now > yielded_at + _CORE_TAKEN_S:
                    break
            self._asked_at_once = False
        return self._poll.poll(self._wait_s())

    def _wait_s(self) -> float:
        # What is being written wakes the loop when it is done: until then no other checkpoint can begin.
        if self._sign is None or self._dirty_since is None or self._writing is not None:
            return 1.0
        now = self._monotonic()
        return max(0.0, min(1.0, max(self._dirty_since + _CHECKPOINT_S, self._try_again_at) - now))

    # Connections

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            if len(self._producers) >= _MOST_CONNECTIONS or _peer_of(connection) != self._starter:
                connection.close()
                return
            connection.setblocking(False)
            producer = _Producer(connection)
            self._producers[producer.descriptor] = producer
            self._poll.register(producer.descriptor, select.EPOLLIN)

    def _receive(self, producer: _Producer) -> list[Message]:
        if producer.gone:
            return []
        try:
            count = producer.connection.recv_into(self._buffer)
        except BlockingIOError:
            return []
        except OSError:
            count = 0
        if not count:
            self._drop(producer)
            return []
        producer.received += memoryview(self._buffer)[:count]
        try:
            return protocol.take_messages(producer.received)
        except Malformed:
            self._drop(producer)
            return []

    def _reply(self, producer: _Producer, kind: int, number: int, body: bytes) -> None:
        if not producer.gone:
            producer.unsent += protocol.pack(kind, number, body)

    def _send(self, producer: _Producer) -> None:
        if producer.gone:
            return
        try:
            sent = producer.connection.send(producer.unsent)
            del producer.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(producer)
            return
        if len(producer.unsent) > _MOST_UNREAD_BYTES:
            self._drop(producer)
            return
        if bool(producer.unsent) != producer.blocked:
            producer.blocked = bool(producer.unsent)
            self._poll.modify(producer.descriptor, select.EPOLLIN | (select.EPOLLOUT if producer.blocked else 0))

    def _drop(self, producer: _Producer) -> None:
        if not producer.gone:
            producer.gone = True
            del self._producers[producer.descriptor]
            self._poll.unregister(producer.descriptor)
            producer.connection.close()

    # Requests

    def _answer(self, messages: list[tuple[_Producer, Message]]) -> None:
        if messages:
            self._asked_at_once = self._monotonic() < self._answered_at + _AT_ONCE_S
        together: list[tuple[_Producer, int, list[Draft]]] = []
        entries = 0
        for producer, message in messages:
            alone = message.kind != protocol.APPEND
            if alone or entries >= _MOST_TOGETHER:
                self._append(together, privileged=False)
                together, entries = [], 0
            if message.kind not in _APPENDS:
                self._serve(producer, message)
                continue
            try:
                drafts = protocol.unpack_drafts(message.body)
            except Malformed:
                self._drop(producer)
                continue
            if message.kind in _AGAIN:
                self._append_again(producer, message.number, drafts, privileged=message.kind in _PRIVILEGED)
            elif alone:
                self._append([(producer, message.number, drafts)], privileged=True)
            else:
                together.append((producer, message.number, drafts))
                entries += len(drafts)
        self._append(together, privileged=False)
        for producer in {producer for producer, _ in messages}:
            self._send(producer)
        self._log.hash_appended()  # while producers work at what they were answered, not all at a checkpoint
        if messages:
            self._answered_at = self._monotonic()

    def _append(self, together: list[tuple[_Producer, int, list[Draft]]], *, privileged: bool) -> None:
        if not together:
            return
        try:
            sequence = self._log.append([draft for _, _, drafts in together for draft in drafts], privileged=privileged)
        except LogUnwritable as error:
            self._error = error.record()
            for producer, number, _ in together:
                self._reply(producer, protocol.REFUSED, number, json.dumps(error.record()).encode())
            return
        if not privileged:
            self._error = None
        if self._dirty_since is None:
            self._dirty_since = self._monotonic()
        for producer, number, drafts in together:
            sequence += len(drafts)
            self._reply(producer, protocol.DONE, number, protocol.SEQUENCE.pack(sequence - 1))

    def _append_again(self, producer: _Producer, number: int, drafts: list[Draft], *, privileged: bool) -> None:
        missing = [draft for draft in drafts if draft.nonce not in self._found]
        if missing:
            self._append([(producer, number, missing)], privileged=privileged)
        else:
            sequence = max(self._found[draft.nonce] for draft in drafts)
            self._reply(producer, protocol.DONE, number, protocol.SEQUENCE.pack(sequence))

    def _serve(self, producer: _Producer, message: Message) -> None:
        if message.kind == protocol.SIGNING_KEY:
            self._take_key(message.body)
        elif message.kind == protocol.CHECKPOINT and self._sign is not None:
            self._asked_for.append((producer, message.number, self._log.size))
            self._publish()
            return
        elif message.kind not in (protocol.STATUS, protocol.CHECKPOINT):
            self._drop(producer)
            return
        self._reply(producer, protocol.DONE, message.number, json.dumps(self._status()).encode())

    def _take_key(self, body: bytes) -> None:
        from appliance.audit.notes import Checkpoint, SigningKey, sign_checkpoint

        key = SigningKey.from_bytes(body)
        self._vkey = str(key.verifier())
        first = self._sign is None
        self._sign = lambda head: sign_checkpoint(Checkpoint(key.name, head.size, head.root), key)
        if first and self._dirty_since is not None:
            self._publish()

    def _status(self) -> dict[str, object]:
        now, found = self._monotonic(), self._log.found
        return {
            "size": self._log.size,
            "checkpoint_size": self._log.published.size or (0 if found is None else found.size),
            "checkpoint_age_s": None if self._published_at is None else now - self._published_at,
            "signs": self._sign is not None,
            "public_key": self._vkey,
            "cut_bytes": self._log.cut_bytes,
            "error": self._error or self._publication_error,
        }

    # Checkpoints

    def _publish_when_due(self) -> None:
        if self._sign is None or self._monotonic() < self._try_again_at:
            return
        new = self._log.size - self._log.published.size
        old = self._dirty_since is not None and self._monotonic() >= self._dirty_since + _CHECKPOINT_S
        if new >= _CHECKPOINT_ENTRIES or old or self._asked_for:
            self._publish()

    def _publish(self) -> None:
        """Begin to write what there is, unless that is being done."""
        if self._sign is None or self._writing is not None:
            return
        self._publication = self._log.prepare()
        self._dirty_since = None
        note = self._sign(self._publication.head)
        self._writing = self._writers.submit(self._log.write, self._publication, note)
        self._writing.add_done_callback(lambda _: os.eventfd_write(self._wake, 1))

    def _conclude_publication(self) -> None:
        """Take note of a publication that was written, or was not."""
        if self._writing is None or self._publication is None or not self._writing.done():
            return
        writing, publication = self._writing, self._publication
        self._writing = self._publication = None
        try:
            writing.result()
        except LogUnwritable as error:
            self._publication_error = error.record()
            self._try_again_at = self._monotonic() + _TRY_AGAIN_S
            self._dirty_since = self._monotonic() - _CHECKPOINT_S
        else:
            self._publication_error = None
            self._log.conclude(publication)
            self._published_at = self._monotonic()
        # One that failed is told at once: the status says why.
        asked_for, self._asked_for = self._asked_for, []
        for producer, number, size in asked_for:
            if size > publication.head.size and self._publication_error is None:
                self._asked_for.append((producer, number, size))
                continue
            self._reply(producer, protocol.DONE, number, json.dumps(self._status()).encode())
            self._send(producer)


def main() -> int:
    """Run the appender on the socket that is standard input."""
    forbid_core_dumps()
    os.umask(0o077)
    try:
        boot_id = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
        log = open_log(Path(sys.argv[1]), boot_id=boot_id, clock=_stamp)
    except HoldfastError as error:
        _tell(json.dumps(error.record()))
        return 1
    listener = socket.socket(fileno=os.dup(0))
    appender = Appender(log, listener, starter=os.getppid(), monotonic=time.monotonic, lifeline=1)
    signal.signal(signal.SIGTERM, lambda *_: appender.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; the gateway drains first
    _tell("ready")
    appender.run()
    log.close()
    return 0


def open_log(directory: Path, *, boot_id: bytes, clock: Callable[[], Stamp]) -> AuditLog:
    """The log in `directory`; that its tail had to be cut off is its next entry. Raises as `AuditLog.open`."""
    log = AuditLog.open(directory, boot_id=boot_id, clock=clock)
    try:
        if log.cut_bytes:
            log.append([_recovered(log.cut_bytes)], privileged=True)
    except LogUnwritable:
        log.close()
        raise
    return log


def _recovered(cut_bytes: int) -> Draft:
    """That a start had to cut the log's tail: nobody has a key yet."""
    event = Event(LOG_RECOVERED, SYSTEM, counts={"bytes": cut_bytes})
    record = event.record({"holdfast": version("holdfast"), "python": platform.python_version()})
    number = LOG_RECOVERED.number
    return seal(number, record, keys=None, scope="", actor="", session="", random=os.urandom(32))


def _peer_of(connection: socket.socket) -> int:
    """Which process connected, as the kernel says."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[0])


def _stamp() -> Stamp:
    return Stamp(time.time_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME))


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
