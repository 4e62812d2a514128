"""Why prompts were computed, as it is told with each turn and from the transcript."""

import dataclasses
from typing import Any

import pytest

from appliance.identity import Caller, Role
from appliance.sessions import (
    Account,
    Cause,
    UnknownSession,
    archive,
    misses,
    registry,
)
from appliance.sessions.misses import Divergence
from appliance.vault import RootKey
from tests.unit.sessions.making import HELLO, World, ask, caller, chat, end, explaining, outcome, say

pytestmark = pytest.mark.anyio


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
