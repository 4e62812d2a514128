"""Files for a data diode: batches appear in a folder, whole, each with its signed manifest (`batches`).

Rules:

- A batch is written under a name that begins with a dot, synced, and renamed: what others see is whole and stays.
- It is closed when it has `max_bytes`, `max_events` or is `max_age_s` old; the first of a connection after a second,
  so that whoever tries a destination sees it. Events count as acknowledged when their batch is in its place.
- The number is taken when the batch and its manifest are on the disk. From that moment the batch will appear, whatever
  ends meanwhile: who connects next puts it in its place. Before it, nothing has happened: a full disk leaves no trace.
- Whoever carries batches away may remove them. The state (`.state`) must stay: without it another series begins.
- What the folder's disk does not do within a deadline counts as not taken; nothing else is done there meanwhile. The
  batch that was open is dropped when the disk answers again.
- Several may write to one folder, a trial beside the export: numbers are given out under a lock.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from appliance.audit.files import open_regular, sync_directory
from appliance.audit.notes import KeyInvalid, SigningKey
from appliance.audit.siem.batches import BATCH, MANIFEST, NO_PREVIOUS, PUBLIC_KEY, Manifest
from appliance.audit.siem.files import DEADLINE_S, MAX_FILE_BYTES, in_own_thread, read_in_time
from appliance.audit.siem.transport import ExportUnreachable, ExportUnusable, Message
from appliance.errors import HoldfastError

MAX_BYTES: Final = 8 << 20
MAX_EVENTS: Final = 4096  # less than a shipper sends ahead of what is acknowledged
MAX_AGE_S: Final = 60.0
_MAX_MESSAGE_BYTES: Final = 64 << 10
_FIRST_AGE_S: Final = 1.0
_STATE: Final = ".state"
_LOCK: Final = ".lock"
_NEW: Final = ".new"  # not numbered: nothing has happened yet
_READY: Final = ".ready"  # numbered, or left by somebody who ended just before
_MODE: Final = 0o640  # who carries batches away is another user, of the folder's group
_SERIES: Final = re.compile(r"[0-9a-f]{16}")
_T = TypeVar("_T")


class Limits(NamedTuple):
    """When a batch is closed."""

    max_bytes: int = MAX_BYTES
    max_events: int = MAX_EVENTS
    max_age_s: float = MAX_AGE_S
    first_age_s: float = _FIRST_AGE_S


class DiodeFiles:
    """The transport, as `transport.Transport` has it.

    Args:
        folder: is there, on a disk of this machine.
        key_file: an Ed25519 private key, PEM without a passphrase, that nobody but its owner may read.
        name: what its public key is called.
        random: gives as many random bytes as it is asked for.
        deadline_s: for each thing that is done in the folder.
    """

    messages_at_once: Final = 256
    max_payload_bytes: Final = _MAX_MESSAGE_BYTES

    def __init__(
        self,
        folder: Path,
        key_file: Path,
        *,
        name: str,
        limits: Limits = Limits(),  # noqa: B008  (it never changes)
        monotonic: Callable[[], float] = time.monotonic,
        random: Callable[[int], bytes] = os.urandom,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._folder = folder
        self._deadline_s = deadline_s
        self._room: _Room | None = None  # the last connection's
        self._key_file = key_file
        self._name = name
        self._limits = limits
        self._monotonic = monotonic
        self._random = random

    def __str__(self) -> str:
        return f"files in {self._folder}"

    async def connect(self) -> "Connection":
        """See `Transport.connect`."""
        key = await read_in_time(self._deadline_s, load_key, self._key_file, self._name)
        if self._room is not None:
            self._room.refuse_late()  # so that no more than one thread waits for a dead disk
        self._room = room = _Room(self._folder, key, self._random, self._deadline_s)
        await room.run(room.prepare)
        return Connection(room, self._limits, self._monotonic)


class Connection:
    """A way into a folder. Made by `DiodeFiles.connect`."""

    def __init__(self, room: "_Room", limits: Limits, monotonic: Callable[[], float]) -> None:
        self._room = room
        self._limits = limits
        self._monotonic = monotonic
        self._batch: _Batch | None = None
        self._due_s = 0.0
        self._sent = 0
        self._acknowledged = 0
        self._writing = asyncio.Lock()
        self._begun = asyncio.Event()
        self._ended = asyncio.create_task(self._close_old_batches())

    @property
    def acknowledged(self) -> int:
        """See `transport.Connection.acknowledged`."""
        return self._acknowledged

    def arrived(self) -> int:
        """See `transport.Connection.arrived`."""
        return self.acknowledged

    async def send(self, messages: Sequence[Message]) -> None:
        """See `transport.Connection.send`."""
        self.check()
        async with self._writing:
            if self._batch is None:
                self._batch = self._room.batch()
                is_first = self._acknowledged == 0
                self._due_s = self._monotonic() + (self._limits.first_age_s if is_first else self._limits.max_age_s)
                self._begun.set()
            try:
                await self._room.run(self._batch.write, messages)
            except BaseException:  # what was written may be half of an event
                await self._drop()
                raise
            self._sent += len(messages)
            if self._batch.size >= self._limits.max_bytes or self._batch.events >= self._limits.max_events:
                await self._publish()

    def check(self) -> None:
        """See `transport.Connection.check`."""
        if self._ended.done():
            raise self._ended.result()

    async def ended_within(self, seconds: float) -> bool:
        """See `transport.Connection.ended_within`."""
        done, _ = await asyncio.wait([self._ended], timeout=seconds)
        return bool(done)

    async def close(self, *, in_good_order: bool = False) -> None:
        """See `transport.Connection.close`. What is open is put in its place in good order, and else dropped."""
        ended = self._ended.done()
        self._ended.cancel()
        await asyncio.gather(self._ended, return_exceptions=True)
        async with self._writing:
            if self._batch is not None and in_good_order and not ended:
                with contextlib.suppress(HoldfastError):
                    await self._publish()
            await self._drop()

    async def _publish(self) -> None:
        assert self._batch is not None  # noqa: S101  (its callers looked)
        try:
            await self._room.run(self._room.publish, self._batch)
            self._acknowledged = self._sent
        finally:
            await self._drop()

    async def _drop(self) -> None:
        batch, self._batch = self._batch, None
        self._begun.clear()
        if batch is not None:
            await self._room.drop(batch)

    async def _close_old_batches(self) -> HoldfastError:
        """Until that fails; how it did."""
        try:
            while True:
                await self._begun.wait()
                await asyncio.sleep(max(0.0, self._due_s - self._monotonic()))
                async with self._writing:
                    if self._batch is not None and self._monotonic() >= self._due_s:
                        await self._publish()
        except HoldfastError as error:
            return error


def load_key(path: Path, name: str) -> SigningKey:
    """The key of a destination, from a PEM file. Blocks.

    Raises:
        ExportUnusable: it cannot be used, or others may read it.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with open(open_regular(path, most=MAX_FILE_BYTES), "rb") as file:  # noqa: PTH123  (a descriptor)
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ValueError(f"others may read it: its mode is {mode:04o}")
            key = load_pem_private_key(file.read(), password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError("it is no Ed25519 key")
        return SigningKey(name, key.private_bytes_raw())
    except (OSError, ValueError, TypeError, KeyInvalid) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ExportUnusable(
            "the key that signs batches cannot be used",
            cause=f"{path}: {cause}"[:300],
            remedy=f"Make one as the appliance's user: `umask 077; openssl genpkey -algorithm ed25519 -out {path}`",
        ) from None


class _Batch:
    """A batch that is being written, under a name that nobody looks for. Blocks. There is no file before `write`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self.events = 0
        self.first = self.last = ""
        self._hashed = hashlib.sha256()
        self._descriptor = -1

    @property
    def sha256(self) -> str:
        """Of what is in it, hexadecimal."""
        return self._hashed.hexdigest()

    def write(self, messages: Sequence[Message]) -> None:
        """Write events, whole."""
        if self._descriptor < 0:
            self._descriptor = _create(self.path)
        lines = b"".join(b"%b\n" % message.payload for message in messages)
        _write_all(self._descriptor, lines)
        self._hashed.update(lines)
        self.size += len(lines)
        self.events += len(messages)
        self.first = self.first or messages[0].stable_id
        self.last = messages[-1].stable_id

    def sync(self) -> None:
        """Have it on the disk."""
        os.fsync(self._descriptor)

    def drop(self) -> None:
        """Close it, and remove it if it has its name still."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _State(NamedTuple):
    """How far the series of a folder is: the number of its last batch, and that one's digest."""

    series: str
    number: int
    previous: str


class _Room:
    """The folder. Everything here blocks but `run`, `drop` and `batch`."""

    def __init__(
        self, folder: Path, key: SigningKey, random: Callable[[int], bytes], deadline_s: float = DEADLINE_S
    ) -> None:
        self.folder = folder
        self._key = key
        self._random = random
        self._deadline_s = deadline_s
        self._working: asyncio.Future[Any] | None = None  # what was begun last: it may be late, and done yet

    async def run(self, do: Callable[..., _T], *arguments: object) -> _T:
        """Do something here in a thread.

        Raises:
            ExportUnreachable: the disk does not take it, or not within the deadline.
        """
        self.refuse_late()
        self._working = working = in_own_thread(do, *arguments)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.shield(working)
        except asyncio.CancelledError:
            # The thread goes on, and nobody may use the same files meanwhile.
            await asyncio.wait([working], timeout=self._deadline_s)
            raise
        except TimeoutError:
            raise self._too_late() from None
        except OSError as error:
            if isinstance(error, HoldfastError):
                raise
            raise _unreachable(self.folder, error) from None

    async def drop(self, batch: _Batch) -> None:
        """Drop a batch: once what is late with it, if anything is, is done. Raises as `run`."""
        late = self._working
        if late is None or late.done():
            await self.run(batch.drop)
        else:
            late.add_done_callback(lambda _: self._drop_late(batch))

    def _drop_late(self, batch: _Batch) -> None:
        self._working = in_own_thread(batch.drop)

    def refuse_late(self) -> None:
        """Raise ExportUnreachable while something that is late may still be done."""
        if self._working is not None and not self._working.done():
            raise self._too_late()

    def _too_late(self) -> ExportUnreachable:
        return ExportUnreachable(
            f"{self.folder} takes no batches",
            cause=f"its disk did not answer within {self._deadline_s:g} s",
            remedy="Nothing is lost: events wait in the log. See that the disk answers: `ls -l` shows it, or hangs too",
        )

    def prepare(self) -> None:
        """See that it can be used, and finish what was begun by somebody who ended.

        Raises:
            ExportUnusable: it is no folder, or not ours to write to.
            ExportUnreachable: the disk does not take it.
        """
        if not self.folder.is_dir() or not os.access(self.folder, os.W_OK | os.X_OK):
            raise ExportUnusable(
                f"batches cannot be put into {self.folder}",
                cause="it is no folder that the appliance's user may write to",
                remedy="Make it, on a disk of this machine, and give it to the appliance's user",
            )
        try:
            with self._locked():
                self._recover()
            for path in self.folder.glob(f".*{_NEW}"):
                if _is_left(path):
                    path.unlink(missing_ok=True)
            self._put(PUBLIC_KEY, f"{self._key.verifier()}\n".encode())
        except OSError as error:
            raise _unreachable(self.folder, error) from None

    def batch(self) -> _Batch:
        """A batch without a number, and without a file yet."""
        return _Batch(self.folder / f".{self._random(8).hex()}{_NEW}")

    def publish(self, batch: _Batch) -> None:
        """Give a batch its number and its place."""
        batch.sync()
        with self._locked():
            state = self._recover()
            manifest = Manifest(
                series=state.series,
                number=state.number + 1,
                size=batch.size,
                sha256=batch.sha256,
                events=batch.events,
                first=batch.first,
                last=batch.last,
                previous=state.previous,
            )
            self._put(f".{manifest.name}{MANIFEST}{_READY}", manifest.sign(self._key))
            batch.path.rename(self.folder / f".{manifest.name}{BATCH}{_READY}")
            sync_directory(self.folder)
            # From here on it will appear. What fails before leaves files that are removed when somebody looks next.
            self._put(_STATE, json.dumps(_State(state.series, manifest.number, manifest.digest)).encode())
            self._recover()

    def _recover(self) -> _State:
        """What has a number is put in its place, what has none is removed; how far the series is."""
        state = self._state()
        # A batch before its manifest: who waits for manifests finds both.
        for path in sorted(self.folder.glob(f".batch-*{_READY}")):
            name = path.name.removeprefix(".").removesuffix(_READY)
            series, _, number = name.partition(".")[0].removeprefix("batch-").partition("-")
            if series == state.series and number.isdecimal() and int(number) <= state.number:
                path.rename(self.folder / name)
            else:
                path.unlink()
        sync_directory(self.folder)
        return state

    def _state(self) -> _State:
        try:
            state = _State(*json.loads((self.folder / _STATE).read_bytes()))
            if _SERIES.fullmatch(state.series) and state.number >= 0:
                return state
        except (FileNotFoundError, ValueError, TypeError):
            pass
        return _State(self._random(8).hex(), 0, NO_PREVIOUS)

    def _put(self, name: str, content: bytes) -> None:
        """Write a file in the place of the one before, whole and on the disk."""
        staged = self.folder / f".{self._random(8).hex()}{_NEW}"
        descriptor = _create(staged)
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
            staged.rename(self.folder / name)
            sync_directory(self.folder)
        finally:
            staged.unlink(missing_ok=True)
            os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / _LOCK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _create(path: Path) -> int:
    """A file that is not there yet, for the folder's group to read, locked: nobody takes it for one that was left."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.fchmod(descriptor, _MODE)  # whatever the umask is
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_left(path: Path) -> bool:
    """Whether nobody writes to it any more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _unreachable(folder: Path, error: OSError) -> ExportUnreachable:
    return ExportUnreachable(
        f"{folder} takes no batches",
        cause=f"{error.filename or folder}: {error.strerror or type(error).__name__}",
        remedy="Nothing is lost: events wait in the log. See that the disk has room, and that batches are carried away",
    )
