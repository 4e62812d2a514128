"""The audit log of this node as a producer has it: its appender, its recorder, its signing key.

Rule: what is recorded here goes through one recorder; whoever needs an event to be on the disk waits for `record`.

Example:
    audit = NodeAudit(state_dir, vault, versions={"holdfast": "0.1.0"})
    await audit.start()
    await audit.record(Event(GATEWAY_STARTED, SYSTEM))
    await audit.sign()  # once the vault is open
    await audit.stop()
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from appliance.audit.accepted import AcceptedWitnesses, WitnessesTampered
from appliance.audit.checking import Checking
from appliance.audit.events import Event
from appliance.audit.launch import Launcher
from appliance.audit.marks import UNKNOWN, WITNESSES
from appliance.audit.notes import Checkpoint, VerifierKey
from appliance.audit.recorder import Recorder
from appliance.audit.retention import Retention
from appliance.audit.signing import public_key, signing_key
from appliance.audit.witnessing import check_reply, take_reply
from appliance.errors import ErrorRecord, HoldfastError
from appliance.randomness import DrawnAhead
from appliance.vault import SYSTEM_SCOPE, Vault

_TELL_S = 5.0
_LOOK_S = 10.0
_LATE_S = 300.0  # a checkpoint is due every minute
_LOG = logging.getLogger("holdfast.audit")


class NodeAudit:
    """The audit log in `state_dir/audit`.

    Args:
        versions: of what runs here, for every record.
        retention_days: how long entries are kept.
        monotonic: seconds.

    Attributes:
        retention: what removes entries; whoever drives it calls its `run`.
        checking: what verifies the log now and then; whoever drives it calls its `run`.
        witnesses: those of this log that were accepted.
        opened: set once checkpoints are signed, and records can be read.
        older: which was found put back to an older copy, `log`, `database` or `unknown`, and nobody has acknowledged;
            empty: neither.
        restored: what is to be shown of a restore until the next start; empty: nothing.
    """

    def __init__(
        self,
        state_dir: Path,
        vault: Vault,
        *,
        versions: Mapping[str, str],
        retention_days: int = 400,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = state_dir / "audit"
        self._vault = vault
        self._launcher = Launcher(self.directory, state_dir / "run")
        self._recorder = Recorder(
            lambda: None if vault.sealed else vault,
            system_scope=SYSTEM_SCOPE,
            versions=versions,
            random_bytes=DrawnAhead(),  # a record's key comes of what it says, too
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._signing_error: ErrorRecord | None = None
        self._monotonic = monotonic
        self._signs_since = 0.0
        self._said: dict[str, Any] | None = None  # by the appender, and when: so it is known while it hangs
        self._said_at = 0.0
        self.opened = asyncio.Event()
        self.compared = asyncio.Event()  # with the database; until then nothing that tells of it is removed
        self.older = ""
        self.restored = ""
        self.retention = Retention(self, self.directory, days=retention_days)
        self.witnesses = AcceptedWitnesses(self.directory, vault)
        self.checking = Checking(self, self.directory)

    @property
    def error(self) -> ErrorRecord | None:
        """Why nothing can be recorded or signed now; None: it can."""
        return self._recorder.error or self._signing_error

    @property
    def is_unwritable(self) -> bool:
        """Whether nothing can be recorded now, so that nothing is admitted."""
        return self._recorder.error is not None

    @property
    def alarm(self) -> str:
        """What an administrator has to know; empty: nothing."""
        if not self.older:
            return ""
        if self.older == UNKNOWN:
            return (
                "it cannot be told whether the log or the database was put back to an older copy: the log's newest "
                "entries have no mark; `holdfast audit acknowledge` ends this alarm once you know"
            )
        return (
            f"the {self.older} was put back to an older copy, and no restore was announced; "
            "`holdfast audit acknowledge` ends this alarm once you know why"
        )

    @property
    def alarms(self) -> str:
        """As `alarm`, with what retention and the check of the log found; empty: nothing."""
        return "; ".join(filter(None, (self.alarm, self.retention.alarm, self.checking.alarm)))

    @property
    def checkpoint_age_s(self) -> float | None:
        """How old the newest checkpoint is; None: there is none, as far as is known."""
        age_s = None if self._said is None else self._said["checkpoint_age_s"]
        return None if age_s is None else float(age_s) + self._monotonic() - self._said_at

    @property
    def checkpoint_trouble(self) -> str:
        """Why what is recorded is not signed, or that it should have been by now; empty: nothing is in the way."""
        said = self._said
        if said is None:
            return ""
        if said["error"] is not None:
            return f"no checkpoint can be made: {said['error']['cause']}"
        if not self.opened.is_set() or said["size"] <= said["checkpoint_size"]:
            return ""
        signs_s, age_s = self._monotonic() - self._signs_since, self.checkpoint_age_s
        late_s = signs_s if age_s is None else min(age_s, signs_s)
        if late_s < _LATE_S:
            return ""
        return f"no checkpoint was made for {late_s:.0f} s, and {said['size'] - said['checkpoint_size']} entries wait"

    @property
    def pid(self) -> int | None:
        """The appender's process, while there is one."""
        return self._launcher.pid

    async def start(self) -> None:
        """Start the appender and stay connected with it."""
        self._tasks = [
            asyncio.create_task(self._recorder.run(self._launcher.connect)),
            asyncio.create_task(self._tell_what_was_counted()),
            asyncio.create_task(self._look()),
        ]

    async def sign(self) -> None:
        """Have checkpoints signed from now on. The vault must be open.

        Raises:
            HoldfastError: the key cannot be had, or handed to the appender; what is recorded is kept, unsigned.
        """
        try:
            key = await asyncio.to_thread(signing_key, self.directory, self._vault)
            await self._recorder.sign_with(key.to_bytes())
        except HoldfastError as error:
            self._signing_error = error.record()
            raise
        self._signing_error = None
        if not self.opened.is_set():
            self._signs_since = self._monotonic()
        self.opened.set()

    async def record(self, *events: Event, privileged: bool = False) -> int:
        """Append events together; all are on the disk when this returns. The last one's sequence.

        Raises:
            AuditUnavailable: says which file and why.
        """
        return await self._recorder.record(*events, privileged=privileged)

    def begin(self, *events: Event, privileged: bool = False) -> "asyncio.Future[int]":
        """As `record`, for who has something else to do meanwhile: the future is done when they are on the disk, and
        raises what `record` would.
        """
        return self._recorder.record(*events, privileged=privileged)

    def count(self, event: Event) -> None:
        """Note what is not to be an entry each time; recorded once a minute, with how often it was."""
        self._recorder.count(event)

    async def status(self) -> dict[str, Any]:
        """What the appender says of the log.

        Raises:
            AuditUnavailable: there is none.
        """
        self._said, self._said_at = await self._recorder.status(), self._monotonic()
        return self._said

    async def size(self) -> int:
        """How many entries are on the disk.

        Raises:
            AuditUnavailable: there is no appender to ask.
        """
        return int((await self._recorder.status())["size"])

    async def checkpoint(self) -> dict[str, Any]:
        """Have a checkpoint made of all that there is; the status then.

        Raises:
            AuditUnavailable: there is no appender.
        """
        return await self._recorder.checkpoint()

    async def accepted_witnesses(self) -> dict[VerifierKey, int]:
        """Each witness of this log, and the largest size that it co-signed. Raises as `AcceptedWitnesses.accepted`."""
        return await asyncio.to_thread(self.witnesses.accepted)

    async def keep_cosignature(
        self, request: bytes, reply: bytes, witness: VerifierKey, *, anew: bool = False
    ) -> tuple[Checkpoint, dict[str, int], dict[str, str]]:
        """Check a witness's reply, keep it, and accept who gave it. Whoever calls this records it.

        Args:
            anew: as `AcceptedWitnesses.accept` has it.

        Returns:
            What was co-signed; the counts and the details of the event `audit.witnessed`.

        Raises:
            As `take_reply` and `AcceptedWitnesses.accept`.
        """
        return await asyncio.to_thread(self._keep_cosignature, request, reply, witness, anew)

    def _keep_cosignature(
        self, request: bytes, reply: bytes, witness: VerifierKey, anew: bool
    ) -> tuple[Checkpoint, dict[str, int], dict[str, str]]:
        log_key = public_key(self.directory)
        check_reply(request, reply, log_key, witness)
        # Wherever this run ends between these, no line is a stranger's: a witness is accepted before its line is kept.
        try:
            self.witnesses.accept(witness, 0)
        except WitnessesTampered:
            if not anew:  # else nobody's line is a stranger's, until it is begun anew, and that is told
                raise
        seen = take_reply(self.directory, request, reply, log_key, witness)
        begun_anew = self.witnesses.accept(witness, seen.size, anew=anew)
        version = self.witnesses.version
        counts = {} if version is None else {WITNESSES: version}
        return seen, counts, {"size": str(seen.size), **({"begun_anew": begun_anew} if begun_anew else {})}

    async def stop(self) -> None:
        """Record what was counted, publish a last checkpoint, and end the appender."""
        await self._tell_counted(at_once=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._launcher.stop()

    async def _look(self) -> None:
        while True:
            with contextlib.suppress(
                HoldfastError
            ):  # of an appender that does not answer it is known what it said last
                await self.status()
            await asyncio.sleep(_LOOK_S)

    async def _tell_what_was_counted(self) -> None:
        while True:
            await asyncio.sleep(_TELL_S)
            await self._tell_counted()

    async def _tell_counted(self, *, at_once: bool = False) -> None:
        try:
            await self._recorder.tell_counted(at_once=at_once)
        except HoldfastError as error:
            _LOG.warning("what was counted is not all in the audit log: %s", error.cause)
