"""DRAM and the disk together, in an engine that the test steps: what waits, what is given up, and whose a chunk is."""

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from vllm.v1.kv_offload.base import ReqContext, make_offload_key

from appliance.engine.inside.disk.files import Owner as DiskOwner
from appliance.engine.protocol import Lease, TurnAccount, TurnEnd, lease_params
from tests.engine.in_process import BLOCK, EngineInProcess, words

CHUNKS = 24
CHUNK_BYTES = 2 * 2 * 64 * 2 * BLOCK  # layers, keys and values, hidden size, bfloat16, tokens
DEADLINE_S = 30.0
NUMBERS = itertools.count()


@pytest.fixture
def engine(on_disk: tuple[EngineInProcess, Path]) -> Iterator[EngineInProcess]:
    engine = on_disk[0]
    yield engine
    engine.cancel_all()
    run(engine)
    engine.report(release=[state.session for state in engine.report().leases])
    tiers(engine).release({owner.session for owner in store(engine)._index.owners()})
    empty_all_but_the_disk(engine)


def tiers(engine: EngineInProcess) -> Any:
    return cast("Any", engine.connector)._tiers


def store(engine: EngineInProcess) -> Any:
    return tiers(engine).secondary_tiers[0].store


def run(engine: EngineInProcess) -> None:
    """Step until every request has ended and nothing moves."""
    deadline = time.monotonic() + DEADLINE_S
    while engine._front.has_unfinished_requests():
        assert time.monotonic() < deadline, "a request waits for ever"
        engine.step()
    while engine.scheduler.has_requests() or tiers(engine).has_pending_work():
        assert time.monotonic() < deadline, "a copy is never over"
        engine.core.step_fn()


def empty_all_but_the_disk(engine: EngineInProcess) -> None:
    run(engine)
    engine.connector.release_all()
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)


def stored(engine: EngineInProcess, seed: int, session: str, blocks: int) -> list[int]:
    """A prompt of a session that has run, and is on the disk alone now."""
    prompt = words(seed, blocks * BLOCK + 5)
    engine.submit(prompt, session=session, max_tokens=2)
    empty_all_but_the_disk(engine)
    return prompt


def test_nobody_waits_for_a_disk_that_does_not_answer(engine: EngineInProcess, folder: Path) -> None:
    prompt = stored(engine, 3, "ana", 10)
    file = next(path for path in folder.rglob("tenant~ana/*") if f"-{BLOCK:08x}-" in path.name)
    file.unlink()
    os.mkfifo(file)  # whoever opens it waits until somebody writes
    try:
        began = time.monotonic()
        name = engine.submit(prompt, session="ana", max_tokens=2)
        while engine.answers[name].finish_reason is None:
            assert time.monotonic() < began + DEADLINE_S
            engine.step()
        assert engine.answers[name].cached_tokens == 0
        assert not store(engine).answers()
        chunks = tiers(engine)._chunks._chunks
        assert sum(not chunk.is_ready for chunk in chunks.values()) == 10  # what the disk may still write to
    finally:
        os.close(os.open(file, os.O_WRONLY))
    run(engine)
    assert store(engine).answers()
    assert all(chunk.is_ready for chunk in chunks.values())


def test_a_chunk_is_booked_to_the_session_that_computed_it(engine: EngineInProcess) -> None:
    manager = tiers(engine)
    primary, order = manager.primary_tier, manager._chunks.order
    ana, eve = (ReqContext(name, lease_params(Lease(name, "tenant", 5.0))) for name in ("ana", "eve"))
    keys = {"ana": make_offload_key(b"k" * 32, 0), "eve": make_offload_key(b"j" * 32, 0)}
    for context in (ana, eve):
        context.set_offload_key_position(keys[context.req_id], BLOCK)
        primary.on_new_request(context)
        manager.on_new_request(context)
    manager.prepare_store([keys["ana"]], ana)
    primary.complete_store([keys["ana"]], ana, False)  # it was damaged on the disk
    manager.prepare_store([keys["eve"]], eve)
    manager.prepare_store([keys["ana"]], ana)
    assert order.keys_of(("tenant", "ana")) == (keys["ana"],)
    assert order.keys_of(("tenant", "eve")) == (keys["eve"],)
    for context in (ana, eve):
        primary.complete_store([keys[context.req_id]], context, False)
        state = manager._req_state[context.req_id]
        state.pending_primary_stores = 0
        manager.on_request_finished(context)


def test_sessions_that_come_back_together_to_too_small_a_dram_do_not_push_each_other_out(
    engine: EngineInProcess,
) -> None:
    prompts = {session: stored(engine, 10 + seed, session, 10) for seed, session in enumerate(("a", "b", "c", "d"))}
    loaded = store(engine).status().loaded_chunks
    names = [engine.submit(prompt, session=session, max_tokens=2) for session, prompt in prompts.items()]
    run(engine)
    cached = [engine.answers[name].cached_tokens or 0 for name in names]
    assert sum(cached) >= (CHUNKS - 4) * BLOCK
    assert store(engine).status().loaded_chunks - loaded <= len(prompts) * 10  # each chunk is read once at most


def test_of_a_session_larger_than_dram_the_head_comes_back(engine: EngineInProcess) -> None:
    prompt = stored(engine, 30, "long", 30)
    assert store(engine).status().chunks >= CHUNKS
    loaded = store(engine).status().loaded_chunks
    name = engine.submit(prompt, session="long", max_tokens=2)
    run(engine)
    assert engine.answers[name].cached_tokens == CHUNKS * BLOCK
    assert store(engine).status().loaded_chunks - loaded == CHUNKS


def began(engine: EngineInProcess, prompt: list[int], session: str, **lease: Any) -> str:
    """A turn of a session is queued; what it is called."""
    turn = f"turn-{next(NUMBERS)}"
    engine.submit(prompt, transfer=lease_params(Lease(session, "tenant", 15.0, turn=turn, **lease)), max_tokens=2)
    return turn


def account_of(engine: EngineInProcess, prompt: list[int], session: str, **lease: Any) -> TurnAccount:
    """What a session's turn found, once it is over and nothing moves."""
    turn = began(engine, prompt, session, **lease)
    run(engine)
    account = engine.ended(TurnEnd(session, "tenant", turn, "other", 2, 15.0))
    assert account is not None
    return account


def damage(folder: Path, session: str, end_token: int) -> None:
    """Change a byte of the chunk that ends there."""
    file = next(path for path in folder.rglob(f"tenant~{session}/*") if f"-{end_token:08x}-" in path.name)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def is_nowhere_but_on_the_device(engine: EngineInProcess, folder: Path, session: str) -> bool:
    """Whether the tiers have nothing of a session, and no row of DRAM anything at all; waits for its files to go."""
    deadline = time.monotonic() + DEADLINE_S
    while list(folder.rglob(f"tenant~{session}")):
        assert time.monotonic() < deadline, "its files stay"
        time.sleep(0.001)
    manager = tiers(engine)
    in_dram = manager._chunks.order.chunks_of(("tenant", session)) or manager._doomed
    return not in_dram and not manager.primary_tier._mmap_region.base_tensor.any()


def test_with_its_first_strict_turn_a_session_leaves_every_tier_and_with_its_timeout_the_device(
    engine: EngineInProcess, folder: Path
) -> None:
    tiers(engine).primary_tier._mmap_region.base_tensor.zero_()
    prompt = words(40, 10 * BLOCK + 5)
    began(engine, prompt, "ana")
    run(engine)
    in_dram = tiers(engine)._chunks.order.chunks_of(("tenant", "ana"))
    assert (in_dram, store(engine).chunks_of(("tenant", "ana"))) == (10, 10)
    engine.connector.release_all()
    assert engine.scheduler.reset_prefix_cache()  # it is in DRAM and on the disk alone

    strict = account_of(engine, prompt, "ana", strict=True)
    assert (strict.device_tokens, strict.dram_tokens, strict.disk_tokens) == (0, 0, 0)
    assert is_nowhere_but_on_the_device(engine, folder, "ana")
    again = account_of(engine, prompt, "ana", strict=True)
    assert (again.device_tokens, again.dram_tokens, again.disk_tokens) == (10 * BLOCK, 0, 0)
    engine.clock.advance(15)
    engine.tick()
    for late in ({"strict": True}, {}):  # whoever asks with its salt
        account = account_of(engine, prompt, "ana", **late)
        assert (account.device_tokens, account.dram_tokens, account.disk_tokens) == (0, 0, 0)
        if late:
            assert account.reason == "expired"
            assert is_nowhere_but_on_the_device(engine, folder, "ana")
            engine.clock.advance(15)
            engine.tick()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("from_disk", [False, True])
def test_a_strict_turn_takes_along_what_a_turn_before_it_still_loads_and_stores(
    engine: EngineInProcess, folder: Path, steps: int, from_disk: bool
) -> None:
    prompt = words(41, 10 * BLOCK + 5)
    if from_disk:
        prompt = stored(engine, 41, "ana", 10)
    tiers(engine).primary_tier._mmap_region.base_tensor.zero_()
    soft = engine.submit(prompt, session="ana", max_tokens=2 * BLOCK)
    engine.step(steps)
    strict = engine.submit(prompt, session="ana", strict=True, max_tokens=2 * BLOCK)
    run(engine)
    assert engine.answers[soft].token_ids == engine.answers[strict].token_ids
    assert len(engine.answers[strict].token_ids) == 2 * BLOCK
    assert is_nowhere_but_on_the_device(engine, folder, "ana")


def test_a_strict_turn_takes_nothing_of_another_session_s(engine: EngineInProcess) -> None:
    stored(engine, 42, "ana", 5)
    prompt = stored(engine, 43, "eve", 5)
    account_of(engine, words(42, 5 * BLOCK + 5), "ana", strict=True)
    assert account_of(engine, prompt, "eve").disk_tokens == 5 * BLOCK


def test_a_child_is_told_that_its_parent_s_chunk_could_not_be_read(engine: EngineInProcess, folder: Path) -> None:
    prompt = stored(engine, 44, "parent", 10)
    damage(folder, "parent", 3 * BLOCK)
    child = account_of(engine, prompt[: 10 * BLOCK] + words(45, 40), "child", parent="parent")
    assert (child.disk_tokens, child.reason) == (2 * BLOCK, "tier_fault")
    empty_all_but_the_disk(engine)
    parent = account_of(engine, prompt, "parent")
    assert (parent.disk_tokens, parent.reason) == (10 * BLOCK, "")  # the child computed it again


def test_a_fault_behind_what_left_for_another_reason_is_not_the_reason(engine: EngineInProcess, folder: Path) -> None:
    prompt = stored(engine, 47, "ana", 10)
    damage(folder, "ana", 3 * BLOCK)
    assert account_of(engine, prompt[: 3 * BLOCK + 5], "eve", strict=True).reason == ""
    other = account_of(engine, words(48, 4 * BLOCK), "ana")  # it begins anew, and its fault is not looked up
    assert (other.disk_tokens, other.reason) == (0, "")


def test_in_quarantine_the_tiers_are_the_reason_for_what_they_have_and_for_nothing_else(
    engine: EngineInProcess,
) -> None:
    on_disk = stored(engine, 49, "disk", 5)
    in_dram, strict = words(50, 5 * BLOCK + 5), words(51, 5 * BLOCK + 5)
    account_of(engine, in_dram, "dram")
    account_of(engine, strict, "strict", strict=True)
    tiers(engine).quarantined = True
    try:
        engine.clock.advance(15)
        engine.tick()
        assert account_of(engine, strict, "strict", strict=True).reason == "expired"
        engine.connector.release_all()
        assert engine.scheduler.reset_prefix_cache()
        for session, prompt in {"dram": in_dram, "disk": on_disk}.items():
            account = account_of(engine, prompt, session)
            assert (account.device_tokens, account.dram_tokens, account.disk_tokens) == (0, 0, 0)
            assert account.reason == "tier_fault"
        assert account_of(engine, words(52, 5 * BLOCK), "new").reason == ""
        engine.report(release=["dram"])
        assert account_of(engine, in_dram, "dram").reason == ""
    finally:
        tiers(engine).quarantined = False


def test_what_a_session_diverged_from_is_the_first_to_leave_the_disk_too(engine: EngineInProcess) -> None:
    old = stored(engine, 60, "ana", 10)
    ana = DiskOwner("tenant", "ana")
    new = [*old[: 4 * BLOCK], *words(61, 7 * BLOCK)]
    engine.submit(new, session="ana", max_tokens=2)
    run(engine)
    places = store(engine).positions_of(ana).values()
    assert sorted(places) == [BLOCK * block for block in range(1, 12)]  # each token once: of the branch that goes on
    assert store(engine).status().chunks == 10 + 7
    empty_all_but_the_disk(engine)
    name = engine.submit(old, session="ana", max_tokens=2)
    run(engine)
    assert engine.answers[name].cached_tokens == 10 * BLOCK  # while it is there, whoever goes back finds it
    assert sorted(store(engine).positions_of(ana).values()) == [BLOCK * block for block in range(1, 11)]
