"""What leaves the device comes back from DRAM: for its own session, as it was, and for as long as it should."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.engine.inside.canary import MOST_AGE_S, MOST_TOKENS_BESIDE
from appliance.engine.inside.connector import TieredStateConnector
from appliance.engine.protocol import Lease, TurnAccount, TurnEnd, lease_params
from tests.engine.in_process import BLOCK, POOL, Answer, EngineInProcess, words

CHUNKS = 100
CHUNK_BYTES = 2 * 2 * 64 * 2 * BLOCK  # layers, keys and values, hidden size, bfloat16, tokens


@pytest.fixture(scope="module")
def tiered(tiny_model: Path) -> Iterator[EngineInProcess]:
    """An engine whose DRAM holds two and a half times what its device does.

    It is closed with the last one: an engine that is shut down takes vLLM's process groups with it.
    """
    engine = EngineInProcess(tiny_model, dram_bytes=CHUNKS * CHUNK_BYTES)
    yield engine
    engine.close()


@pytest.fixture
def engine(tiered: EngineInProcess) -> Iterator[EngineInProcess]:
    """An engine with empty tiers, and held to account for every block after the test."""
    assert tiered.scheduler.reset_prefix_cache(reset_connector=True)
    tiered.start_anew()
    yield tiered
    tiered.cancel_all()
    tiered.drain()
    tiered.report(release=[state.session for state in tiered.report().leases])
    settle(tiered)
    tiered.assert_nothing_is_held()


def connector(engine: EngineInProcess) -> TieredStateConnector:
    assert isinstance(engine.connector, TieredStateConnector)
    return engine.connector


def in_dram(engine: EngineInProcess, session: str) -> int:
    return connector(engine)._tiers._chunks.order.chunks_of(("tenant", session))


def settle(engine: EngineInProcess) -> None:
    """Step as the engine's loop does, until no copy is under way."""
    for _ in range(10):
        if engine.scheduler.has_requests():
            engine.core.step_fn()


def turn(
    engine: EngineInProcess, seed: int, session: str, *, salt: str = "salt", blocks: int = 10, strict: bool = False
) -> tuple[Answer, TurnAccount]:
    lease = Lease(session, "tenant", 0.0, turn=f"turn-{engine.steps}-{seed}", strict=strict)
    prompt = words(seed, blocks * BLOCK + 5)
    answer = engine.turn(prompt, salt=salt, transfer=lease_params(lease), max_tokens=BLOCK)
    settle(engine)
    (account,) = connector(engine).turns_ended([TurnEnd(session, "tenant", lease.turn, "other", BLOCK, 0.0)])
    assert account is not None
    return answer, account


def push_off_the_device(engine: EngineInProcess) -> None:
    """Others take the room, and what they left is emptied, too."""
    for seed in range(50, 55):
        turn(engine, seed, f"filler-{seed}")
    assert engine.core.reset_prefix_cache()


def test_a_prompt_comes_back_from_dram_and_the_answer_is_the_same(engine: EngineInProcess) -> None:
    cold, account = turn(engine, 1, "a")
    assert (account.device_tokens, account.dram_tokens) == (0, 0)
    warm, account = turn(engine, 1, "a")
    assert (account.device_tokens, account.dram_tokens) == (10 * BLOCK, 0)
    push_off_the_device(engine)
    restored, account = turn(engine, 1, "a")
    assert (account.device_tokens, account.dram_tokens, account.disk_tokens) == (0, 10 * BLOCK, 0)
    assert cold.token_ids == warm.token_ids == restored.token_ids


def test_the_answer_is_kept_with_the_prompt(engine: EngineInProcess) -> None:
    turn(engine, 1, "a")
    assert in_dram(engine, "a") == 11  # ten blocks of prompt, and one that the answer completes


def test_another_salt_hits_nothing_in_dram(engine: EngineInProcess) -> None:
    turn(engine, 1, "a", salt="mine")
    push_off_the_device(engine)
    _, account = turn(engine, 1, "b", salt="theirs")
    assert (account.device_tokens, account.dram_tokens) == (0, 0)


def test_a_released_session_leaves_dram_at_once_and_is_overwritten(engine: EngineInProcess) -> None:
    turn(engine, 1, "a")
    turn(engine, 2, "b")
    policy = connector(engine)._tiers._chunks
    rows = [policy._chunks[key].chunk_id for key in policy.order.keys_of(("tenant", "a"))]
    engine.report(release=["a"])
    assert (in_dram(engine, "a"), in_dram(engine, "b")) == (0, 11)
    memory = connector(engine)._tiers.primary_tier.get_kv_memoryview()
    assert not any(any(memory[row, byte] for byte in range(0, CHUNK_BYTES, 512)) for row in rows)
    push_off_the_device(engine)
    _, account = turn(engine, 1, "a")
    assert account.dram_tokens == 0


def test_what_a_released_session_diverged_from_is_overwritten_too(engine: EngineInProcess) -> None:
    turn(engine, 1, "a")
    policy = connector(engine)._tiers._chunks
    rows = [policy._chunks[key].chunk_id for key in policy.order.keys_of(("tenant", "a"))]
    other = words(1, 4 * BLOCK) + words(2, 10 * BLOCK)
    engine.turn(other, transfer=lease_params(Lease("a", "tenant", 0.0)), max_tokens=2)
    settle(engine)
    assert len(policy.order) > in_dram(engine, "a")
    engine.report(release=["a"])
    assert len(policy.order) == 0
    memory = connector(engine)._tiers.primary_tier.get_kv_memoryview()
    assert not any(any(memory[row, byte] for byte in range(0, CHUNK_BYTES, 512)) for row in rows)


def test_a_session_closed_while_it_runs_leaves_nothing_in_dram(engine: EngineInProcess) -> None:
    transfer = lease_params(Lease("a", "tenant", 0.0))
    engine.submit(words(1, 10 * BLOCK), transfer=transfer, max_tokens=BLOCK)
    engine.step(4)
    engine.report(release=["a"])
    engine.drain()
    settle(engine)
    assert in_dram(engine, "a") == 0
    assert len(connector(engine)._tiers._chunks.order) == 0


def test_a_session_closed_while_it_is_loaded_leaves_nothing_in_dram(engine: EngineInProcess) -> None:
    turn(engine, 1, "a")
    push_off_the_device(engine)
    name = engine.submit(words(1, 10 * BLOCK + 5), transfer=lease_params(Lease("a", "tenant", 0.0)), max_tokens=4)
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda *arguments: (schedule(*arguments), engine.report(release=["a"]))[0]
    engine.step()  # the load is under way when the session is closed
    engine.scheduler.schedule = schedule
    engine.drain()
    settle(engine)
    assert len(engine.answers[name].token_ids) == 4
    assert in_dram(engine, "a") == 0


def test_a_strict_session_never_leaves_the_device(engine: EngineInProcess) -> None:
    turn(engine, 1, "a", strict=True)
    assert len(connector(engine)._tiers._chunks.order) == 0


def test_a_request_without_a_session_never_leaves_the_device(engine: EngineInProcess) -> None:
    engine.turn(words(1, 10 * BLOCK), max_tokens=2)
    settle(engine)
    assert len(connector(engine)._tiers._chunks.order) == 0


@pytest.mark.parametrize("transfer", [{"holdfast": {}}, {"holdfast": None}, {"holdfast": {"session": "a"}}, {"do": 1}])
def test_a_request_whose_lease_is_malformed_is_answered_and_never_leaves_the_device(
    engine: EngineInProcess, transfer: object
) -> None:
    assert len(engine.turn(words(1, 10 * BLOCK), transfer=transfer, max_tokens=2).token_ids) == 2
    settle(engine)
    assert len(connector(engine)._tiers._chunks.order) == 0


def test_dram_that_is_full_keeps_what_is_worth_most(engine: EngineInProcess) -> None:
    turn(engine, 1, "idle")
    engine.clock.advance(3600)
    for seed in range(2, 12):
        turn(engine, seed, f"s{seed}")
    assert in_dram(engine, "idle") == 0
    assert in_dram(engine, "s11") == 11


def test_a_request_cancelled_during_a_load_gives_everything_back(engine: EngineInProcess) -> None:
    turn(engine, 1, "a")
    push_off_the_device(engine)
    name = engine.submit(words(1, 10 * BLOCK + 5), transfer=lease_params(Lease("a", "tenant", 0.0)), max_tokens=4)
    engine.step()
    engine.cancel(name)
    settle(engine)
    assert engine.pool.get_num_free_blocks() + engine.report().leased_blocks == POOL


def test_the_memory_has_no_name_that_could_be_left_behind(engine: EngineInProcess) -> None:
    assert not list(Path("/dev/shm").glob("vllm_offload*"))
    mapped = Path("/proc/self/smaps").read_text().split("vllm_offload")[1:]
    assert len(mapped) == 2  # the scheduler's and the worker's
    assert all({"dd", "lo"} <= set(flags_of(region)) for region in mapped)


def test_the_device_s_pool_in_memory_is_locked_too_and_in_no_core(engine: EngineInProcess) -> None:
    for tensor in engine.kv_tensors():
        address = tensor.untyped_storage().data_ptr()
        for line, region in mappings():
            begin, _, end = line.partition(" ")[0].partition("-")
            if int(begin, 16) <= address < int(end, 16):
                assert {"dd", "lo"} <= set(flags_of(region))
                break
        else:
            raise AssertionError("the pool is nowhere")


def flags_of(region: str) -> list[str]:
    """The flags of a mapping, as /proc/self/smaps has them (proc(5))."""
    return region.partition("VmFlags:")[2].partition("\n")[0].split()


def mappings() -> list[tuple[str, str]]:
    """Each mapping of this process: its first line, and all that /proc/self/smaps says of it."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return [(part.partition("\n")[0], part) for part in parts if part]


def restored_with_canary(engine: EngineInProcess) -> None:
    """A session comes back from DRAM, and what came back is computed again."""
    engine.clock.advance(3600)
    turn(engine, 1, "a")
    push_off_the_device(engine)
    engine.clock.advance(3600)
    turn(engine, 1, "a")
    engine.tick()
    settle(engine)


def test_what_comes_back_is_compared_with_what_is_computed(engine: EngineInProcess) -> None:
    canary = connector(engine)._canary
    compared = canary.compared_total
    restored_with_canary(engine)
    assert canary.compared_total == compared + 10
    assert canary.worst < 0.01
    assert not canary.quarantined
    assert ("holdfast", "canary") not in connector(engine)._tiers._chunks.order.sessions()


def test_a_block_that_comes_back_otherwise_quarantines_the_tiers(engine: EngineInProcess) -> None:
    engine.clock.advance(3600)
    cold, _ = turn(engine, 1, "a")
    push_off_the_device(engine)
    order = connector(engine)._tiers._chunks.order
    row = connector(engine)._tiers.row(order.keys_of(("tenant", "a"))[3])
    assert row is not None
    row[100:200] = 77  # what a fault in memory would do
    engine.clock.advance(3600)
    turn(engine, 1, "a")
    engine.tick()
    settle(engine)
    try:
        assert connector(engine)._canary.quarantined
        push_off_the_device(engine)
        answer, account = turn(engine, 1, "a")
        assert account.dram_tokens == 0  # the session goes on, computed again
        assert answer.token_ids == cold.token_ids
    finally:
        connector(engine)._canary.quarantined = connector(engine)._tiers.quarantined = False


def test_where_somebody_is_always_served_a_short_canary_is_computed_beside_them(engine: EngineInProcess) -> None:
    engine.clock.advance(3600)
    turn(engine, 1, "a")
    push_off_the_device(engine)
    engine.clock.advance(3600)
    turn(engine, 1, "a")
    canary = connector(engine)._canary
    compared = canary.compared_total
    engine.submit(words(7, BLOCK), transfer=lease_params(Lease("b", "tenant", 0.0)), max_tokens=8 * BLOCK)
    engine.step(2)
    engine.tick()
    settle(engine)
    assert engine.running()
    assert canary.compared_total == compared + MOST_TOKENS_BESIDE // BLOCK
    assert canary.compared_age_s() == 0
    assert not canary.quarantined


def test_a_canary_goes_with_the_session_that_it_is_of(engine: EngineInProcess) -> None:
    engine.clock.advance(3600)
    turn(engine, 1, "a")
    push_off_the_device(engine)
    engine.clock.advance(3600)
    turn(engine, 1, "a")
    canary = connector(engine)._canary
    compared = canary.compared_total
    engine.tick()
    engine.core.step_fn()  # it is being computed
    assert canary.places()
    engine.report(release=["a"])
    assert not canary.places()
    settle(engine)
    assert canary.compared_total == compared
    assert ("holdfast", "canary") not in connector(engine)._tiers._chunks.order.sessions()


def test_a_canary_that_is_never_computed_is_let_go(engine: EngineInProcess) -> None:
    engine.clock.advance(3600)
    turn(engine, 1, "a")
    push_off_the_device(engine)
    engine.report(release=[f"filler-{seed}" for seed in range(50, 55)])
    engine.clock.advance(3600)
    turn(engine, 1, "a")
    canary = connector(engine)._canary
    due_in_s = connector(engine).tick()
    assert due_in_s is not None
    assert 0 < due_in_s <= MOST_AGE_S
    engine.clock.advance(MOST_AGE_S)
    connector(engine).tick()
    assert canary.take(idle=True) is None


@pytest.mark.timeout(400)
@pytest.mark.parametrize("phase", ["store", "load", "reclaim", "close"])
def test_an_engine_that_is_killed_in_any_phase_leaves_nothing_in_shared_memory(tiny_model: Path, phase: str) -> None:
    script = Path(__file__).with_name("killed_in_a_phase.py")
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_model), phase],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not list(Path("/dev/shm").glob("vllm_offload*"))
