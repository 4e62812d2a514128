"""The witnesses that this node's log is co-signed by over the network, as the gateway has them.

Rules:

- Another process asks them (`asking`), without a key. What it hands over is verified here before it is kept: with the
  witness's key from the settings and the log's own, by `witnessing.take_reply`, as what is carried by hand is.
- Nothing waits for a witness: no append, no checkpoint, no turn. One that is down, slow or false is told in `views`.
- A witness that saw a longer log, or another history, is an alarm until it co-signs again, an event, and a line in the
  gateway's log. So is, as an event, one that has been silent for `SILENT_S`, and the first co-signature after either.
  Each further co-signature is none: it would be an entry, and so a reason for the next checkpoint.
- The process that asks is started again when it ends, and killed when it hangs.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from appliance.audit.accepted import WitnessesTampered
from appliance.audit.asking import (
    HEARTBEAT_S,
    MAX_TOLD_BYTES,
    Outcome,
    Told,
    WitnessAt,
    WitnessUnreachable,
    newest_note,
)
from appliance.audit.events import AUDIT_WITNESSED, SYSTEM, WITNESS_REFUSED, WITNESS_SILENT, Event, EventClass
from appliance.audit.events import Outcome as EventOutcome
from appliance.audit.launch import PASSED_ON
from appliance.audit.notes import Algorithm, Checkpoint, KeyInvalid, VerifierKey, size_of_note
from appliance.audit.signing import public_key
from appliance.audit.witnessing import last_cosigned, take_reply, thin_out
from appliance.errors import ErrorRecord, HoldfastError
from appliance.settings import SettingsError, WitnessSettings

SILENT_S: Final = 300.0
LONGEST_SILENCE_S: Final = 6 * HEARTBEAT_S  # of the process that asks: it says that it lives
_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
_LIVED_S: Final = 30.0
_STOP_S: Final = 5.0
_LAST_S: Final = 3.0
_LOOK_EVERY_S: Final = 0.05
_THIN_OUT_EVERY_S: Final = 3600.0
_ACCEPT_EVERY_S: Final = 3600.0
_COSIGNED: Final = "cosigned"
_LOG = logging.getLogger("holdfast.audit.witness")

_WHY: Final[Mapping[Outcome, str]] = {
    Outcome.SHORTER: "this log has {size} entries, and the witness saw {witness_size}: it was cut off, or an old copy "
    "was put back",
    Outcome.FORKED: "this log of {size} entries does not go on from the {witness_size} that the witness saw: its "
    "history was written anew",
}
_REMEDY: Final = (
    "keep the folder of the log and the witness's state as they are, and compare them: `holdfast audit verify "
    "--witness`; docs/audit.md says what then"
)


class Trail(Protocol):
    """Where events go."""

    async def record(self, *events: Event, privileged: bool = False) -> int:
        """Append events. Raises HoldfastError."""

    async def keep_cosignature(
        self, request: bytes, reply: bytes, witness: VerifierKey
    ) -> tuple[Checkpoint, dict[str, int], dict[str, str]]:
        """Keep what a witness co-signed, and accept who did; with the counts and the details of the event of it."""

    async def accepted_witnesses(self) -> Mapping[VerifierKey, int]:
        """Each accepted witness, and the largest size that it co-signed when it was accepted last."""


class View(NamedTuple):
    """How a witness is.

    Attributes:
        name: what it is called here.
        to: where it is asked.
        size: how many entries it co-signed last; 0: none yet.
        cosigned_s: when that was, epoch seconds: by this machine's clock, before this start by the witness's.
        silent_since_s: since when it has co-signed nothing that it was asked for, epoch seconds; None: it does.
        refused: why it says that this log is not the one that it saw; empty: it does not.
        error: why it co-signs nothing now; None: nothing is in the way.
    """

    name: str
    to: str
    size: int = 0
    cosigned_s: float | None = None
    silent_since_s: float | None = None
    refused: str = ""
    error: ErrorRecord | None = None

    def trouble(self, now_s: float) -> str:
        """What is wrong with it, for people; empty: nothing."""
        if self.refused:
            return f"witness {self.name} REFUSES: {self.refused}"
        if self.error is None or self.silent_since_s is None:
            return ""
        last = "it never did" if self.cosigned_s is None else f"last {max(0.0, now_s - self.cosigned_s):.0f} s ago"
        return (
            f"witness {self.name} has co-signed nothing for {max(0.0, now_s - self.silent_since_s):.0f} s ({last}): "
            f"{self.error['cause']}"
        )


class Witnesses:
    """The witnesses of the log in `directory`; whoever drives them calls `run`.

    Args:
        wall: epoch seconds.
    """

    def __init__(
        self,
        directory: Path,
        at: Sequence[WitnessAt],
        trail: Trail,
        *,
        wall: Callable[[], float] = time.time,
        longest_silence_s: float = LONGEST_SILENCE_S,
    ) -> None:
        self._directory = directory
        self._at = {each.name: each for each in at}
        self._trail = trail
        self._wall = wall
        self._longest_silence_s = longest_silence_s
        self._views = {each.name: View(each.name, each.url) for each in at}
        self._told: dict[str, object] = {}  # of each witness, which event was the last
        self._accepted_s: dict[str, float] = {}
        self._process: Process | None = None

    @property
    def pid(self) -> int | None:
        """The process that asks, while there is one."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    @property
    def alarm(self) -> str:
        """What an administrator has to know; empty: nothing."""
        return "; ".join(view.trouble(self._wall()) + f"; {_REMEDY}" for view in self.views() if view.refused)

    def views(self) -> list[View]:
        """How each is now."""
        return list(self._views.values())

    async def run(self) -> None:
        """Have them asked, until cancelled. Where there is none, there is no process."""
        if not self._at:
            return
        for name, at in self._at.items():
            with contextlib.suppress(HoldfastError, OSError):
                last = await asyncio.to_thread(last_cosigned, self._directory, at.key)
                if last is not None:
                    self._views[name] = self._views[name]._replace(size=last[0], cosigned_s=float(last[1]))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_asking())
            tasks.create_task(self._keep_thin())

    async def catch_up(self) -> None:
        """Give those that co-sign a moment for the newest checkpoint: the last one of a gateway that ends."""
        with contextlib.suppress(TimeoutError, HoldfastError):
            async with asyncio.timeout(_LAST_S):
                note = await asyncio.to_thread(newest_note, self._directory)
                size = size_of_note(note) if note else 0
                while any(view.size < size and view.silent_since_s is None for view in self.views()):  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_EVERY_S)

    async def take(self, told: Told) -> None:
        """What came of asking one: keep what it co-signed, if that is what it is, and tell of the rest."""
        view = self._views[told.name]
        if told.outcome is Outcome.COSIGNED:
            try:
                await self._take_up(view, told)
            except HoldfastError as error:
                await self._fail(view, error.record())
            except OSError as error:
                await self._fail(view, _cannot_be_kept(error))
            else:
                self._cosigned(view, told)
        elif told.outcome.refused:
            await self._refuse(view, told)
        elif told.error is not None:
            await self._fail(view, told.error)

    def _keep(self, told: Told) -> None:
        key = self._at[told.name].key
        take_reply(self._directory, told.request.encode(), told.reply.encode(), public_key(self._directory), key)

    async def _take_up(self, view: View, told: Told) -> None:
        """Keep what one co-signed. The first of a run or since trouble, and one an hour, says what it is held to."""
        request, reply, key = told.request.encode(), told.reply.encode(), self._at[view.name].key
        is_fresh = self._wall() < self._accepted_s.get(view.name, -math.inf) + _ACCEPT_EVERY_S
        try:
            is_known = key in await self._trail.accepted_witnesses()
            if not is_known:
                self._told.pop(view.name, None)  # whatever comes of it now: it is accepted, and told, the next time
            if is_known and is_fresh and self._told.get(view.name) == _COSIGNED:
                await asyncio.to_thread(self._keep, told)
                return
            _, counts, details = await self._trail.keep_cosignature(request, reply, key)
        except WitnessesTampered:
            # The check of the log alarms for that; what is co-signed meanwhile is kept all the same.
            await asyncio.to_thread(self._keep, told)
            return
        self._accepted_s[view.name] = self._wall()
        await self._tell_of(view.name, _COSIGNED, AUDIT_WITNESSED, counts=counts, details=details)

    def _cosigned(self, view: View, told: Told) -> None:
        if told.witness_size is not None and told.witness_size < view.size:
            _LOG.error(
                "witness %s had forgotten: it saw %d entries, and co-signed %d before: its state was lost, or put back",
                view.name,
                told.witness_size,
                view.size,
            )
        self._views[view.name] = view._replace(
            size=told.size, cosigned_s=self._wall(), silent_since_s=None, refused="", error=None
        )

    async def _refuse(self, view: View, told: Told) -> None:
        why = _WHY[told.outcome].format(size=told.size, witness_size=told.witness_size)
        since_s = self._wall() if view.silent_since_s is None else view.silent_since_s
        changed = view._replace(silent_since_s=since_s, refused=why, error=None)
        self._views[view.name] = changed
        _LOG.error("%s; %s", changed.trouble(self._wall()), _REMEDY)
        counts = {"size": told.size, "witness_size": told.witness_size or 0}
        await self._tell_of(view.name, told.outcome, WITNESS_REFUSED, reason=told.outcome.value, counts=counts)

    async def _fail(self, view: View, error: ErrorRecord) -> None:
        since_s = self._wall() if view.silent_since_s is None else view.silent_since_s
        changed = view._replace(silent_since_s=since_s, error=error)
        self._views[view.name] = changed
        if view.error is None or view.error["cause"] != error["cause"]:
            _LOG.warning("witness %s: %s: %s", view.name, error["message"], error["cause"])
        if not view.refused and self._wall() >= since_s + SILENT_S:
            await self._tell_of(view.name, "silent", WITNESS_SILENT, reason=error["code"])

    async def _tell_of(
        self,
        name: str,
        what: object,
        kind: EventClass,
        *,
        reason: str = "",
        counts: Mapping[str, int | float] | None = None,
        details: Mapping[str, str] | None = None,
    ) -> None:
        """Record what is new of a witness; what cannot be recorded is recorded when it is told again."""
        if self._told.get(name) == what:
            return
        outcome = EventOutcome.FAILURE if reason else EventOutcome.SUCCESS
        target = ("witness", self._at[name].vkey)
        with contextlib.suppress(HoldfastError):
            event = Event(
                kind, SYSTEM, outcome, target=target, reason=reason, counts=counts or {}, details=details or {}
            )
            await self._trail.record(event, privileged=True)
            self._told[name] = what

    # The process

    async def _keep_asking(self) -> None:
        pause_s = _PAUSE_S
        while True:
            begun_s = time.monotonic()
            try:
                ended = await self._ask()
            except OSError as error:
                ended = f"it cannot be started: {error.strerror}"
            except Exception as error:  # a defect of ours: not the end of the gateway
                _LOG.exception("the process that asks witnesses cannot be had")
                ended = f"{type(error).__name__}: {error}"[:300]
            if time.monotonic() > begun_s + _LIVED_S:
                pause_s = _PAUSE_S
            for view in self.views():
                await self._fail(view, _ended(ended))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _ask(self) -> str:
        """Have a process that asks, until it ends; how it did."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "appliance.audit.asking",
            str(self._directory),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
            limit=MAX_TOLD_BYTES,
        )
        self._process = process
        assert process.stdin is not None  # noqa: S101  (they are pipes)
        assert process.stdout is not None  # noqa: S101
        try:
            asked = [{"at": asdict(at), "seen": self._views[name].size} for name, at in self._at.items()]
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            while True:
                try:
                    async with asyncio.timeout(self._longest_silence_s):
                        line = await process.stdout.readline()
                except TimeoutError:
                    return f"it said nothing for {self._longest_silence_s:g} s, and is killed"
                if not line:
                    return "it closed its end"
                if line != b"\n":
                    await self.take(Told.read(json.loads(line)))
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_S):
                    await process.wait()

    async def _keep_thin(self) -> None:
        keys = [at.key for at in self._at.values()]
        while True:
            try:
                await asyncio.to_thread(thin_out, self._directory, keys)
            except OSError as error:
                _LOG.warning("co-signed checkpoints cannot be looked through: %s", error.strerror)
            await asyncio.sleep(_THIN_OUT_EVERY_S)


def witnesses_of(settings: Mapping[str, WitnessSettings]) -> list[WitnessAt]:
    """The witnesses that settings name.

    Raises:
        SettingsError: a public key is none, is a log's, or is given twice.
    """
    found: list[WitnessAt] = []
    for name, each in settings.items():
        at = WitnessAt(
            name,
            each.url,
            each.vkey,
            str(each.ca),
            certificate=None if each.certificate is None else str(each.certificate),
            private_key=None if each.private_key is None else str(each.private_key),
            server_name=each.server_name,
        )
        try:
            key = at.key
        except KeyInvalid as error:
            raise _bad_key(name, error.cause) from None
        if key.algorithm is not Algorithm.COSIGNATURE:
            raise _bad_key(name, "it is a log's, and a witness's is needed")
        if any(other.key == key for other in found):
            raise _bad_key(name, "another witness has the same one")
        found.append(at)
    return found


def _bad_key(name: str, cause: str) -> SettingsError:
    return SettingsError(
        f"the setting audit.witness.{name}.vkey cannot be used",
        cause=cause,
        remedy="Give the public key that `holdfast audit witness serve` printed there",
    )


def _cannot_be_kept(error: OSError) -> ErrorRecord:
    return WitnessUnreachable(
        "a co-signature cannot be kept",
        cause=f"{error.filename}: {error.strerror}",
        remedy="See that the appliance's user can write there, and that there is room",
    ).record()


def _ended(cause: str) -> ErrorRecord:
    return WitnessUnreachable(
        "the process that asks witnesses ended",
        cause=cause,
        remedy="It is started again by itself; `holdfast logs gateway` says more",
    ).record()
