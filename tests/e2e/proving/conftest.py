"""One real vLLM, and gateways over it: one as it is, and others that were broken on purpose."""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api.admin import types
from api.admin.client import AdminClient
from appliance.engine.client import EngineClient
from appliance.engine.command_line import EngineSpec, compute_threads
from appliance.engine.launcher import EngineProcess
from benchmarks.running import REPOSITORY, make_appliance, running_gateway

PYTHON = Path(f"{sys.prefix}-engine") / "bin" / "python"
MODEL = REPOSITORY / "appliance" / "engine" / "demo" / "model"
READY_WITHIN_S = 240
ROUNDS = 8
Prove = Callable[[str], types.IsolationProof]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of an engine, in a loop of its own thread."""
    folder = tmp_path_factory.mktemp("engine")
    spec = EngineSpec(
        python=PYTHON,
        model=MODEL,
        served_name="demo",
        run_dir=folder / "run",
        log_path=folder / "engine.log",
        kv_cache_bytes=32 << 20,
        max_model_len=640,
        max_num_seqs=8,
        tool_call_parser=None,
        cpu_threads=compute_threads(),
        cache_dir=PYTHON.parent.parent / "cache",
    )
    ready, over = threading.Event(), threading.Event()

    async def run() -> None:
        async with EngineClient(spec.socket) as client:
            process = EngineProcess(spec, client, base_environment=dict(os.environ))
            await process.start()
            try:
                await process.wait_ready(READY_WITHIN_S)
                ready.set()
                await asyncio.to_thread(over.wait)
            finally:
                await process.stop()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(READY_WITHIN_S)
        yield spec.socket
    finally:
        over.set()
        thread.join(60)


@pytest.fixture
def prove(engine: Path, tmp_path: Path) -> Prove:
    """Prove isolation on a gateway that runs with a patch: Python that is run before anything else is."""

    def run(patch: str) -> types.IsolationProof:
        state_dir = tmp_path / "state"
        make_appliance(state_dir)
        (tmp_path / "sitecustomize.py").write_text(patch)
        environment = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
        with contextlib.ExitStack() as open_until_asked:
            open_until_asked.enter_context(running_gateway(state_dir, engine, environment=environment))
            client = AdminClient(state_dir, deadline_s=280)
            proof = client.prove_isolation(rounds=ROUNDS)
            assert [tenant.name for tenant in client.tenants().tenants] == ["tenant"], "the made-up tenants are gone"
            assert {each.tenant_id for each in client.kv().tenants} <= {"other"}, "they have no place in the books"
            assert client.sessions().sessions == []
            return proof

    return run
