"""The table of leases, without a pool: who keeps what, who yields first, and that the counts are right."""

import dataclasses
import string
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.engine.inside.chunks import ChunkOrder
from appliance.engine.inside.leases import Change, LeasedBlock, LeaseTable, TenantCounts
from appliance.engine.inside.quotas import Quotas
from appliance.engine.protocol import Lease, TurnEnd

BLOCK = 32  # tokens


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def table_of(bound: int, clock: Clock) -> LeaseTable:
    """A table over a pool in which each block has a content of its own, as `chain` says it."""
    return LeaseTable(bound, clock, lambda block_id: ("content", block_id))


def chain(*block_ids: int) -> list[LeasedBlock]:
    """Blocks in the order of a history, each with a content of its own."""
    return [
        LeasedBlock(block_id, (place + 1) * BLOCK, ("content", block_id)) for place, block_id in enumerate(block_ids)
    ]


def lease(session: str, idle_timeout_s: float = 15.0, tenant: str = "tenant") -> Lease:
    """A lease that a request asks for."""
    return Lease(session, tenant, idle_timeout_s)


def nothing_is_busy(_block_id: int) -> bool:
    return False


def held(table: LeaseTable) -> dict[str, int]:
    """How many blocks each session has, the earliest deadline first."""
    return {state.session: state.blocks for state in table.states()}


def test_a_grant_takes_each_block_once() -> None:
    table = table_of(10, Clock())
    assert table.finished(lease("a"), chain(1, 2, 3)) == Change(taken=(1, 2, 3))
    assert table.leased_blocks == 3


def test_the_next_turn_takes_only_what_is_new() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a"), chain(1, 2, 3))
    assert table.finished(lease("a"), chain(1, 2, 3, 4)) == Change(taken=(4,))


def test_a_branch_gives_back_the_rest_of_the_other_branch_tail_first() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a"), chain(1, 2, 3, 4))
    assert table.finished(lease("a"), chain(1, 2, 5)) == Change(taken=(5,), freed=(4, 3))


def test_a_beginning_of_the_history_moves_the_deadline_only() -> None:
    clock = Clock()
    table = table_of(10, clock)
    table.finished(lease("a"), chain(1, 2, 3, 4))
    clock.now += 10
    assert table.finished(lease("a"), chain(1, 2)) == Change()
    assert table.next_expiry_in_s() == 15.0
    assert held(table) == {"a": 4}


def test_a_beginning_computed_once_more_in_other_blocks_is_still_a_beginning() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a"), chain(1, 2, 3, 4))
    again = [*chain(1), LeasedBlock(9, 2 * BLOCK, ("content", 2))]
    assert table.finished(lease("a"), again) == Change()


def test_a_turn_that_computed_nothing_leaves_the_lease_alone_and_starts_none() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a"), chain(1, 2))
    assert table.finished(lease("a"), []) == Change()
    assert table.finished(lease("b"), []) == Change()
    assert held(table) == {"a": 2}


def test_who_goes_down_gives_up_all_of_it_and_what_others_have_too_stays_with_them() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a"), chain(1, 2, 3))
    table.finished(lease("b"), chain(1, 4))
    change = table.demote(("tenant", "a"))
    assert change.freed == (3, 2)
    assert set(change.forgotten) == {("content", 1), ("content", 2), ("content", 3)}
    assert held(table) == {"b": 2}
    assert table.demote(("tenant", "a")) == Change()
    table.arrived(lease("b"))
    assert table.demote(("tenant", "b")) == Change()
    assert held(table) == {"b": 2}


class PassingClock(Clock):
    """Time passes with every look at it, so that an order that was reckoned holds for a while."""

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def test_a_parent_is_pinned_from_the_moment_its_child_comes_though_the_order_was_reckoned_before() -> None:
    table = table_of(40, PassingClock())
    table.finished(lease("parent"), chain(1, 2, 3, 4))
    table.finished(lease("other"), chain(11, 12))
    assert table.reclaim(1, nothing_is_busy).freed == (4,)  # the order holds for seconds now
    table.arrived(dataclasses.replace(lease("child"), parent="parent"))
    freed = [block_id for _ in range(3) for block_id in table.reclaim(1, nothing_is_busy).freed]
    assert freed[:2] == [12, 11]
    assert held(table) == {"parent": 2}


def test_a_shared_block_is_given_back_with_its_last_lease() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a"), chain(1, 2, 3))
    assert table.finished(lease("b"), chain(1, 2, 4)) == Change(taken=(4,))
    assert table.release(["a"]).freed == (3,)
    assert table.release(["b"]).freed == (4, 2, 1)


def test_over_the_bound_the_one_used_least_recently_of_equal_worth_yields_its_tail() -> None:
    clock = Clock()
    table = table_of(6, clock)
    table.finished(lease("first"), chain(1, 2, 3))
    table.finished(lease("second"), chain(4, 5, 6))
    assert table.finished(lease("new"), chain(7, 8)) == Change(taken=(7, 8), freed=(3, 2))
    assert held(table) == {"first": 1, "second": 3, "new": 2}


def test_one_session_may_have_the_whole_bound_and_no_more() -> None:
    table = table_of(3, Clock())
    table.finished(lease("old"), chain(1, 2))
    assert table.finished(lease("new"), chain(3, 4, 5, 6)) == Change(taken=(3, 4, 5), freed=(2, 1))
    assert held(table) == {"new": 3}


def test_a_bound_of_nothing_leases_nothing() -> None:
    table = table_of(0, Clock())
    assert table.finished(lease("a"), chain(1, 2)) == Change()
    assert table.next_expiry_in_s() is None


def test_reclaiming_takes_no_more_than_wanted_tails_first_and_without_rank_first() -> None:
    clock = Clock()
    table = table_of(10, clock)
    table.finished(lease("ranked", 30.0), chain(1, 2, 3))
    table.finished(lease("no rank", 5.0), chain(4, 5, 6))
    clock.now += 5
    assert table.expire() == Change()
    assert table.reclaim(2, nothing_is_busy) == Change(freed=(6, 5))
    assert table.reclaim(2, nothing_is_busy) == Change(freed=(4, 3))
    assert table.reclaim(9, nothing_is_busy) == Change(freed=(2, 1))
    assert table.reclaim(1, nothing_is_busy) == Change()
    assert table.reclaimed_blocks_total == 6
    assert table.states() == ()


def test_a_lease_whose_tail_is_in_use_yields_nothing() -> None:
    table = table_of(10, Clock())
    table.finished(lease("in use", 5.0), chain(1, 2, 3))
    table.finished(lease("idle", 30.0), chain(4, 5, 6))
    assert table.can_yield(3, {1, 2, 3}.__contains__)
    assert not table.can_yield(4, {1, 2, 3}.__contains__)
    assert table.reclaim(2, {1, 2, 3}.__contains__) == Change(freed=(6, 5))


def test_where_a_request_uses_a_copy_of_a_block_the_block_yields_after_all_others() -> None:
    table = table_of(10, Clock())
    table.finished(lease("copied", 5.0), chain(1, 2, 3))
    table.finished(lease("idle", 30.0), chain(4))
    assert table.can_yield(2, {1, 3}.__contains__)
    assert table.reclaim(2, {1, 3}.__contains__) == Change(freed=(4, 3, 2))  # 3 is in use, and makes no room
    assert table.reclaimed_blocks_total == 2


def test_what_lies_beyond_the_part_in_use_can_be_reclaimed() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a"), chain(1, 2, 3, 4))
    assert table.reclaim(9, {1, 2}.__contains__) == Change(freed=(4, 3))


def test_a_shared_block_counts_as_reclaimed_once_the_last_lease_yields_it() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a", 5.0), chain(1, 2))
    table.finished(lease("b", 30.0), chain(1, 2, 3))
    assert table.reclaim(1, nothing_is_busy) == Change(freed=(3,))
    assert table.reclaim(1, nothing_is_busy) == Change(freed=(2,))
    assert table.reclaimed_blocks_total == 2


def test_what_leases_came_to_is_counted_for_the_tenant_whose_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.engine.inside.leases._MOST_COUNTED", 2)
    clock = Clock()
    table = table_of(20, clock)
    table.finished(Lease("a", "bank", 5.0), chain(1, 2, 3))
    table.finished(Lease("a", "ship", 30.0), chain(4, 5))
    clock.now += 5
    table.expire()
    table.reclaim(4, nothing_is_busy, "ship")
    assert table.counts() == {"bank": TenantCounts(3, 1), "ship": TenantCounts(1, 0)}
    table.finished(Lease("a", "mill", 30.0), chain(7))
    table.reclaim(9, nothing_is_busy)
    assert list(table.counts()) == ["ship", "mill"], "who was counted first makes room"
    assert table.reclaimed_blocks_total == 6


def test_a_lease_loses_its_rank_at_its_deadline_and_not_before_and_keeps_its_blocks() -> None:
    clock = Clock()
    table = table_of(10, clock)
    table.finished(lease("b", 15.0), chain(3, 4))
    table.finished(lease("a", 5.0), chain(1, 2))
    clock.now += 4.999
    table.expire()
    assert table.next_expiry_in_s() == pytest.approx(0.001)
    clock.now += 0.001
    assert table.next_expiry_in_s() == pytest.approx(0.0)
    assert table.expire() == Change()
    assert table.next_expiry_in_s() == pytest.approx(10.0)
    assert table.reclaim(1, nothing_is_busy).freed == (2,)
    clock.now += 60
    assert table.expire() == Change()
    assert table.next_expiry_in_s() is None
    assert table.expired_total == 2
    assert held(table) == {"a": 1, "b": 2}


def test_a_lease_that_may_lose_its_rank_is_found_without_a_look_at_any_other() -> None:
    clock = Clock()
    table = table_of(10, clock)
    assert not table.is_due()
    table.finished(lease("a", 15.0), chain(1))
    table.finished(lease("b", 20.0), chain(2))
    clock.now += 14.9
    assert not table.is_due()
    clock.now += 0.1
    assert table.is_due()
    table.expire()
    assert not table.is_due()


def test_a_strict_lease_gives_up_all_at_its_deadline_and_what_it_left_is_forgotten() -> None:
    clock = Clock()
    table = table_of(2, clock)
    strict = dataclasses.replace(lease("a"), strict=True)
    assert table.finished(strict, chain(1, 2, 3)) == Change(taken=(1, 2), forgotten=(("content", 3),))
    clock.now += 15
    assert table.expire() == Change(freed=(2, 1), forgotten=tuple(("content", block) for block in (1, 2, 3)))


def test_what_a_session_diverges_from_with_its_first_strict_turn_is_forgotten() -> None:
    table = table_of(9, Clock())
    table.finished(lease("a"), chain(1, 2, 3))
    change, _ = table.admitted(dataclasses.replace(lease("a"), strict=True), BLOCK, prompt_hits=False)
    assert change == Change(freed=(3, 2), forgotten=(("content", 2), ("content", 3)))


def test_what_a_strict_lease_yields_is_forgotten() -> None:
    table = table_of(9, Clock())
    table.finished(dataclasses.replace(lease("a"), strict=True), chain(1, 2))
    assert table.reclaim(1, nothing_is_busy) == Change(freed=(2,), forgotten=(("content", 2),))


def test_no_time_runs_against_a_session_whose_request_waits() -> None:
    clock = Clock()
    table = table_of(10, clock)
    table.finished(lease("a"), chain(1))
    clock.now += 14
    table.arrived(lease("a"))
    table.arrived(lease("unknown"))
    assert table.next_expiry_in_s() is None
    clock.now += 140
    assert table.expire() == Change()
    table.finished(lease("a"), [])
    assert table.next_expiry_in_s() == 15.0


def test_whose_request_waits_yields_last_but_yields() -> None:
    clock = Clock()
    table = table_of(10, clock)
    table.finished(lease("waits", 5.0), chain(1, 2))
    table.finished(lease("idle", 60.0), chain(3, 4))
    clock.now += 5
    table.expire()
    table.arrived(lease("waits"))
    assert table.reclaim(3, nothing_is_busy).freed == (4, 3, 2)


def test_the_stop_reason_that_is_told_later_decides_worth_and_rank() -> None:
    clock = Clock()
    table = table_of(10, clock)
    for session, blocks in (("tool", chain(1, 2)), ("done", chain(3, 4))):
        table.arrived(Lease(session, "tenant", 15.0, turn=session))
        table.finished(Lease(session, "tenant", 15.0, turn=session), blocks, 100)
    table.turn_ended(TurnEnd("tool", "tenant", "tool", "tool_use", 100, 120.0))
    table.turn_ended(TurnEnd("done", "tenant", "done", "end_turn", 100, 120.0))
    clock.now += 30
    table.expire()
    assert held(table) == {"tool": 2, "done": 2}
    assert table.next_expiry_in_s() == 90.0
    assert table.reclaim(2, nothing_is_busy).freed == (4, 3)


def test_whose_request_waits_elsewhere_keeps_its_rank_meanwhile_and_yields_last() -> None:
    clock = Clock()
    table = table_of(10, clock)
    for session, blocks in (("awaited", chain(1, 2)), ("other", chain(3, 4)), ("strict", chain(5))):
        table.finished(dataclasses.replace(lease(session, 20.0), strict=session == "strict"), blocks)
    clock.now += 19
    table.awaited([("tenant", "awaited"), ("tenant", "strict"), ("tenant", "unknown")], 5.0)
    clock.now += 1
    table.expire()
    assert held(table) == {"other": 2, "awaited": 2}
    assert table.reclaim(3, nothing_is_busy).freed == (4, 3, 2)
    clock.now += 1
    table.awaited([("tenant", "awaited")], 5.0)
    assert table.next_expiry_in_s() == 5.5
    clock.now += 5.5
    table.expire()
    assert table.next_expiry_in_s() is None


def test_a_session_that_is_released_is_found_under_whichever_tenant_has_it_and_no_other_ends() -> None:
    table = table_of(10, Clock())
    for tenant, session, block in (("one", "a", 1), ("two", "b", 2), ("two", "c", 3)):
        table.finished(Lease(session, tenant, 15.0), chain(block))
    table.arrived(Lease("d", "three", 15.0))
    assert table.release(["b", "d", "unknown", "b"]).freed == (2,)
    assert held(table) == {"a": 1, "c": 1}
    assert not table.finished(Lease("d", "three", 15.0), chain(4)).taken


def test_a_lease_that_runs_longer_is_not_cut_short_by_being_awaited() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a", 60.0), chain(1))
    table.awaited([("tenant", "a")], 5.0)
    assert table.next_expiry_in_s() == 60.0


def test_the_end_of_an_earlier_turn_changes_nothing() -> None:
    table = table_of(10, Clock())
    table.finished(Lease("a", "tenant", 15.0, turn="second"), chain(1))
    table.turn_ended(TurnEnd("a", "tenant", "first", "tool_use", 1, 300.0))
    assert table.next_expiry_in_s() == 15.0


def test_what_a_session_diverged_from_is_given_up_when_its_request_is_admitted() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a"), chain(1, 2, 3))
    table.arrived(lease("a"))
    assert table.admitted(lease("a"), BLOCK, prompt_hits=False) == (Change(freed=(3, 2)), "")
    assert table.admitted(lease("a"), BLOCK, prompt_hits=True) == (Change(), "")


@pytest.mark.parametrize(("passes", "reason"), [(0.0, "evicted"), (15.0, "expired")])
@pytest.mark.parametrize("taken", [1, 3])
def test_it_is_known_why_blocks_are_not_there_any_more(passes: float, reason: str, taken: int) -> None:
    clock = Clock()
    table = table_of(10, clock)
    table.finished(lease("a"), chain(1, 2, 3))
    clock.now += passes
    table.expire()
    table.reclaim(taken, nothing_is_busy)
    table.arrived(lease("a"))
    assert table.admitted(lease("a"), (3 - taken) * BLOCK, prompt_hits=False) == (Change(), reason)


def test_a_tenant_leaves_another_its_guaranteed_share_as_long_as_it_has_blocks_of_its_own() -> None:
    table = table_of(8, Clock())
    table.finished(dataclasses.replace(lease("small", tenant="small"), tenant_share=0.5), chain(1, 2, 3, 4, 5))
    table.finished(lease("big", tenant="big"), chain(11, 12, 13))
    assert table.finished(lease("more", tenant="big"), chain(21, 22, 23)).freed == (5, 13, 12)
    assert held(table) == {"small": 4, "big": 1, "more": 3}


def test_no_request_waits_for_a_guaranteed_share() -> None:
    table = table_of(8, Clock())
    table.finished(dataclasses.replace(lease("small", tenant="small"), tenant_share=0.5), chain(1, 2, 3, 4))
    table.finished(lease("big", tenant="big"), chain(11, 12, 13, 14))
    assert table.reclaim(6, nothing_is_busy, "big").freed == (14, 13, 12, 11, 4, 3)


def test_who_has_no_rank_yields_ahead_tails_first_and_nobody_else_does() -> None:
    clock = Clock()
    table = table_of(20, clock)
    table.finished(lease("old", 0.0), chain(1, 2, 3))
    clock.now += 1
    table.finished(lease("newer", 0.0), chain(4, 5))
    table.finished(lease("leased"), chain(6, 7, 8))
    clock.now += 1
    table.expire()
    assert table.reclaim(1, nothing_is_busy, ahead=1).freed == (5, 4)
    assert table.reclaim(1, nothing_is_busy, ahead=0).freed == (3,)
    assert table.reclaim(1, nothing_is_busy, ahead=9).freed == (2, 1), "the next one has rank"
    assert table.reclaim(1, nothing_is_busy, ahead=9).freed == (8,)
    assert held(table) == {"leased": 2}


def test_a_guaranteed_share_does_not_yield_ahead_nor_what_a_request_uses() -> None:
    clock = Clock()
    table = table_of(20, clock)
    table.finished(dataclasses.replace(lease("a", 0.0, tenant="small"), tenant_share=0.2), chain(1, 2, 3, 4, 5))
    table.finished(lease("b", 0.0, tenant="other"), chain(6, 7))
    clock.now += 1
    table.expire()
    assert table.reclaim(0, nothing_is_busy, "big", ahead=9).freed == (), "nothing is wanted"
    assert table.reclaim(1, {6}.__contains__, "big", ahead=9).freed == (5, 7)
    assert table.reclaim(1, {6}.__contains__, "big", ahead=9).freed == (4,), "the request's one, and no more"
    assert table.reclaim(1, {6}.__contains__, "small", ahead=9).freed == (3,), "its own share, and no more of it"


class Passing(Clock):
    """It goes on a little with each look, so that an order that was reckoned holds for a while."""

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


@pytest.mark.parametrize("child_runs", [True, False])
def test_a_parent_whose_time_is_over_yields_nothing_ahead_while_its_child_has_rank(child_runs: bool) -> None:
    clock = Passing()
    table = table_of(20, clock)
    child = dataclasses.replace(lease("child", 600.0), parent="parent")
    table.finished(lease("parent", 5.0), chain(1, 2, 3, 4))
    table.finished(lease("other", 1.0), chain(11, 12))
    table.arrived(child)
    if not child_runs:
        table.finished(child, chain(21))
    clock.now += 2
    table.expire()
    table._reckon_order()
    clock.now += 4
    table.expire()
    assert table.reclaim(1, nothing_is_busy, ahead=9).freed == (12, 11)


def test_a_child_that_is_awaited_again_gives_its_parent_rank_at_once() -> None:
    clock = Passing()
    table = table_of(20, clock)
    child = dataclasses.replace(lease("child", 1.0), parent="parent")
    table.arrived(child)
    table.finished(lease("parent", 1.0), chain(1, 2, 3, 4))
    table.finished(child, chain(21))
    table.finished(lease("other", 1.0), chain(11, 12, 13))
    clock.now += 2
    table.expire()
    table._reckon_order()
    table.awaited([("tenant", "child")], 60.0)
    assert table.reclaim(1, nothing_is_busy, ahead=9).freed == (13, 12, 11)


def test_no_order_is_reckoned_for_what_yields_ahead_where_a_request_uses_the_rest() -> None:
    clock = Passing()
    table = table_of(20, clock)
    table.finished(lease("used", 0.0), chain(1, 2))
    table.finished(lease("leased", 60.0), chain(3))
    clock.now += 1
    table.expire()
    table._reckon_order()
    with patch.object(table, "_reckon_order") as reckoned:
        assert table.reclaim(1, {2}.__contains__, ahead=1).freed == (3,)
    assert not reckoned.called


def test_no_order_is_reckoned_for_what_yields_ahead_where_the_rest_has_a_request() -> None:
    clock = Passing()
    table = table_of(20, clock)
    table.finished(lease("a", 0.0), chain(1))
    table.finished(lease("b", 0.0), chain(2))
    clock.now += 1
    table.expire()
    table._reckon_order()
    yields_last = table._order[False][0].key[1]
    table.arrived(lease(yields_last))
    with patch.object(table, "_reckon_order") as reckoned:
        assert len(table.reclaim(1, nothing_is_busy, ahead=1).freed) == 1
    assert not reckoned.called
    assert held(table) == {yields_last: 1}


def test_looking_for_blocks_ahead_ends_with_the_first_who_has_none_to_give() -> None:
    clock = Clock()
    table = table_of(20, clock)
    table.finished(lease("d", 0.0), chain(3))
    clock.now += 100_000
    for name in ("a", "b", "c"):
        table.finished(lease(name, 0.0), chain(1, 2))
    clock.now += 1
    table.expire()
    assert table.reclaim(1, nothing_is_busy, ahead=9).freed == (3,)
    assert len(held(table)) == 2, "one of them gave up its claim, and that made no room"


def test_a_tenant_and_a_session_keep_no_more_than_their_caps() -> None:
    table = table_of(10, Clock())
    capped = dataclasses.replace(lease("a"), tenant_cap=0.5, session_cap=0.3)
    assert table.finished(capped, chain(1, 2, 3, 4)) == Change(taken=(1, 2, 3))
    other = dataclasses.replace(capped, session="b")
    assert table.finished(other, chain(5, 6, 7)) == Change(taken=(5, 6, 7), freed=(3,))
    table.arrived(capped)
    assert table.admitted(capped, 2 * BLOCK, prompt_hits=False) == (Change(), "quota")


def test_a_parent_yields_after_others_while_its_child_runs_and_while_the_child_has_a_lease() -> None:
    clock = Clock()
    table = table_of(10, clock)
    child = dataclasses.replace(lease("child", 60.0), parent="parent")
    table.finished(lease("parent", 5.0), chain(1, 2))
    table.finished(lease("other", 60.0), chain(3, 4))
    table.arrived(child)
    clock.now += 5
    table.expire()
    assert table.reclaim(1, nothing_is_busy).freed == (4,)
    table.finished(child, chain(1, 5))
    clock.now += 5
    assert table.reclaim(1, nothing_is_busy, ahead=9).freed == (3,)
    assert held(table) == {"parent": 2, "child": 2}
    assert table.reclaim(1, nothing_is_busy, ahead=9).freed == (2,), "it has its child's rank"


def test_in_dram_too_a_parent_yields_after_others_while_its_child_runs_and_no_longer() -> None:
    clock = Clock()
    table = table_of(10, clock)
    order = ChunkOrder(table.worth_behind, clock, Quotas(20))
    child = dataclasses.replace(lease("child", 60.0), parent="parent")

    def kept(session: str) -> None:
        order.add(session.encode(), BLOCK, ("tenant", session))
        order.freed(session.encode())
        table.arrived(lease(session))
        table.finished(lease(session), chain(1))

    kept("parent")
    table.arrived(child)
    clock.now += 600  # a child may run for long
    kept("other")
    clock.now += 5
    assert order.pick(1, ()) == (b"other",)
    table.finished(child, chain(2))
    clock.now += 5
    kept("another")
    assert table.worth_behind(session=("tenant", "parent"), now=clock.now, position=0, abandoned=False) == (
        table.policy.value(session=("tenant", "child"), now=clock.now, position=0, abandoned=False)
    )
    table.release(["child"])
    clock.now += 5
    assert order.pick(1, ()) == (b"parent",)


def test_a_session_closed_while_its_request_runs_leaves_nothing_when_that_ends() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a"), chain(1))
    table.arrived(lease("a"))
    assert table.release(["a"]) == Change(freed=(1,), forgotten=(("content", 1),))
    assert table.finished(lease("a"), chain(1, 2)) == Change(forgotten=(("content", 1), ("content", 2)))
    assert table.states() == ()


def test_ten_thousand_sessions_that_are_abandoned_hold_no_more_than_the_bound() -> None:
    clock = Clock()
    table = table_of(100, clock)
    for number in range(10_000):
        clock.now += 0.01
        table.arrived(lease(f"s{number}"))
        table.finished(lease(f"s{number}"), chain(2 * number, 2 * number + 1))
        table.expire()
    assert table.leased_blocks == 100
    assert len(table.states()) == 50
    assert len(table._deadlines) < 200
    assert len(table._active) == len(table._closed) == len(table._parents) == len(table._children) == 0


def test_the_leases_that_are_asked_for_are_told_and_no_others() -> None:
    table = table_of(100, Clock())
    for number in range(50):
        table.finished(lease(str(number)), chain(number))
    states = table.states([("tenant", "7"), ("tenant", "unknown"), ("tenant", "3"), ("other", "3")])
    assert [(state.session, state.blocks) for state in states] == [("7", 1), ("3", 1)]
    assert table.states([]) == ()
    assert {state.session for state in table.states()} == {str(number) for number in range(50)}


def test_a_label_reaches_nothing_of_another_tenant() -> None:
    table = table_of(10, Clock())
    table.finished(lease("a", tenant="one"), chain(1, 2))
    assert table.finished(lease("a", tenant="two"), chain(3)) == Change(taken=(3,))
    assert table.leased_blocks == 3


def test_ten_thousand_turns_of_a_session_leave_a_short_list_of_deadlines() -> None:
    table = table_of(10, Clock())
    for _ in range(10_000):
        table.arrived(lease("a"))
        table.finished(lease("a"), chain(1))
    assert len(table._deadlines) < 100


class TableAgainstPool(RuleBasedStateMachine):
    """Whatever is asked of the table, a pool that does as it says never loses a block and never frees one twice."""

    bound = 12

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table = table_of(self.bound, self.clock)
        self.references: set[int] = set()

    def apply(self, change: Change) -> None:
        """What the connector does."""
        assert not self.references.intersection(change.taken)
        assert len(set(change.taken)) == len(change.taken)
        self.references.update(change.taken)
        assert len(set(change.freed)) == len(change.freed)
        assert self.references.issuperset(change.freed)
        self.references.difference_update(change.freed)

    @rule(
        session=st.sampled_from(string.ascii_lowercase[:6]),
        trunk=st.integers(0, 8),
        branch=st.integers(0, 3),
        length=st.integers(0, 8),
        idle_timeout_s=st.sampled_from([0.0, 5.0, 15.0]),
    )
    def grant(self, session: str, trunk: int, branch: int, length: int, idle_timeout_s: float) -> None:
        blocks = chain(*range(trunk), *range(100 * branch + 50, 100 * branch + 50 + length))
        self.apply(self.table.finished(lease(session, idle_timeout_s), blocks))

    @rule(session=st.sampled_from(string.ascii_lowercase[:6]), hit_tokens=st.integers(0, 6 * BLOCK))
    def arrive(self, session: str, hit_tokens: int) -> None:
        self.table.arrived(lease(session))
        self.apply(self.table.admitted(lease(session), hit_tokens, prompt_hits=not hit_tokens)[0])

    @rule(sessions=st.lists(st.sampled_from(string.ascii_lowercase[:6])))
    def awaited(self, sessions: list[str]) -> None:
        self.table.awaited([("tenant", session) for session in sessions], 5.0)

    @rule(seconds=st.sampled_from([0.0, 1.0, 6.0, 20.0]))
    def expire(self, seconds: float) -> None:
        self.clock.now += seconds
        self.apply(self.table.expire())
        due_in_s = self.table.next_expiry_in_s()
        assert due_in_s is None or due_in_s > 0

    @rule(sessions=st.sets(st.sampled_from(string.ascii_lowercase[:6])))
    def release(self, sessions: set[str]) -> None:
        self.apply(self.table.release(sessions))
        assert not sessions.intersection(held(self.table))

    @rule(wanted=st.integers(0, 20), busy_below=st.integers(0, 6), ahead=st.integers(0, 4))
    def reclaim(self, wanted: int, busy_below: int, ahead: int) -> None:
        # A request in flight uses the head of the trunk.
        def busy(block_id: int) -> bool:
            return block_id < busy_below

        could_yield = sum(not busy(block_id) for block_id in self.table.leased_block_ids())
        change = self.table.reclaim(wanted, busy, ahead=ahead)
        self.apply(change)
        assert min(wanted, could_yield) <= len(change.freed) <= wanted + ahead
        assert not any(map(busy, change.freed[wanted:]))

    @precondition(lambda self: self.references)
    @rule()
    def release_all(self) -> None:
        self.apply(self.table.release_all())
        assert not self.references

    @invariant()
    def counts_are_right(self) -> None:
        assert self.references == set(self.table.leased_block_ids())
        assert self.table.leased_blocks == len(self.references) <= self.bound
        states = self.table.states()
        assert all(state.blocks > 0 and state.tokens == state.blocks * BLOCK for state in states)
        kept = self.table.kept()
        assert kept.sessions == len(states)
        assert sum(tenant.sessions for tenant in kept.tenants.values()) == len(states)
        assert sum(tenant.blocks for tenant in kept.tenants.values()) == sum(state.blocks for state in states)
        counts = self.table.counts().values()
        assert sum(each.reclaimed_blocks for each in counts) == self.table.reclaimed_blocks_total
        assert sum(each.expired_leases for each in counts) == self.table.expired_total
        deadlines = [state.expires_in_s for state in states]
        assert deadlines == sorted(deadlines)


TableAgainstPool.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestTableAgainstPool = TableAgainstPool.TestCase
