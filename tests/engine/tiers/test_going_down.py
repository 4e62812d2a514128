"""A session that is sent down comes back from the tier that it was sent to, and from no other; nothing is lost."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.engine.protocol import TurnEnd
from tests.engine.in_process import BLOCK, EngineInProcess, words
from tests.engine.tiers.test_disk_in_process import empty_all_but_the_disk, run, store, tiers

BLOCKS = 5
PROMPT = words(3, BLOCKS * BLOCK + 5)
OTHERS = words(4, BLOCKS * BLOCK + 5)
STAYS_S = 600.0  # of a lease
NUMBERS = itertools.count()


@pytest.fixture
def engine(on_disk: tuple[EngineInProcess, Path]) -> Iterator[EngineInProcess]:
    """The engine, with two sessions that have run."""
    engine = on_disk[0]
    for session, prompt in (("ana", PROMPT), ("ben", OTHERS)):
        engine.submit(prompt, session=session, max_tokens=2, idle_timeout_s=STAYS_S)
        run(engine)
    yield engine
    engine.cancel_all()
    run(engine)
    engine.report(release=["ana", "ben", "child"])
    empty_all_but_the_disk(engine)


def found(engine: EngineInProcess, prompt: list[int], session: str) -> tuple[int, int, int]:
    """How many blocks the session's next turn finds on the device, in DRAM and on the disk."""
    turn = f"turn-{next(NUMBERS)}"
    engine.submit(prompt, session=session, max_tokens=2, turn=turn, idle_timeout_s=STAYS_S)
    run(engine)
    account = engine.ended(TurnEnd(session, "tenant", turn, "tool_use", 2, STAYS_S, returns_soon=False))
    assert account is not None
    return account.device_tokens // BLOCK, account.dram_tokens // BLOCK, account.disk_tokens // BLOCK


def test_it_comes_back_from_dram_and_others_stay(engine: EngineInProcess) -> None:
    assert engine.demote("dram", "ana") == {"ana"}
    assert found(engine, OTHERS, "ben") == (BLOCKS, 0, 0)
    assert found(engine, PROMPT, "ana") == (0, BLOCKS, 0)
    assert found(engine, PROMPT, "ana") == (BLOCKS, 0, 0)
    engine.assert_references_add_up()


def test_it_comes_back_from_the_disk_though_it_was_expected(engine: EngineInProcess) -> None:
    assert engine.demote("disk", "ana") == {"ana"}
    assert tiers(engine)._chunks.order.keys_of(("tenant", "ana")) == ()
    engine.assert_nobody_s_rows_are_empty()
    for _ in range(50):  # what is read ahead would be now
        engine.clock.advance(0.1)
        engine.tick()
        run(engine)
    assert found(engine, OTHERS, "ben") == (BLOCKS, 0, 0)
    assert found(engine, PROMPT, "ana") == (0, 0, BLOCKS)


def test_what_no_lease_holds_leaves_the_device_too(engine: EngineInProcess) -> None:
    engine.connector.release_all()
    assert engine.demote("dram", "ana") == {"ana"}
    assert found(engine, PROMPT, "ana") == (0, BLOCKS, 0)


def test_what_the_tier_does_not_have_stays(engine: EngineInProcess) -> None:
    store(engine).drop_labelled({"ana"})
    assert engine.demote("disk", "ana", "ben", "nobody") == {"ben"}
    assert found(engine, PROMPT, "ana") == (BLOCKS, 0, 0)
    assert found(engine, OTHERS, "ben") == (0, 0, BLOCKS)


def test_who_runs_stays(engine: EngineInProcess) -> None:
    name = engine.submit(PROMPT, session="ana", max_tokens=8)
    engine.step(2)
    assert engine.demote("disk", "ana") == set()
    run(engine)
    assert engine.answers[name].cached_tokens == BLOCKS * BLOCK


def test_what_another_session_has_too_stays_with_it(engine: EngineInProcess) -> None:
    engine.submit(PROMPT, session="child", max_tokens=2, idle_timeout_s=STAYS_S)
    run(engine)
    assert engine.demote("disk", "ana") == {"ana"}
    assert found(engine, PROMPT, "child") == (BLOCKS, 0, 0)


def test_what_another_session_of_the_tenant_stored_is_on_the_disk_for_all_of_them(engine: EngineInProcess) -> None:
    shared = [*PROMPT[: 2 * BLOCK], *words(9, 3 * BLOCK + 5)]
    engine.submit(shared, session="child", max_tokens=2, idle_timeout_s=STAYS_S)
    run(engine)
    assert engine.demote("disk", "ana", "child") == {"ana", "child"}
    assert engine.demote("disk", "child") == {"child"}
    assert found(engine, shared, "child") == (0, 2, BLOCKS - 2)  # what both have stays in DRAM with the other
