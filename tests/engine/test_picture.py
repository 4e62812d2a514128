"""What the engine says of all that it keeps, of vLLM's real block pool."""

from appliance.engine.picture import KvPicture
from tests.engine.in_process import POOL, EngineInProcess, words


def picture(engine: EngineInProcess, sessions: int = 10) -> KvPicture:
    return KvPicture.from_wire(engine.core.holdfast_kv_picture(sessions))


def test_a_picture_is_that_of_the_pool(engine: EngineInProcess) -> None:
    assert picture(engine).sessions_total == 0
    engine.turn(words(1, 100), session="short", tenant="bank")
    engine.turn(words(2, 300), session="long", tenant="bank")
    seen = picture(engine)
    (device,) = seen.tiers
    held = POOL - engine.pool.get_num_free_blocks()
    assert (device.tier, device.capacity_blocks, device.used_blocks) == ("device", POOL, held)
    assert device.leased_blocks == len(engine.connector.leased_block_ids()) == held
    assert [(each.session, each.held[0].tokens) for each in seen.sessions] == [("long", 288), ("short", 96)]
    assert (seen.tenants[0].sessions, seen.tenants[0].blocks) == (2, {"device": held})
    assert seen.leased_sessions_total == seen.tenants[0].leased_sessions == 2
    assert seen.tenants[0].worths_hits_per_s == seen.worths_hits_per_s
    assert seen.engine_life == picture(engine).engine_life
    assert all(each.worth_hits_per_s is not None and each.worth_hits_per_s > 0 for each in seen.sessions)
    assert len(seen.worths_hits_per_s) == 3
    assert [each.session for each in picture(engine, 1).sessions] == ["long"]


def test_a_block_has_the_bytes_that_the_worker_gave_it(engine: EngineInProcess) -> None:
    """One page for each layer of the model: keys and values of a block's tokens."""
    (device,) = picture(engine).tiers
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    held = sum(cache.numel() * cache.element_size() for cache in runner.kv_caches)
    assert held == device.block_bytes * engine.pool.num_gpu_blocks
