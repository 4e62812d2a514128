"""What the engine says of its tiers behind the device, of vLLM's real manager and the real store on disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.engine.inside.connector import TieredStateConnector
from appliance.engine.picture import HeldPicture, KvPicture
from appliance.engine.protocol import disk_tier
from tests.engine.in_process import BLOCK, EngineInProcess, words

CHUNKS = 100
CHUNK_BYTES = 2 * 2 * 64 * 2 * BLOCK  # layers, keys and values, hidden size, bfloat16, tokens


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineInProcess]:
    """An engine with all three tiers; nobody gives it keys, so that nothing reaches its disk."""
    disk = disk_tier(str(tmp_path_factory.mktemp("disk")), 64 << 20, 3600.0)
    made = EngineInProcess(tiny_model, dram_bytes=CHUNKS * CHUNK_BYTES, disk=disk)
    yield made
    made.close()


def picture(engine: EngineInProcess) -> KvPicture:
    return KvPicture.from_wire(engine.core.holdfast_kv_picture(10))


def settle(engine: EngineInProcess) -> None:
    """Step as the engine's loop does, until nothing moves between tiers."""
    connector = engine.connector
    assert isinstance(connector, TieredStateConnector)
    while True:
        engine.core.step_fn()
        if not connector._tiers.has_pending_work():
            break
    engine.core.step_fn()


def tiers(engine: EngineInProcess) -> dict[str, tuple[str, int, int]]:
    return {tier.tier: (tier.state, tier.capacity_blocks, tier.used_blocks) for tier in picture(engine).tiers}


def test_dram_and_disk_are_seen_with_what_they_hold_and_what_went_wrong(engine: EngineInProcess) -> None:
    assert tiers(engine)["dram"] == ("ok", CHUNKS, 0)
    engine.turn(words(1, 10 * BLOCK + 5), session="a")
    settle(engine)
    assert tiers(engine)["dram"] == ("ok", CHUNKS, 10)
    seen = picture(engine)
    assert [tier.tier for tier in seen.tiers] == ["device", "dram", "disk"]
    assert seen.tiers[1].block_bytes == CHUNK_BYTES
    disk = seen.tiers[2]
    assert 0.9 * (64 << 20) < disk.capacity_blocks * disk.block_bytes <= 64 << 20
    assert seen.disk is not None
    assert (seen.disk.stored_blocks_total, seen.disk.last_error) == (0, "")
    assert seen.canary is not None
    assert (seen.canary.compared_blocks_total, seen.canary.quarantined) == (0, False)
    engine.report(release=["a"])
    settle(engine)
    assert tiers(engine)["dram"][2] == 0


def test_what_each_tier_has_of_a_session_is_seen_with_its_reason(engine: EngineInProcess) -> None:
    engine.turn(words(1, 6 * BLOCK + 5), session="a", idle_timeout_s=15.0, tenant_share=0.5)
    engine.turn(words(2, 12 * BLOCK + 5), session="b", tenant="other", idle_timeout_s=0.0)
    settle(engine)
    b, a = picture(engine).sessions
    assert (a.tenant, a.session, b.tenant, b.session) == ("tenant", "a", "other", "b")
    assert a.held == (HeldPicture("device", 6, 192, "lease", 15.0), HeldPicture("dram", 6, 192, "share", None))
    assert b.held == (HeldPicture("device", 12, 384, "worth", None), HeldPicture("dram", 12, 384, "worth", None))
    engine.connector.release_all()
    assert engine.scheduler.reset_prefix_cache()
    b, a = picture(engine).sessions
    assert ([held.tier for held in a.held], [held.tier for held in b.held]) == (["dram"], ["dram"])
    seen = picture(engine)
    assert [tier.sessions for tier in seen.tiers] == [0, 2, 0]
    assert {each.tenant: dict(each.blocks) for each in seen.tenants} == {
        "tenant": {"device": 0, "dram": 6, "disk": 0},
        "other": {"device": 0, "dram": 12, "disk": 0},
    }
    assert len(KvPicture.from_wire(engine.core.holdfast_kv_picture(1)).sessions) == 1
    assert KvPicture.from_wire(engine.core.holdfast_kv_picture(0, ["tenant", "a"])).sessions == (a,)
    for nobody in (["other", "a"], ["tenant", "c"]):
        assert KvPicture.from_wire(engine.core.holdfast_kv_picture(10, nobody)).sessions == ()
    engine.report(release=["a", "b"])
    assert picture(engine).sessions == ()


def test_a_quarantine_is_seen_in_every_tier_that_is_restored_from(engine: EngineInProcess) -> None:
    connector = engine.connector
    assert isinstance(connector, TieredStateConnector)
    connector._tiers.quarantined = True
    try:
        assert {tier: state for tier, (state, _, _) in tiers(engine).items()} == {
            "device": "ok",
            "dram": "quarantined",
            "disk": "quarantined",
        }
        assert picture(engine).canary is not None
        canary = picture(engine).canary
        assert canary is not None
        assert canary.quarantined
    finally:
        connector._tiers.quarantined = False
