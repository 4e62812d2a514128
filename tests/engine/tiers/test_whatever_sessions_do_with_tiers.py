"""Whatever sessions do with DRAM behind the device: no request that fits waits for a lease, and nothing is lost.

Loads are asynchronous and take as many steps as they are told to: requests wait while they hold blocks. What leaves the
device is copied a chunk a step, and what left DRAM is overwritten a row a step.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from appliance.engine.inside.pace import Pace
from tests.engine.crowd import DEEDS, Deed, Seen, live
from tests.engine.in_process import BLOCK, EngineInProcess

CHUNK_BYTES = 2 * 2 * 64 * 2 * BLOCK  # layers, keys and values, hidden size, bfloat16, tokens
ENGINES: dict[str, dict[str, Any]] = {
    "first come, first served": {},
    "priorities and a watermark": {"scheduling_policy": "priority", "watermark": 0.1},
    "prompts let in by their first part": {"scheduler_reserve_full_isl": False, "long_prefill_token_threshold": 64},
}


@pytest.fixture(scope="module")
def engines(tiny_model: Path) -> Iterator[dict[str, EngineInProcess]]:
    """Each is closed with the last one: an engine that is shut down takes vLLM's process groups with it."""
    made = {
        name: EngineInProcess(tiny_model, dram_bytes=100 * CHUNK_BYTES, **options) for name, options in ENGINES.items()
    }
    for engine in made.values():
        tiers: Any = engine.connector
        tiers._tiers._chunks.pace, engine.copying_worker()._pace = (Pace(lambda: 0.0, least_bytes=1) for _ in range(2))
    yield made
    for engine in made.values():
        engine.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ENGINES)
def test_no_request_that_fits_waits_for_a_lease_and_nothing_is_lost(
    engines: dict[str, EngineInProcess], name: str
) -> None:
    seen = Seen()

    @settings(max_examples=15, derandomize=True)
    @given(deeds=DEEDS)
    def whatever_they_do(deeds: list[Deed]) -> None:
        live(engines[name], deeds, seen)

    whatever_they_do()
    assert seen.happened["waited"]
    assert seen.happened["preempted"]
    assert seen.happened["loaded"]
