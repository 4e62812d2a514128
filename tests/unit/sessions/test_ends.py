"""The end of a session, and of its tree."""

import asyncio
import dataclasses

import pytest

from appliance.sessions import (
    Account,
    Sessions,
    Turn,
    UnknownSession,
)
from tests.unit.sessions.making import HELLO, World, caller, chat, end, family, outcome, say

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("restarted", [False, True])
async def test_the_end_of_a_tree_s_first_session_is_that_of_its_agents_and_of_nobody_else(
    world: World, restarted: bool
) -> None:
    parent, one, two, _ = await family(world)
    sessions = world.reopened() if restarted else world.sessions
    assert await end(sessions, caller(), "agent-1") == {one.session_id}
    ending = await sessions.ending(caller(), parent.session_id)
    assert set(ending.session_ids) == {parent.session_id, two.session_id}
    assert set(ending.lease_labels) == {each.lease_label for each in (parent, one, two)}
    await sessions.end(ending)
    assert await end(sessions, caller(), "job") == set()


async def test_an_agent_whose_parent_was_forgotten_ends_itself_alone(world: World) -> None:
    parent, one, _, _ = await family(world)
    await world.sessions.forget(caller(), parent.session_id)
    for sessions in (world.sessions, world.reopened()):
        assert set((await sessions.ending(caller(), "agent-1")).session_ids) == {one.session_id}


def computed(account: Account) -> set[str]:
    return {cause.value for cause in account.computed}


async def goes_on(sessions: Sessions, turn: Turn, started_at: float, ended_at: float, *, last: bool = False) -> Account:
    session = await sessions.resolve(caller(), turn)
    ids = (list(range(20)), [20])
    said = dataclasses.replace(outcome("x", ids=ids), started_at=started_at, ended_at=ended_at)
    return await sessions.record(session, turn, said, engine="one", last=last)


@pytest.mark.parametrize("refused_between", [False, True])
@pytest.mark.parametrize("how", ["with the last call", "deleted"])
async def test_what_was_let_go_at_a_session_s_end_is_laid_to_that_once(
    world: World, how: str, refused_between: bool
) -> None:
    turn = chat(HELLO, client_id="job")
    world.clock = 3.0
    await goes_on(world.sessions, turn, 1.0, 3.0, last=how == "with the last call")
    if how == "deleted":
        await end(world.sessions, caller(), "job")
    if refused_between:
        await world.sessions.resolve(caller(), turn)
    assert "ended" in computed(await goes_on(world.sessions, turn, 4.0, 5.0))
    assert "ended" not in computed(await goes_on(world.sessions, turn, 6.0, 7.0))


async def test_that_a_session_is_over_is_known_after_a_restart(world: World) -> None:
    turn = chat(HELLO, client_id="job")
    await goes_on(world.sessions, turn, 1.0, 2.0, last=True)
    sessions = world.reopened()
    assert await end(sessions, caller(), "job") == set()
    session = await sessions.resolve(caller(), turn)
    await sessions.record(session, turn, dataclasses.replace(outcome("x"), started_at=3.0, ended_at=4.0))
    assert await end(world.reopened(), caller(), "job") == {session.session_id}


async def test_a_turn_that_runs_while_its_session_ends_lets_go_and_one_that_begins_later_does_not(world: World) -> None:
    turn = chat(HELLO, client_id="job")
    first = await say(world.sessions, caller(), turn, "Hello.")
    assert not first.was_ended()
    world.clock -= 1000.0  # somebody sets it
    await end(world.sessions, caller(), "job")
    assert first.was_ended()
    assert await end(world.sessions, caller(), "job") == set()
    second = await world.sessions.resolve(caller(), turn)
    assert not second.was_ended()
    await world.sessions.record(second, turn, outcome("x"))
    assert await end(world.sessions, caller(), "job") == {first.session_id}


async def test_what_ends_a_session_while_its_turn_is_written_down_stands(world: World) -> None:
    turn = chat(HELLO, client_id="job")
    first = await say(world.sessions, caller(), turn, "Hello.")
    running = await world.sessions.resolve(caller(), turn)
    writing = asyncio.create_task(world.sessions.record(running, turn, outcome("x")))
    await asyncio.sleep(0)
    assert await end(world.sessions, caller(), "job") == {first.session_id}
    await writing
    assert running.was_ended()
    for sessions in (world.sessions, world.reopened()):
        assert await end(sessions, caller(), "job") == set()


async def test_nobody_ends_a_strangers_session(world: World) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO, client_id="job"), "Hello.")
    for stranger in (caller("prn_2"), caller("prn_1", "ten_2")):
        for name in ("job", mine.session_id, "ses_" + "0" * 32):
            with pytest.raises(UnknownSession):
                await world.sessions.ending(stranger, name)
