"""What a session's lease does on a real engine's block pool, and what it never does to others."""

import logging
import time
from unittest.mock import patch

import pytest

from appliance.engine.inside.connector import LeaseRetention
from appliance.engine.inside.leases import LeaseTable
from appliance.engine.protocol import LEASE_FIELD, Lease, TurnAccount, TurnEnd
from tests.engine.in_process import BLOCK, BOUND, MAX_MODEL_LEN, POOL, EngineInProcess, words


def pass_cold_traffic(engine: EngineInProcess, blocks: int, first_seed: int = 1000) -> None:
    """Requests that nobody leases, of four blocks each, one after the other."""
    for number in range(blocks // 4):
        engine.turn(words(first_seed + number, 4 * BLOCK - 1), salt=f"cold-{number}")


def lease_whole_bound(engine: EngineInProcess) -> None:
    """Four sessions of five blocks each."""
    for number in range(4):
        engine.turn(words(number, BOUND // 4 * BLOCK), salt=f"leased-{number}", session=f"session-{number}")
        engine.clock.advance(1.0)
    assert engine.report().leased_blocks == BOUND


def test_a_leased_session_outlives_cold_traffic_that_evicts_an_unleased_one(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), salt="leased", session="session")
    engine.turn(words(2, 300), salt="not leased")
    pass_cold_traffic(engine, 3 * POOL)
    assert engine.turn(words(1, 300), salt="leased", session="session").cached_tokens == 288
    assert engine.turn(words(2, 300), salt="not leased").cached_tokens == 0


def test_a_report_says_what_is_leased_and_until_when(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), session="session", tenant="bank", idle_timeout_s=15.0, max_tokens=40)
    engine.clock.advance(5.0)
    report = engine.report()
    (lease,) = report.leases
    assert (lease.session, lease.tenant, lease.blocks, lease.tokens) == ("session", "bank", 10, 320)
    assert lease.expires_in_s == report.next_expiry_in_s == pytest.approx(10.0)
    assert (report.leased_blocks, report.free_blocks, report.total_blocks) == (10, POOL - 10, POOL)
    assert report.block_size == BLOCK


def test_a_request_without_a_lease_gets_none(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300))
    assert engine.report().leases == ()


def test_ten_thousand_sessions_that_are_abandoned_leave_an_engine_as_it_was(engine: EngineInProcess) -> None:
    at_once = 8
    for first in range(0, 10_000, at_once):
        for number in range(first, first + at_once):
            engine.submit(words(number, BLOCK + 1), salt=f"salt-{number}", session=f"session-{number}")
        engine.drain()
        engine.clock.advance(0.01)
        assert engine.report().leased_blocks <= BOUND
    engine.assert_references_add_up()
    assert engine.preemptions == 0
    engine.answers.clear()
    kept = words(1, 6 * BLOCK)
    engine.turn(kept, salt="new", session="new")
    assert engine.turn(kept, salt="new", session="new").cached_tokens == 5 * BLOCK
    engine.report([each.session for each in engine.report().leases])
    engine.assert_nothing_is_held()


def test_the_next_turn_extends_a_lease(engine: EngineInProcess) -> None:
    first = words(1, 100)
    answer = engine.turn(first, session="session", max_tokens=30)
    engine.turn(first + answer.token_ids + words(2, 60), session="session", max_tokens=10)
    (lease,) = engine.report().leases
    assert lease.tokens == (100 + 30 + 60 + 10 - 1) // BLOCK * BLOCK


def test_a_branch_replaces_what_its_session_had(engine: EngineInProcess) -> None:
    trunk = words(1, 4 * BLOCK)
    engine.turn(trunk + words(2, 4 * BLOCK), session="session")
    engine.turn(trunk + words(3, 2 * BLOCK), session="session")
    report = engine.report()
    assert report.leases[0].blocks == report.leased_blocks == 6


def test_a_beginning_of_the_leased_history_leaves_the_lease_as_long_as_it_was(engine: EngineInProcess) -> None:
    engine.turn(words(1, 8 * BLOCK), session="session")
    engine.clock.advance(10.0)
    engine.turn(words(1, 3 * BLOCK), session="session")
    (lease,) = engine.report().leases
    assert lease.blocks == 8
    assert lease.expires_in_s == pytest.approx(15.0)


def test_sessions_that_share_a_prefix_hold_its_blocks_once(engine: EngineInProcess) -> None:
    trunk = words(1, 4 * BLOCK)
    engine.turn([*trunk, *words(2, 2 * BLOCK)], session="parent")
    engine.turn([*trunk, *words(3, 2 * BLOCK)], session="child")
    report = engine.report()
    assert [lease.blocks for lease in report.leases] == [6, 6]
    assert report.leased_blocks == 8
    engine.assert_references_add_up()
    assert engine.report(release=["parent"]).leased_blocks == 6
    engine.assert_references_add_up()


def test_the_same_label_in_two_tenants_is_two_leases(engine: EngineInProcess) -> None:
    engine.turn(words(1, 4 * BLOCK), salt="one", session="session", tenant="one")
    engine.turn(words(2, 4 * BLOCK), salt="two", session="session", tenant="two")
    report = engine.report()
    assert {lease.tenant for lease in report.leases} == {"one", "two"}
    assert report.leased_blocks == 8


def test_leases_never_hold_more_than_their_bound(engine: EngineInProcess) -> None:
    for number in range(12):
        engine.turn(words(number, 6 * BLOCK), salt=f"salt-{number}", session=f"session-{number}")
        engine.clock.advance(0.5)
        assert engine.report().leased_blocks <= BOUND
        engine.assert_references_add_up()
    assert engine.report().leased_blocks == BOUND


def test_one_session_leases_no_more_than_the_bound_and_keeps_its_head(engine: EngineInProcess) -> None:
    engine.turn(words(1, 30 * BLOCK), session="session")
    assert engine.report().leases[0].tokens == BOUND * BLOCK
    pass_cold_traffic(engine, 2 * POOL)
    assert engine.turn(words(1, 30 * BLOCK), session="session").cached_tokens == BOUND * BLOCK


def test_room_is_made_ahead_and_stays_in_the_cache_until_it_is_used(
    engine: EngineInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.connector, "most_ahead", 2)
    lease_whole_bound(engine)
    engine.clock.advance(60)
    engine.tick()  # no lease has rank any more
    cold = engine.submit(words(99, (POOL - BOUND) * BLOCK), salt="cold", max_tokens=3)
    while not engine.reclaimed_blocks():
        engine.step()
    assert engine.reclaimed_blocks() == 2, "one that it lacks, and one ahead, as one request runs"
    leases = {lease.session: lease.blocks for lease in engine.report().leases}
    (shorter,) = (number for number in range(4) if leases[f"session-{number}"] < BOUND // 4)
    assert leases[f"session-{shorter}"] == BOUND // 4 - 2
    engine.cancel(cold)
    engine.drain()
    prompt = words(shorter, BOUND // 4 * BLOCK)
    found = engine.turn(prompt + words(7, 40), salt=f"leased-{shorter}", session=f"session-{shorter}").cached_tokens
    assert found == (BOUND // 4 - 1) * BLOCK


def test_each_of_those_that_run_seldom_makes_room(engine: EngineInProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def reclaims(most_ahead: int) -> int:
        engine.start_anew()
        monkeypatch.setattr(engine.connector, "most_ahead", most_ahead)
        lease_whole_bound(engine)
        engine.clock.advance(60)
        engine.tick()
        for number in range(2):
            engine.submit(words(90 + number, 10 * BLOCK - 2), salt=f"cold-{number}", max_tokens=4 * BLOCK)
        with patch.object(LeaseTable, "reclaim", autospec=True, side_effect=LeaseTable.reclaim) as reclaim:
            engine.drain()
        assert engine.preemptions == 0
        return len(reclaim.mock_calls)

    assert (reclaims(0), reclaims(2)) == (8, 3)


def test_a_request_that_fits_never_waits_for_leases(engine: EngineInProcess) -> None:
    lease_whole_bound(engine)
    engine.submit(words(9, 31 * BLOCK), salt="cold")
    engine.step()
    assert engine.running() == 1


def test_leases_yield_no_more_than_is_wanted(engine: EngineInProcess) -> None:
    lease_whole_bound(engine)
    engine.turn(words(9, 25 * BLOCK - 1), salt="cold")
    assert engine.reclaimed_blocks() == 25 - (POOL - BOUND)
    assert engine.report().leased_blocks == POOL - 25


def test_of_equal_worth_the_one_used_least_recently_yields_first_and_from_its_tail(engine: EngineInProcess) -> None:
    lease_whole_bound(engine)
    engine.clock.advance(600.0)
    engine.turn(words(9, 23 * BLOCK - 1), salt="cold")
    assert [(lease.session, lease.blocks) for lease in engine.report().leases] == [
        ("session-0", 2),
        ("session-1", 5),
        ("session-2", 5),
        ("session-3", 5),
    ]
    assert engine.turn(words(0, 5 * BLOCK), salt="leased-0").cached_tokens == 2 * BLOCK


def test_a_request_does_not_reclaim_the_blocks_that_it_hits(engine: EngineInProcess) -> None:
    trunk = words(1, 10 * BLOCK)
    engine.turn(trunk, salt="one", session="one")
    engine.clock.advance(1.0)
    engine.turn(words(2, 10 * BLOCK), salt="two", session="two")
    # Twenty-two blocks beside its ten hits, where twenty are free; the hits are on the lease that yields first.
    name = engine.submit(trunk + words(3, 22 * BLOCK - 1), salt="one")
    engine.step()
    assert engine.running() == 1
    assert {lease.session: lease.blocks for lease in engine.report().leases} == {"one": 10, "two": 8}
    engine.drain()
    assert engine.answers[name].cached_tokens == 10 * BLOCK


def test_nothing_yields_to_a_request_that_would_not_fit_even_then(engine: EngineInProcess) -> None:
    lease_whole_bound(engine)
    running = engine.submit(words(8, 10 * BLOCK), salt="running", max_tokens=BLOCK)
    engine.step(3)
    waiting = engine.submit(words(9, 31 * BLOCK), salt="waiting")
    engine.step(4)
    assert engine.running() == 1
    assert engine.report().leased_blocks == BOUND
    engine.drain()
    assert engine.answers[running].finish_reason == engine.answers[waiting].finish_reason == "length"


def test_blocks_in_use_do_not_count_as_room_that_leases_could_yield(engine: EngineInProcess) -> None:
    trunk = words(1, 10 * BLOCK)
    engine.turn(trunk, salt="one", session="one")
    engine.turn(words(2, 10 * BLOCK), salt="two", session="two")
    engine.submit(trunk + words(3, 5), salt="one", max_tokens=20)
    engine.step(2)
    engine.submit(words(9, 31 * BLOCK), salt="waiting")
    engine.step(4)
    assert engine.running() == 1
    assert {lease.session: lease.blocks for lease in engine.report().leases} == {"one": 10, "two": 10}


def test_an_admission_leaves_the_watermark_that_the_engine_wants_free(
    engine: EngineInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.scheduler.kv_cache_manager, "watermark_blocks", 6)
    lease_whole_bound(engine)
    engine.submit(words(8, 2 * BLOCK), salt="running", max_tokens=BLOCK)
    engine.step()
    engine.submit(words(9, 16 * BLOCK - 1), salt="cold")
    engine.step()
    assert engine.running() == 2
    assert engine.report().leased_blocks == POOL - 3 - 16 - 6


def grow_beyond_what_is_free(engine: EngineInProcess) -> None:
    """Four running requests that start with two blocks each and end with eight."""
    names = [engine.submit(words(number, 2 * BLOCK), salt=f"grow-{number}", max_tokens=190) for number in range(30, 34)]
    engine.drain()
    assert {engine.answers[name].finish_reason for name in names} == {"length"}


def test_a_lease_is_reclaimed_before_a_running_request_is_preempted(engine: EngineInProcess) -> None:
    lease_whole_bound(engine)
    engine.steps = 0
    grow_beyond_what_is_free(engine)
    assert engine.preemptions == 0
    assert engine.steps == 190  # nobody missed a step
    assert engine.report().leased_blocks == POOL - 4 * 8


def test_a_long_prompt_taken_in_chunks_never_lacks_room_that_leases_hold(
    engine: EngineInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without this rule of vLLM's a prompt is admitted when its first chunk fits.
    monkeypatch.setattr(engine.scheduler, "scheduler_reserve_full_isl", False)
    lease_whole_bound(engine)
    engine.steps = 0
    engine.turn(words(9, MAX_MODEL_LEN - 1), salt="cold")
    assert engine.preemptions == 0
    assert engine.steps == 4


def test_running_requests_are_preempted_once_no_lease_is_left(engine: EngineInProcess) -> None:
    engine.turn(words(1, 5 * BLOCK), salt="leased", session="session")
    names = [engine.submit(words(number, 6 * BLOCK), salt=f"grow-{number}", max_tokens=190) for number in range(30, 35)]
    engine.drain()
    assert engine.preemptions > 0
    assert {engine.answers[name].finish_reason for name in names} == {"length"}
    assert engine.report().leased_blocks == 0


def test_a_lease_loses_its_rank_at_its_deadline_while_the_engine_sleeps(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), session="session", idle_timeout_s=15.0)
    engine.clock.advance(14.9)
    assert engine.tick() == pytest.approx(0.1)
    engine.clock.advance(0.1)
    steps = engine.steps
    assert engine.tick() is None
    expired = engine.report().expired_total
    assert engine.steps == steps
    (lease,) = engine.report().leases
    assert lease.blocks == 9
    assert expired > 0


def test_a_lease_without_rank_yields_before_one_that_has_it(engine: EngineInProcess) -> None:
    engine.turn(words(1, 10 * BLOCK), salt="short", session="short", idle_timeout_s=5.0)
    engine.turn(words(2, 10 * BLOCK), salt="long", session="long", idle_timeout_s=60.0)
    engine.clock.advance(5.0)
    engine.turn(words(9, 25 * BLOCK - 1), salt="cold")
    assert {lease.session: lease.blocks for lease in engine.report().leases} == {"short": 5, "long": 10}


def test_under_strict_nothing_is_hit_after_the_idle_timeout(engine: EngineInProcess) -> None:
    history = words(1, 30 * BLOCK)  # more than the bound: what is not leased must go, too
    engine.turn(history, salt="strict", session="strict", strict=True, idle_timeout_s=15.0)
    engine.clock.advance(14.9)
    assert engine.turn(history, salt="strict").cached_tokens == BOUND * BLOCK
    engine.clock.advance(0.1)
    engine.tick()
    assert engine.turn(history, salt="strict").cached_tokens == 0
    assert engine.report().leases == ()


def test_under_strict_the_next_turn_in_time_hits(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), salt="strict", session="strict", strict=True)
    engine.clock.advance(14.0)
    assert engine.turn(words(1, 300), salt="strict", session="strict", strict=True).cached_tokens == 288


def test_a_strict_session_that_was_preempted_leaves_no_copy_behind(engine: EngineInProcess) -> None:
    names = [
        engine.submit(words(number, 6 * BLOCK), salt=f"s{number}", session=f"s{number}", strict=True, max_tokens=190)
        for number in range(30, 35)
    ]
    engine.drain()
    assert engine.preemptions > 0
    assert {engine.answers[name].finish_reason for name in names} == {"length"}
    engine.clock.advance(15.0)
    engine.tick()
    for number in range(30, 35):
        assert engine.turn(words(number, 6 * BLOCK + 1), salt=f"s{number}").cached_tokens == 0


def test_the_account_of_a_turn_is_what_its_first_admission_hit(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), session="session", turn="first")
    engine.turn(words(1, 300) + words(2, 40), session="session", turn="second")
    first = engine.ended(TurnEnd("session", "tenant", "first", "tool_use", 1, 60.0))
    second = engine.ended(TurnEnd("session", "tenant", "second", "tool_use", 1, 60.0))
    assert (first, second) == (TurnAccount("first", 0), TurnAccount("second", 288))
    assert engine.report().leases[0].expires_in_s == pytest.approx(60.0)
    assert engine.ended(TurnEnd("session", "tenant", "unknown", "other", 1, 15.0)) is None


def test_an_account_says_that_what_was_kept_had_to_yield(engine: EngineInProcess) -> None:
    engine.turn(words(1, 10 * BLOCK), salt="one", session="session", turn="before")
    engine.turn(words(9, 31 * BLOCK), salt="cold")
    engine.turn(words(1, 10 * BLOCK + 5), salt="one", session="session", turn="after")
    account = engine.ended(TurnEnd("session", "tenant", "after", "other", 1, 15.0))
    assert account is not None
    assert account.reason == "evicted"
    assert account.device_tokens < 10 * BLOCK


def test_a_session_released_while_its_request_runs_leaves_nothing(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), session="session")
    engine.submit(words(1, 300) + words(2, 40), session="session", max_tokens=20)
    engine.step(2)
    engine.report(release=["session"])
    engine.drain()
    engine.assert_nothing_is_held()
    assert engine.turn(words(1, 300)).cached_tokens == 0


def test_two_requests_of_one_session_at_once_leave_the_later_ones_history(engine: EngineInProcess) -> None:
    trunk = words(1, 4 * BLOCK)
    engine.submit(trunk + words(2, 2 * BLOCK), session="session", max_tokens=2)
    engine.submit(trunk + words(3, 2 * BLOCK), session="session", max_tokens=8)
    engine.drain()
    engine.assert_references_add_up()
    (lease,) = engine.report().leases
    assert lease.blocks == 6
    assert lease.expires_in_s == pytest.approx(15.0)


def test_a_session_that_grows_beyond_the_pool_keeps_its_head_and_the_engine_goes_on(engine: EngineInProcess) -> None:
    history = words(1, 100)
    for turn in range(6):
        answer = engine.turn(history, session="session")
        assert answer.finish_reason == "length"
        history += words(10 + turn, 170)
        engine.assert_references_add_up()
    assert engine.report().leases[0].blocks == BOUND


def test_a_clock_that_jumps_costs_rank_and_nothing_else(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), session="session")
    engine.clock.advance(1e9)
    engine.tick()
    assert engine.turn(words(1, 300), session="session").cached_tokens == 288
    engine.clock.advance(-500.0)
    engine.tick()
    assert engine.turn(words(1, 300), session="session").cached_tokens == 288
    engine.assert_references_add_up()
    engine.clock.advance(500.0)


def test_no_step_of_the_wall_clock_reaches_a_lease() -> None:
    assert LeaseRetention.clock is time.monotonic


def test_a_lease_without_rank_leaves_its_blocks_in_the_cache_until_the_room_is_wanted(engine: EngineInProcess) -> None:
    engine.turn(words(1, 10 * BLOCK), salt="leased", session="session")
    engine.clock.advance(15.0)
    engine.tick()
    assert engine.turn(words(1, 10 * BLOCK), salt="leased").cached_tokens == 9 * BLOCK


def test_the_tail_of_a_lease_without_rank_is_evicted_before_its_head(engine: EngineInProcess) -> None:
    engine.turn(words(1, 10 * BLOCK), salt="leased", session="session")
    engine.clock.advance(15.0)
    engine.tick()
    engine.turn(words(9, 31 * BLOCK), salt="cold")  # with its sampled token's, 31 blocks: one more than was free
    assert engine.turn(words(1, 10 * BLOCK + 1), salt="leased").cached_tokens == 9 * BLOCK


def test_no_time_runs_against_a_session_whose_next_turn_has_to_queue(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), session="session", idle_timeout_s=15.0)
    engine.clock.advance(14.0)
    name = engine.submit(words(1, 300), session="session", idle_timeout_s=15.0)
    engine.clock.advance(14.0)
    assert engine.tick() is None
    engine.drain()
    assert engine.tick() == pytest.approx(15.0)
    assert engine.answers[name].cached_tokens == 288


def test_a_released_lease_is_gone_and_its_blocks_are_never_hit_again(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), salt="released", session="released")
    engine.turn(words(2, 300), salt="kept", session="kept")
    assert [lease.session for lease in engine.report(release=["released", "unknown"]).leases] == ["kept"]
    assert engine.turn(words(1, 300), salt="released").cached_tokens == 0
    assert engine.turn(words(2, 300), salt="kept").cached_tokens == 288


def test_no_lease_is_reported_that_nobody_asked_for(engine: EngineInProcess) -> None:
    for seed, session in enumerate(("ended", "awaited", "idle")):
        engine.turn(words(seed, 100), session=session)
    report = engine.core.holdfast_lease_report
    assert report(["ended"], [], False)["leases"] == []
    awaited = report([], [["tenant", "awaited"], ["tenant", "ended"]], False)
    assert [lease["session"] for lease in awaited["leases"]] == ["awaited"]
    assert awaited["leased_blocks"] == 6  # totals are of all
    assert {lease["session"] for lease in report([], [], True)["leases"]} == {"awaited", "idle"}


def test_another_salt_never_hits_a_leased_block(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), salt="one", session="one")
    assert engine.turn(words(1, 300), salt="two", session="two").cached_tokens == 0
    assert engine.report().leased_blocks == 18


def test_a_cancelled_request_leases_what_it_computed(engine: EngineInProcess) -> None:
    name = engine.submit(words(1, 10 * BLOCK), salt="salt", session="session", max_tokens=500)
    engine.step(5)
    engine.cancel(name)
    engine.assert_references_add_up()
    assert engine.report().leases[0].blocks == 10
    assert engine.turn(words(1, 10 * BLOCK + 1), salt="salt").cached_tokens == 10 * BLOCK


def test_a_request_cancelled_in_the_middle_of_its_prompt_leases_what_was_computed(engine: EngineInProcess) -> None:
    name = engine.submit(words(1, 25 * BLOCK), session="session")
    engine.step(2)
    engine.cancel(name)
    engine.assert_references_add_up()
    assert engine.report().leases[0].tokens == 2 * 256


def test_a_request_cancelled_before_it_ran_leaves_its_sessions_lease_alone(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), session="session")
    engine.cancel(engine.submit(words(1, 300) + words(2, 300), session="session"))
    engine.cancel(engine.submit(words(3, 300), session="new"))
    (lease,) = engine.report().leases
    assert (lease.session, lease.blocks) == ("session", 9)


@pytest.mark.parametrize(
    "lease",
    [
        None,
        "text",
        [],
        {},
        {"session": "s", "tenant": "t"},
        Lease("s", "t", 15.0).to_wire() | {"release": "victim"},
        Lease("s", "t", 15.0).to_wire() | {"idle_timeout_s": "15"},
        Lease("s", "t", 15.0).to_wire() | {"idle_timeout_s": True},
        Lease("s", "t", 15.0).to_wire() | {"idle_timeout_s": -1.0},
        Lease("s", "t", 15.0).to_wire() | {"idle_timeout_s": float("nan")},
        Lease("s", "t", 15.0).to_wire() | {"idle_timeout_s": 1e9},
        Lease("s", "t", 15.0).to_wire() | {"session": ""},
        Lease("s", "t", 15.0).to_wire() | {"session": "s" * 65},
        Lease("s", "t", 15.0).to_wire() | {"session": "SECRET WORDS\n"},
        Lease("s", "t", 15.0).to_wire() | {"session": 7},
    ],
)
def test_a_malformed_lease_is_counted_and_ignored_without_repeating_it(
    engine: EngineInProcess, lease: object, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    before = engine.report().ignored_total
    engine.turn(words(1, 100), transfer={LEASE_FIELD: lease})
    report = engine.report()
    assert report.ignored_total == before + 1
    assert report.leases == ()
    assert "malformed lease" in caplog.text
    assert "SECRET" not in caplog.text


def test_a_request_that_names_another_transfer_gets_no_lease(engine: EngineInProcess) -> None:
    engine.turn(words(1, 100), transfer={"do_remote_prefill": False, "release": "session"})
    assert engine.report().leases == ()


def test_a_lease_never_stops_a_reset_of_the_prefix_cache(engine: EngineInProcess) -> None:
    engine.turn(words(1, 300), session="session")
    assert engine.core.reset_prefix_cache()
    engine.assert_nothing_is_held()
    assert engine.turn(words(1, 300), session="session").cached_tokens == 0


@pytest.mark.parametrize("length", [31, 32, 33, 300, 700])
def test_output_is_the_same_from_leased_blocks_as_from_none(engine: EngineInProcess, length: int) -> None:
    cold = engine.turn(words(5, length), salt="cold", max_tokens=48)
    engine.turn(words(5, length), salt="warm", session="session")
    warm = engine.turn(words(5, length), salt="warm", session="session", max_tokens=48)
    assert warm.cached_tokens == (length - 1) // BLOCK * BLOCK
    assert warm.token_ids == cold.token_ids
