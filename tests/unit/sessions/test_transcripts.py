"""Transcripts: read by who may, whole, in pieces."""

from typing import Any

import pytest

from appliance.identity import Caller, Role
from appliance.sessions import (
    TranscriptForbidden,
    UnknownSession,
    archive,
)
from tests.unit.sessions.making import HELLO, SYSTEM, World, ask, caller, chat, explaining, outcome, say

pytestmark = pytest.mark.anyio


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
