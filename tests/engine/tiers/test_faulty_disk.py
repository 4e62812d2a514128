"""A disk that fails or hangs under an engine that serves: every answer is the same, and the fault is seen."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.engine.picture import KvPicture
from tests.engine.in_process import BLOCK, EngineInProcess, words
from tests.engine.tiers.on_disk import give_clock
from tests.engine.tiers.test_disk_in_process import (
    CHUNK_BYTES,
    CHUNKS,
    account_of,
    empty_all_but_the_disk,
    run,
    store,
    stored,
    tiers,
)

BLOCKS = 10
FILE_BYTES = CHUNK_BYTES + 4096
DEADLINE_S = 30.0


class Clock:
    """The tier's: seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def clock(on_disk: tuple[EngineInProcess, Path]) -> Clock:
    clock = Clock()
    give_clock(store(on_disk[0]), clock)
    return clock


@pytest.fixture
def engine(on_disk: tuple[EngineInProcess, Path], clock: Clock) -> Iterator[EngineInProcess]:
    engine = on_disk[0]
    yield engine
    engine.cancel_all()
    run(engine)
    engine.report(release=[state.session for state in engine.report().leases])
    tiers(engine).release({owner.session for owner in store(engine)._index.owners()})
    empty_all_but_the_disk(engine)
    assert sum(1 for chunk in tiers(engine)._chunks._chunks.values() if not chunk.is_ready) == 0


class Gate:
    """Calls to the operating system that get no further until the test lets them."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.held = 0
        self._opened = threading.Event()

    def __call__(self, descriptor: int, data: Any) -> Any:
        if _is_a_file_s(data):
            self.held += 1
            assert self._opened.wait(DEADLINE_S)
        return self._call(descriptor, data)

    def open(self) -> None:
        self._opened.set()


def _is_a_file_s(data: Any) -> bool:
    return (len(data[0]) if isinstance(data, list) else len(data)) == FILE_BYTES


def failing(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Have what the tier asks of the operating system fail."""
    real = getattr(os, call)

    def fail(descriptor: int, data: Any) -> Any:
        if _is_a_file_s(data):
            raise OSError(number, os.strerror(number))
        return real(descriptor, data)

    monkeypatch.setattr(os, call, fail)


def picture(engine: EngineInProcess) -> tuple[str, str, dict[str, int], dict[str, int]]:
    """The disk's state, its last error, what was not stored and what could not be read."""
    seen = KvPicture.from_wire(engine.core.holdfast_kv_picture(0))
    assert seen.disk is not None
    return seen.tiers[2].state, seen.disk.last_error, dict(seen.disk.not_stored_total), dict(seen.disk.faults_total)


def words_of(engine: EngineInProcess, prompt: list[int], **of: Any) -> tuple[int, list[int]]:
    """How many tokens a turn finds, and what it answers, once nothing moves any more."""
    name = engine.submit(prompt, max_tokens=4, **of)
    run(engine)
    answer = engine.answers[name]
    return answer.cached_tokens or 0, answer.token_ids


def until(engine: EngineInProcess, condition: Callable[[], bool]) -> None:
    """Step until a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        engine.core.step_fn()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_what_a_disk_cannot_read_is_computed_and_a_tier_s_fault(engine: EngineInProcess, number: int) -> None:
    _, expected = words_of(engine, words(60, BLOCKS * BLOCK + 5), salt="cold")
    prompt = stored(engine, 60, "ana", BLOCKS)
    before = picture(engine)[3]["error"]
    with pytest.MonkeyPatch.context() as fault:
        failing(fault, "readv", number)
        account = account_of(engine, prompt, "ana")
        assert (account.disk_tokens, account.reason) == (0, "tier_fault")
        _, last_error, _, faults = picture(engine)
        assert errno.errorcode[number] in last_error
        assert faults["error"] == before + BLOCKS
    empty_all_but_the_disk(engine)
    assert words_of(engine, prompt, session="ana") == (BLOCKS * BLOCK, expected)  # it was computed, and stored again
    assert account_of(engine, prompt, "ana").reason == ""


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_what_a_disk_does_not_take_costs_no_answer_and_it_is_used_again(
    engine: EngineInProcess, clock: Clock, number: int
) -> None:
    prompt = words(61, BLOCKS * BLOCK + 5)
    _, expected = words_of(engine, prompt, salt="cold")
    not_stored = picture(engine)[2]["error"]
    with pytest.MonkeyPatch.context() as fault:
        failing(fault, "write", number)
        assert words_of(engine, prompt, session="ana") == (0, expected)
        state, last_error, missed, _ = picture(engine)
        assert (state, missed["error"]) == ("failed", not_stored + BLOCKS)
        assert errno.errorcode[number] in last_error
        empty_all_but_the_disk(engine)
        assert words_of(engine, prompt, session="ana") == (0, expected)
    empty_all_but_the_disk(engine)
    clock.now += 60.0
    assert words_of(engine, prompt, session="ana") == (0, expected)
    assert picture(engine)[0] == "ok"
    empty_all_but_the_disk(engine)
    assert words_of(engine, prompt, session="ana") == (BLOCKS * BLOCK, expected)


def test_a_disk_that_hangs_in_writes_keeps_nobody_from_dram(engine: EngineInProcess, clock: Clock) -> None:
    prompts = {f"session-{seed}": words(62 + seed, 8 * BLOCK + 5) for seed in range(6)}  # twice what DRAM holds
    expected = {session: words_of(engine, prompt, salt="cold")[1] for session, prompt in prompts.items()}
    gate = Gate(os.write)
    with pytest.MonkeyPatch.context() as fault:
        fault.setattr(os, "write", gate)
        names = {}
        for session, prompt in prompts.items():
            names[session] = engine.submit(prompt, session=session, max_tokens=4)
            engine.drain()
            clock.now += 3.0  # longer than anything may wait
        assert {session: engine.answers[name].token_ids for session, name in names.items()} == expected
        until(engine, lambda: store(engine).status().waiting_bytes == 0)
        state, last_error, not_stored, _ = picture(engine)
        assert (state, last_error) == ("failed", "the disk does not answer")
        assert not_stored["slow"] > 0
        chunks = tiers(engine)._chunks
        held = [chunk for chunk in chunks._chunks.values() if chunk.ref_cnt]
        assert len(held) <= CHUNKS // 2, "DRAM is taken by what waits for the disk"
        assert chunks.order.chunks_of(("tenant", "session-5")) == 8
        gate.open()
        run(engine)
    assert picture(engine)[0] == "ok"
    empty_all_but_the_disk(engine)
    prompt = prompts["session-5"]
    words_of(engine, prompt, session="session-5")
    empty_all_but_the_disk(engine)
    assert words_of(engine, prompt, session="session-5") == (8 * BLOCK, expected["session-5"])


def test_a_disk_that_reads_too_slowly_is_not_waited_for(engine: EngineInProcess, clock: Clock) -> None:
    prompt = stored(engine, 70, "ana", BLOCKS)
    _, expected = words_of(engine, prompt, salt="cold")
    empty_all_but_the_disk(engine)
    gate = Gate(os.readv)
    with pytest.MonkeyPatch.context() as fault:
        fault.setattr(os, "readv", gate)
        name = engine.submit(prompt, session="ana", max_tokens=4)
        until(engine, lambda: bool(gate.held))
        assert engine.answers[name].finish_reason is None
        clock.now += 3.0
        engine.drain()
        assert engine.answers[name].token_ids == expected
        assert engine.answers[name].cached_tokens == 0
        assert picture(engine)[:2] == ("failed", "the disk does not answer")
        gate.open()
        run(engine)
    assert picture(engine)[0] == "ok"
    empty_all_but_the_disk(engine)
    assert words_of(engine, prompt, session="ana") == (BLOCKS * BLOCK, expected)
