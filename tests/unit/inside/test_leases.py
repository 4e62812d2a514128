"""The table of leases, without a pool: who keeps what, who yields first, and that the counts are right."""

import string

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.engine.inside.leases import Change, LeasedBlock, LeaseTable
from appliance.engine.protocol import Lease

BLOCK = 32  # tokens


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


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
    table = LeaseTable(10, Clock())
    assert table.grant(lease("a"), chain(1, 2, 3)) == Change(taken=(1, 2, 3))
    assert table.leased_blocks == 3


def test_the_next_turn_takes_only_what_is_new() -> None:
    table = LeaseTable(10, Clock())
    table.grant(lease("a"), chain(1, 2, 3))
    assert table.grant(lease("a"), chain(1, 2, 3, 4)) == Change(taken=(4,))


def test_a_branch_gives_back_the_rest_of_the_other_branch_tail_first() -> None:
    table = LeaseTable(10, Clock())
    table.grant(lease("a"), chain(1, 2, 3, 4))
    assert table.grant(lease("a"), chain(1, 2, 5)) == Change(taken=(5,), freed=(4, 3))


def test_a_beginning_of_the_history_moves_the_deadline_only() -> None:
    clock = Clock()
    table = LeaseTable(10, clock)
    table.grant(lease("a"), chain(1, 2, 3, 4))
    clock.now += 10
    assert table.grant(lease("a"), chain(1, 2)) == Change()
    assert table.next_expiry_in_s() == 15.0
    assert held(table) == {"a": 4}


def test_a_beginning_computed_once_more_in_other_blocks_is_still_a_beginning() -> None:
    table = LeaseTable(10, Clock())
    table.grant(lease("a"), chain(1, 2, 3, 4))
    again = [*chain(1), LeasedBlock(9, 2 * BLOCK, ("content", 2))]
    assert table.grant(lease("a"), again) == Change()


def test_a_turn_that_computed_nothing_leaves_the_lease_alone_and_starts_none() -> None:
    table = LeaseTable(10, Clock())
    table.grant(lease("a"), chain(1, 2))
    assert table.grant(lease("a"), []) == Change()
    assert table.grant(lease("b"), []) == Change()
    assert held(table) == {"a": 2}


def test_a_shared_block_is_given_back_with_its_last_lease() -> None:
    table = LeaseTable(10, Clock())
    table.grant(lease("a"), chain(1, 2, 3))
    assert table.grant(lease("b"), chain(1, 2, 4)) == Change(taken=(4,))
    assert table.release(["a"]) == Change(freed=(3,))
    assert table.release(["b"]) == Change(freed=(4, 2, 1))


def test_over_the_bound_the_earliest_deadline_yields_its_tail() -> None:
    clock = Clock()
    table = LeaseTable(6, clock)
    table.grant(lease("late", 30.0), chain(1, 2, 3))
    table.grant(lease("early", 5.0), chain(4, 5, 6))
    assert table.grant(lease("new", 5.0), chain(7, 8)) == Change(taken=(7, 8), freed=(6, 5))
    assert held(table) == {"early": 1, "new": 2, "late": 3}


def test_one_session_may_have_the_whole_bound_and_no_more() -> None:
    table = LeaseTable(3, Clock())
    table.grant(lease("old"), chain(1, 2))
    assert table.grant(lease("new"), chain(3, 4, 5, 6)) == Change(taken=(3, 4, 5), freed=(2, 1))
    assert held(table) == {"new": 3}


def test_a_bound_of_nothing_leases_nothing() -> None:
    table = LeaseTable(0, Clock())
    assert table.grant(lease("a"), chain(1, 2)) == Change()
    assert table.next_expiry_in_s() is None


def test_reclaiming_takes_no_more_than_wanted_tails_first_and_the_earliest_deadline_first() -> None:
    table = LeaseTable(10, Clock())
    table.grant(lease("late", 30.0), chain(1, 2, 3))
    table.grant(lease("early", 5.0), chain(4, 5, 6))
    assert table.reclaim(2, nothing_is_busy) == Change(freed=(6, 5))
    assert table.reclaim(2, nothing_is_busy) == Change(freed=(4, 3))
    assert table.reclaim(9, nothing_is_busy) == Change(freed=(2, 1))
    assert table.reclaim(1, nothing_is_busy) == Change()
    assert table.reclaimed_blocks_total == 6
    assert table.states() == ()


def test_a_lease_whose_tail_is_in_use_yields_nothing() -> None:
    table = LeaseTable(10, Clock())
    table.grant(lease("in use", 5.0), chain(1, 2, 3))
    table.grant(lease("idle", 30.0), chain(4, 5, 6))
    assert table.yieldable({1, 2, 3}.__contains__) == 3
    assert table.reclaim(2, {1, 2, 3}.__contains__) == Change(freed=(6, 5))


def test_what_lies_beyond_the_part_in_use_can_be_reclaimed() -> None:
    table = LeaseTable(10, Clock())
    table.grant(lease("a"), chain(1, 2, 3, 4))
    assert table.reclaim(9, {1, 2}.__contains__) == Change(freed=(4, 3))


def test_a_shared_block_counts_as_reclaimed_once_the_last_lease_yields_it() -> None:
    table = LeaseTable(10, Clock())
    table.grant(lease("a", 5.0), chain(1, 2))
    table.grant(lease("b", 30.0), chain(1, 2, 3))
    assert table.reclaim(1, nothing_is_busy) == Change(freed=(3,))
    assert table.reclaim(1, nothing_is_busy) == Change(freed=(2,))
    assert table.reclaimed_blocks_total == 2


def test_a_lease_ends_at_its_deadline_and_not_before() -> None:
    clock = Clock()
    table = LeaseTable(10, clock)
    table.grant(lease("b", 15.0), chain(3, 4))
    table.grant(lease("a", 5.0), chain(1, 2))
    clock.now += 4.999
    assert table.expire() == Change()
    clock.now += 0.001
    assert table.next_expiry_in_s() == 0.0
    assert table.expire() == Change(freed=(2, 1))
    clock.now += 60
    assert table.next_expiry_in_s() == -50.0
    assert table.expire() == Change(freed=(4, 3))
    assert table.next_expiry_in_s() is None
    assert table.expired_total == 2


def test_a_renewed_lease_forgets_its_earlier_deadline() -> None:
    clock = Clock()
    table = LeaseTable(10, clock)
    table.grant(lease("a", 15.0), chain(1))
    clock.now += 14
    table.renew(lease("a", 15.0))
    table.renew(lease("unknown", 15.0))
    clock.now += 14
    assert table.expire() == Change()
    clock.now += 1
    assert table.expire() == Change(freed=(1,))


def test_a_label_reaches_nothing_of_another_tenant() -> None:
    table = LeaseTable(10, Clock())
    table.grant(lease("a", tenant="one"), chain(1, 2))
    assert table.grant(lease("a", tenant="two"), chain(3)) == Change(taken=(3,))
    assert table.leased_blocks == 3


def test_ten_thousand_renewals_leave_a_short_list_of_deadlines() -> None:
    table = LeaseTable(10, Clock())
    table.grant(lease("a"), chain(1))
    for _ in range(10_000):
        table.renew(lease("a"))
    assert len(table._deadlines) < 100


class TableAgainstPool(RuleBasedStateMachine):
    """Whatever is asked of the table, a pool that does as it says never loses a block and never frees one twice."""

    bound = 12

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table = LeaseTable(self.bound, self.clock)
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
        self.apply(self.table.grant(lease(session, idle_timeout_s), blocks))

    @rule(session=st.sampled_from(string.ascii_lowercase[:6]))
    def renew(self, session: str) -> None:
        self.table.renew(lease(session))

    @rule(seconds=st.sampled_from([0.0, 1.0, 6.0, 20.0]))
    def expire(self, seconds: float) -> None:
        self.clock.now += seconds
        self.apply(self.table.expire())
        assert all(state.expires_in_s > 0 for state in self.table.states())

    @rule(sessions=st.sets(st.sampled_from(string.ascii_lowercase[:6])))
    def release(self, sessions: set[str]) -> None:
        self.apply(self.table.release(sessions))
        assert not sessions.intersection(held(self.table))

    @rule(wanted=st.integers(0, 20), busy_below=st.integers(0, 6))
    def reclaim(self, wanted: int, busy_below: int) -> None:
        # A request in flight uses the head of the trunk.
        def busy(block_id: int) -> bool:
            return block_id < busy_below

        could_yield = self.table.yieldable(busy)
        change = self.table.reclaim(wanted, busy)
        self.apply(change)
        assert len(change.freed) == min(wanted, could_yield)

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
        deadlines = [state.expires_in_s for state in states]
        assert deadlines == sorted(deadlines)
        assert self.table.next_expiry_in_s() == (deadlines[0] if deadlines else None)


TableAgainstPool.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTableAgainstPool = TableAgainstPool.TestCase
