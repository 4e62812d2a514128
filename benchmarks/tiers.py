"""What tiers are worth where the device holds a third of what the agents need.

    .venv-engine/bin/python -m benchmarks.tiers [--agents 6] [--turns 3] [--json] [--check]

Agents take turns, each with a context that grows from turn to turn, so that all contexts together take three times the
device's pool. The same turns go to real servers, one after another, on the model of about 140 million random weights:

- vanilla: vLLM as it is;
- leases: our connector without tiers;
- dram: DRAM that holds every context;
- dram+disk: DRAM for half of them, and the encrypted disk behind it. The keys are this program's.

A turn's prompt is made of token ids and does not depend on the answers, so that every server computes the same. Counted
are turns after each agent's first: what was computed of their prompts, and how long the first token took.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from appliance.engine.demo.random_model import SHAPE, write_random_model
from appliance.engine.protocol import PLUGIN_ENVIRONMENT, Lease, connector_arguments, disk_tier, lease_params
from appliance.engine.tier_keys import KEY_BYTES, KEY_SOCKET
from benchmarks.engine_bars import FEWER_TOKENS, SOONER

BLOCK: Final = 32  # tokens
BLOCK_BYTES: Final = SHAPE.layers * 2 * SHAPE.key_value_heads * SHAPE.head_size * 2 * BLOCK
START_TOKENS: Final = 2048  # an agent's first prompt
STEP_TOKENS: Final = 256  # by how much a prompt is longer than the one before
LEASE_FRACTION: Final = 0.9
TENANT: Final = "bench"
READY_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Arm:
    """A server and how it is configured."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """What one server did on the turns after each agent's first."""

    arm: str
    turns: int
    prompt_tokens: int
    computed_tokens: int
    ttft_p50_s: float
    ttft_p90_s: float


class Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket that is reached through its folder: a path may be longer than an address."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=REQUEST_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        folder = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(f"/proc/self/fd/{folder}/{self._path.name}")
        finally:
            os.close(folder)


@contextlib.contextmanager
def key_socket() -> Iterator[socket.socket]:
    """The engine's end of a channel on which each session that is asked for gets a key of its own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keys: dict[bytes, bytes] = {}

    def answer() -> None:
        while labels := ours.recv(1024):
            ours.send(b"K" + keys.setdefault(labels, os.urandom(KEY_BYTES)) + labels)

    answering = threading.Thread(target=answer, daemon=True)
    answering.start()
    with ours, theirs:
        yield theirs
        ours.shutdown(socket.SHUT_RDWR)
        answering.join(10)


@contextlib.contextmanager
def served(arm: Arm, model: Path, pool_blocks: int, folder: Path, keys: socket.socket) -> Iterator[Path]:
    """A server on a Unix socket; its whole session ends with the block."""
    path = folder / f"{arm.name}.sock"
    log = (folder / f"{arm.name}.log").open("wb")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
            *("--uds", path.name, "--served-model-name", "m", "--enforce-eager", "--enable-prompt-tokens-details"),
            *("--block-size", str(BLOCK), "--num-gpu-blocks-override", str(pool_blocks + 1)),
            *("--max-num-seqs", "4", "--max-model-len", str(pool_blocks * BLOCK), "--enable-prefix-caching"),
            *arm.arguments,
        ],
        cwd=folder,
        env=os.environ
        | (PLUGIN_ENVIRONMENT if arm.arguments else {"VLLM_PLUGINS": ""})
        | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            KEY_SOCKET: str(keys.fileno()),
        },
        pass_fds=(keys.fileno(),),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _wait_until_ready(path, process, READY_TIMEOUT_S)
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        log.close()


def _wait_until_ready(path: Path, process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = path.with_suffix(".log").read_text(errors="replace")[-20000:]
            raise SystemExit(f"a server ended before it was ready:\n{last}")
        with contextlib.suppress(OSError), contextlib.closing(Connection(path)) as connection:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"a server was not ready after {timeout_s:g} s; its log: {path.with_suffix('.log')}")


def context_of(agent: int, tokens: int) -> list[int]:
    """The token ids of an agent's prompt: a longer one begins with a shorter one."""
    return random.Random(agent).choices(range(10, 250), k=tokens)


def ask(
    path: Path, agent: int, turn: int, *, start_tokens: int = START_TOKENS, step_tokens: int = STEP_TOKENS
) -> tuple[int, int, float]:
    """One turn: its prompt's tokens, how many of them were computed, seconds to the first token."""
    body = {
        "model": "m",
        "prompt": context_of(agent, start_tokens + turn * step_tokens),
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": f"salt-{agent}",
        "kv_transfer_params": lease_params(Lease(f"agent-{agent}", TENANT, 15.0, f"turn-{turn}")),
    }
    with contextlib.closing(Connection(path)) as connection:
        started = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"a server answered {answer.status}: {answer.read(2000)!r}")
        first_s: float | None = None
        usage: Mapping[str, Any] = {}
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"] and first_s is None:
                first_s = time.perf_counter() - started
            usage = chunk.get("usage") or usage
    if first_s is None or not usage:
        raise SystemExit("a server ended an answer early")
    details = usage.get("prompt_tokens_details") or {}
    prompt_tokens = int(usage["prompt_tokens"])
    return prompt_tokens, prompt_tokens - int(details.get("cached_tokens") or 0), first_s


def measure(arm: Arm, path: Path, agents: int, turns: int) -> Figures:
    """All turns of all agents, interleaved."""
    asked = [(turn, ask(path, agent, turn)) for turn in range(turns) for agent in range(agents)]
    later = [said for turn, said in asked if turn]
    firsts = sorted(first_s for _, _, first_s in later)
    return Figures(
        arm.name,
        len(later),
        sum(prompt for prompt, _, _ in later),
        sum(computed for _, computed, _ in later),
        statistics.median(firsts),
        firsts[int(0.9 * (len(firsts) - 1))],
    )


def missed(figures: Sequence[Figures]) -> list[str]:
    """What the figures do not reach; empty when they hold."""
    by_name = {each.arm: each for each in figures}
    vanilla = by_name["vanilla"]
    misses = []
    if by_name["leases"].computed_tokens > vanilla.computed_tokens:
        misses.append(f"without tiers {by_name['leases'].computed_tokens} tokens, vanilla {vanilla.computed_tokens}")
    for each in (by_name[name] for name in ("dram", "dram+disk") if name in by_name):
        fewer = vanilla.computed_tokens / max(each.computed_tokens, 1)
        if fewer < FEWER_TOKENS:
            misses.append(f"{each.arm}: {fewer:.1f} times fewer tokens, not {FEWER_TOKENS:g}")
        sooner = vanilla.ttft_p50_s / each.ttft_p50_s
        if each.arm == "dram" and sooner < SOONER:
            misses.append(f"{each.arm}: the first token {sooner:.1f} times sooner, not {SOONER:g}")
    return misses


def print_table(figures: Sequence[Figures]) -> None:
    """The figures, and each against vanilla."""
    vanilla = figures[0]
    print(f"{'':12}{'turns':>6}{'prompt':>9}{'computed':>10}{'fewer':>8}{'ttft p50':>11}{'sooner':>8}{'ttft p90':>11}")
    for each in figures:
        fewer = vanilla.computed_tokens / max(each.computed_tokens, 1)
        print(
            f"{each.arm:12}{each.turns:6}{each.prompt_tokens:9}{each.computed_tokens:10}{fewer:7.1f}x"
            f"{each.ttft_p50_s:10.3f}s{vanilla.ttft_p50_s / each.ttft_p50_s:7.1f}x{each.ttft_p90_s:10.3f}s"
        )


def main() -> int:
    """Run every server, and print what it did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--agents", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a figure is missed")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # servers are ended on the way out
    blocks_each = (START_TOKENS + (chosen.turns - 1) * STEP_TOKENS) // BLOCK + 2
    needed_blocks = chosen.agents * blocks_each
    needed_bytes = (needed_blocks + chosen.agents) * BLOCK_BYTES
    folder = Path(tempfile.mkdtemp(prefix="tiers-"))
    arms = [
        Arm("vanilla", ()),
        Arm("leases", tuple(connector_arguments(LEASE_FRACTION))),
        Arm("dram", tuple(connector_arguments(LEASE_FRACTION, None, needed_bytes))),
        Arm(
            "dram+disk",
            tuple(
                connector_arguments(
                    LEASE_FRACTION, None, needed_bytes // 2, disk_tier(str(folder / "tier"), 4 * needed_bytes, 3600.0)
                )
            ),
        ),
    ]
    try:
        model = write_random_model(folder / "model")
        figures = []
        for arm in arms:
            print(f"{arm.name}: starting", file=sys.stderr)
            with key_socket() as keys, served(arm, model, needed_blocks // 3, folder, keys) as path:
                figures.append(measure(arm, path, chosen.agents, chosen.turns))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if chosen.json:
        print(json.dumps([asdict(each) for each in figures], indent=2))
    else:
        print_table(figures)
    misses = missed(figures)
    for miss in misses:
        print(f"missed: {miss}", file=sys.stderr)
    return int(bool(misses) and chosen.check)


if __name__ == "__main__":
    sys.exit(main())
