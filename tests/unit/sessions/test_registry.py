"""Sessions over a real store and vault: recognised, isolated, and written down whole."""

import asyncio
import dataclasses
import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, insert

from appliance.identity import Caller, Isolation
from appliance.sessions import (
    Origin,
    Sessions,
    TurnState,
    UnknownResponse,
    registry,
)
from appliance.settings import SessionSettings
from appliance.store import Change, StoreConflict, StoreUnavailable, tables
from appliance.vault import RootKey, VaultSealed
from tests.unit.sessions.making import HELLO, SYSTEM, World, caller, chat, outcome, say

pytestmark = pytest.mark.anyio


async def test_a_client_that_resends_everything_is_recognised_by_it(world: World) -> None:
    first = await say(world.sessions, caller(), chat(SYSTEM, HELLO), "Hello.")
    answer = {"role": "assistant", "content": "Hello.", "refusal": None}
    second = await world.sessions.resolve(caller(), chat(SYSTEM, HELLO, answer, HELLO))
    assert second.session_id == first.session_id
    assert second.salt == first.salt


async def test_it_is_recognised_after_a_restart_too(world: World) -> None:
    first = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    answer = {"role": "assistant", "content": "Hello."}
    second = await world.reopened().resolve(caller(), chat(HELLO, answer, HELLO))
    assert (second.session_id, second.salt) == (first.session_id, first.salt)


async def test_a_second_continuation_of_one_point_is_a_branch_of_the_same_tree(world: World) -> None:
    first = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    answer = {"role": "assistant", "content": "Hello."}
    await say(world.sessions, caller(), chat(HELLO, answer, {"role": "user", "content": "left"}), "L")
    branch = await say(world.sessions, caller(), chat(HELLO, answer, {"role": "user", "content": "right"}), "R")
    assert branch.session_id != first.session_id
    assert branch.salt == first.salt
    assert branch.lease_label != first.lease_label


async def test_of_two_continuations_that_run_at_once_one_is_a_branch(world: World) -> None:
    first = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    answer = {"role": "assistant", "content": "Hello."}
    said = [[HELLO, answer, {"role": "user", "content": side}] for side in ("left", "right")]
    turns = [chat(*messages) for messages in said]
    sessions = await asyncio.gather(*(world.sessions.resolve(caller(), turn) for turn in turns))
    assert sorted(session.session_id == first.session_id for session in sessions) == [False, True]
    assert {session.salt for session in sessions} == {first.salt}
    for session, turn in zip(sessions, turns, strict=True):
        await world.sessions.record(session, turn, outcome("Done."))
    for session, messages in zip(sessions, said, strict=True):
        longer = chat(*messages, {"role": "assistant", "content": "Done."}, HELLO)
        assert (await world.sessions.resolve(caller(), longer)).session_id == session.session_id


async def test_a_continuation_that_was_given_up_is_in_nobodys_way(world: World) -> None:
    first = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    longer = chat(HELLO, {"role": "assistant", "content": "Hello."}, HELLO)
    given_up = await world.sessions.resolve(caller(), longer)
    assert given_up.session_id == first.session_id
    del given_up
    assert (await world.sessions.resolve(caller(), longer)).session_id == first.session_id


async def test_a_turn_that_is_over_unrecorded_is_in_nobodys_way_though_it_is_still_in_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    longer = chat(HELLO, {"role": "assistant", "content": "Hello."}, HELLO)
    failed = await world.sessions.resolve(caller(), longer)
    world.sessions.turn_over(failed)
    refused = await world.sessions.resolve(caller(), longer)
    assert refused.session_id == first.session_id
    world.sessions.turn_over(failed)
    assert (await world.sessions.resolve(caller(), longer)).session_id != first.session_id, "one of them goes on"

    async def fail(_: object) -> None:
        raise StoreUnavailable("x", cause="", remedy="")

    with monkeypatch.context() as patched:
        patched.setattr(world.store, "write", fail)
        with pytest.raises(StoreUnavailable):
            await world.sessions.record(refused, longer, outcome("Hello again."))
    assert (await world.sessions.resolve(caller(), longer)).session_id == first.session_id


@pytest.mark.parametrize("state", [TurnState.INTERRUPTED, TurnState.FAILED])
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_turn_that_was_broken_off_is_asked_again_in_its_session(
    state: TurnState, restarted: bool, world: World
) -> None:
    first = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    longer = chat(HELLO, {"role": "assistant", "content": "Hello."}, HELLO)
    for number in range(2):
        broken = await world.sessions.resolve(caller(), longer)
        assert broken.session_id == first.session_id
        await world.sessions.record(
            broken, longer, replace(outcome("Hel", response=f"chatcmpl-b{number}"), state=state)
        )
    del broken
    sessions = world.reopened() if restarted else world.sessions
    again = await sessions.resolve(caller(), longer)
    assert again.session_id == first.session_id
    await sessions.record(again, longer, outcome("Hello again.", response="chatcmpl-again"))
    branch = await sessions.resolve(caller(), longer)
    assert branch.session_id != first.session_id


@pytest.mark.parametrize("left_memory", ["restarted", "session", "links"])
async def test_the_longest_history_is_continued_though_another_session_of_its_opening_was_used_last(
    world: World, monkeypatch: pytest.MonkeyPatch, left_memory: str
) -> None:
    if left_memory == "session":
        monkeypatch.setattr(registry, "_LIVE_SESSIONS", 1)
    if left_memory == "links":
        monkeypatch.setattr(registry, "_KNOWN_LINKS", 1)
    opening = [HELLO, {"role": "assistant", "content": "Hello."}]
    task = [*opening, {"role": "user", "content": "task"}, {"role": "assistant", "content": "Done."}]
    first_id = (await say(world.sessions, caller(), chat(HELLO), "Hello.")).session_id  # and nothing that holds it
    await say(world.sessions, caller(), chat(*task[:-1]), "Done.", "chatcmpl-2")
    sessions = world.reopened() if left_memory == "restarted" else world.sessions
    other = await say(sessions, caller(), chat(HELLO), "Hello.", "chatcmpl-3")
    assert other.session_id != first_id
    longer = await say(sessions, caller(), chat(*task, {"role": "user", "content": "private"}), "x", "chatcmpl-4")
    assert longer.session_id == first_id
    assert (await sessions.resolve(caller(), chat(*opening, HELLO))).session_id == other.session_id
    assert len((await sessions.transcript(caller(), other.session_id)).turns) == 1


async def test_the_same_words_from_another_principal_are_another_session(world: World) -> None:
    first = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    answer = {"role": "assistant", "content": "Hello."}
    for other in (caller("prn_2"), caller("prn_1", "ten_2")):
        session = await world.sessions.resolve(other, chat(HELLO, answer, HELLO))
        assert session.session_id != first.session_id
        assert session.salt != first.salt


async def test_a_session_id_is_scoped_to_its_principal_and_an_unknown_one_begins_a_session(world: World) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO, client_id="job-7", origin=Origin.HEADER), "Hello.")
    again = await world.reopened().resolve(caller(), chat(SYSTEM, client_id="job-7", origin=Origin.HEADER))
    theirs = await world.sessions.resolve(caller("prn_1", "ten_2"), chat(HELLO, client_id="job-7"))
    unknown = await world.sessions.resolve(caller("prn_1", "ten_2"), chat(HELLO, client_id="job-8"))
    assert again.session_id == mine.session_id
    assert mine.visible_id == again.visible_id == theirs.visible_id == "job-7"
    assert theirs.session_id != mine.session_id
    assert theirs.salt != mine.salt
    assert unknown.session_id not in (mine.session_id, theirs.session_id)


async def test_a_child_agent_shares_its_parents_tree(world: World) -> None:
    parent = await world.sessions.resolve(caller(), chat(HELLO, client_id="parent"))
    child_turn = chat(HELLO, client_id="child", parent_client_id="parent")
    child = await world.sessions.resolve(caller(), child_turn)
    assert child.session_id != parent.session_id
    assert child.salt == parent.salt
    # The child may be done first.
    await world.sessions.record(child, child_turn, outcome("done"))
    await world.sessions.record(parent, chat(HELLO, client_id="parent"), outcome("done"))
    assert (await world.reopened().resolve(caller(), child_turn)).salt == parent.salt


async def test_two_first_turns_at_once_begin_one_session(world: World) -> None:
    turn = chat(HELLO, client_id="job-7")
    found = await asyncio.gather(*(world.sessions.resolve(caller(), turn) for _ in range(8)))
    assert len({session.session_id for session in found}) == 1
    await asyncio.gather(*(world.sessions.record(session, turn, outcome("ok")) for session in found))
    transcript = await world.sessions.transcript(caller(), found[0].session_id)
    assert [turn.number for turn in transcript.turns] == list(range(1, 9))


async def test_a_previous_response_finds_its_session_for_its_principal_only(world: World) -> None:
    first = await say(world.sessions, caller(), chat(HELLO), "Hello.", response="chatcmpl-7")
    again = await world.sessions.resolve(caller(), chat(HELLO, previous_response_id="chatcmpl-7"))
    assert again.session_id == first.session_id
    for who, response in ((caller("prn_2"), "chatcmpl-7"), (caller(), "chatcmpl-8")):
        with pytest.raises(UnknownResponse):
            await world.sessions.resolve(who, chat(HELLO, previous_response_id=response))


async def test_a_turn_that_could_not_be_written_leaves_no_trace_and_the_next_one_takes_its_number(world: World) -> None:
    turn = chat(HELLO, client_id="job-7")
    session = await world.sessions.resolve(caller(), turn)
    broken = [Change(insert(tables.meta), {"name": "x", "value": None})]
    with pytest.raises(StoreConflict, match=r"meta\.value"):
        await world.sessions.record(session, turn, outcome("lost"), broken)
    await world.sessions.record(session, turn, outcome("kept"))
    transcript = await world.sessions.transcript(caller(), session.session_id)
    assert [(turn.number, turn.answer["content"]) for turn in transcript.turns] == [(1, "kept")]


@pytest.mark.parametrize("first_turn", [False, True])
@pytest.mark.parametrize("left_memory", [False, True])
@pytest.mark.parametrize("error", [StoreUnavailable("x", cause="", remedy=""), asyncio.CancelledError()])
async def test_a_turn_that_was_written_though_nobody_was_told_is_followed_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch, first_turn: bool, left_memory: bool, error: BaseException
) -> None:
    sessions, write = world.sessions, world.store.write
    turn, longer = [chat(*[HELLO] * said, client_id="job") for said in (1, 2)]
    if not first_turn:
        await say(sessions, caller(), turn, "one", "chatcmpl-1")
    session = await sessions.resolve(caller(), longer)
    tier_key = await sessions.tier_key(session.tenant_label, session.lease_label)

    async def write_and_lose_the_answer(changes: Sequence[Change]) -> None:
        await write(changes)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(world.store, "write", write_and_lose_the_answer)
        with pytest.raises(type(error)):
            await sessions.record(session, longer, outcome("lost", response="chatcmpl-2"))
    assert await sessions.tier_key(session.tenant_label, session.lease_label) == tier_key
    if left_memory:
        del session
        monkeypatch.setattr(registry, "_LIVE_SESSIONS", 1)
        await sessions.resolve(caller(), chat(HELLO, client_id="another"))
        gc.collect()
    again = await say(sessions, caller(), longer, "kept", "chatcmpl-3")
    transcript = await sessions.transcript(caller(), again.session_id)
    assert [turn.answer["content"] for turn in transcript.turns] == [*([] if first_turn else ["one"]), "lost", "kept"]
    assert [turn.number for turn in transcript.turns] == list(range(1, again._live.turns + 1))


async def test_a_client_s_session_whose_first_turn_runs_is_found_however_many_begin_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_LIVE_SESSIONS", 4)
    turn = chat(HELLO, client_id="long")
    first = await world.sessions.resolve(caller(), turn)
    for number in range(20):
        await world.sessions.resolve(caller(), chat(HELLO, client_id=f"job-{number}"))
    second = await world.sessions.resolve(caller(), turn)
    assert second.session_id == first.session_id
    for session in (first, second):
        await world.sessions.record(session, turn, outcome("done"))


async def test_a_client_s_session_that_another_gateway_began_meanwhile_is_gone_on_with(world: World) -> None:
    turn = chat(HELLO, client_id="job")
    mine = await world.sessions.resolve(caller(), turn)
    theirs = await say(world.reopened(), caller(), turn, "theirs", "chatcmpl-1")
    with pytest.raises(StoreConflict):
        await world.sessions.record(mine, turn, outcome("mine"))
    again = await say(world.sessions, caller(), turn, "again", "chatcmpl-2")
    assert again.session_id == theirs.session_id
    transcript = await world.sessions.transcript(caller(), theirs.session_id)
    assert [turn.answer["content"] for turn in transcript.turns] == ["theirs", "again"]


async def test_what_the_engine_has_of_a_first_turn_that_was_not_written_is_let_go_of(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = chat(HELLO, client_id="job-7")
    session = await world.sessions.resolve(caller(), turn)
    key = await world.sessions.tier_key(session.tenant_label, session.lease_label)

    async def full(_: object) -> None:
        raise StoreUnavailable("x", cause="", remedy="")

    with monkeypatch.context() as patched:
        patched.setattr(world.store, "write", full)
        with pytest.raises(StoreUnavailable):
            await world.sessions.record(session, turn, outcome("x"))
    assert session.was_ended(), "its tier files are under a key that is no more"
    again = await say(world.sessions, caller(), turn, "x")
    assert not again.was_ended()
    assert again.session_id == session.session_id
    assert await world.sessions.tier_key(session.tenant_label, session.lease_label) != key


async def test_a_child_joins_the_tree_of_a_parent_whose_first_turn_was_not_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = chat(HELLO, client_id="parent")

    async def fail(_: object) -> None:
        raise StoreUnavailable("x", cause="", remedy="")

    with monkeypatch.context() as patched:
        patched.setattr(world.store, "write", fail)
        with pytest.raises(StoreUnavailable):
            await say(world.sessions, caller(), turn, "Hello.")
    child = await world.sessions.resolve(caller(), chat(HELLO, client_id="child", parent_client_id="parent"))
    assert child.salt == (await say(world.sessions, caller(), turn, "Hello.")).salt


async def test_a_first_turn_is_kept_however_many_sessions_begin_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.vault.vault._CACHED_KEYS", 8)
    turn = chat(HELLO, client_id="long")
    session = await world.sessions.resolve(caller(), turn)
    for number in range(20):
        await world.sessions.resolve(caller(), chat(HELLO, client_id=f"job-{number}"))
    await world.sessions.record(session, turn, outcome("done"))
    assert (await world.sessions.transcript(caller(), session.session_id)).turns[0].answer["content"] == "done"


async def test_a_first_turn_is_kept_when_the_vault_was_sealed_and_opened_meanwhile(world: World) -> None:
    turn = chat(HELLO, client_id="long")
    session = await world.sessions.resolve(caller(), turn)
    world.vault.seal()
    with pytest.raises(VaultSealed):
        await world.sessions.record(session, turn, outcome("lost"))
    world.vault.open(RootKey(b"r" * 32))
    await world.sessions.record(session, turn, outcome("done"))
    again = await world.sessions.resolve(caller(), turn)
    await world.sessions.record(again, turn, outcome("and again"))
    transcript = await world.reopened().transcript(caller(), session.session_id)
    assert [turn.answer["content"] for turn in transcript.turns] == ["done", "and again"]


async def test_our_own_id_sent_back_goes_on_with_the_session(world: World) -> None:
    first = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    for sessions in (world.sessions, world.reopened()):
        again = await say(sessions, caller(), chat(SYSTEM, client_id=first.visible_id, origin=Origin.HEADER), "x")
        assert (again.session_id, again.visible_id, again.salt) == (first.session_id, first.visible_id, first.salt)
    child = await world.reopened().resolve(caller(), chat(HELLO, client_id="c", parent_client_id=first.visible_id))
    assert child.salt == first.salt


@pytest.mark.parametrize("stranger", [caller("prn_2"), caller("prn_1", "ten_2")])
async def test_an_id_of_our_form_that_is_not_ours_names_nothing(world: World, stranger: Caller) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    for sessions in (world.sessions, world.reopened()):
        for named in (mine.session_id, "ses_" + "0" * 32):
            other = await sessions.resolve(stranger, chat(HELLO, client_id=named))
            assert other.visible_id == other.session_id != named
            assert other.salt != mine.salt


async def test_the_idle_timeout_is_the_tenants_else_the_models_else_the_default(world: World) -> None:
    settings = SessionSettings(idle_timeout_s=15.0, idle_timeout_s_by_model={"big": 60.0})
    sessions = Sessions(world.store, world.vault, settings)
    who = caller()
    assert who.tenant is not None
    own = dataclasses.replace(who, tenant=dataclasses.replace(who.tenant, idle_timeout_s=5.0))
    big = dataclasses.replace(chat(HELLO), model="big")
    timeouts = [
        (await sessions.resolve(*asked)).keeping.idle_timeout_s
        for asked in ((who, chat(HELLO)), (who, big), (own, big))
    ]
    assert timeouts == [15.0, 60.0, 5.0]


async def test_what_a_tenant_shares_has_a_salt_of_the_tenants_and_its_epochs_and_nothing_else_has(world: World) -> None:
    def of(principal: str, tenant: str, mode: Isolation, epoch: int = 0) -> Caller:
        known = caller(principal, tenant)
        assert known.tenant is not None
        return replace(known, tenant=replace(known.tenant, isolation=mode, cache_epoch=epoch))

    async def salts(*who: Any) -> tuple[str, str | None]:
        session = await world.sessions.resolve(of(*who), chat({"role": "user", "content": "Hello"}))
        return session.salt, session.shared_salt

    prefix, whole = Isolation.TENANT_PREFIX, Isolation.TENANT
    alone = [await salts("prn_1", "ten_1", Isolation.SESSION) for _ in range(2)]
    assert alone[0] != alone[1]
    assert {shared for _, shared in alone} == {None}
    first, second = await salts("prn_1", "ten_1", prefix), await salts("prn_2", "ten_1", prefix)
    assert first[0] != second[0]
    assert first[1] == second[1] is not None
    shared = await salts("prn_1", "ten_1", whole)
    assert shared == await salts("prn_2", "ten_1", whole)
    others = [
        await salts("prn_1", "ten_1", prefix, 1),
        await salts("prn_1", "ten_1", whole, 1),
        await salts("prn_1", "ten_2", prefix),
        await salts("prn_1", "ten_2", whole),
    ]
    every = [*alone, first, shared, *others]
    used = [salt for pair in every for salt in pair if salt is not None]
    assert len(used) == len(set(used))


async def test_salts_and_labels_say_nothing_of_what_they_are_made_from(world: World) -> None:
    session = await world.sessions.resolve(caller(), chat(HELLO, client_id="job-7"))
    shown = session.salt + session.lease_label + session.tenant_label
    assert len(session.salt) == 64
    assert session.session_id[4:] not in shown
    assert "ten_1" not in shown


@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize("by", ["client_id", "history"])
async def test_a_session_that_is_forgotten_while_a_turn_looks_for_it_is_not_found(
    world: World, monkeypatch: pytest.MonkeyPatch, by: str, reads: int
) -> None:
    hints = {"client_id": "mine"} if by == "client_id" else {}
    said = await say(world.sessions, caller(), chat(HELLO, **hints), "Hello.")
    sessions, read, seen = world.reopened(), world.store.read, itertools.count(1)

    async def read_and_be_late(query: Callable[[Connection], Any]) -> Any:
        found = await read(query)
        if next(seen) == reads:
            await sessions.forget(caller(), said.session_id)
        return found

    monkeypatch.setattr(world.store, "read", read_and_be_late)
    turn = chat(HELLO, {"role": "assistant", "content": "Hello."}, HELLO, **hints)
    session = await sessions.resolve(caller(), turn)
    assert session.session_id != said.session_id
    await sessions.record(session, turn, outcome("Hello again."))
    again = await sessions.resolve(caller(), turn) if by == "client_id" else session
    assert again.session_id == session.session_id
