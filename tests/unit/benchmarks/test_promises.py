"""The benchmarks hold their figures to what the project promises, and to nothing less."""

import copy
from typing import Any

import pytest

from benchmarks.gateway_overhead import promises_met
from benchmarks.stateful import missed

QUICK = {"first_p50_ms": 1.0, "end_p50_ms": 1.0, "first_p99_ms": 1.0, "end_p99_ms": 1.0, "errors": 0.0}
OVERHEAD = {
    "direct": {**QUICK, "requests_per_s": 4000.0},
    "bare": {**QUICK, "requests_per_s": 1000.0},
    "gateway": {**QUICK, "first_p50_ms": 3.0, "end_p99_ms": 5.0, "requests_per_s": 250.0},
}
ARM = {"prefill_tokens_per_turn": 53.5, "ttft_p50_s": 0.020, "account_per_turn": {"lost": 0.0}}
STATEFUL: dict[str, Any] = {
    "stateful": ARM,
    "vanilla": ARM,
    "ttft_over_vanilla_p50_s": 0.0029,
    "prefill_reduction": 0.983,
    "ttft_reduction": 0.90,
    "identical_output": True,
}


def test_what_holds_every_promise_of_the_gateway_s_misses_none() -> None:
    assert all(promises_met(OVERHEAD, start_s=1.49, resident_bytes=149e6).values())


@pytest.mark.parametrize(
    ("target", "figure", "value", "promise"),
    [
        ("gateway", "end_p50_ms", 3.1, "added to the durable end, median"),
        ("gateway", "first_p99_ms", 5.1, "added to the first byte, p99"),
        ("gateway", "requests_per_s", 249.0, "requests/s"),
        ("bare", "errors", 1.0, "no error"),
    ],
)
def test_a_figure_that_misses_its_bound_is_named(target: str, figure: str, value: float, promise: str) -> None:
    figures = copy.deepcopy(OVERHEAD)
    figures[target][figure] = value
    broken = [name for name, kept in promises_met(figures, start_s=1.0, resident_bytes=1e6).items() if not kept]
    assert [name.startswith(promise) for name in broken] == [True]


@pytest.mark.parametrize(
    ("start_s", "resident_bytes", "promise"), [(1.5, 1e6, "start to accepting"), (1.0, 150e6, "resident memory")]
)
def test_a_start_and_a_memory_have_bounds(start_s: float, resident_bytes: float, promise: str) -> None:
    met = promises_met(OVERHEAD, start_s=start_s, resident_bytes=resident_bytes)
    assert [name.startswith(promise) for name, kept in met.items() if not kept] == [True]


def with_stateful(**changed: Any) -> dict[str, Any]:
    return {**STATEFUL, "stateful": {**STATEFUL["stateful"], **changed}}


def test_what_is_no_worse_than_vanilla_misses_nothing() -> None:
    assert missed(STATEFUL) == []


@pytest.mark.parametrize(
    ("figures", "miss"),
    [
        ({**STATEFUL, "prefill_reduction": 0.9829}, "fewer tokens"),
        ({**STATEFUL, "ttft_reduction": 0.899}, "sooner"),
        (with_stateful(prefill_tokens_per_turn=53.6), "vanilla 53.5"),
        (with_stateful(account_per_turn={"lost": 0.1}), "found again"),
        ({**STATEFUL, "ttft_over_vanilla_p50_s": 0.0031}, "after vanilla's"),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_what_is_worse_is_named(figures: dict[str, Any], miss: str) -> None:
    (said,) = missed(figures)
    assert miss in said


def test_where_the_answers_differ_only_what_could_be_found_again_compares() -> None:
    other = {**with_stateful(prefill_tokens_per_turn=60.0), "identical_output": False}
    assert missed(other) == []
    assert missed({**with_stateful(account_per_turn={"lost": 1.0}), "identical_output": False}) != []
