"""Start vLLM in its cage, watch it, start it again when it dies.

Rules:

- vLLM listens on a Unix socket in a directory that only the appliance's user may enter, and on nothing else that the
  host can reach (`cage`). Where the system does not allow that, `EngineProcess.isolated` is false, and
  `isolation_detail` says why.
- A start that can heal is repeated, after a pause that doubles up to a minute and is short again once the engine has
  been ready for a minute. One that cannot (a model that is not there, an option that vLLM refuses) fails at once, and
  so does an engine that was never ready after three starts: `EngineFailed` says what the engine said last. What the
  system refuses a start (a descriptor, a process, memory, room on the disk) may be had later: it is a start that can
  heal. For memory it waits first: an engine that has ended gives back what it had for a while.
- An engine that was ready once is never given up, whatever it says of a start: the same settings did serve.
- Whether the machine may run an engine at all (`may_start`) is asked before each start, for that can change meanwhile.
- What the engine writes is kept in its log: all of it until it serves, then what `log` says of it. Whatever becomes of
  the log, the engine's pipe is read: an engine that nobody reads stands still.
- Clock and sleep are passed in. What starts here ends here: `stop` and the gateway's own death take every process of
  the engine with them.
"""

import asyncio
import contextlib
import enum
import json
import os
import re
import secrets
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeVar

from appliance.engine.cage import belongs_to, sweep
from appliance.engine.client import EngineClient, EngineUnavailable
from appliance.engine.command_line import LOGGING_NAME, EngineSpec, cage_line, command_line, environment
from appliance.engine.log import RAISED, SERVING_NAME, Sieve, logging_config
from appliance.engine.tier_keys import KeyChannel
from appliance.errors import Fault, HoldfastError

_T = TypeVar("_T")

_LOG_BYTES = 8 << 20  # then it is turned over once; where it cannot be, it grows to twice as much
_TAIL_LINES = 200
_TAIL_LINE_CHARACTERS = 1000

LONGEST_BACKOFF_S = 60.0
STABLE_AFTER_S = 60.0  # ready for so long, a death counts as the first again
FRUITLESS_STARTS = 3  # of an engine that was never ready
HEALTH_INTERVAL_S = 1.0
STARTING_INTERVAL_S = 0.2
SILENT_FOR_S = 60.0  # a ready engine that does not answer for so long is started again
STOP_GRACE_S = 10.0
MEMORY_WAIT_S = 30.0  # each start, for what the tier in DRAM takes
_DESCRIPTORS = 16  # a start takes fewer


class EngineFailed(HoldfastError):
    """The engine cannot be started, and starting it again would not help."""

    code: ClassVar[str] = "engine_failed"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class EngineState(enum.StrEnum):
    """Where the engine stands."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it died; the pause before the next start is running
    FAILED = "failed"  # it is not started again


class Patience:
    """How long to wait before an engine that died is started again, and when to give up.

    The pause doubles with each death up to `LONGEST_BACKOFF_S`; an engine that was ready for `STABLE_AFTER_S` begins
    anew. One that has been ready once is never given up: what fails it, a lack of memory or a model's file system that
    is away, may pass.
    """

    def __init__(self, first_pause_s: float) -> None:
        self._first_pause_s = first_pause_s
        self._next_pause_s = first_pause_s
        self._fruitless: int | None = 0  # None: it was ready once

    def pause_after(self, ready_for_s: float | None, *, final: bool = False) -> float | None:
        """Seconds to wait after a life that was ready for so long (None: never); None to give up.

        `final`: by what it said, another start would end the same way.
        """
        if ready_for_s is not None:
            self._fruitless = None
            if ready_for_s >= STABLE_AFTER_S:
                self._next_pause_s = self._first_pause_s
        elif self._fruitless is not None:
            self._fruitless += 1
            if final or self._fruitless >= FRUITLESS_STARTS:
                return None
        pause_s, self._next_pause_s = self._next_pause_s, min(LONGEST_BACKOFF_S, 2 * self._next_pause_s)
        return pause_s


class EngineProcess:
    """One engine: started, watched, started again.

    Args:
        client: asks whether the engine is ready; it speaks to `spec.socket`.
        base_environment: what `environment` chooses from.
        command: what runs in the cage.
        now: a monotonic clock, in seconds.
        sleep: waits for so many seconds.
        on_change: called after each change of state, in the event loop; it must not block.
        keys: answers the engine when it asks for the keys of its tiers.
        may_start: raises `HoldfastError` where this machine must not run an engine now.

    Attributes:
        state: where the engine stands.
        detail: why, in words for people; without anything that a client sent.
        isolated: whether it runs in namespaces of its own; meaningful from the first `STARTING` on.
        isolation_detail: why it does not.
        restarts: how often it was started again.
        started_at: when it was started last, by `now`.
        failure: what ended it for good.
    """

    def __init__(
        self,
        spec: EngineSpec,
        client: EngineClient,
        *,
        base_environment: Mapping[str, str] | None = None,
        command: Callable[[EngineSpec], list[str]] = command_line,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        on_change: Callable[["EngineProcess"], None] | None = None,
        keys: KeyChannel | None = None,
        may_start: Callable[[], object] = lambda: None,
    ) -> None:
        # What stands in the environment must be what the cage keeps visible: no links on the way.
        self.spec = replace(spec, model=spec.model.resolve(), run_dir=spec.run_dir.resolve())
        self.state = EngineState.STOPPED
        self.detail = "it was not started"
        self.isolated = False
        self.isolation_detail = ""
        self.restarts = 0
        self.started_at: float | None = None
        self.failure: EngineFailed | None = None
        self._client = client
        self._base_environment = os.environ if base_environment is None else base_environment
        self._command = command
        self._now = now
        self._sleep = sleep
        self._on_change = on_change
        self._keys = keys
        self._may_start = may_start
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The cage's process, while there is one."""
        return None if self._process is None else self._process.pid

    def owns(self, process: int) -> bool:
        """Whether a process of this machine is the engine's, or may be: one that has ended cannot be told from it."""
        return belongs_to(process, self.pid, self.spec.run_dir)

    def forget_keys(self) -> None:
        """Have the engine forget the keys of its tiers: the vault was sealed."""
        if self._keys is not None:
            self._keys.sealed()

    async def start(self) -> None:
        """Start the engine and return at once; `wait_ready` waits.

        Raises:
            EngineFailed: the interpreter or the model is not there, or the tier in DRAM is too much for the machine.
        """
        if self._keeper is not None and not self._keeper.done():
            return
        self._stopping = False
        self.failure = _missing(self.spec)
        if self.failure is not None:
            self._become(EngineState.FAILED, self.failure.cause)
            raise self.failure
        self._become(EngineState.STARTING, "it is starting")
        self._keeper = asyncio.create_task(self._keep_running(), name="engine")

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Return when the engine is ready.

        Raises:
            EngineFailed: it will not be.
            EngineUnavailable: it was not within `timeout_s`, or it was stopped.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self.state is not EngineState.READY:
                    if self.failure is not None:
                        raise self.failure
                    if self.state is EngineState.STOPPED:
                        raise _not_ready(self.detail)
                    await self._changed.wait()
        except TimeoutError:
            raise _not_ready(f"{timeout_s:g} s have passed, and {self.detail}") from None

    async def stop(self, deadline_s: float = STOP_GRACE_S) -> None:
        """Ask the engine to stop, kill it after `deadline_s`, and return when nothing of it is left."""
        self._stopping = True
        keeper = self._keeper
        if keeper is None:
            return
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._process.stdin.write(b"\n")
            await asyncio.wait({keeper}, timeout=deadline_s)
        keeper.cancel()
        await asyncio.wait({keeper})
        self._keeper = None
        if self.state is not EngineState.FAILED:
            self._become(EngineState.STOPPED, "it was stopped")

    def _become(self, state: EngineState, detail: str) -> None:
        self.state, self.detail = state, detail
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if self._on_change is not None:
            self._on_change(self)

    async def _keep_running(self) -> None:
        patience = Patience(self.spec.restart_backoff_s)
        while True:
            death = await self._live()
            if self._stopping:
                return
            pause_s = patience.pause_after(death.ready_for_s, final=death.final)
            if pause_s is None:
                self._fail(death)
                return
            self._become(EngineState.RESTARTING, f"{death.cause}; it is started again in {pause_s:g} s")
            await self._sleep(pause_s)
            self.restarts += 1
            self._become(EngineState.STARTING, f"it is starting again: {death.cause}")

    def _fail(self, death: "_Death") -> None:
        self.failure = EngineFailed(
            "the engine cannot be started",
            cause=death.cause,
            remedy=death.remedy or f"Read what it wrote last in {self.spec.log_path}, mend it, and start again",
        )
        self._become(EngineState.FAILED, death.cause)

    async def _live(self) -> "_Death":
        """One life of the engine, from its start to its end; also one that the system refuses."""
        mark = secrets.token_hex(16)
        try:
            self._may_start()
            if lacking := await self._lacking_memory():
                return _Death(lacking, remedy="Lower tiers.dram_bytes, or stop something else")
            _need_descriptors(_DESCRIPTORS)
            _furnish(self.spec, mark)
            with contextlib.closing(_Log(self.spec.log_path)) as log:
                return await self._live_with(log, mark)
        except OSError as error:
            return _Death(
                f"the system refused what a start needs: {error}",
                remedy="Mend that, and start again; `holdfast doctor` checks this machine",
            )
        except HoldfastError as error:
            return _Death(error.cause, remedy=error.remedy)
        finally:
            if self._keys is not None:
                self._keys.close()

    async def _lacking_memory(self) -> str:
        """Wait until the tier in DRAM can be had; why it cannot after `MEMORY_WAIT_S`, if so."""
        detail, deadline = self.detail, self._now() + MEMORY_WAIT_S
        while (lacking := dram_not_available(self.spec.dram_bytes, _meminfo())) and self._now() < deadline:
            self.detail = f"{detail}; it waits for memory: {lacking}"
            await self._sleep(STARTING_INTERVAL_S)
        self.detail = detail
        return lacking

    async def _live_with(self, log: "_Log", mark: str) -> "_Death":
        serving = self.spec.run_dir / SERVING_NAME
        sieve = Sieve(mark, lambda: _serves(serving))
        self.started_at, started_at = self._now(), time.time()
        report, reporting = os.pipe()
        try:
            self._process = process = await self._start_cage(reporting)
        except BaseException:
            os.close(report)
            raise
        finally:
            os.close(reporting)
        copying, heeding = asyncio.create_task(_copy(process, sieve, log)), asyncio.create_task(self._heed(report))
        reaping = asyncio.create_task(process.wait())
        exited: asyncio.Future[int] | asyncio.Future[None] = reaping
        ready_at: float | None = None
        silence = ""
        try:
            exited = _exit_of(process.pid)
            silence = await self._until_ready(exited)
            if not exited.done() and not silence:
                serving.touch(mode=0o600)
                ready_at = self._now()
                self._become(EngineState.READY, f"it serves {self.spec.served_name}")
                silence = await self._until_silent(exited)
        finally:
            died_at = self._now()
            await _end(process, exited)
            await asyncio.wait({heeding}, timeout=STOP_GRACE_S)
            if not (outcome := _result(heeding)):
                with contextlib.suppress(OSError):  # then the next cage does
                    sweep(self.spec.run_dir, started_at)  # the cage was killed: it could not
            await asyncio.wait({copying}, timeout=STOP_GRACE_S)
            copying.cancel()
            log.write(sieve.end())
            heeding.cancel()
            await asyncio.wait({reaping}, timeout=STOP_GRACE_S)  # so that asyncio lets go of it too
            reaping.cancel()
            self._process = None
        return _death(log.tail, outcome, silence, None if ready_at is None else died_at - ready_at)

    async def _start_cage(self, reporting: int) -> asyncio.subprocess.Process:
        spec = self.spec
        with contextlib.nullcontext() if self._keys is None else self._keys.open(self.owns) as keys:
            inherited = (reporting,) if keys is None else (reporting, keys.fileno())
            return await asyncio.create_subprocess_exec(
                *cage_line(spec, inherited, self._command(spec)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                cwd=spec.run_dir,
                env=environment(spec, self._base_environment),
                pass_fds=inherited,
                start_new_session=True,
            )

    async def _until_ready(self, exited: "asyncio.Future[None]") -> str:
        """Wait until the engine is ready or has ended; why it is given up, if it is."""
        deadline = self._now() + self.spec.ready_timeout_s
        while not exited.done():
            if await self._healthy(2.0, exited):
                return ""
            if self._now() >= deadline:
                return f"it was not ready after {self.spec.ready_timeout_s:g} s"
            await self._pause(STARTING_INTERVAL_S, exited)
        return ""

    async def _until_silent(self, exited: "asyncio.Future[None]") -> str:
        """Wait until the engine has ended or has not answered for too long; that, if so."""
        heard_at = self._now()
        while not exited.done():
            await self._pause(HEALTH_INTERVAL_S, exited)
            if exited.done() or await self._healthy(10.0, exited):
                heard_at = self._now()
            elif self._now() - heard_at >= SILENT_FOR_S:
                return f"it did not answer for {SILENT_FOR_S:g} s"
        return ""

    async def _healthy(self, deadline_s: float, exited: "asyncio.Future[None]") -> bool:
        asking = asyncio.ensure_future(self._client.health(deadline_s=deadline_s))
        healthy = await _unless(exited, asking)
        return healthy is True

    async def _pause(self, seconds: float, exited: "asyncio.Future[None]") -> None:
        await _unless(exited, asyncio.ensure_future(self._sleep(seconds)))

    async def _heed(self, descriptor: int) -> dict[str, object]:
        """Read what the cage reports; the last word is how it ended."""
        last: dict[str, object] = {}
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
        )
        try:
            async for line in reader:
                event = json.loads(line)
                if event["event"] == "started":
                    self.isolated, self.isolation_detail = event["isolated"], event["detail"]
                else:
                    last = event
        finally:
            transport.close()  # which closes the pipe, in a moment; whoever else did it might close another's by then
        return last


@dataclass(frozen=True, slots=True)
class _Death:
    """How one life of the engine ended. `final`: by what it said, another start would end the same way."""

    cause: str
    final: bool = False
    ready_for_s: float | None = None  # None: it never was
    remedy: str = ""


class _Log:
    """The engine's log: 0600, turned over once when it is full; and its last lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = self._opened()
        self._size = os.fstat(self._descriptor).st_size
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._line = b""

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, text: bytes) -> None:
        """Append; blocks for as long as the page cache takes."""
        if self._size + len(text) > _LOG_BYTES:
            with contextlib.suppress(OSError):  # then the old file is written on, and the next write tries again
                self._turn_over()
        if self._size + len(text) <= 2 * _LOG_BYTES:
            with contextlib.suppress(OSError):  # a full disk ends no engine: the store says so where it matters
                os.write(self._descriptor, text)
            self._size += len(text)
        *lines, self._line = (self._line + text).split(b"\n")
        self._line = self._line[-_TAIL_LINE_CHARACTERS:]
        self.tail.extend(line[:_TAIL_LINE_CHARACTERS].decode("utf-8", "replace") for line in lines if line.strip())

    def _turn_over(self) -> None:
        """Go on in a new file; the old one stays open until there is one."""
        with contextlib.suppress(FileNotFoundError):  # somebody moved it, or the last attempt did
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        full, self._descriptor, self._size = self._descriptor, self._opened(), 0
        os.close(full)

    def close(self) -> None:
        """Close the file; the last lines stay."""
        os.close(self._descriptor)


async def _copy(process: asyncio.subprocess.Process, sieve: Sieve, log: _Log) -> None:
    if process.stdout is not None:
        while output := await process.stdout.read(1 << 16):
            kept = sieve.pass_on(output)
            with contextlib.suppress(Exception):  # whatever it is: the engine waits for who reads
                log.write(kept)


def _serves(serving: Path) -> bool:
    """Whether the engine serves; also when that cannot be told: what may quote a request is withheld then."""
    try:
        return serving.exists()
    except OSError:
        return True


def _exit_of(pid: int) -> "asyncio.Future[None]":
    """Done when the process has ended, whoever still holds its pipes."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        ended.set_result(None)
        return ended

    def note() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        if not ended.done():
            ended.set_result(None)

    try:
        loop.add_reader(descriptor, note)
    except OSError:
        os.close(descriptor)
        raise
    return ended


async def _end(process: asyncio.subprocess.Process, exited: "asyncio.Future[int] | asyncio.Future[None]") -> None:
    """Let go of the cage and wait for it; then nothing of its session is left."""
    if process.stdin is not None:
        process.stdin.close()
    await asyncio.wait({exited}, timeout=2 * STOP_GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await asyncio.wait({exited}, timeout=STOP_GRACE_S)


async def _unless(exited: "asyncio.Future[None]", other: "asyncio.Future[_T]") -> _T | None:
    """Wait for the other, and give it up when the engine has ended."""
    waited: set[asyncio.Future[_T] | asyncio.Future[None]] = {other, exited}
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        return other.result() if other.done() else None
    finally:
        other.cancel()


def _result(heeding: "asyncio.Task[dict[str, object]]") -> dict[str, object]:
    """The cage's last word; empty when it had none."""
    if heeding.done() and not heeding.cancelled() and heeding.exception() is None:
        return heeding.result()
    return {}


def _need_descriptors(count: int) -> None:
    """Raise an OSError where so many cannot be had: a start that runs out of them midway leaves some open (uvloop)."""
    with contextlib.ExitStack() as opened:
        for _ in range(count):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def _furnish(spec: EngineSpec, mark: str) -> None:
    """Make the engine's private folder, with what it reads there."""
    serving = spec.run_dir / SERVING_NAME
    spec.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    spec.run_dir.chmod(0o700)
    spec.log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if spec.disk_dir is not None:
        with contextlib.suppress(OSError):  # the tier is off then, and says why
            spec.disk_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not spec.disk_dir.is_symlink():
                spec.disk_dir.chmod(0o700)
    serving.unlink(missing_ok=True)
    configuration = spec.run_dir / LOGGING_NAME
    configuration.touch(mode=0o600)
    configuration.write_text(json.dumps(logging_config(mark, str(serving))))


def _missing(spec: EngineSpec) -> EngineFailed | None:
    if not os.access(spec.python, os.X_OK):
        return EngineFailed(
            "the engine cannot be started",
            cause=f"there is no interpreter at {spec.python}",
            remedy="Install the engine's environment with `make run`, or set engine.python",
        )
    if not (spec.model / "config.json").is_file():
        return EngineFailed(
            "the engine cannot be started",
            cause=f"{spec.model} is no model: it holds no config.json",
            remedy="Name the folder that holds the model's config.json and weights, with --model or engine.model",
        )
    return too_much_dram(spec.dram_bytes, _meminfo())


def too_much_dram(dram_bytes: int, meminfo: str) -> EngineFailed | None:
    """Why a DRAM tier of so many bytes can never be had on this machine; None: it can.

    It is shared memory, of which the cage gives half the machine's (tmpfs(5)).

    Args:
        dram_bytes: the tier's size.
        meminfo: the text of /proc/meminfo (proc(5)). What it does not tell is not held against the tier.
    """
    most = _told("MemTotal", meminfo, 2 * dram_bytes) // 2
    if dram_bytes <= most:
        return None
    return EngineFailed(
        "the engine cannot be started",
        cause=f"tiers.dram_bytes asks for {_gib(dram_bytes)} of memory; at most {_gib(most)} can be had, half of the"
        " machine's",
        remedy="Lower tiers.dram_bytes",
    )


def dram_not_available(dram_bytes: int, meminfo: str) -> str:
    """Why a DRAM tier of so many bytes, which is taken whole at the start, cannot be had now; empty: it can.

    For the arguments see `too_much_dram`.
    """
    available = _told("MemAvailable", meminfo, dram_bytes)
    if dram_bytes <= available:
        return ""
    return f"tiers.dram_bytes asks for {_gib(dram_bytes)} of memory, and {_gib(available)} is available"


def _meminfo() -> str:
    return Path("/proc/meminfo").read_text()


def _told(name: str, meminfo: str, otherwise: int) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", meminfo, re.MULTILINE)
    return otherwise if found is None else int(found[1]) << 10


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


# What a Python exception looks like, at the end of a traceback, behind whatever a logger put in front of it.
_EXCEPTION = re.compile(r"(?:^|\s)(?P<kind>(?:\w+\.)*\w*(?:Error|Exception))(?:: (?P<text>.*))?$")
_ARGUMENT = re.compile(r"error: (?P<text>(?:unrecognized|argument|the following) .*)$")
_RAISED = re.compile(rf"{re.escape(RAISED)}(?P<kind>\w+)")
# What the front end says after the core has said why: of a start, and of an engine that served.
_SECOND_HAND = ("Engine core initialization failed", "EngineDeadError")
_FINAL_KINDS = (
    "FileNotFoundError",
    "HFValidationError",
    "ImportError",
    "JSONDecodeError",
    "KeyError",
    "ModuleNotFoundError",
    "NotADirectoryError",
    "NotImplementedError",
    "PermissionError",
    "SafetensorError",
    "ValidationError",
    "ValueError",
)


def _death(tail: Sequence[str], outcome: Mapping[str, object], silence: str, ready_for_s: float | None) -> _Death:
    """What is to be made of an end: the engine's last lines, the cage's last word, whether it was given up."""
    if silence:
        return _Death(silence, ready_for_s=ready_for_s)
    if outcome.get("event") == "refused":
        return _Death(
            f"it must be isolated, and {outcome.get('detail')}",
            final=True,
            remedy="Allow unprivileged user namespaces (on Ubuntu 24.04: an AppArmor profile for this interpreter with"
            ' `userns,`), run the appliance as root, or set engine.isolation to "where-allowed"',
        )
    number = outcome.get("signal")
    if isinstance(number, int):
        return _Death(f"it was killed by signal {number} ({_signal_name(number)})", ready_for_s=ready_for_s)
    said, final = _said(tail) if ready_for_s is None else (_kind_raised(tail), False)
    code = outcome.get("code")
    how = f"it ended with status {code}" if isinstance(code, int) else "its cage was killed"
    return _Death(f"{how}: {said}" if said else how, final=final, ready_for_s=ready_for_s)


def _said(tail: Sequence[str]) -> tuple[str, bool]:
    """The last cause that stands in the log, and whether it is one that no other start would change."""
    for index in range(len(tail) - 1, -1, -1):
        line = tail[index]
        if found := _ARGUMENT.search(line):
            return found["text"], True
        found = _EXCEPTION.search(line)
        if found is None or any(words in line for words in _SECOND_HAND):
            continue
        kind, text = found["kind"].rpartition(".")[2], found["text"] or ""
        if kind == "ValidationError" and index + 1 < len(tail):
            text = tail[index + 1].strip()  # pydantic says on the next line what is wrong
        heals = kind not in _FINAL_KINDS or "memory" in text.lower()
        return f"{kind}: {text}" if text else kind, not heals
    return tail[-1].strip() if tail else "", False


def _kind_raised(tail: Sequence[str]) -> str:
    """The last type of exception in the log of an engine that served."""
    for line in reversed(tail):
        found = _RAISED.search(line)
        if found is not None and not any(words in line for words in _SECOND_HAND):
            return found["kind"]
    return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _not_ready(cause: str) -> EngineUnavailable:
    return EngineUnavailable(
        "the engine is not ready",
        cause=cause,
        remedy="Wait for it to start: `holdfast status` says how far it is, `holdfast logs` why not",
    )
