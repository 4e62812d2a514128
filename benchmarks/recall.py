"""What it is worth to have read a session's KV before its request comes: the same engine with recall and without.

    .venv-engine/bin/python -m benchmarks.recall [--agents 6] [--tokens 6144] [--json] [--check]

Agents have a turn each on a real server with DRAM for all of them and the encrypted disk behind it, on the model of
about 140 million random weights. Then the server is started again: everything is on the disk alone. Every other agent's
request is announced, as the gateway does for one that waits in its line, and comes when its KV is in DRAM; the others
come as they are, one after the other, so that the machine's moods fall on both. Counted is the time to the first token
of that turn, which has `NEW_TOKENS` more than the turn before. The keys are this program's.
"""

import argparse
import contextlib
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from appliance.engine.demo.random_model import write_random_model
from appliance.engine.picture import KV_PATH, KvPicture
from appliance.engine.protocol import LEASES_PATH, connector_arguments, disk_tier, leases_request
from benchmarks.engine_bars import NO_LATER
from benchmarks.tiers import BLOCK, BLOCK_BYTES, LEASE_FRACTION, TENANT, Arm, Connection, ask, key_socket, served

NEW_TOKENS: Final = 8
_DEADLINE_S: Final = 60.0
_FIRST_TURN, _LATER_TURN = 0, 1


def main() -> int:
    """1 with `--check` when recall makes the first token come later, or reads in vain."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--agents", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=6144, help="of each agent's first prompt")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="leave with 1 when the figure is missed")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # servers are ended on the way out
    folder = Path(tempfile.mkdtemp(prefix="recall-"))
    try:
        figures = _measure(folder, chosen.agents, chosen.tokens)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if chosen.json:
        print(json.dumps(figures, indent=2))
    else:
        for name in ("without", "with"):
            print(f"{name:8} recall: first token {figures[name]['ttft_p50_s']:.3f} s (median)")
        print(f"sooner: {figures['sooner']:.2f} times; blocks recalled {figures['recalled']}, used {figures['used']}")
    return int(chosen.check and (figures["sooner"] < NO_LATER or figures["used_share"] < 1))


def _measure(folder: Path, agents: int, tokens: int) -> dict[str, Any]:
    blocks = (tokens + NEW_TOKENS) // BLOCK + 2
    dram_bytes = (blocks + 1) * agents * BLOCK_BYTES
    disk = disk_tier(str(folder / "tier"), 4 * dram_bytes, 3600.0)
    arguments = tuple(connector_arguments(LEASE_FRACTION, None, dram_bytes, disk))
    model = write_random_model(folder / "model")
    with key_socket() as keys:
        print("the agents' first turns", file=sys.stderr)
        with served(Arm("before", arguments), model, blocks, folder, keys) as path:
            for agent in range(agents):
                ask(path, agent, _FIRST_TURN, start_tokens=tokens, step_tokens=NEW_TOKENS)
            _until(lambda: _on_disk(path) >= agents * (tokens // BLOCK))
        print("the turns after a start of the engine", file=sys.stderr)
        with served(Arm("after", arguments), model, blocks, folder, keys) as path:
            ask(path, agents, _FIRST_TURN, start_tokens=BLOCK, step_tokens=NEW_TOKENS)  # what is made once, is made
            firsts: dict[str, list[float]] = {"without": [], "with": []}
            for agent in range(agents):
                name = "with" if agent % 2 else "without"
                if name == "with":
                    _announce(path, agent, tokens // BLOCK)
                prompt, computed, first_s = ask(path, agent, _LATER_TURN, start_tokens=tokens, step_tokens=NEW_TOKENS)
                if prompt - computed < tokens - BLOCK:
                    raise SystemExit(f"an agent's turn found {prompt - computed} tokens of {prompt} only")
                firsts[name].append(first_s)
            recall = _picture(path).recall
    if recall is None:
        raise SystemExit("the engine reads nothing ahead")
    medians = {name: statistics.median(each) for name, each in firsts.items()}
    return {
        **{name: {"ttft_p50_s": medians[name], "ttft_s": each} for name, each in firsts.items()},
        "sooner": medians["without"] / medians["with"],
        "recalled": recall.recalled_blocks_total,
        "used": recall.used_blocks_total,
        "used_share": recall.used_blocks_total / max(recall.recalled_blocks_total, 1),
    }


def _announce(path: Path, agent: int, blocks: int) -> None:
    """Say that an agent's request waits, and return when its KV is in DRAM."""
    before = _recalled(path)

    def is_read() -> bool:
        _call(path, "POST", LEASES_PATH, leases_request(awaited=[(TENANT, f"agent-{agent}")]))
        return _recalled(path) >= before + blocks

    _until(is_read)


def _recalled(path: Path) -> int:
    recall = _picture(path).recall
    return 0 if recall is None else recall.recalled_blocks_total


def _on_disk(path: Path) -> int:
    return next(tier.used_blocks for tier in _picture(path).tiers if tier.tier == "disk")


def _picture(path: Path) -> KvPicture:
    return KvPicture.from_wire(json.loads(_call(path, "GET", KV_PATH)))


def _call(path: Path, method: str, url: str, body: bytes = b"") -> bytes:
    with contextlib.closing(Connection(path)) as connection:
        connection.request(method, url, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
        if answer.status != 200:
            raise SystemExit(f"a server answered {answer.status}: {said[:2000]!r}")
        return said


def _until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not reached():
        if time.monotonic() > deadline:
            raise SystemExit("what was to happen in the server did not")
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
