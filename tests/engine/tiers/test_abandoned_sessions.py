"""Thousands of sessions that come once and never end, with tiers that hold a hundred: nothing of them adds up."""

import sys
import time
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import Any, cast

import pytest

from appliance.engine.inside.disk.files import HEADER_BYTES
from appliance.engine.inside.disk.keys import MAX_KEYS
from appliance.engine.inside.disk.store import _WRITERS
from appliance.engine.protocol import disk_tier
from appliance.engine.tier_keys import KEY_SOCKET
from tests.engine.in_process import BLOCK, BOUND, EngineInProcess, words
from tests.engine.tiers.test_disk_tier import Gateway

SESSIONS = 10_000
AT_ONCE = 8
CHUNK_BYTES = 2 * 2 * 64 * 2 * BLOCK  # layers, keys and values, hidden size, bfloat16, tokens
IN_DRAM, ON_DISK = 60, 100  # chunks
DEADLINE_S = 60.0
# What may have more than `FEW`, by the name of the attribute: each has a bound of its own.
FEW = 1000
REMEMBERED = {"_reasons": 10_000, "_sessions": 100_000, "_slots": MAX_KEYS, "_complete": 10_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the disk is."""
    return tmp_path_factory.mktemp("tier")


@pytest.fixture(scope="module")
def engine(tiny_model: Path, folder: Path) -> Iterator[EngineInProcess]:
    """An engine with little DRAM and little disk."""
    gateway = Gateway()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(KEY_SOCKET, str(gateway.open()))
        disk = disk_tier(str(folder), (ON_DISK + _WRITERS - 1) * (CHUNK_BYTES + HEADER_BYTES), 3600.0)
        engine = EngineInProcess(tiny_model, dram_bytes=IN_DRAM * CHUNK_BYTES, disk=disk)
        yield engine
        engine.close()
    gateway.close()


def come_once(engine: EngineInProcess, first: int) -> None:
    """Some sessions have a turn each, and are not heard of again."""
    for number in range(first, first + AT_ONCE):
        engine.submit(words(number, BLOCK + 1), salt=f"salt-{number}", session=f"session-{number}")
    engine.drain()
    engine.answers.clear()
    engine.clock.advance(0.01)


def settle(engine: EngineInProcess) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while engine.scheduler.has_requests():
        assert time.monotonic() < deadline, "something is never over"
        engine.core.step_fn()


def number_of(pattern: str) -> int:
    """How many files there are; a folder that goes meanwhile is passed over, where `Path.rglob` would raise."""
    return len(glob(pattern, recursive=True))  # noqa: PTH207


def calls(of: Callable[[], object]) -> int:
    """How many functions this thread calls meanwhile."""
    count = 0

    def counted(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(counted)
    try:
        of()
    finally:
        sys.setprofile(None)
    return count


def large_containers(*roots: object) -> dict[str, int]:
    """What our objects and vLLM's connector hold many of, by the name of the attribute."""
    large: dict[str, int] = {}
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", root) for root in roots]
    while left:
        name, value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict | list | set | frozenset | tuple) or type(value).__name__ == "deque":
            if len(value) > FEW:
                large[name] = max(len(value), large.get(name, 0))
            else:
                left += [(name, each) for each in (value.values() if isinstance(value, dict) else value)]
        elif type(value).__module__.startswith(("appliance.", "vllm.")) and hasattr(value, "__dict__"):
            left += vars(value).items()
    return large


@pytest.mark.timeout(900)
def test_ten_thousand_sessions_that_are_abandoned_leave_no_block_no_row_and_no_file(
    engine: EngineInProcess, folder: Path
) -> None:
    tiers = cast("Any", engine.connector)._tiers
    store = tiers.secondary_tiers[0].store
    for first in range(0, 1000, AT_ONCE):
        come_once(engine, first)
    at_first = min(calls(lambda: come_once(engine, 1000 + AT_ONCE * turn)) for turn in range(5))  # noqa: B023
    for first in range(1000 + 5 * AT_ONCE, SESSIONS - 5 * AT_ONCE, AT_ONCE):
        come_once(engine, first)
        assert engine.report().leased_blocks <= BOUND
        assert store.status().bytes <= store.status().capacity_bytes
    at_last = min(calls(lambda: come_once(engine, SESSIONS - AT_ONCE * (turn + 1))) for turn in range(5))  # noqa: B023
    assert at_last < 1.5 * at_first, "a step takes longer the more sessions were there"
    assert store.status().stored_chunks > SESSIONS // 2
    settle(engine)

    remembered = large_containers(engine.connector, engine.scheduler)
    assert {name: size for name, size in remembered.items() if size > REMEMBERED.get(name, 0)} == {}
    primary = tiers.primary_tier
    assert tiers._chunks.order.owners <= IN_DRAM
    assert primary._get_num_free_chunks() + len(tiers._chunks._chunks) == IN_DRAM
    assert all(chunk.ref_cnt == 0 for chunk in tiers._chunks._chunks.values())
    assert primary._num_evictable_cache_chunks == len(tiers._chunks._chunks)
    behind = cast("Any", engine.connector).connector_scheduler
    under_way = [tiers._req_state, tiers._jobs, tiers._doomed, tiers._request_load_sources]
    under_way += [behind._req_status, behind._jobs, behind._block_id_to_pending_jobs]
    assert not any(under_way)
    engine.assert_nobody_s_rows_are_empty()
    kept = store.status()
    assert kept.chunks <= ON_DISK
    deadline = time.monotonic() + DEADLINE_S
    while (number_of(f"{folder}/**/*~*/*"), number_of(f"{folder}/**/*~*")) != (kept.chunks, kept.sessions):
        assert time.monotonic() < deadline, "files stay that nobody knows of"
        time.sleep(0.001)  # lets the tier's threads go on

    engine.clock.advance(3600.0)
    engine.tick()
    engine.connector.release_all()
    engine.assert_nothing_is_held()
    prompt = words(SESSIONS + 1, 10 * BLOCK + 5)
    cold = engine.turn(prompt, salt="new", session="new", max_tokens=4)
    settle(engine)
    assert engine.demote("disk", "new") == {"new"}
    settle(engine)
    warm = engine.turn(prompt, salt="new", session="new", max_tokens=4)
    assert warm.cached_tokens == 10 * BLOCK
    assert warm.token_ids == cold.token_ids
