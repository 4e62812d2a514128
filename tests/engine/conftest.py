"""What the tests in the engine's environment share: a tiny model, and one engine that runs in this process."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.engine.in_process import EngineInProcess

# vLLM and torch read these when they are first imported. One thread that may run anywhere is quickest for so small a
# model on a machine that others use too.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    VLLM_PLUGINS="holdfast",
)


def pytest_configure(config: pytest.Config) -> None:
    """Our own warnings stay errors; what the engine's libraries say of each other is not ours to mend."""
    for library in ("torch", "vllm", "transformers", "tokenizers", "pydantic", "importlib"):
        config.addinivalue_line("filterwarnings", f"ignore:::{library}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test that is first to ask for an engine waits for it to start: ten seconds, or minutes on a busy machine."""
    for item in items:
        if {"engine", "server"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.timeout(400))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a randomly initialised Llama of two layers."""
    from tests.engine.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def engine_in_process(tiny_model: Path) -> "Iterator[EngineInProcess]":
    """The one engine of the session; tests take `engine`."""
    from tests.engine.in_process import EngineInProcess

    engine = EngineInProcess(tiny_model)
    yield engine
    engine.close()


@pytest.fixture
def engine(engine_in_process: "EngineInProcess") -> "Iterator[EngineInProcess]":
    """An engine without requests, leases or cached blocks, and held to that after the test, save for the cache."""
    engine_in_process.start_anew()
    yield engine_in_process
    engine_in_process.cancel_all()
    engine_in_process.drain()
    engine_in_process.report(release=[state.session for state in engine_in_process.report().leases])
    engine_in_process.assert_nothing_is_held()
