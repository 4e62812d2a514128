"""Keys of the engine's tiers, and labels of sessions that are gone."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from api.tier_keys import key_of
from appliance.engine.tier_keys import SessionGone
from appliance.sessions import (
    UnknownSession,
)
from appliance.sessions.labels import LabelNotKnown
from appliance.store import Change, DatabaseKeys
from appliance.vault import KeyMissing, RootKey, Vault, VaultSealed
from tests.unit.sessions.making import HELLO, World, caller, chat, outcome, say

pytestmark = pytest.mark.anyio


async def nobody() -> tuple[str, ...]:
    """The labels of strict tenants."""
    return ()


async def test_the_engine_gets_a_tiers_key_in_the_first_turn_already_and_the_same_ever_after(world: World) -> None:
    turn = chat(HELLO)
    session = await world.sessions.resolve(caller(), turn)
    key = await world.sessions.tier_key(session.tenant_label, session.lease_label)
    await world.sessions.record(session, turn, outcome("Hello."))
    assert await world.sessions.tier_key(session.tenant_label, session.lease_label) == key
    world.vault.seal()
    world.vault.open(RootKey(b"r" * 32))
    assert await world.reopened().tier_key(session.tenant_label, session.lease_label) == key


async def test_engines_that_ask_for_many_keys_at_once_after_a_start_get_them_all(world: World) -> None:
    said = [await say(world.sessions, caller(), chat(HELLO, client_id=f"s{n}"), "Hi", f"r{n}") for n in range(5)]
    anew = world.reopened()
    keys = await asyncio.gather(*(anew.tier_key(one.tenant_label, one.lease_label) for one in said))
    assert len(set(keys)) == len({one.session_id for one in said})


async def test_a_session_that_was_forgotten_has_no_tiers_key(world: World) -> None:
    session = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    await world.sessions.forget(caller(), session.session_id)
    for sessions in (world.sessions, world.reopened()):
        with pytest.raises((UnknownSession, KeyMissing)):
            await sessions.tier_key(session.tenant_label, session.lease_label)


async def test_among_more_sessions_than_are_remembered_those_that_are_there_are_told_from_those_that_are_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.sessions.labels._KNOWN_LABELS", 4)
    said = [await say(world.sessions, caller(), chat(HELLO, client_id=f"s{n}"), "Hi", f"r{n}") for n in range(7)]
    await world.sessions.forget(caller(), said[2].session_id)
    answer = key_of(world.reopened(), nobody)
    asked = (answer(one.tenant_label, one.lease_label) for one in said[:4])
    told = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(each) for each in told] == [bytes, bytes, SessionGone, bytes]


async def test_a_look_that_takes_too_long_calls_nobody_gone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.sessions.labels._KNOWN_LABELS", 4)
    monkeypatch.setattr("appliance.sessions.labels._DEADLINE_S", -1.0)
    said = [await say(world.sessions, caller(), chat(HELLO, client_id=f"s{n}"), "Hi", f"r{n}") for n in range(3)]
    anew = world.reopened()
    answers = [
        await asyncio.gather(key_of(anew, nobody)(one.tenant_label, one.lease_label), return_exceptions=True)
        for one in said
    ]
    kinds = sorted(type(answer).__name__ for (answer,) in answers)
    assert kinds == ["LabelNotKnown", "bytes", "bytes"]


async def test_who_asks_for_a_label_again_at_once_is_not_told_that_it_is_gone(world: World) -> None:
    answer = key_of(world.reopened(), nobody)
    with pytest.raises(SessionGone):
        await answer("of-nobody", "and-nothing")  # everything was looked through
    elsewhere = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    with pytest.raises(LabelNotKnown):
        await answer(elsewhere.tenant_label, elsewhere.lease_label)


async def test_all_that_are_asked_for_together_after_a_start_are_told_that_they_are_gone(world: World) -> None:
    said = [await say(world.sessions, caller(), chat(HELLO, client_id=f"s{n}"), "Hi", f"r{n}") for n in range(6)]
    for session in said[:5]:
        await world.sessions.forget(caller(), session.session_id)
    answer = key_of(world.reopened(), nobody)
    asked = (answer(one.tenant_label, one.lease_label) for one in said)
    told = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(each) for each in told] == [SessionGone] * 5 + [bytes]


async def test_a_vault_that_was_sealed_when_the_engine_asked_makes_no_session_gone(world: World) -> None:
    session = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    answer = key_of(world.reopened(), nobody)
    world.vault.seal()
    with pytest.raises(VaultSealed):
        await answer(session.tenant_label, session.lease_label)
    world.vault.open(RootKey(b"r" * 32))
    with pytest.raises(LabelNotKnown):
        await answer(session.tenant_label, session.lease_label)


async def test_no_tenants_key_comes_by_another_tenants_label(world: World) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    theirs = await say(world.sessions, caller("prn_2", "ten_2"), chat(HELLO), "Hello.", "chatcmpl-2")
    with pytest.raises(UnknownSession):
        await world.sessions.tier_key(theirs.tenant_label, mine.lease_label)


async def test_a_session_s_first_turn_after_a_restart_waits_for_no_write_in_the_event_loop(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = chat(HELLO, client_id="job-7")
    await say(world.sessions, caller(), turn, "Hello.")
    world.vault = Vault(DatabaseKeys(world.store))
    world.vault.open(RootKey(b"r" * 32))
    sessions, threads = world.reopened(), []
    write_blocking = world.store.write_blocking

    def watched(changes: Sequence[Change]) -> None:
        threads.append(threading.current_thread())
        write_blocking(changes)

    monkeypatch.setattr(world.store, "write_blocking", watched)
    await say(sessions, caller(), turn, "Again.", response="chatcmpl-2")
    await say(sessions, caller(), turn, "And again.", response="chatcmpl-3")
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()
