"""DRAM and the disk together, in an engine that the test steps: what waits, what is given up, and whose a chunk is."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from vllm.v1.kv_offload.base import ReqContext, make_offload_key

from appliance.engine.protocol import Lease, lease_params
from tests.engine.in_process import BLOCK, EngineInProcess, words

CHUNKS = 24
CHUNK_BYTES = 2 * 2 * 64 * 2 * BLOCK  # layers, keys and values, hidden size, bfloat16, tokens
DEADLINE_S = 30.0


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
