"""The books of a gateway's life: exact sums, the newest turn of each session, and a bound on everything."""

from appliance.sessions import Account, Cause, Ledger, Served, TurnOf
from appliance.sessions.ledger import MAX_TENANTS, OTHER_TENANTS


def of(session: int, tenant: int = 0) -> TurnOf:
    return TurnOf(f"ses_{session}", f"ten_{tenant}", f"session-{session}", f"tenant-{tenant}")


WARM = Account(100, 80, {Cause.NEW: 20}, served=Served(50, 30, 0), repeated_tokens=85)
COLD = Account(100, 0, {Cause.FIRST_TURN: 100})


def test_sums_are_those_of_all_turns_and_of_each_tenant() -> None:
    ledger = Ledger()
    ledger.note(of(1, 1), WARM, ended_at=1.0, first_token_s=0.1)
    ledger.note(of(2, 2), COLD, ended_at=2.0, first_token_s=None)
    assert (ledger.sums.turns, ledger.sums.prompt_tokens, ledger.sums.repeated_tokens) == (2, 200, 85)
    assert ledger.sums.served == {"device": 50, "dram": 30, "disk": 0}
    assert ledger.sums.computed == {Cause.NEW: 20, Cause.FIRST_TURN: 100}
    assert ledger.sums_of["ten_2"].computed == {Cause.FIRST_TURN: 100}


def test_what_was_found_without_knowing_where_is_not_laid_to_a_tier() -> None:
    ledger = Ledger()
    ledger.note(of(1), Account(10, 8, {Cause.NEW: 2}), ended_at=1.0, first_token_s=None)
    assert ledger.sums.served == {"unknown": 8}


def test_the_newest_turn_of_a_session_is_found_by_what_the_engine_calls_it() -> None:
    ledger = Ledger()
    ledger.note(of(1), COLD, ended_at=1.0, first_token_s=None)
    ledger.note(of(1), WARM, ended_at=2.0, first_token_s=0.25)
    last = ledger.of_labels("tenant-0", "session-1")
    assert last is not None
    assert (last.of.session_id, last.account, last.first_token_s) == ("ses_1", WARM, 0.25)
    assert ledger.of_labels("tenant-1", "session-1") is None  # a label reaches nothing of another tenant's
    ledger.forget("ses_1")
    assert ledger.of_labels("tenant-0", "session-1") is None


def test_warm_and_cold_are_told_apart_and_have_quantiles_of_their_own() -> None:
    ledger = Ledger()
    for number in range(100):
        ledger.note(of(number, number % 2), WARM, ended_at=float(number), first_token_s=number / 100)
    ledger.note(of(1), COLD, ended_at=1000.0, first_token_s=5.0)
    assert ledger.first_tokens(warm=True) == (100, 0.5, 0.9, 0.99, 0.0)
    assert ledger.first_tokens(warm=False) == (1, 5.0, 5.0, 5.0, 1000.0)
    assert ledger.first_tokens(warm=True, tenant_id="ten_1") == (50, 0.51, 0.91, 0.99, 1.0)
    assert ledger.first_tokens(warm=False, tenant_id="ten_1") is None


def test_nothing_grows_without_bound() -> None:
    ledger = Ledger(max_sessions=10, max_first_tokens=10)
    for number in range(3 * MAX_TENANTS):
        ledger.note(of(number, number), WARM, ended_at=float(number), first_token_s=1.0)
    assert len(ledger._last) == len(ledger._by_label) == 10
    assert len(ledger.sums_of) == MAX_TENANTS + 1
    assert ledger.sums_of[OTHER_TENANTS].turns == 2 * MAX_TENANTS
    assert ledger.tenant_of("tenant-180") == OTHER_TENANTS
    times = ledger.first_tokens(warm=True)
    assert times is not None
    assert times.turns == 10


def test_a_tenant_that_is_removed_leaves_the_books_and_its_place_to_another() -> None:
    ledger = Ledger()
    for number in range(MAX_TENANTS):
        ledger.note(of(number, number), WARM, ended_at=float(number), first_token_s=1.0)
    ledger.note(of(1000, 1000), WARM, ended_at=1000.0, first_token_s=2.0)
    assert ledger.tenant_of("tenant-1000") == OTHER_TENANTS
    for number in range(10):
        ledger.forget_tenant(f"ten_{number}")
    assert ledger.tenant_of("tenant-3") == OTHER_TENANTS
    assert ledger.of_labels("tenant-3", "session-3") is None
    assert ledger.first_tokens(warm=True, tenant_id="ten_3") is None
    assert "ten_3" not in ledger.sums_of
    assert ledger.sums.turns == MAX_TENANTS + 1
    ledger.note(of(1000, 1000), WARM, ended_at=1001.0, first_token_s=2.0)
    assert ledger.tenant_of("tenant-1000") == "ten_1000"
    assert ledger.sums_of["ten_1000"].turns == 1
    assert ledger.tenant_of("tenant-20") == "ten_20"
    assert ledger.first_tokens(warm=True) == (MAX_TENANTS - 10 + 2, 1.0, 1.0, 2.0, 10.0)
