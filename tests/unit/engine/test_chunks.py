"""Which chunks leave DRAM, in which order."""

import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Hashable

import pytest

from appliance.engine.inside.chunks import ChunkOrder
from appliance.engine.inside.quotas import Owner, Quota, Quotas

A, B, CHILD = ("t", "a"), ("t", "b"), ("t", "child")


class Sessions:
    """Worths that the test says, and a clock that it moves."""

    def __init__(self) -> None:
        self.worths: dict[Hashable, float] = {}
        self.now = 0.0
        self.asked = 0

    def worth(self, *, session: Hashable, now: float, position: int, abandoned: bool) -> float:
        self.asked += 1
        return self.worths.get(session, 0.0)


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


@pytest.fixture
def order(sessions: Sessions) -> ChunkOrder:
    return ChunkOrder(sessions.worth, lambda: sessions.now, Quotas(10))


def stored(order: ChunkOrder, owner: Owner, name: str, chunks: int) -> dict[bytes, int]:
    positions = {f"{name}{number}".encode(): 32 * (number + 1) for number in range(chunks)}
    for key, end_token in positions.items():
        if key not in order:
            order.add(key, end_token, owner)
            order.freed(key)
    order.used(owner, positions)
    return positions


def test_the_lowest_worth_leaves_first_and_its_tail_before_its_head(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 2.0, B: 1.0}
    stored(order, A, "a", 2)
    stored(order, B, "b", 3)
    assert order.pick(4, ()) == (b"b2", b"b1", b"b0", b"a1")
    assert len(order) == 1


def test_what_a_session_diverged_from_leaves_before_anything_else(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 9.0, B: 1.0}
    old = stored(order, A, "a", 4)
    stored(order, B, "b", 1)
    for key in (b"new2", b"new3"):
        order.add(key, 0, A)
    order.used(A, {b"a0": 32, b"a1": 64, b"new2": 96, b"new3": 128})
    picked = order.pick(2, ())
    assert picked is not None
    assert set(picked) == {b"a2", b"a3"}
    assert old.keys() - set(picked) == {b"a0", b"a1"}


def test_a_beginning_of_what_is_there_abandons_nothing(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 9.0, B: 1.0}
    stored(order, A, "a", 4)
    stored(order, B, "b", 1)
    order.used(A, {b"a0": 32, b"a1": 64})
    assert order.pick(1, ()) == (b"b0",)


def test_a_shared_chunk_stays_with_the_session_that_is_worth_more(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 1.0, B: 2.0, CHILD: 3.0}
    stored(order, A, "a", 3)
    stored(order, B, "b", 1)
    order.used(CHILD, {b"a0": 32})
    assert order.pick(3, ()) == (b"a2", b"a1", b"b0")


def test_a_chunk_that_is_copied_or_spared_stays(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 1.0, B: 2.0}
    stored(order, A, "a", 2)
    stored(order, B, "b", 2)
    order.held(b"a1")
    assert order.pick(3, {b"b1"}) is None
    assert len(order) == 4  # nothing left halfway
    assert order.pick(2, {b"b1"}) == (b"a0", b"b0")


def test_a_release_names_what_nobody_else_owns(order: ChunkOrder) -> None:
    stored(order, A, "a", 3)
    order.used(CHILD, {b"a0": 32})
    assert set(order.released([A])) == {b"a1", b"a2"}
    assert order.chunks_of(CHILD) == 1
    assert order.sessions() == (CHILD,)


def diverged(order: ChunkOrder) -> None:
    """A session that left two chunks of four behind."""
    stored(order, A, "a", 4)
    for key in (b"new2", b"new3"):
        order.add(key, 0, A)
        order.freed(key)
    order.used(A, {b"a0": 32, b"a1": 64, b"new2": 96, b"new3": 128})


def test_a_release_names_what_the_session_diverged_from(order: ChunkOrder) -> None:
    diverged(order)
    order.used(CHILD, {b"a0": 32, b"a1": 64, b"a2": 96})
    assert set(order.released([A])) == {b"a3", b"new2", b"new3"}
    assert order.sessions() == (CHILD,)
    assert order.released([A]) == ()


def test_a_session_that_has_nothing_but_what_it_diverged_from_can_be_released(order: ChunkOrder) -> None:
    stored(order, A, "a", 2)
    order.used(A, {b"never-came": 128})
    assert order.chunks_of(A) == 0
    assert order.sessions() == (A,)
    assert set(order.released([A])) == {b"a0", b"a1"}


def test_what_a_session_came_back_to_is_its_own_again(sessions: Sessions, order: ChunkOrder) -> None:
    diverged(order)
    order.used(A, {b"a0": 32, b"a1": 64, b"a2": 96, b"a3": 128})
    assert set(order.keys_of(A)) == {b"a0", b"a1", b"a2", b"a3"}
    assert set(order.released([A])) == {b"a0", b"a1", b"a2", b"a3", b"new2", b"new3"}


def test_what_left_is_not_released_again(order: ChunkOrder) -> None:
    diverged(order)
    assert set(order.pick(2, ()) or ()) == {b"a2", b"a3"}
    assert set(order.released([A])) == {b"a0", b"a1", b"new2", b"new3"}
    assert order.sessions() == ()


def test_what_a_request_waits_for_stays_until_it_waits_no_more(order: ChunkOrder) -> None:
    stored(order, A, "a", 3)
    for request in ("one", "two"):
        order.await_for(request, b"a0")
        order.await_for(request, b"a0")
    order.await_for("one", b"a1")
    assert order.pick(2, ()) is None
    assert order.pick(1, ()) == (b"a2",)
    order.waits_no_more("one")
    assert order.pick(2, ()) is None
    assert order.pick(1, ()) == (b"a1",)
    order.waits_no_more("two")
    order.waits_no_more("two")
    assert order.pick(1, ()) == (b"a0",)


def test_ten_thousand_sessions_are_ranked_once_for_many_picks(sessions: Sessions, order: ChunkOrder) -> None:
    for number in range(10_000):
        stored(order, ("t", str(number)), f"{number}-", 1)
    assert order.pick(1, ()) is not None
    asked = sessions.asked
    for _ in range(50):
        sessions.now += 0.02
        assert order.pick(1, ()) is not None
    assert sessions.asked == asked
    sessions.now += 10
    assert order.pick(1, ()) is not None
    assert sessions.asked > asked


NO_QUOTA = Quota()


def brought(order: ChunkOrder, owner: Owner, name: str, chunks: int, quota: Quota = NO_QUOTA, free: int = 0) -> int:
    """How many chunks a session could bring into ten, of which so many are free; they own their room now."""
    coming = {f"{name}{number}".encode(): 32 * (number + 1) for number in range(chunks)}
    coming = {key: end for key, end in coming.items() if key not in order}
    way = order.make_way(owner, coming, quota, free_chunks=free)
    for key in way.leaving:
        order.discard(key)
    missing = len(way.coming) - free - len(way.leaving)
    assert order.pick(max(0, missing), (), owner[0]) is not None
    for key in sorted(way.coming):
        order.add(key, coming[key], owner)
        order.freed(key)
    return len(way.coming)


HALF, THIRD = Quota(tenant_share=0.5), Quota(tenant_share=0.3)
OTHERS = ("u", "x")


def test_another_tenants_chunks_leave_down_to_its_share_and_no_further(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 1.0, B: 2.0, OTHERS: 9.0}
    assert brought(order, A, "a", 4, HALF, free=10) == 4
    assert brought(order, B, "b", 4, HALF, free=6) == 4
    assert brought(order, OTHERS, "x", 7, free=2) == 5
    assert order.chunks_of_tenant("t") == 5
    assert order.keys_of(A) == (b"a0",)  # the lowest worth leaves first, with a share as without one
    assert order.quotas.is_lost(OTHERS, 6 * 32)
    assert not order.quotas.is_lost(OTHERS, 5 * 32)
    assert not order.quotas.is_lost(A, 2 * 32)  # that was no quota of its tenant's


def test_a_tenant_pushes_its_own_out_below_its_share(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 1.0, B: 2.0}
    assert brought(order, A, "a", 5, HALF, free=5) == 5
    assert brought(order, B, "b", 3, HALF) == 3
    assert order.keys_of(A) == (b"a0", b"a1")


def test_what_a_share_kept_out_is_followed_by_nothing(sessions: Sessions, order: ChunkOrder) -> None:
    brought(order, A, "a", 5, HALF, free=5)
    assert brought(order, OTHERS, "x", 2, free=1) == 1
    order.discard(b"a4")  # now there is room, but behind a hole
    later = {b"x2": 96, b"x3": 128}
    assert order.make_way(OTHERS, later, Quota(), free_chunks=1).coming == frozenset()
    assert order.make_way(OTHERS, {b"x1": 64, **later}, Quota(), free_chunks=3).coming == {b"x1", *later}


def test_a_session_brings_in_its_head_up_to_its_cap(order: ChunkOrder) -> None:
    capped = Quota(session_cap=0.3)
    assert brought(order, A, "a", 2, capped, free=10) == 2
    assert brought(order, A, "a", 6, capped, free=8) == 1
    assert set(order.keys_of(A)) == {b"a0", b"a1", b"a2"}
    assert order.quotas.is_lost(A, 4 * 32)
    assert not order.quotas.is_lost(A, 3 * 32)


def test_at_its_tenants_cap_a_session_pushes_the_tenants_others_out_and_nobody_elses(
    sessions: Sessions, order: ChunkOrder
) -> None:
    sessions.worths = {A: 5.0, B: 6.0, OTHERS: 1.0}
    capped = Quota(tenant_cap=0.5)
    assert brought(order, OTHERS, "x", 3, free=10) == 3
    assert brought(order, A, "a", 4, capped, free=7) == 4
    assert brought(order, B, "b", 3, capped, free=3) == 3
    assert (order.chunks_of(A), order.chunks_of(B), order.chunks_of(OTHERS)) == (2, 3, 3)
    assert order.quotas.is_lost(A, 3 * 32)
    assert brought(order, B, "b", 9, capped, free=2) == 2  # more than the cap is nobody's
    assert (order.chunks_of(A), order.chunks_of(B), order.chunks_of(OTHERS)) == (0, 5, 3)
    assert order.quotas.is_lost(B, 6 * 32)


def test_what_a_tier_behind_has_is_not_lost_when_it_leaves_for_a_cap(sessions: Sessions) -> None:
    order = ChunkOrder(sessions.worth, lambda: sessions.now, Quotas(10), lambda key: key == b"a1")
    capped = Quota(tenant_cap=0.2)
    brought(order, A, "a", 2, capped, free=10)
    brought(order, B, "b", 1, capped, free=8)
    assert not order.quotas.is_lost(A, 2 * 32)
    brought(order, B, "b", 2, capped, free=8)
    assert order.quotas.is_lost(A, 2 * 32)
    assert order.quotas.is_lost(A, 32)


def test_what_came_back_or_was_released_is_lost_no_more(order: ChunkOrder) -> None:
    capped = Quota(session_cap=0.2)
    brought(order, A, "a", 3, capped, free=10)
    brought(order, B, "b", 3, capped, free=8)
    brought(order, A, "a", 3, free=6)
    assert not order.quotas.is_lost(A, 3 * 32)
    order.released([B])
    assert not order.quotas.is_lost(B, 3 * 32)


def test_a_chunk_of_two_sessions_counts_once_for_their_tenant_and_abandoned_ones_do_not(order: ChunkOrder) -> None:
    stored(order, A, "a", 4)
    order.used(CHILD, {b"a0": 32, b"a1": 64})
    assert order.chunks_of_tenant("t") == 4
    order.released([A])
    assert order.chunks_of_tenant("t") == 2
    order.used(CHILD, {b"a0": 32, b"other": 64})
    assert order.chunks_of_tenant("t") == 1
    order.discard(b"a0")
    assert order.chunks_of_tenant("t") == 0


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_and_goes_shares_and_caps_hold_and_the_counts_are_right(sessions: Sessions, seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 (the same every time)
    order = ChunkOrder(sessions.worth, lambda: sessions.now, Quotas(40))
    quotas = {"t": Quota(0.25), "u": Quota(0.5, 0.6, 0.3), "v": Quota(0.0, 0.3, 0.2), "w": Quota()}
    owners = [(tenant, str(number)) for tenant in quotas for number in range(4)]
    for _ in range(400):
        sessions.now += 2
        owner = rng.choice(owners)
        sessions.worths[owner] = rng.random()
        before = {tenant: order.chunks_of_tenant(tenant) for tenant in quotas}
        doing = rng.random()
        if doing < 0.7:
            name = f"{owner}{rng.choice(('', '+'))}-"
            brought(order, owner, name, rng.randrange(1, 16), quotas[owner[0]], free=40 - len(order))
        elif doing < 0.8:
            kept = list(order.keys_of(owner))
            order.used(owner, {key: 32 * (place + 1) for place, key in enumerate(kept[: len(kept) // 2])})
        elif doing < 0.9:
            for key in order.released([owner]):
                order.discard(key)
        else:
            order.used((owner[0], "0"), dict.fromkeys(order.keys_of(owner)[:2], 32))
        assert len(order) <= 40
        alone = Counter(next(iter(chunk.owners))[0] for chunk in order._chunks.values() if chunk.owners)
        assert alone == Counter(dict(order.blocks_by_tenant()))
        for each in owners:
            ends = {key: chunk.end_token for key, chunk in order._chunks.items() if each in chunk.owners}
            in_order = order.keys_of(each)
            assert len(in_order) == len(ends)
            assert [ends[key] for key in in_order] == sorted(ends.values())
            assert (each in order._ranked.get(each[0], {})) == bool(in_order)
        for tenant, quota in quotas.items():
            held = order.chunks_of_tenant(tenant)
            if doing < 0.7:
                assert held <= max(before[tenant], int(quota.tenant_cap * 40))
            if tenant != owner[0]:
                assert held >= min(before[tenant], int(quota.tenant_share * 40))


def operations(action: Callable[[], object]) -> int:
    """How many calls of functions, its own and Python's, an action makes."""
    calls = itertools.count()
    before = sys.getprofile()
    sys.setprofile(lambda *_: next(calls))
    try:
        action()
    finally:
        sys.setprofile(before)
    return next(calls)


def full(sessions: Sessions, each: int, chunks: int, share: float) -> ChunkOrder:
    """A full tier, half of it an idle tenant's whose sessions are worth least, half of it another's."""
    order = ChunkOrder(sessions.worth, lambda: sessions.now, Quotas(2 * each * chunks))
    for tenant, worth in (("idle", 1.0), ("busy", 2.0)):
        for number in range(each):
            owner = tenant, str(number)
            sessions.worths[owner] = worth
            stored(order, owner, f"{tenant}-{number}-", chunks)
    sessions.worths |= {("busy", "new"): 9.0, ("third", "new"): 9.0}
    order.quotas.in_force("idle", Quota(tenant_share=share))
    assert order.pick(1, (), "busy") is not None  # the order was reckoned
    order.add(b"first", 32, ("busy", "0"))
    order.freed(b"first")
    return order


def stores(order: ChunkOrder, tenant: str = "busy", blocks: int = 10, quota: Quota = NO_QUOTA) -> None:
    """One block after the other comes into a full tier."""
    for number in range(blocks):
        key, owner = f"new-{tenant}-{number}".encode(), (tenant, "new")
        way = order.make_way(owner, {key: 32 * (number + 1)}, quota, free_chunks=0)
        for leaving in way.leaving:
            order.discard(leaving)
        if way.coming:
            assert way.leaving or order.pick(1, (), tenant) is not None
            order.add(key, 32 * (number + 1), owner)
            order.freed(key)


def test_a_block_costs_no_more_where_an_idle_tenant_has_its_share(sessions: Sessions) -> None:
    shared, unshared = full(sessions, 300, 5, 0.5), full(sessions, 300, 5, 0.0)
    with_share = operations(lambda: stores(shared))
    assert shared.chunks_of_tenant("idle") == 300 * 5
    assert with_share <= 2 * operations(lambda: stores(unshared))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_block_costs_the_same_at_any_number_of_sessions(sessions: Sessions, share: float) -> None:
    few, many = full(sessions, 20, 5, share), full(sessions, 600, 5, share)
    assert operations(lambda: stores(many)) <= 1.1 * operations(lambda: stores(few))


def test_what_has_no_room_and_what_a_cap_makes_room_for_costs_the_same_at_any_number_of_sessions(
    sessions: Sessions,
) -> None:
    few, many = full(sessions, 20, 5, 0.5), full(sessions, 600, 5, 0.5)
    for order in (few, many):
        order.quotas.in_force("busy", Quota(tenant_share=0.5))
    assert operations(lambda: stores(many, "third")) <= 1.1 * operations(lambda: stores(few, "third"))
    assert not many.chunks_of_tenant("third")
    capped = Quota(tenant_share=0.5, tenant_cap=0.5)
    assert operations(lambda: stores(many, quota=capped)) <= 1.1 * operations(lambda: stores(few, quota=capped))


def test_a_block_costs_the_same_however_long_the_context_that_yields_it(sessions: Sessions) -> None:
    short, long = full(sessions, 1, 20, 0.0), full(sessions, 1, 4000, 0.0)
    assert operations(lambda: stores(long)) <= 1.5 * operations(lambda: stores(short))  # a search among 4000


def test_sessions_that_have_nothing_but_a_shared_prefix_cost_a_block_nothing(sessions: Sessions) -> None:
    def with_children(number: int) -> ChunkOrder:
        order = full(sessions, 5, 5, 0.0)
        prefix = stored(order, ("busy", "0"), "prefix-", 20)
        for child in range(number):
            sessions.worths["busy", f"child-{child}"] = 0.5
            order.used(("busy", f"child-{child}"), prefix)
        sessions.now += 10
        assert order.pick(10, (), "busy") is not None  # what the prefix's session diverged from, and more
        return order

    few, many = with_children(2), with_children(500)
    assert operations(lambda: stores(many)) <= 1.1 * operations(lambda: stores(few))


def test_what_left_before_what_is_shared_and_came_again_can_leave(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 1.0, B: 2.0}
    stored(order, A, "a", 3)
    order.used(B, {b"a0": 32, b"a1": 64, b"a2": 96})
    order.discard(b"a1")
    order.add(b"a1", 64, A)
    order.freed(b"a1")
    assert order.pick(3, ()) == (b"a2", b"a0", b"a1")


def test_for_what_nobody_asked_for_only_what_is_worth_less_leaves(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 1.0, B: 4.0}
    stored(order, A, "a", 3)
    stored(order, B, "b", 3)
    assert order.room_ahead(CHILD, 10, free_chunks=1, below=1.0) == 1
    assert order.room_ahead(CHILD, 10, free_chunks=1, below=4.0) == 4
    assert order.room_ahead(CHILD, 3, free_chunks=1, below=4.0) == 3
    assert order.pick(4, (), below=4.0) is None
    assert order.pick(2, (), below=4.0) == (b"a2", b"a1")
    assert order.pick(4, ()) == (b"a0", b"b2", b"b1", b"b0")


def test_what_a_request_waits_for_makes_no_room_for_what_nobody_asked_for(
    sessions: Sessions, order: ChunkOrder
) -> None:
    sessions.worths = {A: 1.0}
    stored(order, A, "a", 2)
    order.await_for("request", b"a1")
    assert order.room_ahead(CHILD, 10, free_chunks=0, below=9.0) == 1


def test_what_nobody_asked_for_keeps_to_the_quotas_in_force_and_loses_nobody_anything(
    sessions: Sessions, order: ChunkOrder
) -> None:
    sessions.worths = {A: 1.0, B: 1.0, OTHERS: 9.0}
    brought(order, A, "a", 4, Quota(0.3, 0.5, 0.4), free=10)
    assert order.room_ahead(B, 9, free_chunks=6, below=9.0) == 1  # its tenant's cap
    assert order.room_ahead(A, 9, free_chunks=6, below=9.0) == 0  # the session's
    assert order.room_ahead(OTHERS, 9, free_chunks=6, below=9.0) == 7  # A's tenant has a share
    assert not any(order.quotas.is_lost(session, 9 * 32) for session in (A, B, OTHERS))


def test_of_a_session_alone_is_what_nobody_shares_copies_or_waits_for(order: ChunkOrder) -> None:
    stored(order, A, "a", 5)
    order.used(B, {b"a0": 32})
    order.held(b"a3")
    order.await_for("request", b"a4")
    assert order.alone(A) == [b"a1", b"a2"]
    assert order.end_of(A) == 5 * 32
    assert (order.alone(CHILD), order.end_of(CHILD)) == ([], 0)


def test_who_is_wanted_leaves_last_at_once(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 1.0, B: 2.0}
    stored(order, A, "a", 2)
    stored(order, B, "b", 2)
    sessions.now += 10.0
    assert order.pick(1, ()) == (b"a1",)
    order.wanted(A)
    order.wanted(CHILD)
    assert order.pick(3, ()) == (b"b1", b"b0", b"a0")
