"""How much a key may ask for, on both kinds of database."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from sqlalchemy import select

from appliance.errors import Fault
from appliance.identity import (
    Admission,
    ApiKey,
    Caller,
    DailyTokensSpent,
    Isolation,
    ModelNotAllowed,
    Principal,
    Quotas,
    RateLimited,
    Role,
    Scopes,
    Tenant,
    TooManyConcurrent,
)
from appliance.store import Store, tables

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()
MIDNIGHT = datetime(2026, 11, 22, tzinfo=UTC).timestamp()


class Clock:
    def __init__(self) -> None:
        self.at = NOON

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(store: Store, clock: Clock) -> Quotas:
    return Quotas(store, now=clock)


def caller(key_id: str = "ak_1", /, **limits: object) -> Caller:
    scopes = Scopes(**limits)  # type: ignore[arg-type]
    principal = Principal("prn_1", "ten_1", "client", Role.CLIENT)
    tenant = Tenant("ten_1", "tenant", None, Isolation.SESSION, 0.0)
    return Caller(principal, tenant, ApiKey(key_id, "ten_1", "prn_1", None, scopes, 0.0, None, None))


def admit(quotas: Quotas, who: Caller, model: str, tokens: int) -> Admission:
    """A turn that was let in; one that may not run is out again."""
    admission = quotas.enter(who)
    try:
        admission.reserve(model, tokens)
    except BaseException:
        admission.release()
        raise
    return admission


def used_tokens(store: Store) -> dict[tuple[str, str], int]:
    days = tables.quota_days
    rows = store.read_blocking(lambda db: db.execute(select(days)).all())
    return {(row.api_key_id, row.day): row.tokens for row in rows}


def test_of_a_key_that_nothing_counts_for_nothing_is_remembered_once_it_is_idle(quotas: Quotas) -> None:
    one, another = (admit(quotas, caller("ak_1", concurrent_requests=2), "any", 10) for _ in range(2))
    one.settle(7)
    assert list(quotas._uses) == ["ak_1"], "another of its requests runs"
    another.release()
    admit(quotas, caller("ak_9"), "any", 10).settle(7)
    quotas.enter(caller("ak_9")).release()
    assert quotas._uses == {}
    admit(quotas, caller("ak_9", tokens_per_day=100), "any", 10).settle(7)
    assert list(quotas._uses) == ["ak_9"], "what its day has had is not read again for each request"


def test_a_key_without_limits_is_let_in_every_time(quotas: Quotas) -> None:
    for _ in range(1000):
        admit(quotas, caller(), "any", 10**9)


def test_a_model_outside_the_scopes_is_refused_and_costs_no_tokens(quotas: Quotas) -> None:
    asking = caller(models=frozenset({"small"}), tokens_per_day=1, concurrent_requests=1)
    with pytest.raises(ModelNotAllowed, match="'large'") as error:
        admit(quotas, asking, "large", 1)
    assert error.value.fault is Fault.DENIED
    admit(quotas, asking, "small", 1)


# Requests a minute


def test_no_minute_has_more_requests_than_allowed(quotas: Quotas, clock: Clock) -> None:
    asking = caller(requests_per_minute=3)
    admitted: list[float] = []
    for _ in range(400):
        clock.at += 0.7
        try:
            admit(quotas, asking, "m", 1).release()
        except RateLimited:
            continue
        admitted.append(clock.at)
    assert all(later - earlier >= 60 for earlier, later in zip(admitted, admitted[3:], strict=False))
    assert len(admitted) >= 3 * 4


def test_what_is_told_to_wait_is_let_in_after_waiting_and_not_before(quotas: Quotas, clock: Clock) -> None:
    asking = caller(requests_per_minute=2)
    admit(quotas, asking, "m", 1).release()
    clock.at += 20
    admit(quotas, asking, "m", 1).release()
    with pytest.raises(RateLimited) as error:
        admit(quotas, asking, "m", 1)
    assert error.value.retry_after_s == 40
    clock.at += 39.9
    with pytest.raises(RateLimited):
        admit(quotas, asking, "m", 1)
    clock.at += 0.1
    admit(quotas, asking, "m", 1)


def test_a_clock_that_was_set_back_locks_nobody_out(quotas: Quotas, clock: Clock) -> None:
    asking = caller(requests_per_minute=1)
    admit(quotas, asking, "m", 1).release()
    clock.at -= 86_400
    admit(quotas, asking, "m", 1).release()


def test_keys_do_not_share_their_limits(quotas: Quotas) -> None:
    limits: dict[str, object] = {"requests_per_minute": 1, "concurrent_requests": 1, "tokens_per_day": 10}
    admit(quotas, caller("ak_1", **limits), "m", 10)
    admit(quotas, caller("ak_2", **limits), "m", 10)


def test_what_is_refused_for_what_it_asks_was_a_request_all_the_same(quotas: Quotas) -> None:
    asking = caller(tokens_per_day=10, requests_per_minute=2)
    for _ in range(2):
        with pytest.raises(DailyTokensSpent):
            admit(quotas, asking, "m", 11)
    with pytest.raises(RateLimited):
        quotas.enter(asking)


# Requests at once


@pytest.mark.parametrize("end", [lambda it: it.settle(5), lambda it: it.settle(0), lambda it: it.release()])
def test_a_slot_is_free_again_however_the_turn_ended(quotas: Quotas, end: Callable[[object], object]) -> None:
    asking = caller(concurrent_requests=1)
    for _ in range(3):
        admission = admit(quotas, asking, "m", 10)
        with pytest.raises(TooManyConcurrent):
            admit(quotas, asking, "m", 10)
        end(admission)
    admit(quotas, asking, "m", 10)


def test_a_turn_that_ends_twice_frees_one_slot_and_counts_once(quotas: Quotas) -> None:
    asking = caller(concurrent_requests=2, tokens_per_day=100)
    first, _ = admit(quotas, asking, "m", 10), admit(quotas, asking, "m", 10)
    assert len(first.settle(10)) == 1
    assert first.settle(10) == []
    first.release()
    admit(quotas, asking, "m", 80)
    with pytest.raises(TooManyConcurrent):
        admit(quotas, asking, "m", 0)


def test_what_was_refused_holds_no_slot_and_no_tokens(quotas: Quotas, clock: Clock) -> None:
    asking = caller(concurrent_requests=1, tokens_per_day=10)
    for _ in range(5):
        with pytest.raises(DailyTokensSpent):
            admit(quotas, asking, "m", 11)
    admit(quotas, asking, "m", 10)


# Tokens a day


def test_tokens_are_reserved_while_a_turn_runs_and_settled_after(quotas: Quotas) -> None:
    asking = caller(tokens_per_day=100)
    running = admit(quotas, asking, "m", 80)
    with pytest.raises(DailyTokensSpent, match="100 tokens"):
        admit(quotas, asking, "m", 21)
    admit(quotas, asking, "m", 20).release()
    running.settle(30)
    admit(quotas, asking, "m", 70).settle(70)
    with pytest.raises(DailyTokensSpent):
        admit(quotas, asking, "m", 1)


def test_a_day_that_is_spent_says_when_the_next_one_begins(quotas: Quotas, clock: Clock) -> None:
    clock.at = MIDNIGHT - 90
    with pytest.raises(DailyTokensSpent) as error:
        admit(quotas, caller(tokens_per_day=0), "m", 1)
    assert error.value.retry_after_s == 90
    assert error.value.fault is Fault.LIMIT


def test_midnight_in_utc_gives_the_day_back_but_not_to_what_ran_before_it(
    quotas: Quotas, store: Store, clock: Clock
) -> None:
    asking = caller(tokens_per_day=100)
    clock.at = MIDNIGHT - 1
    running = admit(quotas, asking, "m", 100)
    clock.at = MIDNIGHT
    admit(quotas, asking, "m", 100).release()
    store.write_blocking(running.settle(60))
    assert used_tokens(store) == {("ak_1", "2026-11-21"): 60}
    store.write_blocking(admit(quotas, asking, "m", 100).settle(100))
    assert used_tokens(store) == {("ak_1", "2026-11-21"): 60, ("ak_1", "2026-11-22"): 100}
    with pytest.raises(DailyTokensSpent):
        admit(quotas, asking, "m", 1)


def test_a_clock_that_is_set_back_over_midnight_gives_no_tokens_away(quotas: Quotas, clock: Clock) -> None:
    asking = caller(tokens_per_day=1000)
    clock.at = MIDNIGHT
    running = admit(quotas, asking, "m", 900)
    clock.at = MIDNIGHT - 1
    admit(quotas, asking, "m", 10).release()
    clock.at = MIDNIGHT
    with pytest.raises(DailyTokensSpent, match="900 are reserved"):
        admit(quotas, asking, "m", 101)
    running.release()
    with pytest.raises(DailyTokensSpent):
        admit(quotas, asking, "m", 1001)
    admit(quotas, asking, "m", 1000)


def test_reservations_of_days_that_are_over_are_not_kept(quotas: Quotas, clock: Clock) -> None:
    asking = caller(tokens_per_day=1000)
    for _ in range(3):
        clock.at += 86_400
        admit(quotas, asking, "m", 10).settle(10)
    assert not quotas._uses["ak_1"].reserved


def test_what_a_day_has_used_outlives_a_restart_and_reservations_do_not(store: Store, clock: Clock) -> None:
    asking = caller(tokens_per_day=100)
    before = Quotas(store, now=clock)
    store.write_blocking(admit(before, asking, "m", 50).settle(40))
    admit(before, asking, "m", 60)
    after = Quotas(store, now=clock)
    with pytest.raises(DailyTokensSpent):
        admit(after, asking, "m", 61)
    admit(after, asking, "m", 60)


def test_turns_that_settle_in_one_commit_are_all_counted(quotas: Quotas, store: Store) -> None:
    asking = caller(tokens_per_day=1000)
    running = [admit(quotas, asking, "m", 10) for _ in range(10)]
    store.write_blocking([change for admission in running for change in admission.settle(7)])
    assert used_tokens(store) == {("ak_1", "2026-11-21"): 70}


def test_a_turn_that_used_more_than_it_reserved_is_counted_whole(quotas: Quotas) -> None:
    asking = caller(tokens_per_day=100)
    admit(quotas, asking, "m", 10).settle(95)
    with pytest.raises(DailyTokensSpent):
        admit(quotas, asking, "m", 6)
    admit(quotas, asking, "m", 5)


def test_a_key_without_a_daily_limit_writes_nothing(quotas: Quotas) -> None:
    assert admit(quotas, caller(), "m", 10).settle(10) == []


@pytest.mark.parametrize("name", ["requests_per_minute", "concurrent_requests", "tokens_per_day"])
def test_a_limit_below_zero_is_refused(name: str) -> None:
    limits: dict[str, object] = {name: -1}
    with pytest.raises(ValueError, match=name):
        caller(**limits)
