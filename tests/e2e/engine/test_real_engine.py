"""vLLM itself in the cage: one engine for the whole module, in a folder too deep for a socket's address."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from appliance.engine.client import EngineClient, EngineLost, EngineRejected
from appliance.engine.command_line import EngineSpec, command_line, compute_threads
from appliance.engine.launcher import EngineFailed, EngineProcess, EngineState

ROOT = Path(__file__).parents[3]
TELLING_ENGINE = Path(__file__).with_name("telling_engine.py")
PYTHON = Path(f"{sys.prefix}-engine") / "bin" / "python"
READY_WITHIN_S = 240
WRITE_MODEL = (
    "import sys; from pathlib import Path; from tests.engine.tiny import write_tiny_model as w; w(Path(sys.argv[1]))"
)
SECRET = "Zanzibar"

pytestmark = pytest.mark.timeout(300)


@dataclass
class Running:
    """The engine, the states that it went through, and a client."""

    process: EngineProcess
    client: EngineClient
    states: list[EngineState] = field(default_factory=list)
    died: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, process: EngineProcess) -> None:
        self.states.append(process.state)
        if process.state is EngineState.RESTARTING:
            self.died.set()

    def processes(self) -> list[Path]:
        """vLLM's own processes, in the host's /proc."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marks = (folder / "environ").read_bytes()
            except OSError:
                continue
            if f"HOLDFAST_ENGINE_DIR={self.process.spec.run_dir}".encode() in marks.split(b"\0"):
                found.append(folder)
        return found

    def core(self) -> int:
        """The process in which the model runs."""
        return next(int(folder.name) for folder in self.processes() if "EngineCore" in (folder / "cmdline").read_text())


def apart(processes: list[Path]) -> bool:
    """Whether every one of them has namespaces, and with them files in /tmp and /dev/shm, that are not the host's."""
    kinds = ("net", "mnt", "ipc", "pid")
    return all(
        all((folder / "ns" / kind).readlink() != Path(f"/proc/self/ns/{kind}").readlink() for kind in kinds)
        and all((folder / f"root{path}").stat().st_dev != Path(path).stat().st_dev for path in ("/tmp", "/dev/shm"))
        for folder in processes
    )


def listening_inodes() -> set[str]:
    """TCP sockets that listen in the host's network namespace."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:] + Path("/proc/net/tcp6").read_text().splitlines()[1:]
    return {line.split()[9] for line in lines if line.split()[3] == "0A"}


def has_no_core_dumps(process: Path) -> bool:
    limit = next(line for line in (process / "limits").read_text().splitlines() if "core file" in line)
    return limit.split()[4:6] == ["1", "1"]


def inodes_of(processes: list[Path]) -> set[str]:
    links = {link.readlink().name for folder in processes for link in (folder / "fd").iterdir()}
    return {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    folder = tmp_path_factory.mktemp("engine")
    model = folder / "tiny"
    model.mkdir()
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([PYTHON, "-c", WRITE_MODEL, model], cwd=ROOT, env=quiet, check=True, timeout=120)
    return EngineSpec(
        python=PYTHON,
        model=model,
        served_name="tiny",
        run_dir=folder.joinpath(*["a-home-that-is-very-deep"] * 6, "run"),
        log_path=folder / "engine.log",
        kv_cache_bytes=32 << 20,
        max_num_seqs=4,
        tool_call_parser="hermes",
        cpu_threads=compute_threads(),
        cache_dir=PYTHON.parent.parent / "cache",
    )


@pytest.fixture(scope="module")
async def engine(spec: EngineSpec) -> AsyncIterator[Running]:
    async with EngineClient(spec.socket) as client:
        process = EngineProcess(
            spec, client, base_environment={**os.environ, "HF_TOKEN": SECRET}, on_change=lambda it: running.note(it)
        )
        running = Running(process, client)
        await process.start()
        try:
            await process.wait_ready(READY_WITHIN_S)
            yield running
        finally:
            await process.stop()
    assert not spec.socket.exists()
    assert running.processes() == []


def chat(**fields: object) -> bytes:
    return json.dumps(
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "t3 t4"}],
            "max_tokens": 8,
            "temperature": 0,
            **fields,
        }
    ).encode()


async def wait_until_running(client: EngineClient, requests: str) -> None:
    """Wait until the engine says that it computes so many."""
    for _ in range(600):
        if re.search(rf"^vllm:num_requests_running\{{.*\}} {requests}$", await client.metrics(), re.MULTILINE):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the engine never computes {requests} requests")


async def test_the_engine_serves_its_model_on_a_socket_that_no_address_could_name(engine: Running) -> None:
    assert len(str(engine.process.spec.socket)) > 108
    assert await engine.client.health()
    assert [model.id for model in await engine.client.models()] == ["tiny"]
    assert engine.states == [EngineState.STARTING, EngineState.READY]


async def test_a_chat_completion_comes_back(engine: Running) -> None:
    _, body = await engine.client.call("/v1/chat/completions", chat(), request_id="req-1")
    answer = json.loads(body)
    assert answer["id"] == "chatcmpl-req-1"
    assert answer["usage"]["completion_tokens"] == 8


async def test_a_stream_ends_with_usage_and_tells_what_was_cached(engine: Running) -> None:
    prompt = " ".join(f"t{number}" for number in range(5, 105))
    body = json.dumps(
        {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    cached = []
    for attempt in ("first", "second"):
        async with engine.client.stream("/v1/completions", body, request_id=f"req-{attempt}") as events:
            chunks = [json.loads(payload) async for payload in events]
        assert len(chunks) >= 2
        cached.append(chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 96]


async def test_leaving_a_stream_ends_the_work(engine: Running) -> None:
    body = chat(max_tokens=1900, stream=True)
    async with engine.client.stream("/v1/chat/completions", body, request_id="req-left") as events:
        await anext(events)
    await wait_until_running(engine.client, r"0\.0")


async def test_the_engine_reports_its_leases(engine: Running) -> None:
    report = await engine.client.leases()
    assert report.block_size == 32
    assert report.total_blocks > 0


async def test_no_word_of_a_request_reaches_the_log(engine: Running) -> None:
    schema = {"type": "object", "properties": {SECRET: {"type": "nonsense"}}}
    requests = [
        chat(messages=[{"role": "user", "content": SECRET}], stop=[SECRET], user=SECRET),
        chat(messages=[{"role": SECRET, "content": [{"type": SECRET}]}]),
        chat(response_format={"type": "json_schema", "json_schema": {"name": SECRET, "schema": schema}}),
        chat(tools=[{"type": "function", "function": {"name": SECRET, "parameters": schema}}], tool_choice=SECRET),
        # What the gateway lets nobody ask: xgrammar says on descriptor 2 what it leaves out.
        *(chat(response_format=held_to({"pattern": pattern})) for pattern in (f"(?={SECRET})a", f"a^{SECRET}$b")),
        chat(response_format=held_to({"$ref": f"http://{SECRET}"})),
        chat(structured_outputs={"regex": f"({SECRET}"}),
        chat(structured_outputs={"regex": f"{SECRET}(?<={SECRET})"}),
        chat(
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"pattern": f"[{SECRET}"}}}
        ),
        chat(stop=[SECRET] * 3, max_tokens=2),
        chat(structured_outputs={"grammar": f"root ::= {SECRET}"}),
        chat(model=SECRET),
        chat(messages=[{"role": "user", "content": f"{SECRET} " * 9000}]),
        chat(logit_bias={SECRET: 1}),
        f'{{"{SECRET}": '.encode(),
    ]
    outcomes = [await outcome_of(engine.client, body) for body in requests]
    assert "200" in outcomes
    assert sum("status 400" in outcome for outcome in outcomes) >= 5
    assert SECRET not in "".join(outcomes)
    log = engine.process.spec.log_path.read_text()
    assert "Loaded endpoint plugin holdfast" in log
    assert "Withheld since the engine serves" in log
    assert SECRET not in log


def held_to(schema: dict[str, object]) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


async def drain(events: AsyncIterator[bytes]) -> None:
    async for _ in events:
        pass


async def outcome_of(client: EngineClient, body: bytes) -> str:
    try:
        status, _ = await client.call("/v1/chat/completions", body, request_id="req-secret")
    except (EngineRejected, EngineLost) as error:
        return str(error)
    return str(status)


async def test_nothing_of_the_gateways_environment_reaches_the_engine(engine: Running) -> None:
    processes = engine.processes()
    assert len(processes) >= 2
    for folder in processes:
        assert SECRET.encode() not in (folder / "environ").read_bytes()


async def test_no_process_of_the_engine_dumps_core(engine: Running) -> None:
    assert all(has_no_core_dumps(folder) for folder in engine.processes())


async def test_the_host_sees_no_port_and_no_file_of_the_engine(engine: Running) -> None:
    processes = engine.processes()
    assert apart(processes) is engine.process.isolated
    if engine.process.isolated:
        assert not listening_inodes() & inodes_of(processes)
    else:
        assert engine.process.isolation_detail


async def test_a_killed_engine_is_started_again_and_serves(engine: Running) -> None:
    body = chat(max_tokens=1900, stream=True)
    async with engine.client.stream("/v1/chat/completions", body, request_id="req-killed") as events:
        await anext(events)
        os.kill(engine.core(), signal.SIGKILL)
        with pytest.raises(EngineLost):
            await drain(events)
    async with asyncio.timeout(60):
        await engine.died.wait()
    await engine.process.wait_ready(READY_WITHIN_S)
    assert engine.process.restarts == 1
    status, _ = await engine.client.call("/v1/chat/completions", chat(), request_id="req-again")
    assert status == 200


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV])
async def test_an_engine_that_dies_at_a_request_leaves_no_word_of_it(engine: Running, end: signal.Signals) -> None:
    restarts = engine.process.restarts
    engine.died.clear()
    body = chat(
        messages=[{"role": "user", "content": f"{SECRET} " + "t3 " * 1400}],
        seed=7,
        temperature=1,
        stop=[SECRET],
        max_tokens=600,
        stream=True,
    )
    asked = asyncio.gather(*(streamed_outcome_of(engine.client, body) for _ in range(3)))
    await wait_until_running(engine.client, r"[1-9]\d*\.0")
    os.kill(engine.core(), end)
    assert SECRET not in "".join(await asked)
    async with asyncio.timeout(60):
        await engine.died.wait()
    await engine.process.wait_ready(READY_WITHIN_S)
    assert engine.process.restarts == restarts + 1
    folders = (engine.process.spec.log_path.parent, engine.process.spec.run_dir)
    written = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert engine.process.spec.log_path in written
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert not [path for path in written if re.match(r"core(\.|$)", path.name)]
    assert SECRET not in engine.process.detail


async def test_an_engine_whose_core_tells_what_it_is_asked_and_fails_at_it_leaves_no_word_of_it(
    spec: EngineSpec, tmp_path: Path
) -> None:
    own = replace(spec, run_dir=tmp_path / "run", log_path=tmp_path / "engine.log", restart_backoff_s=300.0)
    died = asyncio.Event()

    def telling(spec: EngineSpec) -> list[str]:
        line = command_line(spec)
        return [line[0], str(TELLING_ENGINE), *line[line.index("serve") :]]

    def note(process: EngineProcess) -> None:
        if process.state is EngineState.RESTARTING:
            died.set()

    async with EngineClient(own.socket) as client:
        process = EngineProcess(own, client, command=telling, on_change=note)
        await process.start()
        try:
            await process.wait_ready(READY_WITHIN_S)
            asked = {"messages": [{"role": "user", "content": f"t3 {SECRET}"}], "stop": [SECRET], "temperature": 1}
            assert await outcome_of(client, chat(**asked)) == "200"
            assert SECRET not in await outcome_of(client, chat(**asked, response_format=held_to({"enum": [SECRET]})))
            assert SECRET not in await outcome_of(client, chat(**asked, seed=13))
            async with asyncio.timeout(60):
                await died.wait()
            assert "RuntimeError" in process.detail
        finally:
            await process.stop()
    log = own.log_path.read_text()
    assert SECRET not in log + process.detail
    assert "TOLD" not in log + process.detail
    assert "A request asks for %s" in log
    assert re.search(r"EngineCore encountered a fatal error\.; raised RuntimeError \(telling_engine\.py:\d+", log)
    assert "Withheld since the engine serves" in log


async def streamed_outcome_of(client: EngineClient, body: bytes) -> str:
    try:
        async with client.stream("/v1/chat/completions", body, request_id="req-secret") as events:
            await drain(events)
    except (EngineRejected, EngineLost) as error:
        return str(error)
    return ""


async def test_a_model_that_vllm_does_not_know_fails_once_and_says_so(spec: EngineSpec, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Nonsense"], "model_type": "nonsense"}')
    odd = replace(spec, model=tmp_path, run_dir=tmp_path / "run", log_path=tmp_path / "engine.log")
    async with EngineClient(odd.socket) as client:
        process = EngineProcess(odd, client)
        await process.start()
        with pytest.raises(EngineFailed, match="nonsense"):
            await process.wait_ready(READY_WITHIN_S)
        assert process.restarts == 0
        await process.stop()
