"""What is counted of turns, by tenant and by cause, in a bounded number of series."""

from types import SimpleNamespace

import pytest

from api import server
from api.metrics import Metrics
from appliance.sessions import Account, Cause, Served, TurnState
from tests.unit.api.test_export_trouble import services

WARM = Account(100, 80, {Cause.NEW: 15, Cause.TIER_FAULT: 5}, served=Served(50, 30, 0), repeated_tokens=85)


def page(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.exposition().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_a_turn_is_counted_by_tier_by_cause_and_by_tenant() -> None:
    metrics = Metrics()
    metrics.turn(TurnState.COMPLETE, 0.001, WARM, completion=7, tenant_id="ten_a", first_token_s=0.2)
    seen = page(metrics)
    assert seen['holdfast_served_prompt_tokens_total{tenant="ten_a",tier="dram"}'] == 30
    assert seen['holdfast_computed_prompt_tokens_total{cause="tier_fault",tenant="ten_a"}'] == 5
    assert seen['holdfast_prompt_tokens_total{tenant="ten_a"}'] == 100
    assert seen['holdfast_repeated_prompt_tokens_total{tenant="ten_a"}'] == 85
    assert seen['holdfast_time_to_first_token_seconds_bucket{le="0.2",start="warm",tenant="ten_a"}'] == 1
    assert seen['holdfast_time_to_first_token_seconds_count{start="cold",tenant="ten_a"}'] == 0


def quantile(buckets: list[tuple[float, float]], share: float) -> float:
    """As Prometheus' `histogram_quantile`, of counts up to each bound."""
    wanted, bound, below = share * buckets[-1][1], 0.0, 0.0
    for upper, count in buckets:
        if count >= wanted:
            return bound + (upper - bound) * (wanted - below) / (count - below)
        bound, below = upper, count
    raise AssertionError("the last bound is infinite")


@pytest.mark.parametrize("middle_s", [0.005 * 24_000 ** (step / 40) for step in range(41)])
def test_quantiles_from_the_buckets_are_near_the_true_ones_from_5_ms_to_120_s(middle_s: float) -> None:
    metrics = Metrics()
    times = [middle_s * 2 ** (place / 200 - 0.5) for place in range(201)]  # from 0.7 to 1.4 of the middle
    for seconds in times:
        metrics.turn(TurnState.COMPLETE, 0.001, WARM, completion=7, tenant_id="ten_a", first_token_s=seconds)
    ours = 'holdfast_time_to_first_token_seconds_bucket{le="'
    seen = [(name.removeprefix(ours), count) for name, count in page(metrics).items() if name.startswith(ours)]
    warm = [(float(rest.partition('"')[0]), count) for rest, count in seen if 'start="warm"' in rest]
    for share, error in ((0.5, 0.05), (0.9, 0.2), (0.99, 0.4)):
        assert quantile(warm, share) == pytest.approx(times[round(share * 200)], rel=error)


def test_tenants_beyond_the_bound_share_series() -> None:
    metrics = Metrics()
    for number in range(74):
        for _ in range(2):
            metrics.turn(TurnState.COMPLETE, 0.001, WARM, completion=7, tenant_id=f"ten_{number}")
    seen = page(metrics)
    assert sum(name.startswith("holdfast_prompt_tokens_total") for name in seen) == 65
    assert seen['holdfast_prompt_tokens_total{tenant="other"}'] == 10 * 2 * 100


def test_the_series_of_a_tenant_that_is_removed_go_and_another_has_room() -> None:
    metrics = Metrics()
    for number in range(74):
        metrics.turn(TurnState.COMPLETE, 0.001, WARM, completion=7, tenant_id=f"ten_{number}", first_token_s=0.2)
    for number in range(20):
        metrics.forget_tenant(f"ten_{number}")
    metrics.forget_tenant("ten_of_nobody")
    metrics.turn(TurnState.COMPLETE, 0.001, WARM, completion=7, tenant_id="ten_73", first_token_s=0.2)
    text = metrics.exposition().decode()
    assert 'tenant="ten_3"' not in text
    seen = page(metrics)
    assert seen['holdfast_prompt_tokens_total{tenant="ten_73"}'] == 100
    assert seen['holdfast_prompt_tokens_total{tenant="ten_30"}'] == 100
    assert seen['holdfast_tokens_total{kind="prompt_cached"}'] == 75 * 80


def test_the_engine_is_told_by_its_model_and_by_how_often_it_was_started_again() -> None:
    its = services()
    its.engine_process = SimpleNamespace(restarts=3)
    server._observe(its)
    seen = page(its.metrics)
    assert seen['holdfast_engine_info{model_name="demo"}'] == 1
    assert seen["holdfast_engine_restarts_total"] == 3
    its.watch.models = ()
    assert not [name for name in page(its.metrics) if name.startswith("holdfast_engine_info")]
