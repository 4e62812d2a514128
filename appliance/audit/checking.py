"""Verifies this node's log by itself: a minute after each start, and then once a day.

    python -m appliance.audit.checking DIRECTORY VKEY AT_LEAST WITNESSES

Rules:

- What was changed on the disk is found within a day, without anybody asking: it is an alarm, until a check finds the
  log whole, and an event. A log that could not be looked at is an alarm, and no event: nobody changed it. It is looked
  at again soon.
- The key is the vault's, not the folder's: whoever changes the log can change `log.vkey`, too. It is at least as long
  as its appender says that its checkpoint is.
- The witnesses are those that were accepted, and each co-signed at least as much as when it was accepted last. That it
  is not known which they are is an alarm and an event, as is a line of another one.
- It reads in a process of its own, which gives way to everybody else: nobody's request waits for it.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from appliance.audit.events import LOG_TAMPERED, SYSTEM, Event, Outcome
from appliance.audit.launch import PASSED_ON
from appliance.errors import ErrorRecord, HoldfastError

if TYPE_CHECKING:
    from appliance.audit.notes import VerifierKey

_FIRST_S: Final = 60.0
_EVERY_S: Final = 24 * 3600.0
_AGAIN_S: Final = 600.0  # after a check that came to nothing
_DEADLINE_S: Final = 12 * 3600.0  # of one check: a log of 400 days on a slow disk takes hours
_LEAST_URGENT: Final = 19
_LOG = logging.getLogger("holdfast.audit")


class Trail(Protocol):
    """The log that is checked, as its node has it."""

    async def checkpoint(self) -> dict[str, Any]:
        """Have a checkpoint made of all that there is; what its appender says of it then."""

    async def accepted_witnesses(self) -> "dict[VerifierKey, int]":
        """Its witnesses, and what each co-signed last."""

    async def record(self, *events: Event, privileged: bool = False) -> int:
        """Append events."""


class Checked(NamedTuple):
    """What a check found.

    Attributes:
        at: when it ended, by the monotonic clock; seconds.
        size: how many entries are as they were written; 0 where some are not.
        error: what is wrong, or why it could not be looked at; None: the log is whole.
        looked_at: the log was read to where it is wrong, or to its end.
    """

    at: float
    size: int
    error: ErrorRecord | None
    looked_at: bool


class Checking:
    """Checks the log in `directory`; whoever drives it calls its `run`, once checkpoints are signed.

    Attributes:
        last: what the last check found; None: there was none yet.
    """

    def __init__(self, trail: Trail, directory: Path, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._trail = trail
        self._directory = directory
        self._monotonic = monotonic
        self._is_told = False  # that it is not what was written
        self.last: Checked | None = None

    @property
    def alarm(self) -> str:
        """What an administrator has to know; empty: nothing."""
        error = None if self.last is None else self.last.error
        return "" if error is None else f"{error['message']}: {error['cause']}"

    async def run(self) -> None:
        """Check again and again, until cancelled."""
        pause_s = _FIRST_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = _AGAIN_S
            try:
                await self.check()
            except HoldfastError as error:  # there is no appender to ask, which has an alarm of its own
                _LOG.warning("the audit log could not be checked: %s", error.cause)
            except OSError as error:  # no process can be started now: not the end of the gateway
                _LOG.warning("the audit log could not be checked: %s", error.strerror)
            else:
                if self.last is not None and self.last.looked_at:
                    pause_s = _EVERY_S

    async def check(self) -> None:
        """Check it now.

        Raises:
            HoldfastError: its appender cannot be asked, or what was found cannot be recorded.
            OSError: no process can be started.
        """
        said = await self._trail.checkpoint()
        found = await self._found(said["public_key"], said["checkpoint_size"])
        error: ErrorRecord | None = found.get("error")
        looked_at = error is None or "sequence" in found
        self.last = Checked(self._monotonic(), found.get("size", 0), error, looked_at)
        if error is None:
            self._is_told = False
            return
        _LOG.error("%s", self.alarm)
        if looked_at and not self._is_told:
            counts = {} if found["sequence"] is None else {"first": found["sequence"]}
            event = Event(LOG_TAMPERED, SYSTEM, Outcome.FAILURE, reason=error["code"], counts=counts)
            await self._trail.record(event, privileged=True)
            self._is_told = True

    async def _found(self, vkey: str, at_least: int) -> dict[str, Any]:
        from appliance.audit.accepted import WitnessesTampered

        try:
            accepted = await self._trail.accepted_witnesses()
        except WitnessesTampered as error:
            # Of what is there some more may be wrong, which comes first.
            found = await self._verified(vkey, at_least, None)
            return found if "error" in found else {"error": error.record(), "sequence": None}
        found = await self._verified(vkey, at_least, _by_vkey(accepted))
        if "error" in found and (now := await self._trail.accepted_witnesses()).keys() != accepted.keys():
            # One was accepted meanwhile, whose co-signature was a stranger's to that check.
            found = await self._verified(vkey, at_least, _by_vkey(now))
        return found

    async def _verified(self, vkey: str, at_least: int, witnesses: dict[str, int] | None) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "appliance.audit.checking",
            str(self._directory),
            vkey,
            str(at_least),
            json.dumps(witnesses),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
            start_new_session=True,
        )
        said = b""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DEADLINE_S):
                    said, _ = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        try:
            found: dict[str, Any] = json.loads(said)
        except ValueError:
            error = ErrorRecord(
                code="audit_not_checked",
                message="the audit log could not be checked",
                cause=f"the process that reads it ended with {process.returncode} and said nothing",
                remedy="`holdfast audit verify --witness …` checks it; `holdfast logs gateway` has what was said",
            )
            return {"error": error}
        return found


def _by_vkey(accepted: "dict[VerifierKey, int]") -> dict[str, int]:
    return {str(witness): size for witness, size in accepted.items()}


def main() -> int:
    """Verify a log, and say as JSON what was found."""
    from appliance.audit.notes import VerifierKey
    from appliance.audit.verify import LogTampered, verify_log

    os.nice(_LEAST_URGENT)
    directory, vkey, at_least, witnesses = sys.argv[1:]
    accepted: dict[str, int] | None = json.loads(witnesses)
    found: dict[str, Any]
    try:
        saw = {VerifierKey.parse(witness): size for witness, size in (accepted or {}).items()}
        verified = verify_log(
            Path(directory),
            VerifierKey.parse(vkey),
            witnesses=list(saw),
            saw=saw,
            allow_unknown=accepted is None,
            at_least=int(at_least),
        )
        found = {"size": verified.size}
    except LogTampered as tampered:
        found = {"error": tampered.record(), "sequence": tampered.sequence}
    except HoldfastError as error:
        found = {"error": error.record()}
    sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
