"""A model that keeps the KV of its layers in several ways comes back from DRAM, and is found to be what it was."""

from collections.abc import Iterator

import pytest

from appliance.engine.inside.connector import TieredStateConnector
from appliance.engine.protocol import Lease, lease_params
from tests.engine.in_process import BLOCK, POOL, EngineInProcess, words
from tests.engine.tiny import write_tiny_model

PROMPT = words(1, 10 * BLOCK + 5)
LEASE = lease_params(Lease("a", "tenant", 0.0))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineInProcess]:
    """An engine whose model sees a window in its first layer, and all in its second."""
    model = write_tiny_model(tmp_path_factory.mktemp("windowed"), window_tokens=4 * BLOCK)
    engine = EngineInProcess(model, dram_bytes=4 << 20, pool=2 * POOL)
    yield engine
    engine.close()


def settle(engine: EngineInProcess) -> None:
    """Step as the engine's loop does, until no copy is under way."""
    for _ in range(10):
        if engine.scheduler.has_requests():
            engine.core.step_fn()


def test_what_every_layer_kept_whole_is_compared_and_the_rest_is_not(engine: EngineInProcess) -> None:
    connector = engine.connector
    assert isinstance(connector, TieredStateConnector)
    assert connector._manager.num_kv_cache_groups == 2
    cold = engine.turn(PROMPT, transfer=LEASE)
    settle(engine)
    assert engine.core.reset_prefix_cache()
    restored = engine.turn(PROMPT, transfer=LEASE)
    settle(engine)
    assert restored.cached_tokens == 10 * BLOCK
    assert restored.token_ids == cold.token_ids
    engine.tick()
    settle(engine)
    assert connector._canary.compared_total == 10  # of the layer that sees all
    assert connector._canary.worst < 0.01
    assert not connector._tiers.quarantined
