"""How a transcript, and what is kept of a session, reads on a terminal."""

from typing import Any

from api.admin import types
from api.admin.session_commands import _explanation_text, _kept_text, _transcript_text

SESSION = types.Session(
    session_id="ses_1",
    tenant_id="ten_1",
    principal_id="prn_1",
    tree_id="tre_1",
    parent_session_id=None,
    model="demo",
    origin="new",
    turns=1,
    prompt_tokens=40,
    cached_tokens=32,
    completion_tokens=5,
    created_at=1_800_000_000.0,
    last_used_at=1_800_000_060.0,
)


def turn(*new_messages: dict[str, Any], answer: dict[str, Any]) -> types.TranscriptTurn:
    return types.TranscriptTurn(
        number=1,
        response_id="chatcmpl-1",
        model="demo",
        state="complete",
        new_messages=list(new_messages),
        answer=answer,
        parameters={},
        prompt_token_ids=[],
        completion_token_ids=[],
        prompt_tokens=40,
        cached_tokens=32,
        completion_tokens=5,
        finish_reason="stop",
        started_at=1_800_000_000.0,
        ended_at=1_800_000_000.5,
    )


def text(*turns: types.TranscriptTurn, client_id: str | None = None) -> str:
    return _transcript_text(types.Transcript(session=SESSION, client_id=client_id, turns=list(turns), truncated=False))


def test_who_said_what_stands_at_the_margin_and_what_was_said_is_indented() -> None:
    shown = text(turn({"role": "user", "content": "Hello\nthere"}, answer={"role": "assistant", "content": "Hi!"}))
    assert shown.endswith("user:\n  Hello\n  there\nassistant:\n  Hi!")
    assert "turn 1 ── 2027-01-15 08:00:00Z ── 500 ms ── 40 prompt tokens, 32 cached, 5 answered ── stop" in shown


def test_nothing_that_was_said_moves_the_cursor_or_pretends_to_be_another_line() -> None:
    shown = text(
        turn(
            {"role": "us\x1b[1mer", "content": "a\x1b]0;owned\x07b\rc\x9b2J"},
            answer={"role": "assistant", "content": "x"},
        ),
        client_id="id\x1b[2K",
    )
    assert not {c for c in shown if not c.isprintable()} - {"\n"}
    assert "owned" in shown


def test_a_call_of_a_tool_and_content_in_parts_are_shown() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    parts = [{"type": "text", "text": "What is the weather?"}]
    shown = text(
        turn({"role": "user", "content": parts}, answer={"role": "assistant", "content": None, "tool_calls": [call]})
    )
    assert 'calls get_weather({"city": "Paris"})' in shown
    assert "What is the weather?" in shown


def test_what_is_kept_of_a_session_is_said_with_where_why_and_how_long() -> None:
    kept = [
        types.KvHeld(tier="device", blocks=30, tokens=960, kept_for="lease", ends_in_s=12.0),
        types.KvHeld(tier="dram", blocks=40, tokens=1280, kept_for="in_use", ends_in_s=None),
    ]
    said = types.Explanation.model_construct(kept=kept, worth_hits_per_s=0.0831)
    assert _kept_text(said) == (
        "960 tokens on the device (lease, 12 s); 1280 tokens in DRAM (in use); worth 0.0831 hits/s"
    )
    assert _kept_text(types.Explanation.model_construct(kept=[], worth_hits_per_s=None)) == "nothing"
    nobody = types.Explanation.model_construct(kept=None, worth_hits_per_s=None)
    assert _kept_text(nobody) == "the engine could not be asked"


def test_what_a_miss_cost_is_told_with_its_unit_and_not_made_up_where_nothing_was_streamed() -> None:
    def explained(number: int, first_token_s: float | None) -> types.ExplainedTurn:
        return types.ExplainedTurn(
            number=number,
            started_at=1_800_000_000.0,
            prompt_tokens=100,
            served_tokens=0,
            computed_tokens={"evicted": 100},
            served_from=None,
            first_token_s=first_token_s,
            divergence=None,
        )

    turns = [explained(1, 1.234), explained(2, 0.087), explained(3, None)]
    explanation = types.Explanation(
        session=SESSION, kept=[], worth_hits_per_s=None, turns=turns, findings=[], truncated=False
    )
    lines = _explanation_text(explanation).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("TURN "))
    where = lines[at].index("FIRST TOKEN, MS")
    shown = [line[where:].split("  ")[0] for line in lines[at + 1 :]]
    assert shown == ["1234", "87", "-"]
