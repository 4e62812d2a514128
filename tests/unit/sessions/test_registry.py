"""Sessions over a real store and vault: recognised, isolated, written down whole, forgotten for good."""

import asyncio
import dataclasses
import gc
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, delete, insert, select, update

from api.tier_keys import key_of
from appliance.engine.tier_keys import SessionGone
from appliance.identity import Caller, Isolation, Permission, Principal, Role, Scopes, Tenant
from appliance.identity.types import ApiKey
from appliance.sessions import (
    Account,
    Cause,
    Origin,
    Outcome,
    Session,
    SessionForgotten,
    SessionHints,
    Sessions,
    TranscriptForbidden,
    Turn,
    TurnKind,
    TurnState,
    UnknownResponse,
    UnknownSession,
    archive,
    misses,
    registry,
)
from appliance.sessions.labels import LabelNotKnown
from appliance.sessions.misses import Divergence
from appliance.settings import SessionSettings
from appliance.store import Change, DatabaseKeys, Erasures, Store, StoreConflict, StoreUnavailable, key_changes, tables
from appliance.vault import Binding, KeyMissing, KeyPurpose, KeyRecord, RootKey, TamperedValue, Vault, VaultSealed

pytestmark = pytest.mark.anyio

SYSTEM = {"role": "system", "content": "You are terse."}
HELLO = {"role": "user", "content": "My name is Zanzibarra."}


class World:
    """A store, a vault and the sessions over them; two tenants with their keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store.open(f"sqlite:///{folder / 'holdfast.db'}")
        self.vault = Vault(DatabaseKeys(self.store))
        self.vault.open(RootKey(b"r" * 32))
        for tenant in ("ten_1", "ten_2"):
            self.add_keys(self.vault.new_tenant_keys(tenant))
        self.clock = 1_000.0
        self.sessions = self.reopened()

    def reopened(self) -> Sessions:
        """The sessions as another process would find them."""
        settings = SessionSettings(idle_timeout_s=15.0)
        return Sessions(self.store, self.vault, settings, block_size=4, now=lambda: self.clock)

    def add_keys(self, records: list[KeyRecord]) -> None:
        self.store.write_blocking(key_changes(records))

    def files(self) -> bytes:
        return b"".join(path.read_bytes() for path in sorted(self.folder.iterdir()))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.store.close()


def caller(
    principal_id: str = "prn_1", tenant_id: str = "ten_1", *, role: Role = Role.CLIENT, reads: bool = False
) -> Caller:
    permissions = frozenset({Permission.TRANSCRIPT_READ}) if reads else frozenset[Permission]()
    tenant = Tenant(
        tenant_id=tenant_id, name=tenant_id, idle_timeout_s=None, isolation=Isolation.SESSION, created_at=0.0
    )
    principal = Principal(
        principal_id=principal_id, tenant_id=tenant_id, name=principal_id, role=role, permissions=frozenset()
    )
    key = ApiKey(
        key_id="ak_1",
        tenant_id=tenant_id,
        principal_id=principal_id,
        label=None,
        scopes=Scopes(permissions=permissions),
        created_at=0.0,
        expires_at=None,
        revoked_at=None,
    )
    return Caller(principal=principal, tenant=tenant, key=key)


def chat(*messages: dict[str, Any], **hints: Any) -> Turn:
    return Turn(TurnKind.CHAT, "demo", messages, {"temperature": 0}, SessionHints(**hints))


def outcome(text: str, *, ids: tuple[list[int], list[int]] = ([1, 2, 3], [4]), response: str = "chatcmpl-1") -> Outcome:
    return Outcome(
        response_id=response,
        state=TurnState.COMPLETE,
        answer={"role": "assistant", "content": text},
        prompt_token_ids=ids[0],
        completion_token_ids=ids[1],
        prompt_tokens=len(ids[0]),
        cached_tokens=0,
        completion_tokens=len(ids[1]),
        finish_reason="stop",
        started_at=1.0,
        ended_at=2.0,
    )


async def say(sessions: Sessions, who: Caller, turn: Turn, answer: str, response: str = "chatcmpl-1") -> Session:
    session = await sessions.resolve(who, turn)
    await sessions.record(session, turn, outcome(answer, response=response))
    return session


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


async def end(sessions: Sessions, who: Caller, name: str) -> set[str]:
    ended = await sessions.ending(who, name)
    await sessions.end(ended)
    return set(ended.session_ids)


async def family(world: World) -> tuple[Session, Session, Session, Session]:
    """A session, two agents of its, and a session of the same principal's that is none of them."""
    parent = await say(world.sessions, caller(), chat(HELLO, client_id="job"), "Hello.")
    one, two = [
        await say(world.sessions, caller(), chat(HELLO, client_id=name, parent_client_id="job"), "Hello.")
        for name in ("agent-1", "agent-2")
    ]
    other = await say(world.sessions, caller(), chat(HELLO, client_id="other"), "Hello.")
    return parent, one, two, other


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


# Why prompts were computed


BLOCK = 4


def explaining(world: World) -> Sessions:
    """As `World.reopened`, with an engine whose blocks are known."""
    return Sessions(
        world.store,
        world.vault,
        SessionSettings(idle_timeout_s=15.0),
        block_size=BLOCK,
        now=lambda: world.clock,
    )


async def ask(
    sessions: Sessions,
    turn: Turn,
    *,
    tokens: int,
    cached: int | None = 0,
    at: float = 0.0,
    steady: float | None = None,
    engine: str = "one",
    replica: str | None = None,
) -> tuple[Session, Account]:
    """A turn of the principal `prn_1` with a prompt of so many tokens; each is the beginning of the next longer one.

    It takes a second, from `at` by the wall clock and from `steady` by one that nobody sets, where that is known.
    """
    session = await sessions.resolve(caller(), turn)
    said = dataclasses.replace(
        outcome("Hello.", ids=(list(range(tokens)), [tokens])),
        cached_tokens=cached,
        started_at=at,
        ended_at=at + 1,
        ran_s=None if steady is None else (steady, steady + 1),
    )
    return session, await sessions.record(session, turn, said, engine=engine, replica=replica)


async def test_why_is_told_from_the_transcript_as_it_was_told_with_each_turn(world: World) -> None:
    sessions, turn = explaining(world), chat(HELLO, client_id="job")
    session, first = await ask(sessions, turn, tokens=16, at=0)
    told = [first]
    told.append((await ask(sessions, turn, tokens=24, cached=16, at=2))[1])
    told.append((await ask(sessions, turn, tokens=32, at=4))[1])
    told.append((await ask(sessions, turn, tokens=40, at=100))[1])
    told.append((await ask(sessions, turn, tokens=48, at=102, engine="two"))[1])
    told.append((await ask(sessions, turn, tokens=56, at=102.5, engine="two"))[1])
    world.clock = 103.7
    await end(sessions, caller(), "job")
    told.append((await ask(sessions, turn, tokens=64, at=104, engine="two"))[1])
    told.append((await ask(sessions, turn, tokens=72, cached=None, at=106, engine="two"))[1])

    explanation = await explaining(world).explanation(caller(), session.session_id)

    assert [turn.account for turn in explanation.turns] == told
    assert [next(iter(each.computed)) for each in told] == [
        Cause.FIRST_TURN,
        Cause.BLOCK_TAIL,
        Cause.EVICTED,
        Cause.EXPIRED,
        Cause.ENGINE_RESTARTED,
        Cause.CONCURRENT,
        Cause.ENDED,
        Cause.UNKNOWN,
    ]
    assert [turn.number for turn in explanation.turns] == list(range(1, 9))
    assert not explanation.truncated


async def test_a_session_that_goes_from_one_replica_to_another_and_back_is_told_so(world: World) -> None:
    turn = chat(HELLO, client_id="job")
    for at, (replica, engine) in enumerate([("a", "a/1"), ("b", "b/1"), ("b", "b/2"), ("a", "a/1")]):
        # Each gateway has what it remembers of the session from the database they share.
        session, _ = await ask(explaining(world), turn, tokens=16 + 8 * at, at=2 * at, engine=engine, replica=replica)
    explanation = await explaining(world).explanation(caller(), session.session_id)
    assert [next(iter(turn.account.computed)) for turn in explanation.turns] == [
        Cause.FIRST_TURN,
        Cause.OTHER_REPLICA,
        Cause.ENGINE_RESTARTED,
        Cause.OTHER_REPLICA,
    ]


async def test_a_wall_clock_that_is_set_blames_nobody(world: World) -> None:
    sessions, turn = explaining(world), chat(HELLO, client_id="job")
    session, first = await ask(sessions, turn, tokens=16, at=0, steady=50)
    told = [first]
    told.append((await ask(sessions, turn, tokens=24, at=-700_000, steady=52))[1])
    told.append((await ask(sessions, turn, tokens=32, at=700_000, steady=54))[1])
    told.append((await ask(sessions, turn, tokens=40, at=700_002, steady=90))[1])
    told.append((await ask(sessions, turn, tokens=48, at=900_000, steady=90.5))[1])
    explanation = await explaining(world).explanation(caller(), session.session_id)
    assert [turn.account for turn in explanation.turns] == told
    assert [next(iter(each.computed)) for each in told] == [
        Cause.FIRST_TURN,
        Cause.EVICTED,
        Cause.EVICTED,
        Cause.EXPIRED,
        Cause.CONCURRENT,
    ]


async def test_why_is_known_of_a_turn_whose_predecessor_had_left_the_memory(world: World) -> None:
    turn = chat(HELLO, client_id="job")
    session, _ = await ask(explaining(world), turn, tokens=16)
    _, told = await ask(explaining(world), turn, tokens=24, at=2)
    assert told.computed == {Cause.UNKNOWN: 24}
    explanation = await world.sessions.explanation(caller(), session.session_id)
    assert explanation.turns[1].account.computed == {Cause.EVICTED: 16, Cause.BLOCK_TAIL: 1, Cause.NEW: 7}


async def test_what_changed_in_a_session_is_told_without_a_word_of_it(world: World) -> None:
    sessions = explaining(world)
    for turns, minute in enumerate((31, 32, 33), start=1):
        history = [HELLO, {"role": "assistant", "content": "Hello."}] * turns
        turn = chat({"role": "system", "content": f"Secretly 10:{minute}."}, *history, HELLO, client_id="job")
        session = await sessions.resolve(caller(), turn)
        prompt = [minute, *range(1, 20 * turns)]
        await sessions.record(session, turn, outcome("Hello.", ids=(prompt, [0])), engine="one")
    explanation = await world.sessions.explanation(caller(), session.session_id)
    assert [turn.divergence for turn in explanation.turns] == [
        None,
        Divergence(0, 1, "system", misses.Change.NUMBERS),
        Divergence(0, 1, "system", misses.Change.NUMBERS),
    ]
    (finding,) = explanation.findings
    assert (finding.what, finding.turns, finding.tokens) == (misses.Change.NUMBERS, [2, 3], 20 + 1 + 40 + 1)
    assert "Secretly" not in repr(explanation)


async def test_where_a_turn_parted_is_told_with_it_as_it_is_told_from_the_transcript(world: World) -> None:
    sessions = explaining(world)
    system, answer = {"role": "system", "content": "Secretly 10:31."}, {"role": "assistant", "content": "Hello."}
    later, reworded = {**system, "content": "Secretly 10:32."}, {**answer, "content": "Well."}
    tools = [{"type": "function", "function": {"name": "look"}}]
    begun, went_on = [system, HELLO], [system, HELLO, answer, HELLO]
    asked: list[tuple[list[dict[str, Any]], list[int], dict[str, Any]]] = [
        (begun, [*range(20)], {}),
        (went_on, [*range(20), 0, 21], {}),  # an extension
        ([later, *went_on[1:], answer, HELLO], [*range(5), 99, *range(6, 30)], {}),
        ([later, HELLO, reworded, HELLO], [*range(5), 99, *range(6, 18), 77, 78], {}),
        ([later, HELLO, reworded, HELLO, answer, HELLO], [55, *range(1, 30)], {"tools": tools}),
    ]
    told = []
    for messages, prompt, parameters in asked:
        turn = dataclasses.replace(chat(*messages, client_id="job"), parameters=parameters)
        session = await sessions.resolve(caller(), turn)
        said = outcome("Hello.", ids=(prompt, [0]))
        told.append((await sessions.record(session, turn, said, engine="one")).divergence)
    explanation = await world.sessions.explanation(caller(), session.session_id)
    assert [turn.divergence for turn in explanation.turns] == told
    assert told == [
        None,
        None,
        Divergence(5, 1, "system", misses.Change.NUMBERS),
        Divergence(18, 3, "assistant", misses.Change.REPLACED),
        Divergence(0, None, None, misses.Change.TOOLS_CHANGED),
    ]
    assert "Secretly" not in repr(told)


async def test_without_the_text_of_the_turn_before_it_is_told_why_and_not_where(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_TIP_BYTES", 2000)
    sessions = explaining(world)
    turn = chat({"role": "user", "content": "x" * 4000}, client_id="job")
    for prompt in ([*range(20)], [*range(5), 99, *range(6, 20)]):
        session = await sessions.resolve(caller(), turn)
        account = await sessions.record(session, turn, outcome("Hello.", ids=(prompt, [0])), engine="one")
    assert (account.diverged_at, account.computed[Cause.DIVERGED], account.divergence) == (5, 15, None)


async def test_nothing_of_what_was_said_stays_in_memory_when_the_vault_is_sealed(world: World) -> None:
    sessions, turn = explaining(world), chat(HELLO, client_id="job")
    session, _ = await ask(sessions, turn, tokens=16)
    world.vault.seal()
    sessions.forget_texts()
    assert sessions._tips.get(session.session_id) is None
    world.vault.open(RootKey(b"r" * 32))
    _, told = await ask(sessions, turn, tokens=24, at=2)
    assert told.computed == {Cause.UNKNOWN: 24}
    assert len((await sessions.transcript(caller(), session.session_id)).turns) == 2


async def test_of_a_long_session_the_newest_turns_are_explained(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_TURNS_AT_A_TIME", 2)
    sessions, turn = explaining(world), chat(HELLO, client_id="job")
    for number in range(7):
        session, _ = await ask(sessions, turn, tokens=16 + 8 * number, at=2.0 * number)
    whole = await sessions.explanation(caller(), session.session_id)
    for limit in range(1, 7):
        newest = await sessions.explanation(caller(), session.session_id, limit=limit)
        assert (newest.turns, newest.truncated) == (whole.turns[-limit:], True)
    assert not (await sessions.explanation(caller(), session.session_id, limit=7)).truncated
    assert [turn.number for turn in whole.turns] == list(range(1, 8))


@pytest.mark.parametrize("stranger", [caller("prn_2"), caller("prn_1", "ten_2"), caller("p", "ten_2", reads=True)])
async def test_why_is_nobody_elses_to_know(world: World, stranger: Caller) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    raised = []
    for session_id in (mine.session_id, "ses_" + "0" * 32):
        with pytest.raises(UnknownSession) as caught:
            await world.sessions.explanation(stranger, session_id)
        raised.append(str(caught.value).replace(session_id, "ID"))
    assert raised[0] == raised[1]


async def test_who_watches_over_a_tenant_may_know_why_without_reading(world: World) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    auditor = caller("prn_2", role=Role.AUDITOR)
    assert len((await world.sessions.explanation(auditor, mine.session_id)).turns) == 1
    with pytest.raises(UnknownSession):
        await world.sessions.explanation(caller("prn_2", "ten_2", role=Role.AUDITOR), mine.session_id)


async def test_of_a_turn_that_was_broken_off_no_cached_tokens_are_counted(world: World) -> None:
    session, told = await ask(explaining(world), chat(HELLO), tokens=16, cached=None)
    assert told == Account(16, 0, {Cause.UNKNOWN: 16})
    assert (await world.sessions.summary(caller(), session.session_id)).cached_tokens == 0
    assert (await world.sessions.transcript(caller(), session.session_id)).turns[0].cached_tokens == 0


async def test_nobody_ends_a_strangers_session(world: World) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO, client_id="job"), "Hello.")
    for stranger in (caller("prn_2"), caller("prn_1", "ten_2")):
        for name in ("job", mine.session_id, "ses_" + "0" * 32):
            with pytest.raises(UnknownSession):
                await world.sessions.ending(stranger, name)


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


async def test_a_transcript_reads_back_as_it_was_said(world: World) -> None:
    answer = {"role": "assistant", "content": "Hello."}
    first = await say(world.sessions, caller(), chat(SYSTEM, HELLO), "Hello.")
    longer = chat(SYSTEM, HELLO, answer, {"role": "user", "content": "And?"})
    session = await world.sessions.resolve(caller(), longer)
    await world.sessions.record(session, longer, outcome("Yes.", ids=([1, 2, 3, 4, 5, 6], [7, 8])))

    transcript = await world.reopened().transcript(caller(), first.session_id)

    assert [turn.new_messages for turn in transcript.turns] == [[SYSTEM, HELLO], [{"role": "user", "content": "And?"}]]
    assert [turn.answer["content"] for turn in transcript.turns] == ["Hello.", "Yes."]
    assert transcript.turns[1].prompt_token_ids == [1, 2, 3, 4, 5, 6]
    assert transcript.turns[1].completion_token_ids == [7, 8]
    assert transcript.turns[1].parameters == {"temperature": 0}
    assert (transcript.session.turns, transcript.session.prompt_tokens) == (2, 9)


async def test_no_word_of_a_transcript_is_in_the_database_files(world: World) -> None:
    await say(world.sessions, caller(), chat(HELLO, client_id="secret-job-name"), "Pleased, Zanzibarra.")
    files = world.files()
    for word in (b"Zanzibarra", b"secret-job-name", b"Pleased", b"temperature"):
        assert word not in files


async def test_reading_another_principals_transcript_needs_the_scope(world: World) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    auditor = caller("prn_2", role=Role.AUDITOR)
    assert [summary.session_id for summary in await world.sessions.summaries(auditor)] == [mine.session_id]
    with pytest.raises(TranscriptForbidden):
        await world.sessions.transcript(auditor, mine.session_id)
    reader = caller("prn_2", role=Role.AUDITOR, reads=True)
    assert (await world.sessions.transcript(reader, mine.session_id)).turns[0].answer["content"] == "Hello."


@pytest.mark.parametrize("stranger", [caller("prn_2"), caller("prn_1", "ten_2"), caller("p", "ten_2", reads=True)])
async def test_a_strangers_session_is_as_unknown_as_one_that_never_was(world: World, stranger: Caller) -> None:
    mine = await say(world.sessions, caller(), chat(HELLO), "Hello.")
    raised = []
    for session_id in (mine.session_id, "ses_" + "0" * 32):
        with pytest.raises(UnknownSession) as caught:
            await world.sessions.transcript(stranger, session_id)
        with pytest.raises(UnknownSession):
            await world.sessions.forget(stranger, session_id)
        raised.append(str(caught.value).replace(session_id, "ID"))
    assert raised[0] == raised[1]


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


CHANGES: dict[str, dict[str, Any]] = {
    "name": {"name": "somebody else"},
    "reasoning_content": {"reasoning_content": "hm"},
    "refusal": {"refusal": "no"},
    "function_call": {"function_call": {"name": "f", "arguments": "{}"}},
    "tool_call_id": {"tool_call_id": "call_2"},
}


async def test_a_long_transcript_is_read_in_pieces(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_TURNS_AT_A_TIME", 2)
    sessions, turn = explaining(world), chat(HELLO, client_id="job")
    for number in range(7):
        session, _ = await ask(sessions, turn, tokens=9, at=2.0 * number)
    whole = await sessions.transcript(caller(), session.session_id)
    assert [turn.number for turn in whole.turns] == list(range(1, 8))
    assert not whole.truncated
    newest = await sessions.transcript(caller(), session.session_id, limit=3)
    assert (newest.turns, newest.truncated) == (whole.turns[4:], True)
    before = await sessions.transcript(caller(), session.session_id, before=5, limit=3)
    assert (before.turns, before.truncated) == (whole.turns[1:4], True)
    first = await sessions.transcript(caller(), session.session_id, before=2, limit=3)
    assert (first.turns, first.truncated) == (whole.turns[:1], False)
    none = await sessions.transcript(caller(), session.session_id, before=1)
    assert (none.turns, none.truncated) == ([], False)


@pytest.mark.parametrize(("tokens", "turns"), [(1000, 3), (30, 3), (29, 2), (10, 1), (1, 1)])
async def test_a_transcript_has_no_more_tokens_than_an_answer_holds_but_always_a_turn(
    world: World, monkeypatch: pytest.MonkeyPatch, tokens: int, turns: int
) -> None:
    sessions, turn = explaining(world), chat(HELLO, client_id="job")
    for number in range(3):
        session, _ = await ask(sessions, turn, tokens=9, at=2.0 * number)
    monkeypatch.setattr(archive, "TRANSCRIPT_TOKENS", tokens)
    transcript = await sessions.transcript(caller(), session.session_id)
    assert [turn.number for turn in transcript.turns] == [1, 2, 3][3 - turns :]
    assert transcript.truncated == (turns < 3)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_field_that_changed_in_an_old_message_is_in_the_transcript(
    world: World, change: dict[str, Any]
) -> None:
    answer = {"role": "assistant", "content": "Hello."}
    first = await say(world.sessions, caller(), chat(SYSTEM, HELLO), "Hello.")
    changed = {**HELLO, **change}
    second = await say(world.sessions, caller(), chat(SYSTEM, changed, answer, HELLO), "Yes.")
    assert second.session_id == first.session_id  # what recognises a session does not look at it
    transcript = await world.reopened().transcript(caller(), first.session_id)
    assert [turn.new_messages for turn in transcript.turns] == [[SYSTEM, HELLO], [changed, answer, HELLO]]


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


# Keys of the engine's tiers


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
