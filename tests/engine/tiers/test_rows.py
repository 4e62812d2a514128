"""A row of DRAM holds what its chunk's sessions computed and zeros, whoever had it before; and so does what is written
of it to the disk.

The model's groups of layers differ in size: a chunk of the smallest fills half of its row.
"""

import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from vllm.v1.kv_offload.base import ReqContext, get_offload_group_idx, make_offload_key
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus

from appliance.engine.inside.connector import UnsupportedEngine
from appliance.engine.inside.connector.memory import check_layout
from appliance.engine.inside.disk.cipher import AesGcm
from appliance.engine.inside.pace import Pace
from appliance.engine.protocol import Lease, disk_tier, lease_params
from appliance.engine.tier_keys import KEY_SOCKET
from tests.engine.in_process import BLOCK, POOL, EngineInProcess, words
from tests.engine.tiers.test_disk_tier import Gateway
from tests.engine.tiny import write_tiny_model

CHUNKS = 48
PAGE_BYTES = 2 * 64 * 2 * BLOCK  # keys and values, hidden size, bfloat16, tokens: of a layer
ROW_BYTES = 2 * PAGE_BYTES
WINDOWED = (False, True, True, False, True)
DEADLINE_S = 60.0

Owner = tuple[str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the disk is."""
    return tmp_path_factory.mktemp("tier")


@pytest.fixture(scope="module")
def tiered(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineInProcess]:
    """An engine with little DRAM, and a disk that holds everything."""
    model = write_tiny_model(tmp_path_factory.mktemp("padded"), window_tokens=4 * BLOCK, windowed=WINDOWED)
    gateway = Gateway()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(KEY_SOCKET, str(gateway.open()))
        disk = disk_tier(str(folder), 64 << 20, 3600.0)
        engine = EngineInProcess(model, dram_bytes=CHUNKS * ROW_BYTES, disk=disk, pool=3 * POOL)
        assert tiers(engine).secondary_tiers[0].block_size_bytes == ROW_BYTES
        yield engine
        engine.close()
    gateway.close()


@pytest.fixture
def engine(tiered: EngineInProcess) -> Iterator[EngineInProcess]:
    """An engine that has nothing of anybody."""
    yield tiered
    tiered.cancel_all()
    run(tiered)
    everybody = {owner.session for owner in store(tiered)._index.owners()} | {
        name for _, name in tiers(tiered).sessions()
    }
    tiered.report(release=[*everybody, *(state.session for state in tiered.report().leases)])
    reset(tiered)
    assert not any(rows_of_nobody(tiered).values())


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


def reset(engine: EngineInProcess) -> None:
    run(engine)
    engine.connector.release_all()
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)


def turn(engine: EngineInProcess, seed: int, owner: Owner, blocks: int = 8, **lease: Any) -> None:
    tenant, session = owner
    prompt = words(seed, blocks * BLOCK + 5)
    engine.submit(prompt, session=session, tenant=tenant, salt=session, max_tokens=2, idle_timeout_s=0.0, **lease)
    run(engine)


def row_of(engine: EngineInProcess, row: int) -> bytes:
    memory: memoryview = tiers(engine).secondary_tiers[0]._memory
    return bytes(memory[row * ROW_BYTES : (row + 1) * ROW_BYTES])


def rows_of_nobody(engine: EngineInProcess) -> Mapping[int, bool]:
    """Each row that no chunk has, and whether anything is in it."""
    taken = {int(chunk.chunk_id) for chunk in tiers(engine)._chunks._chunks.values()}
    return {row: any(row_of(engine, row)) for row in range(CHUNKS) if row not in taken}


def pages_of(engine: EngineInProcess, owner: Owner) -> set[bytes]:
    """A session's KV in DRAM, a page of a layer each."""
    chunks = tiers(engine)._chunks
    rows = [row_of(engine, int(chunks._chunks[key].chunk_id)) for key in chunks.order.keys_of(owner)]
    return {page for row in rows for page in (row[:PAGE_BYTES], row[PAGE_BYTES:]) if any(page)}


def everything_in_dram(engine: EngineInProcess) -> bytes:
    return b"".join(row_of(engine, row) for row in range(CHUNKS))


def everything_on_disk(engine: EngineInProcess) -> list[bytes]:
    """What each file opens to, with the key of the session that owns it."""
    files, opened = store(engine)._files, []
    for owner in store(engine)._index.owners():
        cipher = AesGcm(hashlib.sha256(f"{owner.tenant}~{owner.session}".encode()).digest())
        for name in list(store(engine)._index.session(owner).names()):
            sealed, row = files.buffer(), bytearray(ROW_BYTES)
            files.read(name, sealed)
            files.open(name, cipher, sealed, memoryview(row))
            opened.append(bytes(row))
    return opened


def test_what_a_chunk_does_not_fill_of_its_row_is_nobody_s_in_dram_and_on_the_disk(engine: EngineInProcess) -> None:
    ana = ("bank", "ana")
    turn(engine, 1, ana)
    pages = pages_of(engine, ana)
    assert len(pages) > 8
    for number in range(8):
        turn(engine, 20 + number, ("evil", f"eve-{number}"))
    assert not tiers(engine)._chunks.order.keys_of(ana)
    engine.report(release=["ana"])
    run(engine)
    small = [
        row_of(engine, int(chunk.chunk_id))
        for key, chunk in tiers(engine)._chunks._chunks.items()
        if get_offload_group_idx(key) not in tiers(engine)._chunks.filling
    ]
    assert small
    assert not any(any(row[PAGE_BYTES:]) for row in small)
    dram, disk = everything_in_dram(engine), everything_on_disk(engine)
    assert len(disk) > CHUNKS
    assert not [page for page in pages if page in dram or any(page in row for row in disk)]


def test_what_a_cap_pushes_out_is_overwritten(engine: EngineInProcess) -> None:
    first, second = ("acme", "first"), ("acme", "second")
    turn(engine, 2, first, tenant_cap=0.4)
    pages = pages_of(engine, first)
    turn(engine, 3, second, tenant_cap=0.4)
    left = pages - pages_of(engine, first)
    assert left
    assert not [page for page in left if page in everything_in_dram(engine)]
    assert not any(rows_of_nobody(engine).values())


def test_what_is_reset_is_overwritten(engine: EngineInProcess) -> None:
    turn(engine, 4, ("acme", "reset"))
    assert any(everything_in_dram(engine))
    reset(engine)
    assert not any(everything_in_dram(engine))


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_evicted_for_a_read_of_the_disk_is_overwritten_by_it_or_when_it_failed(
    engine: EngineInProcess, folder: Path, whole: bool
) -> None:
    away, others = ("acme", "away"), [("bank", f"here-{number}") for number in range(3)]

    def pages_of_others() -> set[bytes]:
        return set[bytes]().union(*(pages_of(engine, other) for other in others))

    turn(engine, 5, away, blocks=10)
    reset(engine)
    for number, other in enumerate(others):
        turn(engine, 30 + number, other)
    before = pages_of_others()
    for file in () if whole else folder.rglob("acme~away/*"):
        damaged = bytearray(file.read_bytes())
        damaged[-1] ^= 1
        file.write_bytes(damaged)
    loaded = store(engine).status().loaded_chunks
    turn(engine, 5, away, blocks=10)
    assert (store(engine).status().loaded_chunks > loaded) is whole
    left = before - pages_of_others()
    assert left  # rows of theirs were taken
    assert not [page for page in left if page in everything_in_dram(engine)]
    assert not any(rows_of_nobody(engine).values())


def test_a_row_that_is_copied_during_a_reset_is_left_alone_until_it_is_taken_over(engine: EngineInProcess) -> None:
    turn(engine, 4, ("acme", "loading"))
    chunks, primary = tiers(engine)._chunks, tiers(engine).primary_tier
    small = next(key for key in chunks._chunks if get_offload_group_idx(key) not in chunks.filling)
    row = int(chunks._chunks[small].chunk_id)
    primary.prepare_load([small], ReqContext("loading"))
    before = row_of(engine, row)
    reset(engine)
    assert row_of(engine, row) == before
    assert sum(rows_of_nobody(engine).values()) == 1
    chunks.insert(small, ChunkStatus(row))
    assert not any(row_of(engine, row))
    chunks.remove(small)


def test_what_could_not_be_copied_is_overwritten(engine: EngineInProcess) -> None:
    manager = tiers(engine)
    primary, key = manager.primary_tier, make_offload_key(b"k" * 32, 0)
    context = ReqContext("ana", lease_params(Lease("ana", "tenant", 5.0)))
    context.set_offload_key_position(key, BLOCK)
    primary.on_new_request(context)
    manager.on_new_request(context)
    manager.prepare_store([key], context)
    row = int(manager._chunks._chunks[key].chunk_id)
    manager._rows()[row].fill_(7)  # what a copy had written when it failed
    manager.complete_store([key], context, False)
    assert not any(row_of(engine, row))
    manager.on_request_finished(context)


@pytest.fixture
def row_by_row(engine: EngineInProcess, monkeypatch: pytest.MonkeyPatch) -> EngineInProcess:
    """The engine, which overwrites one row in a step and copies one chunk, however long the step took."""
    monkeypatch.setattr(tiers(engine)._chunks, "pace", Pace(lambda: 0.0, least_bytes=ROW_BYTES))
    monkeypatch.setattr(engine.copying_worker(), "_pace", Pace(lambda: 0.0, least_bytes=1))
    return engine


def test_the_rows_of_a_large_session_are_overwritten_a_few_a_step_beside_whoever_runs(
    row_by_row: EngineInProcess,
) -> None:
    engine = row_by_row
    turn(engine, 60, ("acme", "large"), blocks=12)
    others = engine.submit(words(61, BLOCK), session="other", salt="other", max_tokens=100)
    engine.step(3)
    chunks = tiers(engine)._chunks
    rows = {int(chunk.chunk_id) for chunk in chunks._chunks.values()}
    assert len(rows) > 12
    tiers(engine)._chunks.pace.step()
    engine.report(release=["large"])
    waiting = [len(chunks.waiting_rows())]
    assert len(rows) > waiting[0] >= len(rows) - 2
    while waiting[-1]:
        assert engine.answers[others].finish_reason is None
        engine.step()
        waiting.append(len(chunks.waiting_rows()))
        engine.assert_nobody_s_rows_are_empty()
    assert all(before - after == 1 for before, after in itertools.pairwise(waiting))
    run(engine)
    assert not any(rows_of_nobody(engine).values())


def test_an_engine_that_has_nothing_else_to_do_goes_on_until_no_row_waits(row_by_row: EngineInProcess) -> None:
    engine = row_by_row
    turn(engine, 62, ("acme", "large"), blocks=12)
    tiers(engine)._chunks.pace.step()
    engine.report(release=["large"])
    assert any(rows_of_nobody(engine).values())
    assert engine.scheduler.has_requests()  # what vLLM's loop asks
    engine.core.step_fn()
    assert not any(rows_of_nobody(engine).values())  # many in a step where nobody runs
    assert not engine.scheduler.has_requests()


def test_a_row_that_waits_is_overwritten_before_anybody_gets_it(row_by_row: EngineInProcess) -> None:
    engine = row_by_row
    turn(engine, 63, ("acme", "large"), blocks=12)
    chunks = tiers(engine)._chunks
    fills, half = (
        next(key for key in chunks._chunks if (get_offload_group_idx(key) in chunks.filling) is filling)
        for filling in (True, False)
    )
    tiers(engine)._chunks.pace.step()
    engine.report(release=["large"])
    for key in (fills, half):
        row = next(row for row in chunks.waiting_rows() if any(row_of(engine, row)))
        chunks.insert(key, ChunkStatus(row))
        assert not any(row_of(engine, row))
        assert row not in chunks.waiting_rows()
        chunks.remove(key)
    reset(engine)
    assert not any(everything_in_dram(engine))


def test_a_reset_overwrites_what_waits_too(row_by_row: EngineInProcess) -> None:
    engine = row_by_row
    turn(engine, 64, ("acme", "large"), blocks=12)
    tiers(engine)._chunks.pace.step()
    engine.report(release=["large"])
    assert tiers(engine)._chunks.waiting_rows()
    tiers(engine)._chunks.clear()
    assert not any(everything_in_dram(engine))


def test_what_is_not_copied_yet_is_copied_before_its_block_is_given_away(row_by_row: EngineInProcess) -> None:
    engine, worker = row_by_row, row_by_row.copying_worker()
    prompt = words(65, 10 * BLOCK + 5)
    cold = engine.turn(prompt, salt="cold", max_tokens=4)
    reset(engine)
    engine.turn(prompt, session="ana", tenant="acme", salt="ana", max_tokens=4)
    assert worker._leaving, "copies lag behind the request"
    engine.connector.release_all()
    names = [engine.submit(words(70 + number, 25 * BLOCK), salt=f"cold-{number}") for number in range(4)]
    engine.drain()  # they have every block of the device
    assert all(engine.answers[name].finish_reason for name in names)
    run(engine)
    assert not worker._leaving
    warm = engine.turn(prompt, session="ana", tenant="acme", salt="ana", max_tokens=4)
    assert warm.cached_tokens == 10 * BLOCK
    assert warm.token_ids == cold.token_ids


def test_where_vllm_would_copy_what_others_left_in_a_block_it_is_refused(engine: EngineInProcess) -> None:
    check_layout(engine.core.vllm_config.cache_config.kv_cache_layout, 3)
    assert engine.core.vllm_config.cache_config.kv_cache_layout == "LBHNC"
    check_layout("BLHNC", 1)
    check_layout(None, 3)
    with pytest.raises(UnsupportedEngine, match="BLHNC"):
        check_layout("BLHNC", 3)
