"""Rows that somebody moved or changed in the database are refused, and named."""

import pytest
from sqlalchemy import Connection, select, update

from appliance.store import tables
from appliance.vault import TamperedValue
from tests.unit.sessions.making import HELLO, SYSTEM, World, caller, chat, outcome, say

pytestmark = pytest.mark.anyio


async def test_a_turn_moved_to_another_place_is_refused_and_named(world: World) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    turns = tables.turns
    row = (await world.store.read(lambda db: db.execute(select(turns)).mappings().one()))["turn_id"]
    await world.store.transact(lambda db: db.execute(update(turns).values(turn_id="trn_elsewhere")))
    with pytest.raises(TamperedValue, match="trn_elsewhere"):
        await world.sessions.transcript(caller(), mine.session_id)
    await world.store.transact(lambda db: db.execute(update(turns).values(turn_id=row)))
    assert (await world.sessions.transcript(caller(), mine.session_id)).turns


@pytest.mark.parametrize("client_id", [None, "job-7"])
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_session_cannot_be_given_to_another_principal_in_the_database(
    world: World, client_id: str | None, restarted: bool
) -> None:
    turn = chat(HELLO, client_id=client_id)
    session = await say(world.sessions, caller(), turn, "Hello.", response="chatcmpl-7")
    thief = caller("prn_2")
    await world.store.transact(lambda db: db.execute(update(tables.sessions).values(principal_id="prn_2")))
    sessions = world.reopened() if restarted else world.sessions
    for asked in (
        sessions.transcript(thief, session.session_id),
        sessions.summary(thief, session.session_id),
        sessions.summaries(thief),
        sessions.forget(thief, session.session_id),
        sessions.resolve(thief, chat(HELLO, previous_response_id="chatcmpl-7")),
    ):
        with pytest.raises(TamperedValue, match=session.session_id):
            await asked


async def test_a_session_cannot_be_put_into_another_tree_in_the_database(world: World) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO, client_id="mine"), "Hello.")
    await say(world.sessions, caller("prn_2"), chat(HELLO, client_id="theirs"), "Hello.")
    sessions = tables.sessions
    trees = select(sessions.c.tree_id).where(sessions.c.principal_id == "prn_2")

    def move(db: Connection) -> None:
        tree_id = db.execute(trees).scalar_one()
        db.execute(update(sessions).where(sessions.c.principal_id == "prn_1").values(tree_id=tree_id))

    await world.store.transact(move)
    with pytest.raises(TamperedValue, match=mine.session_id):
        await world.reopened().resolve(caller(), chat(HELLO, client_id="mine"))


async def test_a_turn_cannot_be_moved_to_another_session_to_be_read_there(world: World) -> None:
    await say(world.sessions, caller(), chat(HELLO), "Hello.")
    theirs = await world.sessions.resolve(caller("prn_2"), chat(HELLO))
    await world.sessions.record(theirs, chat(HELLO), outcome("Hello."))
    turns = tables.turns
    moved = update(turns).where(turns.c.session_id != theirs.session_id).values(session_id=theirs.session_id, number=2)
    await world.store.transact(lambda db: db.execute(moved))
    with pytest.raises(TamperedValue, match="trn_"):
        await world.sessions.transcript(caller("prn_2"), theirs.session_id)


async def test_a_history_cannot_be_made_to_lead_to_another_principals_session(world: World) -> None:
    theirs = await say(world.sessions, caller("prn_2"), chat(SYSTEM), "No.")
    await say(world.sessions, caller(), chat(HELLO), "Hello.")
    chain = tables.chain
    await world.store.transact(lambda db: db.execute(update(chain).values(session_id=theirs.session_id)))
    answer = {"role": "assistant", "content": "Hello."}
    found = await world.reopened().resolve(caller(), chat(HELLO, answer, HELLO))
    assert found.salt != theirs.salt
