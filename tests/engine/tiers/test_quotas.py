"""Shares and caps in DRAM and on the disk, in an engine that the test steps: who is pushed out, and what is told."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from appliance.engine.inside.disk.files import HEADER_BYTES
from appliance.engine.inside.disk.store import _WRITERS
from appliance.engine.protocol import Lease, TurnAccount, TurnEnd, disk_tier, lease_params
from appliance.engine.tier_keys import KEY_SOCKET
from tests.engine.in_process import BLOCK, EngineInProcess, words
from tests.engine.tiers.test_disk_tier import Gateway

CHUNKS = 40  # in DRAM and on the disk
CHUNK_BYTES = 2 * 2 * 64 * 2 * BLOCK  # layers, keys and values, hidden size, bfloat16, tokens
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def tiered(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineInProcess]:
    """An engine with as much DRAM as its device has, and as much disk."""
    gateway = Gateway()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(KEY_SOCKET, str(gateway.open()))
        disk_bytes = (CHUNKS + _WRITERS - 1) * (CHUNK_BYTES + HEADER_BYTES)
        disk = disk_tier(str(tmp_path_factory.mktemp("tier")), disk_bytes, 3600.0)
        engine = EngineInProcess(tiny_model, dram_bytes=CHUNKS * CHUNK_BYTES, disk=disk)
        yield engine
        engine.close()
    gateway.close()


@pytest.fixture
def engine(tiered: EngineInProcess) -> Iterator[EngineInProcess]:
    """An engine whose tiers are empty."""
    yield tiered
    everybody = {owner.session for owner in store(tiered)._index.owners()}
    everybody |= {session for _, session in tiers(tiered).sessions()}
    tiered.report(release=[*everybody, *(state.session for state in tiered.report().leases)])
    push_off(tiered, "device", "dram")
    assert store(tiered).status().chunks == 0


def tiers(engine: EngineInProcess) -> Any:
    return cast("Any", engine.connector)._tiers


def store(engine: EngineInProcess) -> Any:
    return tiers(engine).secondary_tiers[0].store


def settle(engine: EngineInProcess) -> None:
    """Step until nothing moves between tiers."""
    deadline = time.monotonic() + DEADLINE_S
    while engine.scheduler.has_requests() or tiers(engine).has_pending_work():
        assert time.monotonic() < deadline, "a copy is never over"
        engine.core.step_fn()


def push_off(engine: EngineInProcess, *emptied: str) -> None:
    settle(engine)
    engine.connector.release_all()
    assert engine.scheduler.reset_prefix_cache(reset_connector="dram" in emptied)


def turn(engine: EngineInProcess, seed: int, tenant: str, **quota: Any) -> TurnAccount:
    """A turn of ten full blocks, of a session of its own for each seed."""
    lease = Lease(f"s{seed}", tenant, 0.0, turn=f"turn-{engine.steps}-{seed}", **quota)
    engine.turn(words(seed, 10 * BLOCK + 5), transfer=lease_params(lease), max_tokens=2)
    settle(engine)
    account = engine.ended(TurnEnd(lease.session, tenant, lease.turn, "other", 2, 0.0))
    assert account is not None
    return account


def in_dram(engine: EngineInProcess, tenant: str) -> int:
    return int(tiers(engine)._chunks.order.chunks_of_tenant(tenant))


def on_disk(engine: EngineInProcess, tenant: str) -> int:
    return int(store(engine)._index.chunks_of_tenant(tenant))


def found(account: TurnAccount) -> tuple[int, int, int, str]:
    """Blocks from the device, from DRAM and from the disk, and why there were not more."""
    tokens = (account.device_tokens, account.dram_tokens, account.disk_tokens)
    device, dram, disk = (each // BLOCK for each in tokens)
    return device, dram, disk, account.reason


def test_no_tier_keeps_more_of_a_session_than_its_cap_and_its_next_turn_is_told_so(engine: EngineInProcess) -> None:
    turn(engine, 1, "acme", session_cap=0.2)
    assert (in_dram(engine, "acme"), on_disk(engine, "acme")) == (8, 8)
    push_off(engine, "device")
    assert found(turn(engine, 1, "acme", session_cap=0.2)) == (0, 8, 0, "quota")
    push_off(engine, "device", "dram")
    assert found(turn(engine, 1, "acme", session_cap=0.2)) == (0, 0, 8, "quota")


def test_a_tenants_share_stays_in_dram_and_on_the_disk_whoever_else_comes(engine: EngineInProcess) -> None:
    turn(engine, 1, "acme", tenant_share=0.25)
    engine.clock.advance(3600)  # worth less than all that follow
    for seed in range(2, 8):
        turn(engine, seed, "crowd")
    assert (in_dram(engine, "acme"), on_disk(engine, "acme")) == (10, 10)
    assert (in_dram(engine, "crowd"), on_disk(engine, "crowd")) == (30, 30)
    push_off(engine, "device")
    assert found(turn(engine, 1, "acme", tenant_share=0.25)) == (0, 10, 0, "")
    push_off(engine, "device", "dram")
    assert found(turn(engine, 1, "acme", tenant_share=0.25)) == (0, 0, 10, "")


def test_what_no_share_holds_is_evicted_and_not_called_a_quota(engine: EngineInProcess) -> None:
    turn(engine, 1, "acme")
    engine.clock.advance(3600)
    for seed in range(2, 8):
        turn(engine, seed, "crowd")
    assert (in_dram(engine, "acme"), on_disk(engine, "acme")) == (0, 0)
    push_off(engine, "device")
    assert found(turn(engine, 1, "acme"))[3] in ("", "evicted", "expired")


def test_at_its_tenants_cap_a_session_pushes_the_tenants_others_out_of_dram_and_of_the_disk(
    engine: EngineInProcess,
) -> None:
    turn(engine, 9, "crowd")
    for seed in (1, 2):
        turn(engine, seed, "acme", tenant_cap=0.4)
        engine.clock.advance(60)
    for tier in (in_dram, on_disk):
        assert (tier(engine, "acme"), tier(engine, "crowd")) == (16, 10)
    engine.clock.advance(3600)  # nobody is expected, and nothing is read ahead
    push_off(engine, "device", "dram")
    assert found(turn(engine, 2, "acme", tenant_cap=0.4)) == (0, 0, 10, "")
    assert found(turn(engine, 1, "acme", tenant_cap=0.4)) == (0, 0, 6, "quota")


def test_a_session_comes_back_from_the_disk_within_what_dram_may_hold_of_it(engine: EngineInProcess) -> None:
    turn(engine, 1, "acme")
    push_off(engine, "device", "dram")
    assert found(turn(engine, 1, "acme", session_cap=0.1)) == (0, 0, 4, "quota")
    assert on_disk(engine, "acme") == 10
