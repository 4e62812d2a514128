"""What leaves the device comes back: from DRAM, after a crash from the disk, to its session and to nobody else."""

import os
import re
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessageParam

from api.admin.client import AdminClient
from api.dashboards import kv_dashboard
from tests.e2e.appliance.conftest import Appliance, holdfast
from tests.e2e.tiers.conftest import BLOCK_BYTES, DEVICE_BLOCKS, DISK_BLOCKS, DRAM_BLOCKS

BLOCK = 32
PROMPT_WORDS = 220
HEADER_BYTES = 4096  # of a file
pytestmark = pytest.mark.timeout(600)


class Agent:
    """A session and its first prompt."""

    def __init__(self, appliance: Appliance, name: str) -> None:
        self.appliance = appliance
        self.name = name
        client = appliance.client()
        self._model = client.models.list().data[0].id
        self._ask = client.with_options(default_headers={"X-Session-ID": name}).chat.completions.create
        self.text = f"Remember {name}, please. " + "Hello! My name is Anna. " * (PROMPT_WORDS // 5)

    def ask(self) -> tuple[str, dict[str, Any]]:
        """What the model says, and what was found of the prompt."""
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": self.text}]
        answer = self._ask(model=self._model, messages=messages, temperature=0, max_tokens=16)
        assert answer.usage is not None
        found = answer.usage.model_dump()["prompt_tokens_details"]
        assert found["device_tokens"] + found["dram_tokens"] + found["disk_tokens"] == found["cached_tokens"]
        assert found["cached_tokens"] + sum(found["computed_tokens"].values()) == answer.usage.prompt_tokens
        assert answer.usage.prompt_tokens > 10 * BLOCK
        return answer.choices[0].message.content or "", found

    @property
    def session_id(self) -> str:
        """Known of whoever asked last, only."""
        return str(self.appliance.run("session", "list")["sessions"][0]["session_id"])

    def last_turn(self) -> dict[str, Any]:
        """What `session why` says of the newest turn."""
        turns: list[dict[str, Any]] = self.appliance.run("session", "why", self.session_id)["turns"]
        return turns[-1]


def push_off_the_device(appliance: Appliance) -> None:
    """Others ask for twice the device's room; DRAM has room for all of it."""
    blocks, number = 0, 0
    while blocks < 2 * DEVICE_BLOCKS:
        _, found = Agent(appliance, f"filler-{time.monotonic_ns()}-{number}").ask()
        blocks += sum(found["computed_tokens"].values()) // BLOCK
        number += 1


def wait_for(appliance: Appliance, wanted: Callable[[Any], bool], deadline_s: float = 60.0) -> Any:
    """The first `kv status` that is as wanted."""
    end = time.monotonic() + deadline_s
    while not wanted(seen := appliance.run("kv", "status")):
        assert time.monotonic() < end, seen
    return seen


def folder(appliance: Appliance) -> Path:
    return appliance.state_dir / "tier"


def sessions_on_disk(appliance: Appliance) -> set[Path]:
    return {path.parent for path in folder(appliance).rglob("*~*/*")}


def kill_the_engine(appliance: Appliance) -> None:
    """Kill every process of it, and wait for its next life: it has counted nothing yet."""
    for pid in _engine_processes(appliance):
        os.kill(pid, signal.SIGKILL)
    wait_for(appliance, lambda seen: len(seen["tiers"]) == 3 and not seen["disk"]["stored_blocks_total"], 200)


def _engine_processes(appliance: Appliance) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        try:
            engine = process.name.isdigit() and process.joinpath("cwd").readlink() == (
                appliance.state_dir / "run" / "engine"
            )
            command = process.joinpath("cmdline").read_bytes()
        except OSError:
            continue
        if engine and b"vllm" in command and b"cage" not in command:
            found.append(int(process.name))
    assert found, "no engine process"
    return found


def test_three_tiers_are_seen_and_sound(appliance: Appliance) -> None:
    seen = wait_for(appliance, lambda seen: len(seen["tiers"]) == 3)
    device, dram, disk = seen["tiers"]
    assert [tier["tier"] for tier in seen["tiers"]] == ["device", "dram", "disk"]
    assert {tier["state"] for tier in seen["tiers"]} == {"ok"}
    assert device["capacity_blocks"] in range(DEVICE_BLOCKS - 2, DEVICE_BLOCKS + 1)
    assert (dram["capacity_blocks"], dram["block_bytes"]) == (DRAM_BLOCKS, BLOCK_BYTES)
    assert disk["capacity_blocks"] > DISK_BLOCKS
    assert seen["disk"]["last_error"] is None
    assert seen["canary"]["quarantined"] is False
    status = appliance.run("status")
    assert [(tier["tier"], tier["detail"]) for tier in status["tiers"]] == [("device", ""), ("dram", ""), ("disk", "")]


def test_a_session_that_left_the_device_comes_back_from_dram_and_the_canary_agrees(appliance: Appliance) -> None:
    agent = Agent(appliance, "from-dram")
    cold, found = agent.ask()
    assert found["cached_tokens"] == 0
    warm, found = agent.ask()
    assert found["device_tokens"] >= 10 * BLOCK
    push_off_the_device(appliance)
    restored, found = agent.ask()
    assert found["dram_tokens"] >= 10 * BLOCK
    assert cold == warm == restored
    told = agent.last_turn()
    assert told["served_from"]["dram"] == found["dram_tokens"]
    seen = wait_for(appliance, lambda seen: seen["canary"]["compared_blocks_total"] > 0)
    assert seen["canary"]["quarantined"] is False
    assert seen["canary"]["worst_error"] < 0.05
    assert next(tier for tier in seen["tiers"] if tier["tier"] == "dram")["found_tokens"] >= 10 * BLOCK


def test_after_a_crash_of_the_engine_a_session_comes_back_from_the_disk(appliance: Appliance) -> None:
    agent = Agent(appliance, "from-disk")
    cold, _ = agent.ask()
    agent.ask()
    wait_for(appliance, lambda seen: seen["disk"]["stored_blocks_total"] >= 10 and not seen["disk"]["waiting_bytes"])
    kill_the_engine(appliance)
    restored, found = agent.ask()
    assert found["disk_tokens"] >= 10 * BLOCK
    assert restored == cold
    assert agent.last_turn()["served_from"]["disk"] == found["disk_tokens"]
    wait_for(appliance, lambda seen: seen["tiers"] and seen["disk"]["loaded_blocks_total"] >= 10)


def test_a_forgotten_session_leaves_no_file(appliance: Appliance) -> None:
    agent = Agent(appliance, "forgotten")
    before = sessions_on_disk(appliance)
    agent.ask()
    end = time.monotonic() + 30
    while not (own := sessions_on_disk(appliance) - before):
        assert time.monotonic() < end
    appliance.run("session", "forget", agent.session_id, "--yes", agent.session_id)
    while any(path.exists() and any(path.iterdir()) for path in own):
        assert time.monotonic() < end
    _, found = agent.ask()
    assert found["cached_tokens"] == 0


def test_the_files_hold_no_word_and_nothing_that_has_a_pattern(appliance: Appliance) -> None:
    agent = Agent(appliance, "Quetzalcoatlus")
    agent.ask()
    wait_for(appliance, lambda seen: seen["disk"]["stored_blocks_total"] and not seen["disk"]["waiting_bytes"])
    files = [path for path in folder(appliance).rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert path.stat().st_mode & 0o077 == 0
        data = path.read_bytes()
        for word in (b"Quetzalcoatlus", b"Anna", appliance.api_key.encode()):
            assert word not in data
            assert word not in str(path.relative_to(appliance.state_dir)).encode()
        # KV is far from random, and shrinks by a tenth and more; what is encrypted does not.
        assert len(zlib.compress(data[HEADER_BYTES:])) >= 0.999 * (len(data) - HEADER_BYTES)


def test_every_metric_of_the_dashboard_is_on_the_page(appliance: Appliance) -> None:
    Agent(appliance, "metrics").ask()
    with AdminClient(appliance.state_dir)._connected(10.0) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = b""
        while part := connection.recv(1 << 16):
            received += part
    families = set(re.findall(r"^# TYPE (\S+) ", received.decode(), re.MULTILINE))
    asked = {name.removesuffix("_bucket") for name in re.findall(r"holdfast_[a-z0-9_]+", kv_dashboard())}
    assert asked <= families
    assert b'holdfast_kv_tier_state{state="ok",tier="disk"} 1.0' in received


@pytest.mark.timeout(1200)
def test_isolation_is_proved_in_all_three_tiers(appliance: Appliance) -> None:
    proof = holdfast(appliance.state_dir, ("prove", "isolation", "--rounds", "12"), check=False, timeout_s=900)
    assert "checks" in proof, proof
    checks = proof["checks"]
    # Times tell nothing on a machine that is busy with something else: that they are UNKNOWN is no fault of a tier's.
    wrong = [check for check in checks if check["verdict"] == "FAIL" or (check["tier"] and check["verdict"] != "PASS")]
    assert not wrong, "\n".join(map(str, wrong))
    assert {check["tier"] for check in checks} >= {"device", "dram", "disk"}
