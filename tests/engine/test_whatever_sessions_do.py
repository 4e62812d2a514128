"""Whatever sessions do, on vLLM's real block pool: no request that fits waits for a lease, and nothing is lost.

Prompts longer than a step are computed in parts. tests/engine/tiers/ has the same with tiers behind the device.
"""

from hypothesis import given, settings

from tests.engine.crowd import DEEDS, Deed, Seen, live
from tests.engine.in_process import EngineInProcess


def test_no_request_that_fits_waits_for_a_lease_and_nothing_is_lost(engine_in_process: EngineInProcess) -> None:
    seen = Seen()

    @settings(max_examples=20, derandomize=True)
    @given(deeds=DEEDS)
    def whatever_they_do(deeds: list[Deed]) -> None:
        live(engine_in_process, deeds, seen)

    whatever_they_do()
    assert seen.happened["waited"]
    assert seen.happened["preempted"]
