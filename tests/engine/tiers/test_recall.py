"""Read from the disk before it is asked for, in an engine that the test steps: for whom, into whose room, and what when
the disk is slow, a file was changed or the session is forgotten meanwhile."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.engine.picture import KvPicture, RecallPicture
from appliance.engine.protocol import TurnAccount, TurnEnd
from tests.engine.in_process import BLOCK, EngineInProcess, words
from tests.engine.tiers.on_disk import parts_of
from tests.engine.tiers.test_disk_in_process import (
    CHUNKS,
    DEADLINE_S,
    empty_all_but_the_disk,
    run,
    store,
    tiers,
)

LATE_S = 2000.0  # nobody is expected who has been idle for so long
NUMBERS = itertools.count()
TURNS: dict[str, str] = {}  # what each session's newest turn is called


@pytest.fixture
def engine(on_disk: tuple[EngineInProcess, Path]) -> Iterator[EngineInProcess]:
    """The engine, of which every test sees its own counts."""
    engine = on_disk[0]
    yield engine
    engine.cancel_all()
    run(engine)
    engine.report(release={owner.session for owner in store(engine)._index.owners()} | set(in_dram(engine)))
    run(engine)
    empty_all_but_the_disk(engine)
    engine.clock.advance(10 * LATE_S)
    tiers(engine)._recall.__init__(engine.clock)


def recall(engine: EngineInProcess) -> RecallPicture:
    seen = KvPicture.from_wire(engine.core.holdfast_kv_picture(0)).recall
    assert seen is not None
    return seen


def counts(engine: EngineInProcess) -> tuple[int, int, int]:
    """How many blocks were recalled, used, and in vain."""
    seen = recall(engine)
    return seen.recalled_blocks_total, seen.used_blocks_total, seen.in_vain_blocks_total


def in_dram(engine: EngineInProcess) -> dict[str, int]:
    order = tiers(engine)._chunks.order
    return {session: order.chunks_of((tenant, session)) for tenant, session in order.sessions()}


def until(engine: EngineInProcess, reached: Callable[[], bool]) -> None:
    """Do what the engine's loop and its timer do, until something is so."""
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline
        engine.tick()
        engine.core.step_fn()
        engine.clock.advance(0.05)


def settle(engine: EngineInProcess) -> None:
    """Until there is nothing to do, whatever anybody might expect."""
    idle = 0

    def is_settled() -> bool:
        nonlocal idle
        idle = idle + 1 if tiers(engine)._ahead is None and not tiers(engine).has_pending_work() else 0
        return idle > 50  # looks, of which each may have asked for a key

    until(engine, is_settled)


def asked(engine: EngineInProcess, prompt: list[int], session: str, max_tokens: int = 2) -> str:
    """A turn of a session is queued; its request."""
    TURNS[session] = f"turn-{next(NUMBERS)}"
    return engine.submit(prompt, session=session, max_tokens=max_tokens, turn=TURNS[session])


def ended(engine: EngineInProcess, session: str, stop: str = "tool_use", *, returns_soon: bool = False) -> TurnAccount:
    """Tell the engine how the session's turn ended; its account."""
    account = engine.ended(TurnEnd(session, "tenant", TURNS[session], stop, 2, 15.0, returns_soon))
    assert account is not None
    return account


def found(engine: EngineInProcess, prompt: list[int], session: str) -> int:
    """How many tokens the session's next turn finds."""
    name = asked(engine, prompt, session)
    run(engine)
    cached = engine.answers[name].cached_tokens
    assert cached is not None
    return cached


def stored(engine: EngineInProcess, seed: int, session: str, blocks: int, stop: str = "tool_use") -> list[int]:
    """A prompt of a session that has run, and is on the disk alone now."""
    prompt = words(seed, blocks * BLOCK + 5)
    found(engine, prompt, session)
    ended(engine, session, stop)
    empty_all_but_the_disk(engine)
    return prompt


class SlowReads:
    """Reads of the disk that wait until the test lets them go."""

    def __init__(self, engine: EngineInProcess, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        files: Any = store(engine)._files
        read = files.read

        def slowly(*arguments: Any) -> None:
            self.begun.set()
            assert self.go_on.wait(DEADLINE_S)
            read(*arguments)

        monkeypatch.setattr(files, "read", slowly)


def test_who_is_expected_finds_its_kv_in_dram_when_it_returns(engine: EngineInProcess) -> None:
    prompt = stored(engine, 3, "ana", 10)
    until(engine, lambda: in_dram(engine) == {"ana": 10})
    settle(engine)
    assert counts(engine) == (10, 0, 0)
    loaded = store(engine).status().loaded_chunks
    assert found(engine, prompt, "ana") == 10 * BLOCK
    account = ended(engine, "ana")
    assert (account.device_tokens, account.dram_tokens, account.disk_tokens) == (0, 10 * BLOCK, 0)
    assert store(engine).status().loaded_chunks == loaded
    assert counts(engine) == (10, 10, 0)


def test_who_is_not_expected_stays_on_the_disk_and_costs_no_tick(engine: EngineInProcess) -> None:
    stored(engine, 3, "ana", 10)
    engine.clock.advance(LATE_S)
    settle(engine)
    assert in_dram(engine) == {}
    assert engine.tick() is None


def test_what_is_worth_more_is_not_pushed_out_and_once_it_is_over_there_is_room(engine: EngineInProcess) -> None:
    prompt = stored(engine, 3, "ana", 10, stop="end_turn")
    engine.clock.advance(60.0)
    found(engine, words(5, (CHUNKS - 2) * BLOCK + 5), "ben")
    ended(engine, "ben")
    settle(engine)
    assert in_dram(engine) == {"ben": CHUNKS - 2, "ana": 2}  # what was free, and no more
    engine.report(release=["ben"])
    until(engine, lambda: in_dram(engine) == {"ana": 10})
    assert found(engine, prompt, "ana") == 10 * BLOCK


def test_who_waits_at_the_gateway_is_read_for_first_and_pushes_out_who_does_not(engine: EngineInProcess) -> None:
    prompt = stored(engine, 3, "ana", 10)
    stored(engine, 4, "eve", 10)
    engine.clock.advance(LATE_S)
    found(engine, words(5, CHUNKS * BLOCK + 5), "ben")
    ended(engine, "ben")
    settle(engine)
    assert in_dram(engine) == {"ben": CHUNKS}
    engine.report(awaited=[("tenant", "ana")])
    until(engine, lambda: in_dram(engine) == {"ben": CHUNKS - 10, "ana": 10})
    assert found(engine, prompt, "ana") == 10 * BLOCK
    assert counts(engine) == (10, 10, 0)


def test_who_waits_at_the_gateway_yields_last_on_the_device(engine: EngineInProcess) -> None:
    found(engine, words(3, 10 * BLOCK + 5), "ana")
    engine.clock.advance(16.0)
    found(engine, words(4, 10 * BLOCK + 5), "ben")
    engine.report(awaited=[("tenant", "ana")])
    asked(engine, words(5, 25 * BLOCK + 5), "big", max_tokens=20)
    engine.step(6)
    kept = {state.session: state.blocks for state in engine.report().leases}
    assert kept["ana"] == 10 > kept["ben"]


def test_who_is_said_to_return_is_read_for_though_nobody_would_expect_it(engine: EngineInProcess) -> None:
    prompt = stored(engine, 3, "ana", 10)
    found(engine, prompt, "ana")
    ended(engine, "ana", "end_turn", returns_soon=True)
    empty_all_but_the_disk(engine)
    engine.clock.advance(550.0)
    until(engine, lambda: in_dram(engine) == {"ana": 10})
    assert found(engine, prompt, "ana") == 10 * BLOCK
    empty_all_but_the_disk(engine)
    engine.clock.advance(550.0)
    settle(engine)
    assert in_dram(engine) == {}  # that it returned once, is said of one return


def test_who_waits_in_the_engine_is_read_for_before_its_turn(engine: EngineInProcess) -> None:
    prompt = stored(engine, 3, "ana", 6)
    running = engine.submit(words(5, 14 * BLOCK + 5), max_tokens=100)
    engine.step(4)
    assert engine.running() == 1
    engine.submit(words(6, 30 * BLOCK + 5))  # which there is no room for
    behind = engine.submit(prompt, session="ana", max_tokens=2)
    until(engine, lambda: tiers(engine)._ahead is not None)
    store(engine).drain()
    engine.step()
    assert counts(engine)[0] == 6
    assert engine.running() == 1
    assert engine.answers[running].finish_reason is None
    run(engine)
    assert engine.answers[behind].cached_tokens == 6 * BLOCK


def test_of_a_session_larger_than_dram_the_head_is_read(engine: EngineInProcess) -> None:
    prompt = stored(engine, 30, "long", 30)
    until(engine, lambda: in_dram(engine) == {"long": CHUNKS})
    settle(engine)
    assert counts(engine)[0] == CHUNKS
    assert found(engine, prompt, "long") == CHUNKS * BLOCK


def test_a_request_that_comes_meanwhile_waits_for_the_same_read(
    engine: EngineInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = stored(engine, 3, "ana", 10)
    loaded = store(engine).status().loaded_chunks
    reads = SlowReads(engine, monkeypatch)
    until(engine, reads.begun.is_set)
    name = asked(engine, prompt, "ana")
    engine.step(20)
    assert engine.answers[name].cached_tokens is None  # it waits
    reads.go_on.set()
    run(engine)
    assert engine.answers[name].cached_tokens == 10 * BLOCK
    assert ended(engine, "ana").disk_tokens == 10 * BLOCK  # for that it waited
    assert store(engine).status().loaded_chunks == loaded + 10
    assert counts(engine) == (10, 10, 0)


def test_others_go_on_while_the_disk_is_slow(engine: EngineInProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(engine, 3, "ana", 10)
    reads = SlowReads(engine, monkeypatch)
    until(engine, reads.begun.is_set)
    name = engine.submit(words(7, 5 * BLOCK + 5), session="eve", max_tokens=2)
    engine.drain()
    assert engine.answers[name].finish_reason is not None
    assert counts(engine) == (0, 0, 0)
    reads.go_on.set()
    run(engine)


def test_a_disk_that_was_slow_is_left_alone_for_a_while(
    engine: EngineInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(engine, 3, "ana", 5)
    stored(engine, 4, "eve", 5)
    late = [0.0]
    disk: Any = store(engine)
    read = disk._files.read

    def slowly(*arguments: Any) -> None:
        late[0] += 1.0
        read(*arguments)

    for part in parts_of(disk):
        monkeypatch.setattr(part, "_now", lambda: time.monotonic() + late[0])
    monkeypatch.setattr(disk._files, "read", slowly)
    until(engine, lambda: counts(engine)[0] == 5)
    assert recall(engine).paused_for_s > 4
    for _ in range(40):
        engine.tick()
        engine.core.step_fn()
    assert counts(engine)[0] == 5
    until(engine, lambda: counts(engine)[0] == 10)
    assert recall(engine).paused_for_s > 9  # it was slow again


def test_what_was_changed_on_the_disk_is_found_before_anybody_asks(engine: EngineInProcess, folder: Path) -> None:
    prompt = stored(engine, 3, "ana", 10)
    third = next(path for path in folder.rglob("tenant~ana/*") if f"-{3 * BLOCK:08x}-" in path.name)
    content = bytearray(third.read_bytes())
    content[-1] ^= 1
    third.write_bytes(content)
    damaged = store(engine).status().faults.get("damaged", 0)
    until(engine, lambda: counts(engine)[0] == 9)
    settle(engine)
    assert store(engine).status().faults["damaged"] == damaged + 1
    assert in_dram(engine) == {"ana": 9}
    assert found(engine, prompt, "ana") == 2 * BLOCK
    assert ended(engine, "ana").reason == "tier_fault"


@pytest.mark.parametrize("how", ["forgotten", "strict"])
def test_of_a_session_that_is_forgotten_meanwhile_or_strict_from_then_on_nothing_is_left(
    engine: EngineInProcess, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    prompt = stored(engine, 3, "ana", 10)
    memory = tiers(engine).primary_tier._mmap_region.base_tensor
    memory.zero_()
    reads = SlowReads(engine, monkeypatch)
    until(engine, reads.begun.is_set)
    if how == "forgotten":
        engine.report(release=["ana"])
    else:
        engine.submit(prompt, session="ana", strict=True)
    reads.go_on.set()
    run(engine)
    settle(engine)
    manager = tiers(engine)
    assert in_dram(engine) == {}
    assert not manager._doomed
    assert len(manager._chunks._chunks) == 0
    assert not memory.any()
    assert store(engine).status().chunks == 0
    assert recall(engine).paused_for_s == 0  # which was no fault of the disk's


def test_what_leaves_dram_before_anybody_asks_was_read_in_vain(engine: EngineInProcess) -> None:
    stored(engine, 3, "ana", 10)
    until(engine, lambda: counts(engine)[0] == 10)
    engine.report(release=["ana"])
    run(engine)
    assert counts(engine) == (10, 0, 10)


def test_in_quarantine_nothing_is_read(engine: EngineInProcess) -> None:
    stored(engine, 3, "ana", 10)
    tiers(engine).quarantined = True
    try:
        settle(engine)
        assert in_dram(engine) == {}
    finally:
        tiers(engine).quarantined = False
