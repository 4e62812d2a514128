"""A session that is forgotten is gone for good, whatever happens meanwhile."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, delete, select

from appliance.sessions import (
    SessionForgotten,
    UnknownSession,
)
from appliance.store import DatabaseKeys, Erasures, StoreUnavailable, tables
from appliance.vault import Binding, KeyMissing, KeyPurpose
from tests.unit.sessions.making import HELLO, World, caller, chat, family, outcome, say

pytestmark = pytest.mark.anyio


async def test_a_forgotten_session_is_gone_from_the_files_and_its_salt_is_never_used_again(world: World) -> None:
    turn = chat(HELLO, client_id="job-7")
    mine = await say(world.sessions, caller(), turn, "Hello.")
    key = DatabaseKeys(world.store).active(mine.session_id, KeyPurpose.SESSION)
    assert key is not None
    branch_turn = chat(
        HELLO, {"role": "assistant", "content": "Hello."}, HELLO, client_id="child", parent_client_id="job-7"
    )
    branch = await world.sessions.resolve(caller(), branch_turn)
    assert branch.salt == mine.salt
    await world.sessions.record(branch, branch_turn, outcome("x"))
    assert key.wrapped in world.files()

    assert (await world.sessions.forget(caller(), mine.session_id)).erased

    assert key.wrapped not in world.files()
    with pytest.raises(UnknownSession):
        await world.sessions.transcript(caller(), mine.session_id)
    for sessions in (world.sessions, world.reopened()):
        assert (await sessions.resolve(caller(), turn)).salt != mine.salt
        assert (await sessions.resolve(caller(), branch_turn)).salt != mine.salt
    with pytest.raises(KeyMissing):
        world.vault.encrypt(mine.session_id, KeyPurpose.SESSION, b"", Binding("t", "c", "r", "ten_1", 1))


class Stopped(BaseException):
    """The process ends here."""


async def forgotten_but_not_erased(world: World, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> bytes:
    """Forget a session, and fail where its key is to be erased; the wrapped key."""
    mine = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    key = DatabaseKeys(world.store).active(mine.session_id, KeyPurpose.SESSION)
    assert key is not None

    async def fail(**_: bool) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(world.store, "erase", fail)
        if isinstance(error, Stopped):
            with pytest.raises(Stopped):
                await world.sessions.forget(caller(), mine.session_id)
        else:
            assert not (await world.sessions.forget(caller(), mine.session_id)).erased
    with pytest.raises(UnknownSession):
        await world.reopened().forget(caller(), mine.session_id)
    assert key.wrapped in world.files()
    return key.wrapped


async def until_nothing_is_due(world: World) -> None:
    async with asyncio.timeout(30):
        while await world.store.read(lambda db: db.execute(select(tables.meta)).first()) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.parametrize("error", [Stopped(), StoreUnavailable("x", cause="", remedy="")], ids=["stopped", "failed"])
async def test_what_was_forgotten_and_not_erased_is_erased_at_the_next_start(
    world: World, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    wrapped = await forgotten_but_not_erased(world, monkeypatch, error)
    erasing = asyncio.create_task(Erasures(world.store).run())
    await until_nothing_is_due(world)
    erasing.cancel()
    assert wrapped not in world.files()


async def test_an_erasure_that_failed_is_tried_again_with_growing_pauses(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    erase = world.store.erase

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 12:
            monkeypatch.setattr(world.store, "erase", erase)

    async def fail(**_: bool) -> None:
        raise StoreUnavailable("x", cause="", remedy="")

    erasing = asyncio.create_task(world.store.erasures.run(sleep))
    await asyncio.sleep(0)
    mine = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    key = DatabaseKeys(world.store).active(mine.session_id, KeyPurpose.SESSION)
    assert key is not None
    monkeypatch.setattr(world.store, "erase", fail)
    assert not (await world.sessions.forget(caller(), mine.session_id)).erased
    await until_nothing_is_due(world)
    erasing.cancel()
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]
    assert key.wrapped not in world.files()


async def test_a_turn_that_ends_after_its_session_was_forgotten_is_not_written(world: World) -> None:
    turn = chat(HELLO, client_id="job-7")
    await say(world.sessions, caller(), turn, "Hello.")
    running = await world.sessions.resolve(caller(), turn)
    assert not running.was_ended()
    await world.sessions.forget(caller(), running.session_id)
    assert running.was_ended(), "what the engine computes for it meanwhile is let go of when it ends"
    with pytest.raises(SessionForgotten):
        await world.sessions.record(running, turn, outcome("late"))
    assert await world.sessions.summaries(caller()) == []


def forgotten_after_the_next_read(world: World, monkeypatch: pytest.MonkeyPatch, session_id: str) -> None:
    """Have a session go when its row was read and not opened yet."""
    read, seen = world.store.read, itertools.count(1)

    async def read_and_be_late(query: Callable[[Connection], Any]) -> Any:
        found = await read(query)
        if next(seen) == 1:
            await world.sessions.forget(caller(), session_id)
        return found

    monkeypatch.setattr(world.store, "read", read_and_be_late)


async def test_a_session_that_goes_while_all_are_listed_is_left_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, one, two, other = await family(world)
    forgotten_after_the_next_read(world, monkeypatch, one.session_id)
    left = await world.sessions.summaries(caller())
    assert {each.session_id for each in left} == {parent.session_id, two.session_id, other.session_id}


async def test_a_session_that_goes_while_its_tree_is_ended_is_left_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, one, two, _ = await family(world)
    forgotten_after_the_next_read(world, monkeypatch, one.session_id)
    ending = await world.sessions.ending(caller(), "job")
    assert set(ending.session_ids) == {parent.session_id, two.session_id}


@pytest.mark.parametrize("ask", ["summary", "transcript", "explanation", "forget"])
async def test_a_session_that_goes_while_it_is_asked_for_is_not_there(
    world: World, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    forgotten_after_the_next_read(world, monkeypatch, mine.session_id)
    with pytest.raises(UnknownSession):
        await getattr(world.sessions, ask)(caller(), mine.session_id)


async def test_a_session_that_is_there_and_whose_key_is_not_is_named(world: World) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    keys = tables.keys
    await world.store.transact(lambda db: db.execute(delete(keys).where(keys.c.scope == mine.session_id)))
    world.vault.forget(mine.session_id)
    with pytest.raises(KeyMissing, match=mine.session_id):
        await world.sessions.summaries(caller())
