"""How much a key may ask for: a minute, at once, a day."""

import pytest

from appliance.identity import (
    ApiKey,
    Caller,
    DailyTokensSpent,
    ModelNotAllowed,
    Principal,
    Quotas,
    RateLimited,
    Role,
    Scopes,
    TooManyConcurrent,
)
from appliance.store import Store

pytestmark = pytest.mark.anyio

MIDNIGHT = 1_700_006_400.0  # 2023-11-15 00:00 UTC


class Clock:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = MIDNIGHT + 3600

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(store: Store, clock: Clock) -> Quotas:
    return Quotas(store, now=clock)


def caller(scopes: Scopes, key_id: str = "ak_1") -> Caller:
    principal = Principal("prn_1", "ten_1", "agent", Role.CLIENT)
    return Caller(principal, None, ApiKey(key_id, "ten_1", "prn_1", None, scopes, 0.0, None, None))


def test_a_key_without_limits_is_never_refused(quotas: Quotas) -> None:
    for _ in range(1000):
        quotas.admit(caller(Scopes()), "demo", 10**9)


def test_a_key_for_one_model_asks_for_no_other(quotas: Quotas) -> None:
    who = caller(Scopes(models=frozenset({"demo"})))
    quotas.admit(who, "demo", 1)
    with pytest.raises(ModelNotAllowed, match="other"):
        quotas.admit(who, "other", 1)


def test_requests_are_counted_over_the_last_minute(quotas: Quotas, clock: Clock) -> None:
    who = caller(Scopes(requests_per_minute=2))
    quotas.admit(who, "demo", 1)
    clock.now += 20
    quotas.admit(who, "demo", 1)
    clock.now += 20
    with pytest.raises(RateLimited) as caught:
        quotas.admit(who, "demo", 1)
    assert caught.value.retry_after_s == 20
    clock.now += 20
    quotas.admit(who, "demo", 1)


def test_a_clock_that_was_set_back_does_not_lock_a_key_out(quotas: Quotas, clock: Clock) -> None:
    who = caller(Scopes(requests_per_minute=1))
    quotas.admit(who, "demo", 1)
    clock.now -= 86_400
    quotas.admit(who, "demo", 1)


def test_requests_at_once_are_bounded_and_a_place_is_free_again_on_every_way_out(quotas: Quotas) -> None:
    who = caller(Scopes(concurrent_requests=1))
    for leave in ("settle", "release"):
        admission = quotas.admit(who, "demo", 1)
        with pytest.raises(TooManyConcurrent):
            quotas.admit(who, "demo", 1)
        if leave == "settle":
            admission.settle(1)
        else:
            admission.release()
        admission.release()
        admission.settle(5)
    quotas.admit(who, "demo", 1)
    with pytest.raises(TooManyConcurrent):
        quotas.admit(who, "demo", 1)


def test_what_a_turn_may_use_is_reserved_and_what_it_used_is_settled(quotas: Quotas) -> None:
    who = caller(Scopes(tokens_per_day=100))
    first = quotas.admit(who, "demo", 60)
    with pytest.raises(DailyTokensSpent, match="60 are reserved"):
        quotas.admit(who, "demo", 60)
    first.settle(10)
    second = quotas.admit(who, "demo", 90)
    second.release()
    quotas.admit(who, "demo", 90)


def test_a_refused_request_reserves_nothing(quotas: Quotas) -> None:
    who = caller(Scopes(tokens_per_day=100, concurrent_requests=5))
    for _ in range(10):
        with pytest.raises(DailyTokensSpent):
            quotas.admit(who, "demo", 101)
    quotas.admit(who, "demo", 100)


async def test_a_days_use_outlives_the_process(store: Store, quotas: Quotas, clock: Clock) -> None:
    who = caller(Scopes(tokens_per_day=100))
    await store.write(quotas.admit(who, "demo", 50).settle(40))
    await store.write(quotas.admit(who, "demo", 50).settle(40))
    restarted = Quotas(store, now=clock)
    with pytest.raises(DailyTokensSpent, match="80 are used"):
        restarted.admit(who, "demo", 21)
    restarted.admit(who, "demo", 20)


async def test_a_day_ends_at_midnight_utc_and_a_turn_counts_for_the_day_it_began(
    store: Store, quotas: Quotas, clock: Clock
) -> None:
    who = caller(Scopes(tokens_per_day=100))
    clock.now = MIDNIGHT - 1
    late = quotas.admit(who, "demo", 100)
    with pytest.raises(DailyTokensSpent) as caught:
        quotas.admit(who, "demo", 1)
    assert caught.value.retry_after_s == 1
    clock.now = MIDNIGHT
    early = quotas.admit(who, "demo", 100)
    await store.write([*late.settle(100), *early.settle(30)])
    quotas.admit(who, "demo", 70).release()
    restarted = Quotas(store, now=clock)
    with pytest.raises(DailyTokensSpent, match="30 are used"):
        restarted.admit(who, "demo", 71)
    clock.now = MIDNIGHT - 1
    with pytest.raises(DailyTokensSpent, match="100 are used"):
        Quotas(store, now=clock).admit(who, "demo", 1)


def test_keys_do_not_share_their_limits(quotas: Quotas) -> None:
    scopes = Scopes(requests_per_minute=1, concurrent_requests=1, tokens_per_day=10)
    for number in range(5):
        quotas.admit(caller(scopes, f"ak_{number}"), "demo", 10)
