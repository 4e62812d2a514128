"""What a session diverged from on the disk: it goes first, counts for nobody, and comes back when it is asked for."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.engine.inside.disk.files import ChunkName, Owner
from appliance.engine.inside.disk.index import DiskIndex
from appliance.engine.inside.disk.jobs import Piece
from appliance.engine.inside.disk.store import Presence
from appliance.engine.inside.quotas import Quota
from tests.unit.inside.disk.tier import ANA, BEN, EVE, Tier, chunk_key, content

TOKENS = 32  # of a chunk


def key(owner: Owner, branch: str, place: int) -> bytes:
    return f"{owner.session} {branch} {place}".encode()


def branch(owner: Owner, name: str, places: Iterable[int]) -> dict[bytes, int]:
    """Chunks of one branch of a session's tokens, and the token that each ends at."""
    return {key(owner, name, place): (place + 1) * TOKENS for place in places}


def index_of(capacity: int, **sessions: dict[bytes, int]) -> DiskIndex:
    index = DiskIndex(capacity, 3600.0)
    owners = {owner.session: owner for owner in (ANA, BEN, EVE)}
    for session, chunks in sessions.items():
        for name, end in chunks.items():
            index.found(ChunkName(owners[session], name, end, b"copy"), 0.0)
    return index


def make_way(index: DiskIndex, owner: Owner, chunks: int, quota: Quota | None = None) -> list[bytes]:
    worth = {ANA: 9.0, BEN: 1.0, EVE: 5.0}
    ends = [(place + 1) * TOKENS for place in range(chunks)]
    held = index.used(owner, 1.0)
    fits, gone = index.make_way(held, ends, quota or Quota(), worth.__getitem__)
    assert fits == chunks
    return [name.key for name in gone]


def positions(index: DiskIndex, owner: Owner) -> set[bytes]:
    held = index.session(owner)
    return set() if held is None else set(held.chunks)


HEAD = branch(ANA, "head", range(2))
OLD = branch(ANA, "old", range(2, 5))
NEW = branch(ANA, "new", range(2, 4))
IDLE = branch(BEN, "head", range(4))


def test_what_a_session_diverged_from_goes_before_another_sessions_that_is_worth_less() -> None:
    index = index_of(9, ana=HEAD | OLD, ben=IDLE)
    index.reached(ANA, HEAD | NEW)
    assert positions(index, ANA) == set(HEAD)
    assert make_way(index, EVE, 3) == list(OLD)
    assert positions(index, BEN) == set(IDLE)
    assert len(index) == 6


def test_a_request_that_is_a_beginning_of_what_there_is_abandons_nothing() -> None:
    index = index_of(9, ana=HEAD | OLD, ben=IDLE)
    index.reached(ANA, HEAD)
    index.reached(ANA, {})
    assert positions(index, ANA) == set(HEAD | OLD)
    assert set(make_way(index, EVE, 1)) < set(IDLE)


def test_what_is_asked_for_again_is_the_sessions_as_before() -> None:
    index = index_of(9, ana=HEAD | OLD, ben=IDLE)
    index.reached(ANA, HEAD | NEW)
    index.reached(ANA, HEAD | OLD)
    assert positions(index, ANA) == set(HEAD | OLD)
    assert index.chunks_of_tenant(ANA.tenant) == 9
    assert set(make_way(index, EVE, 1)) < set(IDLE)


def test_what_was_diverged_from_counts_for_no_share_and_no_cap() -> None:
    index = index_of(9, ana=HEAD | OLD, ben=IDLE)
    index.quotas.in_force(ANA.tenant, Quota(tenant_share=1.0))
    index.reached(ANA, HEAD | NEW)
    assert index.chunks_of_tenant(ANA.tenant) == 6
    assert make_way(index, EVE, 3) == list(OLD)
    index = index_of(20, ana=HEAD | OLD, ben=IDLE)
    index.reached(ANA, HEAD | NEW)
    assert make_way(index, ANA, 4, Quota(tenant_cap=0.5, session_cap=0.3)) == []


def test_while_something_of_the_session_is_read_nothing_of_it_goes() -> None:
    index = index_of(9, ana=HEAD | OLD, ben=IDLE)
    index.reached(ANA, HEAD | NEW)
    index.used(ANA, 1.0).loading += 1
    assert set(make_way(index, EVE, 1)) < set(IDLE)


def test_a_session_that_brings_in_what_its_own_branch_leaves_for_is_known_all_along() -> None:
    index = index_of(3, ana=OLD)
    index.reached(ANA, HEAD | NEW)
    held, fresh = index.used(ANA, 1.0), branch(ANA, "fresh", range(3))
    fits, gone = index.make_way(held, list(fresh.values()), Quota(), lambda _: 0.0)
    assert (fits, {name.key for name in gone}) == (3, set(OLD))
    for name, end in fresh.items():
        index.begin(held, name)
        assert index.ended(held, ChunkName(ANA, name, end, b"copy"), written=True)
    assert positions(index, ANA) == set(fresh)
    assert {name.key for name in index.drop(ANA)} == set(fresh)


def test_a_session_that_is_dropped_takes_with_it_what_it_diverged_from() -> None:
    index = index_of(9, ana=HEAD | OLD)
    index.reached(ANA, HEAD | NEW)
    assert {name.key for name in index.drop(ANA)} == set(HEAD | OLD)
    assert (len(index), index.sessions, index.chunks_of_tenant(ANA.tenant)) == (0, 0, 0)
    assert make_way(index, EVE, 9) == []


def test_a_chunk_that_could_not_be_read_is_forgotten_wherever_it_stands() -> None:
    index = index_of(9, ana=OLD)
    index.reached(ANA, HEAD | NEW)
    assert all(index.remove(ChunkName(ANA, name, end, b"copy")) for name, end in OLD.items())
    assert (len(index), index.sessions) == (0, 0)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Tier]]:
    made: list[Tier] = []

    def tier(**arguments: Any) -> Tier:
        for earlier in made:
            earlier.store.close()
        made.clear()
        made.append(Tier(tmp_path / "tier", **arguments))
        return made[0]

    yield tier
    for tier_ in made:
        tier_.store.close()


def test_the_tier_reads_ahead_nothing_that_was_diverged_from_and_gives_it_to_who_asks(
    make: Callable[..., Tier],
) -> None:
    tier = make(chunks=10, worth={ANA: 9.0, BEN: 1.0, EVE: 5.0}.__getitem__)
    tier.write(ANA, range(6))
    tier.write(BEN, range(4))
    kept = {chunk_key(ANA, number): number for number in (0, 1)} | {b"another branch": 5}
    tier.store.reached(ANA, kept)
    assert list(tier.store.positions_of(ANA).values()) == [0, 1]
    assert tier.store.chunks_of(ANA) == 2
    assert tier.store.find(chunk_key(ANA, 2), ANA.tenant) is Presence.HERE
    assert tier.read(ANA, [2]) == [2]
    assert list(tier.store.positions_of(ANA).values()) == [0, 1, 2]
    tier.write(EVE, range(3))
    assert tier.read(BEN, range(4)) == [0, 1, 2, 3]
    assert tier.read(ANA, range(6)) == [0, 1, 2]
    tier.settle()


def test_what_another_session_of_the_tenant_computes_again_is_not_the_first_to_leave(
    make: Callable[..., Tier],
) -> None:
    tier = make()
    tier.write(ANA, range(4))
    tier.store.reached(ANA, {chunk_key(ANA, 0): 0, b"another branch": 3})
    shared = chunk_key(ANA, 1)
    tier.store.store(99, BEN, [Piece(shared, 1, memoryview(content(shared)))])
    assert tier.wait(99).whole
    assert list(tier.store.positions_of(ANA).values()) == [0, 1]


def test_a_start_does_not_know_and_the_sessions_next_request_tells(make: Callable[..., Tier]) -> None:
    tier = make()
    tier.write(ANA, range(4))
    kept = {chunk_key(ANA, 0): 0, b"another branch": 3}
    tier.store.reached(ANA, kept)
    tier = make()
    assert tier.store.chunks_of(ANA) == 4
    tier.store.reached(ANA, kept)
    assert tier.store.chunks_of(ANA) == 1
