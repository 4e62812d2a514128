"""The gateway as a process, seen by the command that starts it and the one that stops it.

Rules:

- The gateway is a child in a session of its own: Ctrl-C reaches it once, through whoever started it, as a request to
  finish. Started in the foreground it does not outlive that command.
- Whether a gateway runs, and which process it is, is told by the kernel at the admin socket, never by a file.
- A gateway that refuses to tell its status runs: its database may be away for a moment, or who started it be no
  administrator of the appliance. Nothing is stopped for that.
- Everything that waits has a deadline and says what it waits for.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import ClassVar

from api.admin import types
from api.admin.client import AdminClient, ApplianceDown, ApplianceSilent, Refused
from appliance.errors import Fault, HoldfastError

GATEWAY_LOG = Path("log") / "gateway.log"
_LOG_BOUND_BYTES = 16 << 20  # a longer log is set aside when the gateway starts
_TOLD_LINES = 12
_SHOWN_COLUMNS = 100
_LOOKED_BACK_BYTES = 64 << 10
_TOLD_BYTES = 64 << 10
_ASK_EVERY_S = 0.2
_HEARTBEAT_S = 10.0
_FIRST_ANSWER_S = 60.0
_AT_ONCE_S = 15.0  # from a second signal to the end: broken-off turns are committed, the engine is stopped
_PR_SET_PDEATHSIG = 1


class AlreadyRunning(HoldfastError):
    """A gateway serves this state directory already."""

    code: ClassVar[str] = "already_running"
    fault: ClassVar[Fault] = Fault.CONFLICT


class GatewayDied(HoldfastError):
    """The gateway ended by itself."""

    code: ClassVar[str] = "gateway_died"
    fault: ClassVar[Fault] = Fault.INTERNAL


class NotReadyInTime(HoldfastError, TimeoutError):
    """The appliance was not ready at the deadline."""

    code: ClassVar[str] = "not_ready_in_time"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class EngineGaveUp(HoldfastError):
    """The engine will not start."""

    code: ClassVar[str] = "engine_does_not_start"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class StillRunning(HoldfastError, TimeoutError):
    """The gateway had not ended at the deadline."""

    code: ClassVar[str] = "still_running"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class StopRequested(Exception):
    """A signal asked this command to end what it started."""


class Gateway:
    """A gateway that this command started.

    Args:
        outlives: whether it goes on when this command ends.
        environment: settings for it, besides this process's own environment.
    """

    def __init__(self, state_dir: Path, environment: Mapping[str, str], *, outlives: bool) -> None:
        self._client = AdminClient(state_dir, deadline_s=10.0)
        self._denied: HoldfastError | None = None
        self._log = state_dir / GATEWAY_LOG
        self._log.parent.mkdir(mode=0o700, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > _LOG_BOUND_BYTES:
            self._log.replace(self._log.with_suffix(".log.1"))
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._began_at = os.fstat(descriptor).st_size
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "api"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=descriptor,
                env={**os.environ, **environment, "HOLDFAST_STATE_DIR": str(state_dir)},
                cwd="/",
                start_new_session=True,
                preexec_fn=None if outlives else _end_with_parent,
            )
        finally:
            os.close(descriptor)

    @property
    def pid(self) -> int:
        """The gateway's process."""
        return self._child.pid

    def wait_until_ready(self, say: Callable[[str], None], timeout_s: float) -> types.Status | None:
        """Wait until everything serves, or until only the passphrase is missing; says what it waits for.

        Args:
            timeout_s: from the gateway's first answer on.

        Returns:
            The status; None: everything serves, and this user may know no more.

        Raises:
            GatewayDied: the gateway ended.
            AlreadyRunning: another one has the state directory.
            EngineGaveUp: the engine will not start.
            NotReadyInTime: after `timeout_s` something was still missing.
        """
        deadline = time.monotonic() + _FIRST_ANSWER_S
        waiting = _Waiting(say, self._engine_says)
        status: types.Status | HoldfastError | None = None
        while time.monotonic() < deadline:
            seen, known = self.ask(), status
            status = seen or known
            if seen is not None and known is None:
                deadline = time.monotonic() + timeout_s
            if self._serves_and_tells_no_more():
                return None
            if isinstance(status, types.Status):
                if status.ready or status.vault_sealed:
                    return status
                engine = next(part for part in status.parts if part.name == "engine")
                if engine.state == "failed":
                    raise EngineGaveUp(
                        "the engine does not start",
                        cause=engine.detail,
                        remedy="`holdfast logs engine` has what it said; `holdfast doctor` checks this machine",
                    )
            waiting.for_parts(status)
            time.sleep(_ASK_EVERY_S)
        raise NotReadyInTime(
            f"the appliance is not ready after {timeout_s if status is not None else _FIRST_ANSWER_S:g} s",
            cause="; ".join(_unready(status)) or "the gateway does not answer",
            remedy="`holdfast logs` tells what it is busy with; --timeout waits longer",
        )

    def ask(self) -> types.Status | HoldfastError | None:
        """The gateway's status now, or why it does not tell it; None while it does not answer.

        Raises:
            GatewayDied, AlreadyRunning: it ended.
        """
        if self._child.poll() is not None:
            raise self._death()
        try:
            if self._client.gateway_pid() != self._child.pid:
                return None  # another one: this one finds the directory locked, and ends
            if self._denied is None:
                return self._client.status()
        except (ApplianceDown, ApplianceSilent):
            return None
        except HoldfastError as refusal:
            if refusal.fault is not Fault.DENIED:
                return refusal
            self._denied = refusal  # as it will be: asking again would only be recorded again
        return self._denied

    def _serves_and_tells_no_more(self) -> bool:
        try:
            return self._denied is not None and self._client.ready()
        except (ApplianceDown, ApplianceSilent):
            return False

    @property
    def ended_well(self) -> bool:
        """Whether the gateway ended because it was asked to."""
        return self._child.poll() == 0

    def wait(self, timeout_s: float) -> bool:
        """Whether the gateway ended within `timeout_s`."""
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self, timeout_s: float) -> bool:
        """Ask the gateway to finish and end, and wait; whether it did so in its own time.

        A signal to this command meanwhile has it end at once, and so does the end of `timeout_s`.
        """
        try:
            self._child.terminate()
            if self.wait(timeout_s):
                return True
        except StopRequested:
            pass
        try:
            self._child.send_signal(signal.SIGINT)  # the second one: no more waiting for what runs
            if not self.wait(_AT_ONCE_S):
                self._child.kill()
        except StopRequested:
            self._child.kill()
        self._child.wait()
        return False

    def _death(self) -> HoldfastError:
        """Why the gateway ended: in its own words, else in the last ones of its log."""
        told = self._told()
        try:
            return already_running(self._client.gateway_pid())
        except HoldfastError:
            pass
        if told is not None:
            return told
        status = self._child.returncode
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        said = "\n        ".join(self._last_words()) or "nothing"
        return GatewayDied(
            "the gateway ended",
            cause=f"{how}; the end of its log:\n        {said}",
            remedy="`holdfast logs gateway` has the rest; `holdfast doctor` checks this machine",
        )

    def _told(self) -> HoldfastError | None:
        if self._child.stdout is None:
            return None
        try:
            return Refused(types.ErrorBody.model_validate_json(self._child.stdout.read(_TOLD_BYTES)))
        except ValueError:
            return None

    def _last_words(self) -> list[str]:
        return last_lines(self._log, _TOLD_LINES, not_before=self._began_at)

    def _engine_says(self) -> str:
        """What stands last in the engine's log, shortened."""
        log = self._log.with_name("engine.log")
        line = "".join(last_lines(log, 1))
        return line if len(line) <= _SHOWN_COLUMNS else f"{line[:_SHOWN_COLUMNS]}…"


def last_lines(log: Path, count: int, *, not_before: int = 0) -> list[str]:
    """At most the last `count` lines of a log, from the byte `not_before` on; none when there is no log."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(min(not_before, end), end - _LOOKED_BACK_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def already_running(pid: int) -> AlreadyRunning:
    """The error that names a gateway which is there already."""
    return AlreadyRunning(
        f"the appliance is running already, as process {pid}",
        cause="one gateway at a time serves a state directory",
        remedy="`holdfast status` tells how it is, `holdfast down` stops it; --state-dir names another appliance",
    )


def untold(refusal: HoldfastError) -> str:
    """Of a gateway that refused to tell its status."""
    return f"it runs, and does not tell how it is ({refusal.code}: {refusal.cause})"


def refuse_if_running(state_dir: Path) -> None:
    """Raises `AlreadyRunning` when a gateway serves `state_dir`."""
    try:
        pid = AdminClient(state_dir, deadline_s=5.0).gateway_pid()
    except ApplianceDown:
        return
    raise already_running(pid)


def stop_running(state_dir: Path, *, timeout_s: float, at_once: bool) -> int | None:
    """Stop the gateway that serves `state_dir`; its pid, or None when there was none.

    Args:
        at_once: turns that run are broken off, and kept as they are; killed when that takes too long.

    Raises:
        StillRunning: it had not ended after `timeout_s`.
    """
    client = AdminClient(state_dir, deadline_s=5.0)
    try:
        pid = client.gateway_pid()
        process = os.pidfd_open(pid)
    except (ApplianceDown, ProcessLookupError):
        return None
    try:
        # The pid may have been given to another process between the two calls above.
        if client.gateway_pid() != pid:
            return None
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if at_once:
            signal.pidfd_send_signal(process, signal.SIGINT)  # the second one: no more waiting for what runs
        ended, _, _ = select.select([process], [], [], _AT_ONCE_S if at_once else timeout_s)
        if at_once and not ended:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            ended, _, _ = select.select([process], [], [], _AT_ONCE_S)
    except (ApplianceDown, ProcessLookupError):
        return pid
    finally:
        os.close(process)
    if not ended:
        raise StillRunning(
            f"the gateway (process {pid}) has not ended after {timeout_s:g} s",
            cause="it was asked to, and lets the turns that run finish first",
            remedy="Wait and run `holdfast down` again; `holdfast down --now` ends it without waiting",
        )
    return pid


@contextmanager
def signals_as_requests() -> Iterator[None]:
    """Within it, SIGINT, SIGTERM and SIGHUP raise `StopRequested` in the main thread."""

    def request(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise StopRequested

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.signal(number, request) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class _Waiting:
    """Says what is waited for: at once when it changes, and now and then while it does not.

    Args:
        latest: what the engine wrote last, for those who wait long.
    """

    def __init__(
        self, say: Callable[[str], None], latest: Callable[[], str], *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._say = say
        self._latest = latest
        self._now = now
        self._began = now()
        self._told: str | None = None
        self._told_at = self._began

    def for_parts(self, status: types.Status | HoldfastError | None) -> None:
        now = self._now()
        waiting_for = "; ".join(_unready(status)) if status is not None else "the gateway starts"
        if waiting_for != self._told:
            self._say(f"  {now - self._began:4.0f} s  {waiting_for}")
        elif now - self._told_at > _HEARTBEAT_S:
            latest = self._latest()
            self._say(f"  {now - self._began:4.0f} s  still: {waiting_for}{f' ({latest})' if latest else ''}")
        else:
            return
        self._told, self._told_at = waiting_for, now


def _unready(status: types.Status | HoldfastError | None) -> list[str]:
    if status is None:
        return []
    if isinstance(status, HoldfastError):
        return [untold(status)]
    return [f"{part.name}: {part.detail}" for part in status.parts if part.state != "ready"]


def _end_with_parent() -> None:
    """In the child: be asked to finish when the parent dies (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
