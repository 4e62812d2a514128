"""The launcher and the cage with a fake engine in it: isolation, restarts, and nothing left behind."""

import asyncio
import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from appliance.engine import cage, launcher
from appliance.engine.client import EngineClient, EngineLost, EngineUnavailable
from appliance.engine.command_line import EngineSpec
from appliance.engine.launcher import FRUITLESS_STARTS, EngineFailed, EngineProcess, EngineState, Patience
from appliance.engine.log import Sieve
from appliance.vault.errors import PlaintextSwap
from tests.unit.engine.conftest import left_behind

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
GATEWAY = Path(__file__).with_name("gateway.py")


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.slept: list[float] = []
        self.moved = asyncio.Event()

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds
        self.moved.set()
        await asyncio.sleep(0.005)  # the engine is a process: it needs some time of the world's


class Engine:
    """An engine process under test, its states as they came, and a client."""

    def __init__(self, spec: EngineSpec, mark: str, behaviour: str, clock: Clock) -> None:
        self.client = EngineClient(spec.socket)
        self.behaviour = behaviour  # of its next life
        self.states: list[EngineState] = []
        self._changed = asyncio.Event()
        self._slept = clock.moved
        self.process = EngineProcess(
            spec,
            self.client,
            base_environment={"SECRET": "word"},
            command=lambda _: [sys.executable, str(FAKE_ENGINE), mark, self.behaviour],
            now=clock.now,
            sleep=clock.sleep,
            on_change=self._note,
        )

    def _note(self, process: EngineProcess) -> None:
        self.states.append(process.state)
        self._changed.set()

    async def seen(self) -> dict[str, object]:
        """What the fake engine sees."""
        seen: dict[str, object] = json.loads(await self.client.metrics())
        return seen

    async def die(self) -> None:
        """The engine kills itself with SIGKILL."""
        with pytest.raises(EngineLost):
            await self.client.call("/die", b"{}", request_id="req_1")

    async def until(self, state: EngineState) -> None:
        """Return at the next change into `state`, or at once when it is there."""
        async with asyncio.timeout(30):
            while self.process.state is not state:
                self._changed.clear()
                await self._changed.wait()

    async def written(self, word: str) -> None:
        """Return when the engine has written a line with this word."""
        async with asyncio.timeout(30):
            while word not in text_of(self.process.spec.log_path):
                self._slept.clear()
                await self._slept.wait()


Start = Callable[..., Engine]


def limits_of(mark: str) -> list[str]:
    return [Path(process, "limits").read_text() for process in left_behind(mark) if process.startswith("/proc")]


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def mode(path: str) -> int | None:
    return Path(path).stat().st_mode & 0o777 if Path(path).exists() else None


@pytest.fixture
async def make(spec: EngineSpec, mark: str) -> AsyncIterator[Start]:
    """Make an engine of some behaviour; it is stopped at the end, and must leave nothing."""
    made: list[Engine] = []

    def make_one(behaviour: str = "serve", clock: Clock | None = None, **changes: object) -> Engine:
        made.append(Engine(replace(spec, **changes), mark, behaviour, clock or Clock()))  # type: ignore[arg-type]
        return made[-1]

    yield make_one
    for engine in made:
        await engine.process.stop(deadline_s=0.2)
        await engine.client.close()
    assert left_behind(mark) == []
    assert not spec.socket.exists()


async def test_an_engine_becomes_ready_and_stops(make: Start) -> None:
    engine = make()
    await engine.process.start()
    await engine.process.wait_ready(30)
    assert await engine.client.health()
    await engine.process.stop()
    assert engine.states == [EngineState.STARTING, EngineState.READY, EngineState.STOPPED]
    assert engine.process.pid is None
    with pytest.raises(EngineUnavailable):
        await engine.process.wait_ready(30)


async def test_an_isolated_engine_sees_nothing_of_the_host(make: Start, spec: EngineSpec, tmp_path: Path) -> None:
    engine = make(isolation="required")
    await engine.process.start()
    await engine.process.wait_ready(30)
    seen = await engine.seen()
    assert engine.process.isolated
    assert engine.process.isolation_detail == ""
    assert seen["interfaces"] == ["lo"]
    assert isinstance(seen["processes"], int)
    assert seen["processes"] <= 4
    assert {"SECRET", "PYTHONPATH"} & set(seen["environment"]) == set()  # type: ignore[call-overload]
    # Of /tmp it sees its own files and the folders that it was given, were they in there.
    folders = (tmp_path, spec.model, FAKE_ENGINE, Path(sys.prefix))
    given = [path.relative_to("/tmp").parts[0] for path in folders if path.is_relative_to("/tmp")]
    names = [name for name in seen["tmp"] if not name.startswith("mark")]  # type: ignore[attr-defined]
    assert set(names) <= set(given)


async def test_the_user_namespace_of_an_ordinary_user_does_as_well(
    make: Start, tmp_path: Path, python_in_user_namespace: Path
) -> None:
    engine = make(isolation="required", python=python_in_user_namespace)
    await engine.process.start()
    await engine.process.wait_ready(30)
    seen = await engine.seen()
    assert (engine.process.isolated, seen["interfaces"]) == (True, ["lo"])


class State:
    """A gateway's state directory, with an admin socket that listens, in a folder that the engine is given."""

    def __init__(self, folder: Path, spec: EngineSpec) -> None:
        self.path = folder.joinpath(*["a-home-that-is-very-deep"] * 6, "state")
        self.run_dir = self.path / "run" / "engine"
        self.model = self.path / "models" / "mine"
        for made in (self.run_dir, self.model):
            made.mkdir(parents=True)
        (self.path / "root.key").write_text("secret")
        (self.model / "config.json").write_text("{}")
        (folder / "config.json").write_text("{}")
        # What holds the state directory is kept, so that nothing but its own cover hides it.
        self.changes = {"model": folder, "run_dir": self.run_dir, "hidden_dir": self.path}
        self.admin = socket.socket(socket.AF_UNIX)
        run = os.open(self.run_dir.parent, os.O_PATH)
        self.admin.bind(f"/proc/self/fd/{run}/admin.sock")
        os.close(run)
        self.admin.listen()

    async def looked_at(self, engine: Engine, *names: str) -> list[str]:
        """What the engine finds at these paths."""
        (self.run_dir / "look-at").write_text("\n".join(names))
        await engine.process.start()
        await engine.process.wait_ready(30)
        files = (await engine.seen())["files"]
        assert isinstance(files, dict)
        return [files[name] for name in names]


@pytest.fixture
def state(tmp_path: Path, spec: EngineSpec) -> Iterator[State]:
    state = State(tmp_path / "home", spec)
    yield state
    state.admin.close()


@pytest.mark.parametrize("ordinary_user", [False, True], ids=["root", "ordinary user"])
async def test_an_isolated_engine_sees_its_own_folder_of_the_state_directory_and_no_more(
    make: Start, state: State, python_in_user_namespace: Path, ordinary_user: bool
) -> None:
    changes = state.changes | ({"python": python_in_user_namespace} if ordinary_user else {})
    engine = make(isolation="required", **changes)
    looked = await state.looked_at(
        engine,
        "../admin.sock",
        "/proc/1/cwd/../admin.sock",
        "../../root.key",
        str(state.path / "root.key"),
        str(state.path),
        str(state.path / "run"),
        str(state.run_dir / "look-at"),
    )
    assert set(looked[:4]) <= {"FileNotFoundError", "PermissionError"}
    assert looked[4:6] == ["run", "engine"]
    assert "admin.sock" in looked[6]


async def test_a_model_in_the_state_directory_is_seen(make: Start, state: State) -> None:
    engine = make(isolation="required", **(state.changes | {"model": state.model}))
    looked = await state.looked_at(engine, str(state.path), str(state.model / "config.json"), "../../root.key")
    assert looked == ["models run", "{}", "FileNotFoundError"]


@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "not isolated"])
async def test_processes_of_the_engine_are_told_from_all_others(
    make: Start, mark: str, isolated: bool, python_without_namespaces: Path
) -> None:
    engine = make(**({} if isolated else {"python": python_without_namespaces}))
    await engine.process.start()
    await engine.process.wait_ready(30)
    # One of them has left its session; its parent may go too, and its environment be another.
    theirs = [int(path.removeprefix("/proc/")) for path in left_behind(mark) if path.startswith("/proc/")]
    assert len(theirs) >= 3
    assert [process for process in theirs if not engine.process.owns(process)] == []
    assert not engine.process.owns(os.getpid())
    assert not engine.process.owns(1)
    ended = await asyncio.create_subprocess_exec("true")
    await ended.wait()
    for untold in (ended.pid, 0):
        assert engine.process.owns(untold)


async def test_a_process_of_the_engine_is_told_without_its_mark(make: Start, mark: str) -> None:
    engine = make()
    await engine.process.start()
    await engine.process.wait_ready(30)
    theirs = [int(path.removeprefix("/proc/")) for path in left_behind(mark) if path.startswith("/proc/")]
    elsewhere = Path("/another")
    assert [process for process in theirs if not cage.belongs_to(process, engine.process.pid, elsewhere)] == []
    assert any(cage.belongs_to(process, None, engine.process.spec.run_dir) for process in theirs)


async def test_no_process_of_the_engine_dumps_core_or_holds_rights_it_does_not_need(make: Start, mark: str) -> None:
    engine = make()
    await engine.process.start()
    await engine.process.wait_ready(30)
    seen = await engine.seen()
    assert seen["core_limit"] == [1, 1]  # one byte: less than a file needs, and no dump to a pipe either
    read_pin_and_place = 1 << 2 | 1 << 14 | 1 << 23
    assert int(str(seen["rights"]), 16) & ~read_pin_and_place == 0
    limits = limits_of(mark)
    assert len(limits) >= 3
    assert all("Max core file size        1                    1  " in text for text in limits)


async def test_without_namespaces_the_engine_runs_and_says_so(make: Start, python_without_namespaces: Path) -> None:
    engine = make(python=python_without_namespaces)
    await engine.process.start()
    await engine.process.wait_ready(30)
    assert not engine.process.isolated
    assert "Operation not permitted" in engine.process.isolation_detail
    environment = (await engine.seen())["environment"]
    assert isinstance(environment, dict)
    assert mode(environment["TMPDIR"]) == 0o700
    await engine.process.stop()
    assert mode(environment["TMPDIR"]) is None


async def test_isolation_that_is_required_and_cannot_be_had_fails_at_once(
    make: Start, python_without_namespaces: Path
) -> None:
    engine = make(python=python_without_namespaces, isolation="required")
    await engine.process.start()
    with pytest.raises(EngineFailed, match="must be isolated") as failed:
        await engine.process.wait_ready(30)
    assert "where-allowed" in failed.value.remedy
    assert engine.process.restarts == 0


@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "not isolated"])
async def test_a_gateway_that_is_killed_takes_the_engine_with_it(
    spec: EngineSpec, tmp_path: Path, mark: str, isolated: bool, python_without_namespaces: Path
) -> None:
    python = spec.python if isolated else python_without_namespaces
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, str(GATEWAY), str(tmp_path), mark, str(python), stdout=subprocess.PIPE
    )
    assert gateway.stdout is not None
    async with asyncio.timeout(30):
        cage, said = (await gateway.stdout.readline()).split()
    assert said == str(isolated).encode()
    assert len(left_behind(mark)) >= (4 if isolated else 6)
    ended = os.pidfd_open(int(cage))
    gateway.kill()
    await gateway.wait()
    assert await asyncio.to_thread(select.select, [ended], [], [], 30.0) != ([], [], [])
    os.close(ended)
    assert left_behind(mark) == []
    assert not (tmp_path / "run" / "engine.sock").exists()
    assert not (tmp_path / "run" / "scratch").exists()


async def test_a_cage_that_is_killed_takes_the_engine_with_it_and_both_come_back(
    make: Start, spec: EngineSpec, python_without_namespaces: Path
) -> None:
    for python in (spec.python, python_without_namespaces):
        engine = make(python=python)
        await engine.process.start()
        await engine.process.wait_ready(30)
        assert engine.process.pid is not None
        os.kill(engine.process.pid, signal.SIGKILL)
        await engine.until(EngineState.STARTING)
        await engine.process.wait_ready(30)
        assert engine.process.restarts == 1
        await engine.process.stop(deadline_s=0.2)


async def test_a_killed_engine_is_started_again_and_serves(make: Start, mark: str) -> None:
    engine = make()
    await engine.process.start()
    await engine.process.wait_ready(30)
    await engine.die()
    await engine.until(EngineState.STARTING)
    assert "signal 9 (SIGKILL)" in engine.process.detail
    await engine.process.wait_ready(30)
    assert await engine.client.health()
    assert engine.process.restarts == 1
    assert engine.states == [
        EngineState.STARTING,
        EngineState.READY,
        EngineState.RESTARTING,
        EngineState.STARTING,
        EngineState.READY,
    ]


async def test_an_engine_that_ended_is_not_started_again_while_the_machine_must_not_run_one(
    make: Start, mark: str
) -> None:
    engine = make(restart_backoff_s=7.0)
    forbidden: list[bool] = []
    seen: list[tuple[str, list[str]]] = []

    def may_start() -> None:
        if any(forbidden):
            raise PlaintextSwap("no", cause="swap on /dev/sdz9 is not encrypted", remedy="Run `swapoff -a`")

    async def sleep(seconds: float) -> None:
        if seconds >= 7:
            seen.append((engine.process.detail, left_behind(mark)))
            if len(seen) == FRUITLESS_STARTS + 2:
                forbidden.clear()
        await asyncio.sleep(0.005)

    engine.process._sleep, engine.process._may_start = sleep, may_start
    await engine.process.start()
    await engine.process.wait_ready(30)
    forbidden.append(True)
    await engine.die()
    await engine.until(EngineState.RESTARTING)
    await engine.process.wait_ready(30)
    assert len(seen) == FRUITLESS_STARTS + 2, "an engine that served is not given up"
    assert all(detail.startswith("swap on /dev/sdz9 is not encrypted; it is started again") for detail, _ in seen[1:])
    assert not any(left for _, left in seen[1:])


async def test_a_machine_that_must_not_run_an_engine_never_does_and_what_to_do_is_said(make: Start, mark: str) -> None:
    engine = make()

    def may_start() -> None:
        raise PlaintextSwap("no", cause="swap on /dev/sdz9 is not encrypted", remedy="Run `swapoff -a`")

    engine.process._may_start = may_start
    await engine.process.start()
    with pytest.raises(EngineFailed, match="swap on /dev/sdz9") as failed:
        await engine.process.wait_ready(30)
    assert failed.value.remedy == "Run `swapoff -a`"
    assert left_behind(mark) == []


async def test_a_start_that_may_heal_is_tried_three_times(make: Start) -> None:
    clock = Clock()
    engine = make("crash", clock, restart_backoff_s=7.0)
    await engine.process.start()
    with pytest.raises(EngineFailed, match="RuntimeError: the device is busy"):
        await engine.process.wait_ready(30)
    assert [pause for pause in clock.slept if pause >= 7] == [7.0, 14.0]
    assert engine.process.restarts == 2
    assert engine.process.state is EngineState.FAILED


def refuse_a_descriptor(patch: pytest.MonkeyPatch) -> None:
    real = os.pipe
    patch.setattr(os, "pipe", lambda: full() if asked_by_the_launcher() else real())


def refuse_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Path, "write_text", full)


def refuse_a_process(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(asyncio, "create_subprocess_exec", full)


def refuse_to_tell_of_its_end(patch: pytest.MonkeyPatch) -> None:
    real = os.pidfd_open
    patch.setattr(os, "pidfd_open", lambda pid: full() if asked_by_the_launcher() else real(pid))


def refuse_to_watch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(asyncio.get_running_loop(), "add_reader", full)


REFUSED = [refuse_a_descriptor, refuse_room, refuse_a_process, refuse_to_tell_of_its_end, refuse_to_watch]


def open_descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def asked_by_the_launcher() -> bool:
    return sys._getframe(2).f_globals is vars(launcher)


@pytest.mark.parametrize("refuse", REFUSED)
async def test_an_engine_that_served_is_started_again_until_the_system_lets_it(
    make: Start, mark: str, refuse: Callable[[pytest.MonkeyPatch], None]
) -> None:
    engine = make(restart_backoff_s=7.0)
    seen: list[tuple[str, int, list[str]]] = []
    lets_it = asyncio.Event()

    async def sleep(seconds: float) -> None:
        if seconds >= 7:
            seen.append((engine.process.detail, open_descriptors(), left_behind(mark)))
            if len(seen) == 1:
                refuse(patch)
            elif len(seen) == FRUITLESS_STARTS + 2:
                patch.undo()
                lets_it.set()
        await asyncio.sleep(0.005)

    engine.process._sleep = sleep
    with pytest.MonkeyPatch.context() as patch:
        await engine.process.start()
        await engine.process.wait_ready(30)
        await engine.die()
        async with asyncio.timeout(30):
            await lets_it.wait()
        await engine.process.wait_ready(30)
    details, descriptors, left = zip(*seen[1:], strict=True)
    assert all(each.startswith("the system refused what a start needs: [Errno 24]") for each in details)
    assert set(descriptors) == {seen[0][1]}  # nothing was left open
    assert not any(left)  # nor running


async def test_a_start_that_the_system_refuses_is_tried_three_times(
    make: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    refuse_a_process(monkeypatch)
    await engine.process.start()
    with pytest.raises(EngineFailed, match="Too many open files") as failed:
        await engine.process.wait_ready(30)
    assert "holdfast doctor" in failed.value.remedy
    assert engine.process.restarts == 2


@pytest.fixture
def few_descriptors() -> Iterator[Callable[[int], None]]:
    """Leave this process so many descriptors."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def leave(count: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        give_back(count)

    def give_back(count: int) -> None:
        for _ in range(min(count, len(taken))):
            os.close(taken.pop())

    yield leave
    give_back(len(taken))
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_without_descriptors_for_all_of_a_start_none_is_begun(
    make: Start, spec: EngineSpec, few_descriptors: Callable[[int], None]
) -> None:
    few_descriptors(8)
    engine = make()
    await engine.process.start()
    with pytest.raises(EngineFailed, match="Too many open files"):
        await engine.process.wait_ready(30)
    assert not spec.run_dir.exists()


def memory(patch: pytest.MonkeyPatch, available_gib: Callable[[], int]) -> None:
    patch.setattr(launcher, "_meminfo", lambda: f"MemTotal: {192 << 20} kB\nMemAvailable: {available_gib() << 20} kB\n")


async def test_memory_that_another_engine_gives_back_is_waited_for(
    make: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    memory(monkeypatch, lambda: 20 if clock.time < 1020 else 150)
    engine = make("serve", clock, dram_bytes=90 << 30)
    await engine.process.start()
    await asyncio.wait_for(clock.moved.wait(), 30)
    waiting = (
        "it is starting; it waits for memory: tiers.dram_bytes asks for 90.0 GiB of memory, and 20.0 GiB is available"
    )
    assert engine.process.detail == waiting
    await engine.process.wait_ready(30)
    assert engine.states == [EngineState.STARTING, EngineState.READY]


async def test_memory_that_stays_away_ends_a_start_as_anything_else_does(
    make: Start, spec: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    memory(monkeypatch, lambda: 20)
    engine = make("serve", clock, dram_bytes=90 << 30, restart_backoff_s=7.0)
    await engine.process.start()
    with pytest.raises(EngineFailed, match=r"20\.0 GiB is available") as failed:
        await engine.process.wait_ready(30)
    assert "tiers.dram_bytes" in failed.value.remedy
    assert [pause for pause in clock.slept if pause >= 7] == [7.0, 14.0]
    assert sum(clock.slept) == pytest.approx(FRUITLESS_STARTS * launcher.MEMORY_WAIT_S + 21, abs=1.0)
    assert not spec.run_dir.exists()


async def test_more_memory_than_the_machine_can_give_fails_before_anything_starts(
    make: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, lambda: 192)
    engine = make(dram_bytes=97 << 30)
    with pytest.raises(EngineFailed, match=r"at most 96\.0 GiB"):
        await engine.process.start()


async def test_a_start_that_cannot_heal_is_tried_once(make: Start, spec: EngineSpec) -> None:
    engine = make("refuse")
    await engine.process.start()
    with pytest.raises(EngineFailed, match="ModuleNotFoundError: No module named 'vllm'") as failed:
        await engine.process.wait_ready(30)
    assert str(spec.log_path) in failed.value.remedy
    assert engine.process.restarts == 0


async def test_what_an_engine_that_served_says_of_a_start_is_not_believed_for_good(make: Start) -> None:
    clock = Clock()
    engine = make("serve", clock, restart_backoff_s=7.0)
    await engine.process.start()
    await engine.process.wait_ready(30)
    engine.behaviour = "refuse"
    await engine.die()
    async with asyncio.timeout(30):
        while engine.process.restarts <= FRUITLESS_STARTS:
            clock.moved.clear()
            await clock.moved.wait()
    assert "ModuleNotFoundError" in engine.process.detail
    engine.behaviour = "serve"
    await engine.process.wait_ready(30)


@pytest.mark.parametrize(
    ("missing", "said"), [("python", "there is no interpreter at"), ("model", "it holds no config.json")]
)
async def test_what_is_not_there_fails_before_anything_starts(
    make: Start, tmp_path: Path, missing: str, said: str
) -> None:
    engine = make(**{missing: tmp_path / "nothing"})
    with pytest.raises(EngineFailed, match=said):
        await engine.process.start()
    assert engine.process.state is EngineState.FAILED


async def test_an_engine_that_is_never_ready_is_given_up(make: Start) -> None:
    engine = make("deaf", ready_timeout_s=0.5)
    await engine.process.start()
    with pytest.raises(EngineFailed, match=r"not ready after 0\.5 s"):
        await engine.process.wait_ready(60)


async def test_an_engine_that_falls_silent_is_started_again(make: Start) -> None:
    engine = make("sick")
    await engine.process.start()
    await engine.until(EngineState.READY)
    await engine.until(EngineState.STARTING)
    assert "did not answer for 60 s" in engine.process.detail


async def test_an_engine_that_ignores_the_order_to_stop_is_killed(make: Start, mark: str) -> None:
    engine = make("deaf")
    await engine.process.start()
    await engine.written(mark)
    await engine.process.stop(deadline_s=0.1)
    assert engine.process.state is EngineState.STOPPED
    assert left_behind(mark) == []


async def test_stopping_before_the_next_start_cancels_it(make: Start, spec: EngineSpec) -> None:
    engine = make("crash", restart_backoff_s=7.0)

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds if seconds >= 7 else 0.005)

    engine.process._sleep = sleep
    await engine.process.start()
    await engine.until(EngineState.RESTARTING)
    await engine.process.stop()
    assert engine.process.state is EngineState.STOPPED


async def test_the_log_is_private_and_holds_what_the_engine_wrote(make: Start, spec: EngineSpec, mark: str) -> None:
    engine = make()
    await engine.process.start()
    await engine.process.wait_ready(30)
    await engine.process.stop()
    assert spec.log_path.stat().st_mode & 0o777 == 0o600
    assert f"fake engine {mark}" in spec.log_path.read_text()
    assert spec.run_dir.stat().st_mode & 0o777 == 0o700


async def test_what_an_engine_that_serves_writes_past_its_log_is_counted_and_not_kept(
    make: Start, spec: EngineSpec, mark: str, python_without_namespaces: Path
) -> None:
    for python in (spec.python, python_without_namespaces):
        engine = make(python=python)
        await engine.process.start()
        await engine.process.wait_ready(30)
        await engine.client.call("/say", b"Zanzibar", request_id="req_1")
        await engine.written("Withheld since the engine serves")
        await engine.process.stop()
        log = spec.log_path.read_text()
        assert f"fake engine {mark}" in log
        assert "Zanzibar" not in log + engine.process.detail
        spec.log_path.unlink()


async def test_an_engine_that_is_started_again_is_heard_again_until_it_serves(
    make: Start, spec: EngineSpec, mark: str
) -> None:
    engine = make()
    await engine.process.start()
    await engine.process.wait_ready(30)
    await engine.die()
    await engine.until(EngineState.STARTING)
    await engine.process.wait_ready(30)
    assert spec.log_path.read_text().count(f"fake engine {mark}") == 2


def test_a_full_log_is_turned_over_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_LOG_BYTES", 1000)
    log = launcher._Log(tmp_path / "engine.log")
    for number in range(100):
        log.write(f"line {number:03} {'x' * 40}\n".encode())
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"engine.log", "engine.log.1"}
    assert all(size <= 1000 for size in sizes.values())
    assert (tmp_path / "engine.log").stat().st_mode & 0o777 == 0o600
    assert log.tail[-1].startswith("line 099")


@pytest.mark.parametrize("refused", ["moved", "open", "replace"])
def test_a_log_that_cannot_be_turned_over_is_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    monkeypatch.setattr(launcher, "_LOG_BYTES", 1000)
    path = tmp_path / "log" / "engine.log"
    path.parent.mkdir()
    log = launcher._Log(path)
    log.write(b"x" * 899 + b"\n")
    with monkeypatch.context() as faulty:
        if refused == "moved":
            path.parent.rename(tmp_path / "moved")
        else:
            faulty.setattr(os if refused == "open" else Path, refused, full)
        for number in range(100):
            log.write(b"%099d\n" % number)
    opened_since = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
    written = b"".join(file.read_bytes() for file in tmp_path.glob("*/engine.log*"))
    assert written.startswith(b"x" * 899 + b"\n" + b"%099d\n" % 0)
    assert len(written) == 2000  # and no more
    assert log.tail[-1].endswith("99")
    path.parent.mkdir(exist_ok=True)
    log.write(b"later\n")  # it can be had again
    assert path.read_bytes() == b"later\n"
    log.close()
    for descriptor in opened_since:
        os.close(descriptor)  # an OSError, had the log closed it


async def test_the_engine_is_read_whatever_becomes_of_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log, asked = launcher._Log(tmp_path / "engine.log"), 0

    def refuse(_: bytes) -> None:
        nonlocal asked
        asked += 1
        raise RuntimeError

    monkeypatch.setattr(log, "write", refuse)
    process = await asyncio.create_subprocess_exec("printf", "%0300000d", "0", stdout=subprocess.PIPE)
    async with asyncio.timeout(30):
        await launcher._copy(process, Sieve("mark", lambda: False), log)
    assert await process.wait() == 0  # printf was not left with a pipe that nobody reads
    assert asked > 1
    log.close()


def test_what_may_quote_a_request_is_withheld_while_it_cannot_be_told_whether_there_was_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not launcher._serves(tmp_path / "serving")
    monkeypatch.setattr(Path, "stat", full)
    assert launcher._serves(tmp_path / "serving")


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    log = launcher._Log(tmp_path / "engine.log")
    for _ in range(100):
        log.write(b"x" * 10_000)
    log.write(b"\n")
    log.close()
    assert len(log.tail) == 1
    assert len(log.tail[0]) <= 1000


def pauses(patience: Patience, *lives: float | None) -> list[float | None]:
    return [patience.pause_after(ready_for_s) for ready_for_s in lives]


def test_the_pause_doubles_up_to_a_minute_for_an_engine_that_keeps_dying() -> None:
    assert pauses(Patience(1.0), *[5.0] * 8) == [1, 2, 4, 8, 16, 32, 60, 60]


def test_the_pause_is_short_again_after_a_stable_minute() -> None:
    assert pauses(Patience(1.0), 5.0, 5.0, 59.0, 60.0, 5.0) == [1, 2, 4, 1, 2]


def test_an_engine_that_was_ready_once_is_never_given_up() -> None:
    assert None not in pauses(Patience(1.0), 0.1, *[None] * 20)


def test_an_engine_whose_start_cannot_heal_is_given_up_unless_it_was_ready_once() -> None:
    patience = Patience(1.0)
    assert patience.pause_after(None, final=True) is None
    assert patience.pause_after(0.1, final=True) == 1
    assert patience.pause_after(None, final=True) == 2


def test_an_engine_that_was_never_ready_is_given_up() -> None:
    assert pauses(Patience(1.0), None, None, None) == [1, 2, None]


@pytest.mark.parametrize(
    ("tail", "cause", "final"),
    [
        (["OSError: [Errno 28] No space left"], "OSError: [Errno 28] No space left", False),
        (["torch.OutOfMemoryError: too little"], "OutOfMemoryError: too little", False),
        (["ValueError: Available memory on node 0 is less"], "ValueError: Available memory on node 0 is less", False),
        (["  ValueError: no such thing"], "ValueError: no such thing", True),
        (
            [
                "2026 ERROR vllm.v1.engine.core[7]: EngineCore failed to start.",
                "    Traceback (most recent call last):",
                "    safetensors_rust.SafetensorError: header too large",
                "RuntimeError: Engine core initialization failed. See root cause above.",
                "nanobind: leaked 4 instances!",
            ],
            "SafetensorError: header too large",
            True,
        ),
        (
            ["pydantic_core.ValidationError: 1 validation error for ModelConfig", "  Value error, max_model_len"],
            "ValidationError: Value error, max_model_len",
            True,
        ),
        (["__main__.py: error: unrecognized arguments: --no"], "unrecognized arguments: --no", True),
        (["something odd", "Bus error (core dumped) of sorts"], "Bus error (core dumped) of sorts", False),
        ([], "it ended with status 1", False),
    ],
)
def test_what_the_last_lines_say(tail: Sequence[str], cause: str, final: bool) -> None:
    death = launcher._death(tail, {"event": "exited", "code": 1, "signal": None}, "", None)
    assert death.cause.endswith(cause)
    assert death.final is final


def test_an_engine_that_served_is_quoted_no_further_than_the_kind_of_its_error() -> None:
    tail = [
        "ValueError: what a start said",
        "2026 ERROR vllm.v1.engine.core[7]: core:1512 It failed.; raised KeyError (a.py:1) < OSError (b.py:2)",
        "2026 ERROR vllm.v1.engine.async_llm[2]: async_llm:9 It failed.; raised EngineDeadError (c.py:3)",
        "what a client said",
    ]
    death = launcher._death(tail, {"event": "exited", "code": 1}, "", 5.0)
    assert death.cause == "it ended with status 1: KeyError"
    assert not death.final
