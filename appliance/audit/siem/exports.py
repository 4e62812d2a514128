"""Every destination of this node's log, as the gateway has them: saved in a file, served by an exporter of its own.

Rules:

- A destination is tried before it is saved, and saved before it is shipped to. With it goes its cursor.
- The exporter is another process: whatever becomes of it or of a destination is told in `views`, and delays export and
  nothing else. One that ends is started again, one that hangs is killed. Where there is no destination there is none.
- Where the file cannot be read it is not known who needs what: nothing is shipped, changed or removed from the log
  until somebody has put the file right, which is seen by itself.
- What is in the file was saved here: its keyed hash says so (`saved`). It is what was saved last: the log's newest mark
  says which version that is (`audit.marks`). Both can be read once the vault is open. A file that is gone is no empty
  list, until somebody adds a destination again.
- No destination names a file of the appliance's own state: what it holds is not for a receiver. Whether one leads there
  by a link is looked at again whenever an exporter is told of it.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final

from appliance.audit import protocol
from appliance.audit.entry import AuditKeys
from appliance.audit.marks import DESTINATIONS, last_said
from appliance.audit.reading import LogReader
from appliance.audit.siem import link
from appliance.audit.siem.cursor import Cursor, Position
from appliance.audit.siem.destinations import (
    MOST_DESTINATIONS,
    Destination,
    DestinationInvalid,
    checked,
    format_of,
    transport_of,
)
from appliance.audit.siem.exporter import secrets_for, view_of
from appliance.audit.siem.files import read_in_time
from appliance.audit.siem.saved import CURSOR_SUFFIX, Saved, SavedTampered, load, save
from appliance.audit.siem.shipper import View
from appliance.audit.siem.transport import ExportUnusable
from appliance.audit.signing import public_key
from appliance.errors import ErrorRecord, Fault, HoldfastError
from appliance.vault import VaultSealed

FOLDER: Final = "siem"  # in the state directory
_SAVED: Final = "destinations.json"
_STOP_S: Final = 5.0
_STARTED_WITHIN_S: Final = 20.0  # on a machine that is busy with engines
_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
LONGEST_SILENCE_S: Final = 30.0  # an exporter that does not hang says something four times a second
_LIVED_S: Final = 30.0  # an exporter that lived so long begins the pauses anew
_PASSED_ON: Final = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE")
_LOG = logging.getLogger("holdfast.audit.siem")


class NoSuchDestination(HoldfastError, LookupError):
    """There is no destination of that name."""

    code: ClassVar[str] = "audit_export_unknown"
    fault: ClassVar[Fault] = Fault.MISSING


class DestinationExists(HoldfastError):
    """There is one of that name, or there are as many as there may be."""

    code: ClassVar[str] = "audit_export_exists"
    fault: ClassVar[Fault] = Fault.CONFLICT


class DestinationsUnreadable(HoldfastError, OSError):
    """The file with the destinations cannot be read or written."""

    code: ClassVar[str] = "audit_exports_unreadable"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class DestinationsGone(DestinationsUnreadable):
    """There were destinations, or may have been, and which they were is not known any more."""

    code: ClassVar[str] = "audit_exports_gone"


class Exports:
    """The destinations of the log in `directory`.

    Args:
        state_dir: the appliance's: where they are saved.
        size: how many entries the appender has answered for.
        keys: open records; may raise `VaultSealed`.
        longest_silence_s: an exporter that says nothing for so long is killed.

    Attributes:
        changed: set when there is another `version`; whoever marks the log clears it.
    """

    def __init__(
        self,
        state_dir: Path,
        directory: Path,
        *,
        size: Callable[[], Awaitable[int]],
        keys: AuditKeys,
        longest_silence_s: float = LONGEST_SILENCE_S,
    ) -> None:
        self._state_dir = state_dir
        self._folder = state_dir / FOLDER
        self._directory = directory
        self._size = size
        self._keys = keys
        self._longest_silence_s = longest_silence_s
        self._destinations: dict[str, Destination] = {}
        self._version: int | None = None  # of what was saved last, once that is known
        self.changed = asyncio.Event()
        self._nothing_tells = False  # the log does not say which was saved last
        self._unread: DestinationsUnreadable | None = None  # why it is not known which there are
        self._error: ErrorRecord | None = None  # why there is no exporter
        self._views: dict[str, View] = {}
        self._refused: dict[str, ErrorRecord] = {}  # destinations that the exporter is not told of, and why
        self._link: link.Link | None = None
        self._process: Process | None = None
        self._wanted = asyncio.Event()
        self._connected = asyncio.Event()
        self._running: list[asyncio.Task[None]] = []
        self._changing = asyncio.Lock()
        self._telling = asyncio.Lock()

    # What there is

    @property
    def names(self) -> list[str]:
        """What the destinations are called. Raises as `destination`."""
        self._refuse_unread()
        return list(self._destinations)

    def needed_from(self) -> int | None:
        """The smallest entry that some destination does not have for certain; None: there is no destination.

        Raises:
            DestinationsUnreadable: it is not known which there are.
        """
        self._refuse_unread()
        if self._version is None:
            raise DestinationsUnreadable(
                "it is not known yet which destinations the audit log has",
                cause=f"{self._directory} cannot be read, or the vault is sealed",
                remedy="`holdfast unseal`; `holdfast audit status` says what is in the log's way",
            )
        return min(map(self._has_of_this_log, self._destinations), default=None)

    def _has_of_this_log(self, name: str) -> int:
        view = self._views.get(name)
        return view.delivered if view is not None and view.of_this_log else 0

    @property
    def version(self) -> int | None:
        """Of what was saved last; None: it is not known yet."""
        return self._version

    def _is_known(self) -> bool:
        return self._version is not None and self._unread is None

    @property
    def pid(self) -> int | None:
        """The exporter's process, while there is one."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    @property
    def unreadable(self) -> ErrorRecord | None:
        """Why it is not known which destinations there are, and nothing is shipped; None: it is known."""
        return None if self._unread is None else self._unread.record()

    @property
    def error(self) -> ErrorRecord | None:
        """Why nothing is shipped at all; None: nothing is in the way."""
        return self._error

    def destination(self, name: str) -> Destination:
        """One of them.

        Raises:
            NoSuchDestination: there is none of that name.
            DestinationsUnreadable: it is not known which there are.
        """
        self._refuse_unread()
        if name not in self._destinations:
            raise NoSuchDestination(
                "there is no such destination",
                cause=f"there are: {', '.join(self._destinations) or 'none'}",
                remedy="`holdfast audit export list` shows them, `holdfast audit export add` makes one",
            )
        return self._destinations[name]

    def views(self) -> list[View]:
        """How each is now."""
        return [] if self._unread is not None else [self.view(name) for name in self._destinations]

    def view(self, name: str) -> View:
        """How one of them is now. Raises as `destination`."""
        destination = self.destination(name)
        known = self._views.get(name) or View(
            name=name, to=str(transport_of(destination)), format=format_of(destination).name, connected=False, sent=0,
            delivered=0, of_this_log=False, lag_entries=0, lag_s=0.0, waits_for="the exporter has just begun",
            error=None,
        )  # fmt: skip
        error = self._refused.get(name, self._error)
        return known if error is None else replace(known, connected=False, error=error)

    # Changing it

    async def try_out(self, destination: Destination) -> None:
        """Send a test event to a destination, one of ours or not.

        Raises:
            DestinationInvalid: it cannot be one.
            ExportUnreachable, ExportUnusable: it was not taken; says why.
            ExporterLost: there is no exporter to try it.
        """
        self._refuse_unread(unless_gone=True)
        await read_in_time(_STOP_S, self._refuse_own_files, checked(destination), _resolved)
        await (await self._exporter()).ask(link.TRY_OUT, json.dumps(destination.record()).encode())

    async def add(
        self, destination: Destination, *, first: int = 0, admitted: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Try a destination, save it, and begin to ship to it.

        Args:
            first: the entry that it begins with.
            admitted: called between the two: what it raises for is not done.

        Raises:
            DestinationExists: there is one of that name, or there are too many.
            DestinationsUnreadable: it cannot be saved, or it is not known which there are.
            Otherwise as `try_out`.
        """
        async with self._changing:
            self._refuse_unread(unless_gone=True)
            if destination.name in self._destinations:
                raise DestinationExists(
                    "there is a destination of that name",
                    cause=f"{destination.name} is {self._destinations[destination.name].url}",
                    remedy=f"Choose another name, or `holdfast audit export remove {destination.name}` first",
                )
            if len(self._destinations) >= MOST_DESTINATIONS:
                raise DestinationExists(
                    "there are too many destinations",
                    cause=f"there are {MOST_DESTINATIONS}",
                    remedy="Remove one: `holdfast audit export list` shows them",
                )
            await self.try_out(destination)
            if admitted is not None:
                await admitted()
            await self._change({**self._destinations, destination.name: destination}, begin=(destination.name, first))

    async def remove(self, name: str) -> None:
        """End a destination, and forget how far it was.

        Raises:
            NoSuchDestination: there is none of that name.
            DestinationsUnreadable: the others cannot be saved, or it is not known which there are.
        """
        async with self._changing:
            self.destination(name)
            await self._change({known: each for known, each in self._destinations.items() if known != name})
            self._views.pop(name, None)
            with contextlib.suppress(FileNotFoundError):
                self._cursor(name).unlink()

    async def _change(self, destinations: dict[str, Destination], begin: tuple[str, int] | None = None) -> None:
        version = self._version or 0
        try:
            if begin is not None:
                # The file first: a cursor without one tells of a file that was taken away.
                await asyncio.to_thread(self._save, list(self._destinations.values()), version)
                await asyncio.to_thread(self._begin, *begin)
            await asyncio.to_thread(self._save, list(destinations.values()), version + 1)
        except OSError as error:
            raise _unreadable(self._folder / _SAVED, error) from None
        self._take_up(version + 1, destinations.values())
        self.changed.set()
        if self._link is not None:
            # One that has just ended is told by whoever starts it again.
            with contextlib.suppress(link.ExporterLost):
                await self._tell(self._link)

    def _begin(self, name: str, first: int) -> None:
        origin = public_key(self._directory).name
        Cursor(self._cursor(name), origin).save(Position(first, first))

    def _save(self, destinations: Sequence[Destination], version: int) -> None:
        save(self._folder / _SAVED, destinations, version, self._keys)

    def _read(self) -> tuple[int | None, list[Destination]]:
        """What is saved, if it was saved last. Where nothing is, and the log cannot tell yet, it has no version.

        Blocks.

        Raises:
            DestinationsUnreadable: it is not known, or not believed.
        """
        path = self._folder / _SAVED
        found = self._load()
        last = None
        try:
            if not self._nothing_tells:
                last = last_said(LogReader(self._directory), self._keys, DESTINATIONS)
        except HoldfastError as error:
            if not found.version:
                return None, []
            raise DestinationsUnreadable(
                "it is not known which destinations of the audit log were saved last",
                cause=f"{error.message}: {error.cause}",
                remedy=error.remedy,
            ) from None
        if last is None:
            self._nothing_tells = True
            raise DestinationsGone(
                "it cannot be told which destinations of the audit log were saved last",
                cause=f"version {found.version} is in {path}, and the log's newest entries have no mark that names one",
                remedy="Add them again, each of them: `holdfast audit export add`",
            )
        self._version = max(last, found.version)
        if last and not found.version:
            raise DestinationsGone(
                "the destinations of the audit log are gone",
                cause=f"version {last} of {path} was saved here, and nothing is there",
                remedy="Put the folder back from a copy, or add them again: `holdfast audit export add`",
            )
        if found.version < last:
            raise DestinationsUnreadable(
                "the destinations of the audit log are an older copy",
                cause=f"{path} is of version {found.version}, and {last} was saved here",
                remedy="Put the newest back, or move the folder away and add them again: `holdfast audit export add`",
            )
        return self._version, found.destinations

    def _load(self) -> Saved:
        """What is saved. Reads a file."""
        path = self._folder / _SAVED
        try:
            found = load(path, self._keys)
            for each in found.destinations:
                self._refuse_own_files(each, Path.absolute)  # resolving could hang on a dead mount
        except OSError as error:
            raise _unreadable(path, error) from None
        except VaultSealed:
            raise DestinationsUnreadable(
                "the destinations of the audit log cannot be checked yet",
                cause=f"{path}: the vault is sealed",
                remedy="`holdfast unseal`; what is to be sent waits in the log",
            ) from None
        except SavedTampered as error:
            raise DestinationsUnreadable(error.message, cause=error.cause, remedy=error.remedy) from None
        except (DestinationInvalid, ValueError, KeyError, TypeError) as error:
            told = error.cause if isinstance(error, HoldfastError) else type(error).__name__
            raise DestinationsUnreadable(
                "the destinations of the audit log cannot be read",
                cause=f"{path}: {told}",
                remedy="Move the folder away and add them again: `holdfast audit export add`",
            ) from None
        except HoldfastError as error:  # the database, which has the key
            raise DestinationsUnreadable(
                "the destinations of the audit log cannot be checked now",
                cause=f"{path}: {error.message}: {error.cause}",
                remedy=error.remedy,
            ) from None
        return found

    def _refuse_unread(self, *, unless_gone: bool = False) -> None:
        unread = self._unread
        if unread is not None and not (unless_gone and isinstance(unread, DestinationsGone)):
            raise DestinationsUnreadable(unread.message, cause=unread.cause, remedy=unread.remedy)

    def _refuse_own_files(self, destination: Destination, where: Callable[[Path], Path]) -> None:
        for path in destination.files:
            if where(path).is_relative_to(where(self._state_dir)):
                raise DestinationInvalid(
                    f"{path} cannot be used",
                    cause="it is in the appliance's own state directory",
                    remedy="Put certificates and tokens for receivers into a folder of their own",
                )

    def _cursor(self, name: str) -> Path:
        return self._folder / f"{name}{CURSOR_SUFFIX}"

    # The exporter

    def start(self) -> None:
        """Begin to ship, if there is where to. Reads files; what is wrong with them is told in `unreadable`."""
        try:
            self._take_up(*self._read())
        except DestinationsUnreadable as error:
            self._unread = error
            _LOG.error("%s", error)
        self._running = [asyncio.create_task(self._run()), asyncio.create_task(self._read_again())]

    def _take_up(self, version: int | None, destinations: Iterable[Destination]) -> None:
        self._version, self._unread = version, None
        self._destinations = {each.name: each for each in destinations}
        if self._destinations:
            self._wanted.set()

    async def _read_again(self) -> None:
        """Until it is known what is saved, and somebody has put it right."""
        while not self._is_known():
            await asyncio.sleep(_PAUSE_S)
            async with self._changing:
                if self._is_known():
                    break
                try:
                    self._take_up(*await asyncio.to_thread(self._read))
                except DestinationsUnreadable as error:
                    self._unread = error
                else:
                    if self._link is not None:
                        with contextlib.suppress(link.ExporterLost):
                            await self._tell(self._link)

    async def stop(self, size: int | None = None) -> None:
        """End it; destinations that are connected get a moment for what is not sent yet of the log's `size`."""
        if self._link is not None:
            with contextlib.suppress(HoldfastError, TimeoutError):
                async with asyncio.timeout(_STOP_S):
                    await self._link.ask(link.STOP, protocol.SEQUENCE.pack(size or 0))
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _exporter(self) -> link.Link:
        """The link with the exporter, which is started if there is none."""
        self._wanted.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STARTED_WITHIN_S):
                await self._connected.wait()
        if self._link is None:
            raise link.ExporterLost(
                "the exporter of the audit log is not there",
                cause="it has not started" if self._error is None else self._error["cause"],
                remedy="`holdfast logs gateway` has what it said",
            )
        return self._link

    async def _run(self) -> None:
        """Have an exporter, from when one is wanted, until cancelled."""
        await self._wanted.wait()
        pause_s = _PAUSE_S
        while True:
            begun_s = time.monotonic()
            try:
                ended = await self._run_once()
            except OSError as error:
                ended = f"it cannot be started: {error.strerror}"
            except HoldfastError as error:
                ended = f"{error.message}: {error.cause}"
            except Exception as error:  # a defect of ours: it must not end the export for good
                _LOG.exception("the exporter cannot be had")
                ended = f"{type(error).__name__}: {error}"[:300]
            if time.monotonic() > begun_s + _LIVED_S:
                pause_s = _PAUSE_S
            _LOG.warning("the exporter ended: %s", ended)
            self._error = _exporter_ended(ended)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _run_once(self) -> str:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",
                    "-m",
                    "appliance.audit.siem.exporter",
                    str(self._directory),
                    str(self._folder),
                    stdin=theirs.fileno(),
                    stdout=asyncio.subprocess.DEVNULL,
                    env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                )
            except BaseException:
                ours.close()
                raise
        _, connected = await asyncio.get_running_loop().create_connection(lambda: link.Link(self._serve), sock=ours)
        watching = asyncio.create_task(self._watch(connected))
        try:
            self._link = connected  # before it is told: whoever changes something meanwhile tells it, too
            await self._tell(connected)
            self._error = None
            self._connected.set()
            await connected.lost
        finally:
            self._link = None
            self._connected.clear()
            watching.cancel()
            connected.close()
            await self._end(self._process)
        return f"with status {self._process.returncode}"

    async def _end(self, process: Process) -> None:
        """See it end, which it does with the link; kill it if it does not."""
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            _LOG.warning("the exporter does not end, and is killed")
        finally:
            if process.returncode is None:
                await self._kill(process)

    async def _kill(self, process: Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # One that waits for a dead mount ends when the mount does.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await process.wait()

    async def _watch(self, exporter: link.Link) -> None:
        """End the link with an exporter that is silent for too long: it hangs, and so does every destination."""
        while exporter.silent_s < self._longest_silence_s:  # noqa: ASYNC110  (silence is no event)
            await asyncio.sleep(self._longest_silence_s / 10)
        cause = f"it said nothing for {self._longest_silence_s:g} s, and is killed"
        _LOG.warning("the exporter hangs: %s", cause)
        self._error = _exporter_ended(cause)
        exporter.close()

    async def _tell(self, exporter: link.Link) -> None:
        """What there is to ship to: all but those whose files have come to be the appliance's own."""
        async with self._telling:  # who changes something last tells last
            destinations, refused = list(self._destinations.values()), {}
            for each in destinations:
                try:
                    await read_in_time(_STOP_S, self._refuse_own_files, each, _resolved)
                except DestinationInvalid as error:
                    refused[each.name] = error.record()
                    _LOG.error("nothing is sent to %s: %s", each.name, error)
                except ExportUnusable:
                    pass  # a disk that does not answer, a link that leads nowhere: the exporter says so, until it does
            self._refused = refused
            records = [each.record() for each in destinations if each.name not in refused]
            await exporter.ask(link.DESTINATIONS, json.dumps(records).encode())

    async def _serve(self, kind: int, body: bytes) -> bytes:
        """What the exporter asks for."""
        if kind == link.SECRETS:
            return secrets_for(body, self._keys.audit_secret)
        if kind == link.SIZE:
            return protocol.SEQUENCE.pack(await self._size())
        if kind == link.VIEWS:
            self._views = {view.name: view for view in map(view_of, json.loads(body))}
        return b""


def _resolved(path: Path) -> Path:
    """Where it leads to. Blocks.

    Raises:
        ExportUnusable: nowhere.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself; a name that no file has
        raise ExportUnusable(
            f"{path} cannot be used",
            cause=(error.strerror if isinstance(error, OSError) else None) or str(error),
            remedy=f"See where it leads to: `ls -l {path}`",
        ) from None


def _exporter_ended(cause: str) -> ErrorRecord:
    return link.ExporterLost(
        "the audit log's exporter ended",
        cause=cause,
        remedy="It is started again by itself; events wait in the log. `holdfast logs gateway` says more",
    ).record()


def _unreadable(path: Path, error: OSError) -> DestinationsUnreadable:
    return DestinationsUnreadable(
        "the destinations of the audit log cannot be kept",
        cause=f"{path}: {error.strerror}",
        remedy="See that the appliance's user can write there, and that there is room",
    )
