"""The tier on disk: what the engine's thread asks of it, and the threads that do it.

Rules:

- Nothing here fails a request. What cannot be written is not written, what cannot be read is not there, and either is
  counted with its cause, and named in `status`.
- The engine's thread never waits for a disk or for the gateway. What waits for too long to be written is dropped.
- While the disk does not answer nothing is found (`health`). What it reads to stays in use until it returns.
- Reading never waits behind writing: each has its own threads. One thread at a time encrypts or decrypts, so that the
  tier takes no more than one core.
- What was read is used when it opened as the very chunk that was asked for. A file that does not open is removed.
- A tenant's chunk is given to no other tenant, whatever key it is asked by.
- What was dropped is not found from that moment on; its files go as soon as a thread is free, before anything else is
  written (`write_queue`). While one cannot be removed nothing is written: the files would take more than they may.
- The gateway is asked of everybody whose chunks a start finds, until it answers: who was forgotten is dropped.
- A folder that cannot be used is tried again, so that a fault that passes costs no engine its tier.
"""

import contextlib
import errno
import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Final

from appliance.engine.inside.disk.cipher import NONCE_BYTES, TAG_BYTES, ChunkCipher, Tampered
from appliance.engine.inside.disk.files import HEADER_BYTES, ChunkFiles, ChunkName, Owner
from appliance.engine.inside.disk.health import NO_ANSWER, DiskHealth
from appliance.engine.inside.disk.index import DiskIndex
from appliance.engine.inside.disk.jobs import Done, Jobs, Piece, Task
from appliance.engine.inside.disk.keys import NoKey, TierKeys
from appliance.engine.inside.disk.opening import open_folder, take_up
from appliance.engine.inside.disk.write_queue import Chore, WriteQueue
from appliance.engine.inside.quotas import NO_QUOTA, Quota
from appliance.engine.picture import HeldPicture

_WRITERS: Final = 3  # one encrypts while the others wait for the disk
_READERS: Final = 3
_HOUSEKEEPING_S: Final = 60.0
_AGAIN_S: Final = 1.0  # what was not written down beside chunks is a while later
_STOP_S: Final = 5.0
_ASKED_TOGETHER: Final = 128  # half of what the gateway takes at a time: who is in use asks, too
_ASK_AGAIN_S, _ASK_AGAIN_AT_LEAST_EVERY_S = 10.0, 60.0  # of whom the gateway could not tell
_MOST_LOOKED_THROUGH: Final = 10_000  # sessions, for those that have most
_MOST_UNREADABLE: Final = 10_000  # chunks that are remembered


class Presence(Enum):
    """Whether a chunk can be had from the disk."""

    HERE = "here"
    ABSENT = "absent"
    ASK_AGAIN = "ask again"  # it is there, and its key is on its way
    WITHHELD = "withheld"  # it is there, or was, and could not be read


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """How the tier stands.

    Attributes:
        stored_chunks: since the start; `loaded_chunks`, `evicted_chunks`, `expired_chunks` and the causes below too.
        not_stored: how many chunks were not written, by cause: "slow", "error", "no_key", "too_large", "quota", "off".
        faults: how many chunks could not be read, by cause: "damaged", "lost", "error", "no_key".
        last_error: what went wrong last, in words; empty: nothing did.
        last_error_age_s: how long ago.
        on: whether the folder could be used when it was tried last.
        paused: nothing is written for a while after an error.
        answers: whether the disk does what is asked of it: it reads in time (`DiskStore.answers`), and some thread
            that writes is not held up.
    """

    on: bool
    paused: bool
    chunks: int
    sessions: int
    chunk_bytes: int  # on the disk, with what tells it from others
    bytes: int
    capacity_bytes: int
    waiting_bytes: int
    stored_chunks: int
    loaded_chunks: int
    evicted_chunks: int
    expired_chunks: int
    not_stored: dict[str, int]
    faults: dict[str, int]
    last_error: str
    last_error_age_s: float | None
    answers: bool


class _Plain:
    """What a benchmark compares with: a chunk as it is."""

    def seal(self, nonce: bytes, bound: bytes, chunk: memoryview, sealed: memoryview) -> bytes:  # noqa: ARG002
        sealed[:] = chunk
        return bytes(TAG_BYTES)

    def open(self, nonce: bytes, bound: bytes, tag: bytes, sealed: memoryview, chunk: memoryview) -> None:  # noqa: ARG002
        chunk[:] = sealed


class DiskStore:
    """The tier. Its public methods are for the engine's thread, and return at once unless they say that they block.

    Args:
        root: the tier's folder. While it cannot be used the tier is off, and says why.
        fingerprint: 32 bytes that name what the KV is made by; see `fingerprint`.
        chunk_bytes: of every chunk.
        capacity_bytes: the most that the files take.
        ttl_s: for how long a session may be unused.
        keys: the sessions' keys.
        worth: of a session; the least goes first. See `RetentionPolicy.value`.
        now: a monotonic clock, in seconds.
        wall: epoch seconds: only what a restart must know is kept by it.
    """

    def __init__(
        self,
        root: Path,
        *,
        fingerprint: bytes,
        chunk_bytes: int,
        capacity_bytes: int,
        ttl_s: float,
        keys: TierKeys,
        worth: Callable[[Owner], float],
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        random_bytes: Callable[[int], bytes] = os.urandom,
        _encrypt: bool = True,
    ) -> None:
        self._chunk_bytes = chunk_bytes
        self._file_bytes = HEADER_BYTES + chunk_bytes
        self._keys = keys
        self._worth = worth
        self._now = now
        self._wall = wall
        self._random_bytes = random_bytes
        self._plain = None if _encrypt else _Plain()
        # What is removed may be a file for each other thread behind what is written.
        self._new_index = partial(DiskIndex, max(0, capacity_bytes // self._file_bytes - (_WRITERS - 1)), ttl_s)
        self._index = self._new_index()
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._to_write, self._to_read = threading.Condition(self._lock), threading.Condition(self._lock)
        self._stopped = threading.Condition(self._lock)
        self._encrypting = threading.Lock()
        self._sharing = threading.Lock()  # who writes down the shares
        self._noting = threading.Lock()  # who writes down when a session was used
        self._jobs = Jobs(self._lock, chunk_bytes, now)
        self._health = DiskHealth(_WRITERS, now)
        self._queue = WriteQueue(chunk_bytes, now)
        self._reads: deque[Task] = deque()
        self.quarantined = False  # an engine before found what came back to be wrong
        self._stopping = False
        self._stored = self._loaded = self._evicted = self._expired = 0
        self._not_stored: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._unreadable: OrderedDict[bytes, Owner] = OrderedDict()  # chunks that are gone because they could not be
        self._new_files = partial(ChunkFiles, root, fingerprint=fingerprint, chunk_bytes=chunk_bytes)
        self._files: ChunkFiles | None = None
        self._threads: list[threading.Thread] = []
        keys.on_gone = self._forget
        if not self._open():
            self._start(self._open_on, "holdfast-disk-open")

    # Asking

    def find(self, key: bytes, tenant: str) -> Presence:
        """Whether a tenant can have the chunk of that key."""
        with self._lock:
            if not self._had_by(key, tenant):
                return Presence.ABSENT
            held = self._index.holder(key)
            if held is None or not self._answers():
                return Presence.WITHHELD
            if self._plain is not None:
                return Presence.HERE
        found = self._keys.look(held.owner)
        if found is NoKey.ASKED:
            return Presence.ASK_AGAIN
        if found is NoKey.REFUSED:
            with self._lock:
                if held.gone:
                    return Presence.ABSENT
                self._faults["no_key"] += 1
            return Presence.WITHHELD
        return Presence.HERE

    def had(self, key: bytes, tenant: str) -> bool:
        """Whether a tenant's chunk of that key is there, or was until it could not be read."""
        with self._lock:
            return self._had_by(key, tenant)

    def holds(self, key: bytes) -> bool:
        """Whether the chunk of that key is there, or is being written."""
        with self._lock:
            return self._index.holder(key) is not None or self._index.is_writing(key)

    def has(self, key: bytes, tenant: str) -> bool:
        """Whether a tenant's chunk of that key is there, whichever of its sessions stored it."""
        with self._lock:
            held = self._index.holder(key)
            return held is not None and held.owner.tenant == tenant

    def is_lost(self, owner: Owner, end_token: int) -> bool:
        """Whether the first chunk that a session misses, which ends there, was lost for a quota of the disk's."""
        with self._lock:
            return self._index.quotas.is_lost(owner, end_token)

    def answers(self) -> bool:
        """Whether what is read comes in time: nobody should wait for a disk that hangs, or is slower than computing."""
        with self._lock:
            return self._answers()

    def positions_of(self, owner: Owner) -> dict[bytes, int]:
        """A session's chunks, head first, and the token that each ends at."""
        with self._lock:
            held = self._index.session(owner)
            places = {} if held is None else {key: place.position for key, place in held.chunks.items()}
        return dict(sorted(places.items(), key=lambda place: place[1]))

    def chunks_of(self, owner: Owner) -> int:
        """How many chunks of a session are there."""
        with self._lock:
            held = self._index.session(owner)
            return 0 if held is None else len(held.chunks)

    def is_moving(self) -> bool:
        """Whether something is read, or waits to be read or written."""
        with self._lock:
            return bool(self._reads) or self._health.is_reading() or self._queue.waits()

    def expect(self, owner: Owner) -> Presence:
        """A session is about to be used: have its key at hand. Whether its chunks could be read now."""
        if self._files is None:
            return Presence.ABSENT
        if self._plain is not None:
            return Presence.HERE
        found = self._keys.look(owner)
        if found is NoKey.ASKED:
            return Presence.ASK_AGAIN
        return Presence.ABSENT if found is NoKey.REFUSED else Presence.HERE

    def used(self, owners: Iterable[Owner]) -> None:
        """Sessions are in use: they do not expire now."""
        with self._lock:
            for owner in owners:
                if self._index.session(owner) is not None:
                    self._index.used(owner, self._now())

    def reached(self, owner: Owner, positions: Mapping[bytes, int]) -> None:
        """A request of a session is over; what it left at an earlier token goes first. See `DiskIndex.reached`."""
        with self._lock:
            self._index.reached(owner, positions)

    def sizes(self) -> list[tuple[Owner, int]]:
        """The sessions that were used last, and how many chunks each has."""
        with self._lock:
            return self._index.used_last(_MOST_LOOKED_THROUGH)

    def kept_of(self, session: tuple[str, str]) -> HeldPicture | None:
        """What a session has; None: nothing."""
        with self._lock:
            return self._index.kept_of(Owner(*session), self._now())

    def blocks_by_tenant(self) -> dict[str, int]:
        """How many chunks the sessions of each tenant have."""
        with self._lock:
            return self._index.chunks_by_tenant()

    def status(self) -> DiskStatus:
        """How the tier stands."""
        with self._lock:
            answers = self._answers() and not self._health.is_held_up()
            error, error_age_s = self._health.last_error(answers=answers)
            return DiskStatus(
                on=self._files is not None,
                paused=self._health.is_paused(),
                chunks=len(self._index),
                sessions=self._index.sessions,
                chunk_bytes=self._file_bytes,
                bytes=len(self._index) * self._file_bytes,
                capacity_bytes=self._capacity_bytes,
                waiting_bytes=self._queue.waiting_bytes(),
                stored_chunks=self._stored,
                loaded_chunks=self._loaded,
                evicted_chunks=self._evicted,
                expired_chunks=self._expired,
                not_stored=dict(self._not_stored),
                faults=dict(self._faults),
                last_error=error,
                last_error_age_s=error_age_s,
                answers=answers,
            )

    # Moving

    def store(self, number: int, owner: Owner, pieces: Sequence[Piece], quota: Quota = NO_QUOTA) -> None:
        """Write a session's chunks. `finished` tells when their memory is not read any more."""
        with self._lock:
            job = self._jobs.begin(number, pieces)
            self._let_go_of_stale()
            refused = self._refusal(len(pieces))
            held = None if refused else self._index.used(owner, self._now())
            coming = []
            for piece in sorted(pieces, key=lambda piece: piece.position):
                holder = self._index.holder(piece.key)
                if holder is not None and piece.key in holder.left:
                    self._index.back(holder, piece.key)
                if holder is not None or self._index.is_writing(piece.key):
                    self._jobs.piece_over(job, piece.key, done=True)
                else:
                    coming.append(piece)
            fits = 0
            if held is not None:
                if self._index.quotas.in_force(owner.tenant, quota):
                    self._queue.do(Chore.SHARES)
                ends = [piece.position for piece in coming]
                fits, evicted = self._index.make_way(held, ends, quota, self._worth)
                self._evicted += len(evicted)
                self._queue.remove(evicted)
                refused = "quota" if self._index.quotas.is_lost(owner, ends[-1] if ends else 0) else "too_large"
            for place, piece in enumerate(coming):
                if held is None or place >= fits:
                    self._not_stored[refused] += 1
                    self._jobs.piece_over(job, piece.key, done=False)
                else:
                    name = ChunkName(owner, piece.key, piece.position, self._random_bytes(4))
                    self._index.begin(held, piece.key)
                    self._queue.write(Task(job, held, name, piece.data))
            if held is not None:
                self._index.tidy(held)
            self._to_write.notify_all()

    def load(self, number: int, tenant: str, pieces: Sequence[Piece], *, ahead: bool = False) -> None:
        """Read chunks into memory. `finished` tells which of them are there.

        Args:
            ahead: nobody asked for them yet: that they are read does not keep their session from expiring.
        """
        with self._lock:
            job = self._jobs.begin(number, pieces)
            self._health.reads_asked(job.started, job.moved_bytes)
            for piece in pieces:
                held = self._index.holder(piece.key)
                if held is None or held.owner.tenant != tenant:
                    self._jobs.piece_over(job, piece.key, done=False)
                    continue
                place = held.place(piece.key)
                held.loading += 1
                if not ahead:
                    self._index.used(held.owner, self._now())
                if piece.key in held.left:
                    self._index.back(held, piece.key)
                name = ChunkName(held.owner, piece.key, place.position, place.copy)
                self._reads.append(Task(job, held, name, piece.data, ahead))
            self._to_read.notify_all()

    def finished(self) -> list[Done]:
        """The jobs that are over since this was asked last."""
        with self._lock:
            self._let_go_of_stale()
            return self._jobs.finished()

    def computed(self, keys: Iterable[bytes]) -> None:
        """These chunks were computed: whether one before could not be read says nothing of them."""
        if not self._unreadable:
            return
        with self._lock:
            for key in keys:
                self._unreadable.pop(key, None)

    def drop(self, owner: Owner) -> None:
        """A session is over, or forgotten: nothing of it is found from now on, and its key and files go."""
        self._keys.drop(owner)
        self._forget(owner)

    def _forget(self, owner: Owner) -> None:
        with self._lock:
            self._queue.remove(self._index.drop(owner))
            for key in [key for key, whose in self._unreadable.items() if whose == owner]:
                del self._unreadable[key]
            self._to_write.notify_all()

    def drop_labelled(self, sessions: Collection[str]) -> None:
        """As `drop`, of every session that has one of these labels."""
        with self._lock:
            owners = {*self._unreadable.values(), *self._index.owners()}
        for owner in owners.union(self._keys.owners()):
            if owner.session in sessions:
                self.drop(owner)

    def quarantine(self) -> None:
        """What came back was wrong: have every later start know, until somebody empties the folder."""
        with self._lock:
            self.quarantined = True
            self._queue.do(Chore.QUARANTINE)
            self._to_write.notify_all()

    def drain(self) -> None:
        """Return when every job is over. Blocks, for as long as something moves.

        Raises:
            TimeoutError: a disk does not answer; see `close`.
        """
        with self._lock:
            if not self._jobs.wait_for_all(_STOP_S):
                raise TimeoutError(NO_ANSWER)

    def close(self) -> None:
        """Stop. What waits is not done, what runs is finished. Blocks, at most some seconds.

        Raises:
            TimeoutError: a disk does not answer; memory that was to be written or read to is still in use.
        """
        with self._lock:
            self._stopping = True
            for task in (*self._queue.take_all(), *self._reads):
                self._jobs.piece_over(task.job, task.name.key, done=False)
            self._reads.clear()
            self._to_write.notify_all()
            self._to_read.notify_all()
            self._stopped.notify_all()
        deadline = time.monotonic() + _STOP_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            raise TimeoutError(NO_ANSWER)
        self._keys.drop_all()
        if self._files is not None:
            self._files.close()
            self._files = None

    # The threads

    def _start(self, target: Callable[..., None], name: str, *arguments: ChunkFiles) -> None:
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _open_on(self) -> None:
        """Try the folder until it can be used."""
        while True:
            with self._lock:
                self._stopped.wait_for(lambda: self._stopping, _HOUSEKEEPING_S)
                if self._stopping:
                    return
            if self._open(again=True):
                return

    def _open(self, *, again: bool = False) -> bool:
        """Use the folder, and find again what an engine before left in it; whether it could be used. Blocks.

        Args:
            again: the engine serves by now: what a quarantine says is in doubt is left alone.
        """
        try:
            opened = open_folder(self._new_files, may_be_in_quarantine=not again or self.quarantined)
        except OSError as error:
            with self._lock:
                self._health.failed(error)
            return False
        files = opened.files
        if not again:
            self.quarantined = opened.quarantined
        # Beside the index that the engine's thread looks at: with many files this takes a while.
        index = self._new_index()
        removals = take_up(opened, index, now=self._now(), wall=self._wall())
        with self._lock:
            if self._stopping:
                files.close()
                return True
            self._files, self._index = files, index
            self._queue.remove(removals)
            self._expire()
            self._queue.remove(index.make_room(lambda _: 0.0))  # nothing is known yet of what sessions are worth
            for number in range(_WRITERS):
                self._start(self._write_on, f"holdfast-disk-write-{number}", files)
            for number in range(_READERS):
                self._start(self._read_on, f"holdfast-disk-read-{number}", files)
            self._start(self._ask_on, "holdfast-disk-ask")
        return True

    def _write_on(self, files: ChunkFiles) -> None:
        buffer, thread = files.buffer(), threading.get_ident()
        while True:
            with self._lock:
                self._health.write_ended(thread)
                self._to_write.wait_for(lambda: self._stopping or self._queue.is_due(), self._next_chore_in_s())
                if self._stopping:
                    return
                self._health.write_began(thread)
                self._expire()
                taken = self._queue.take()
            if isinstance(taken, Task):
                self._write(files, buffer, taken)
            elif isinstance(taken, ChunkName):
                self._remove(files, taken)
            elif taken is Chore.QUARANTINE:
                self._write_quarantine(files)
            elif taken is Chore.SHARES:
                self._write_shares(files)
            elif taken is Chore.FOREIGN:
                with contextlib.suppress(OSError):
                    files.remove_foreign()

    def _remove(self, files: ChunkFiles, name: ChunkName) -> None:
        try:
            files.remove(name)
        except OSError as error:
            with self._lock:
                self._queue.remove_again(name, self._health.leave_alone(error))
            return
        if not self._note_use(files, name.owner):
            files.remove_folder(name.owner)

    def _note_use(self, files: ChunkFiles, owner: Owner) -> bool:
        """Give a session's folder the time of its last use, for the next start; whether the session has one."""
        with self._noting:
            with self._lock:
                held = self._index.session(owner)
                used_at = None if held is None else self._wall() - (self._now() - held.used_at)
            if used_at is not None:
                files.touch(owner, used_at)
            return used_at is not None

    def _write_quarantine(self, files: ChunkFiles) -> None:
        try:
            files.write_quarantine()
        except OSError as error:
            with self._lock:
                self._health.failed(error)
                self._queue.do(Chore.QUARANTINE, _AGAIN_S)

    def _write_shares(self, files: ChunkFiles) -> None:
        with self._sharing:
            with self._lock:
                shares = dict(self._index.quotas.shares)
            try:
                files.write_shares(shares)
            except OSError as error:
                with self._lock:
                    self._health.failed(error)
                    self._queue.do(Chore.SHARES, _AGAIN_S)

    def _write(self, files: ChunkFiles, buffer: memoryview, task: Task) -> None:
        cause = ""
        if self._queue.is_stale(task):
            cause = "slow"
        elif self._health.is_paused():
            cause = "error"
        elif task.held.gone:
            cause = "closed"
        else:
            cipher = self._plain or self._keys.wait(task.name.owner)
            cause = "no_key" if cipher is None else self._written(files, cipher, buffer, task)
        with self._lock:
            self._write_over(task, cause)

    def _written(self, files: ChunkFiles, cipher: ChunkCipher, buffer: memoryview, task: Task) -> str:
        """Write one chunk; the cause if it could not be."""
        with self._encrypting:
            files.seal(task.name, cipher, self._random_bytes(NONCE_BYTES), task.data, buffer)
        try:
            files.write(task.name, buffer)
        except OSError as error:
            with self._lock:
                self._health.leave_alone(error)
            return "error"
        self._health.wrote()
        return ""

    def _read_on(self, files: ChunkFiles) -> None:
        buffer = files.buffer()
        while True:
            with self._lock:
                self._to_read.wait_for(lambda: self._stopping or self._reads)
                if self._stopping:
                    return
                task = self._reads.popleft()
            cause = self._read(files, buffer, task)
            with self._lock:
                task.held.loading -= 1
                if cause:
                    self._faults[cause] += 1
                if cause and cause != "no_key" and self._index.remove(task.name):
                    self._unreadable[task.name.key] = task.name.owner
                    if len(self._unreadable) > _MOST_UNREADABLE:
                        self._unreadable.popitem(last=False)
                    self._queue.remove([task.name])
                    self._to_write.notify_all()
                self._loaded += not cause
                self._jobs.piece_over(task.job, task.name.key, done=not cause)
            if not cause and not task.ahead:
                self._note_use(files, task.name.owner)

    def _read(self, files: ChunkFiles, buffer: memoryview, task: Task) -> str:
        """Read one chunk; the cause if it could not be."""
        cipher = self._plain or self._keys.wait(task.name.owner)
        if cipher is None:
            return "no_key"
        thread = threading.get_ident()
        with self._lock:
            self._health.read_began(thread)
        try:
            files.read(task.name, buffer)
            with self._encrypting:
                files.open(task.name, cipher, buffer, task.data)
        except Tampered:
            with self._lock:
                self._health.went_wrong("a file was damaged, or changed from outside")
            return "damaged"
        except OSError as error:
            with self._lock:
                self._health.failed(error)
            return "lost" if error.errno == errno.ENOENT else "error"
        finally:
            with self._lock:
                self._health.read_ended(thread)
        return ""

    def _ask_on(self) -> None:
        """Ask of whom the gateway knows, among those whose chunks were found, until it is known of each."""
        with self._lock:
            left = self._index.owners()
        pause_s = _ASK_AGAIN_S
        while left and self._plain is None:
            asked, left = left, []
            for first in range(0, len(asked), _ASKED_TOGETHER):
                if self._stopping:
                    return
                left += self._keys.not_known(asked[first : first + _ASKED_TOGETHER])
            pause_s = _ASK_AGAIN_S if len(left) < len(asked) else min(2 * pause_s, _ASK_AGAIN_AT_LEAST_EVERY_S)
            with self._lock:
                if left:
                    self._stopped.wait_for(lambda: self._stopping, pause_s)
                left = [owner for owner in left if self._index.session(owner) is not None]

    # Private. Whoever calls one of these holds the lock.

    def _had_by(self, key: bytes, tenant: str) -> bool:
        held = self._index.holder(key)
        owner = self._unreadable.get(key) if held is None else held.owner
        return owner is not None and owner.tenant == tenant

    def _answers(self) -> bool:
        return self._health.answers(reads_wait=bool(self._reads))

    def _write_over(self, task: Task, cause: str = "") -> None:
        kept = self._index.ended(task.held, task.name, written=not cause)
        if not cause and not kept:
            self._queue.remove([task.name])
        if cause and cause != "closed":
            self._not_stored[cause] += 1
        self._stored += kept
        self._jobs.piece_over(task.job, task.name.key, done=kept)

    def _let_go_of_stale(self) -> None:
        """A thread that is held up lets go of nothing."""
        for task in self._queue.take_stale():
            self._write_over(task, "slow")

    def _expire(self) -> None:
        expired = self._index.expired(self._now())
        self._expired += len(expired)
        self._queue.remove(expired)

    def _next_chore_in_s(self) -> float:
        due_in_s = self._index.next_expiry_in_s(self._now())
        return min(_HOUSEKEEPING_S if due_in_s is None else due_in_s, _HOUSEKEEPING_S, self._queue.due_in_s())

    def _refusal(self, chunks: int) -> str:
        """Why nothing is written now; empty: it is."""
        if self._files is None or self._stopping:
            return "off"
        if self._health.is_paused():
            return "error"
        return "slow" if self._health.is_held_up() or not self._queue.has_room(chunks) else ""
