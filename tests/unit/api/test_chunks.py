"""What of the engine's answer a client sees, what is kept, and what is held back until the turn is durable."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.openai.chunks import Answer
from api.openai.errors import AnswerBroken
from appliance.sessions import Account, Cause, TurnKind

ID = "chatcmpl-0123456789abcdef0123456789abcdef"
USAGE = {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 2}}


def answer(kind: TurnKind = TurnKind.CHAT, **more: Any) -> Answer:
    options = {"choices": 1, "include_usage": False, "keep_token_ids": False, **more}
    return Answer(kind, ID, "m", **options)


def chunk(delta: dict[str, Any], *, ids: list[int] | None = None, index: int = 0, **more: Any) -> bytes:
    """As vLLM writes one: compact, the token ids last in their choice."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
    if ids is not None:
        choice["token_ids"] = ids
    head = {"id": ID, "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()


def first(ids: list[int]) -> bytes:
    whole = json.loads(chunk({"role": "assistant", "content": ""}))
    return json.dumps({**whole, "prompt_token_ids": ids, "prompt_text": None}, separators=(",", ":")).encode()


def usage() -> bytes:
    return json.dumps(
        {"id": ID, "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": USAGE}
    ).encode()


def read(event: bytes) -> Any:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    return json.loads(event[6:])


def test_token_ids_are_taken_out_and_kept() -> None:
    it = answer()
    assert "prompt_token_ids" not in read(it.feed(first([7, 8, 9])))
    assert read(it.feed(chunk({"content": "a"}, ids=[1, 2]))) == json.loads(chunk({"content": "a"}))
    assert it.prompt_token_ids == [7, 8, 9]
    assert it.completion_token_ids == [1, 2]


@given(st.text(max_size=40), st.lists(st.integers(0, 200_000), max_size=5))
def test_whatever_is_said_only_the_ids_are_cut_off(text: str, ids: list[int]) -> None:
    it = answer()
    payload = chunk({"content": text}, ids=ids)
    assert read(it.feed(payload)) == json.loads(chunk({"content": text}))
    assert it.message()["content"] == text
    assert it.completion_token_ids == ids


@pytest.mark.parametrize(
    "text", ['","token_ids":[1]}]}', ',"token_ids":[1,2]}]}', "\\", '\\"', '"token_ids"', "data: [DONE]\n\n"]
)
def test_a_text_that_looks_like_the_wire_stays_a_text(text: str) -> None:
    for ids in ([5], None):
        it = answer()
        assert read(it.feed(chunk({"content": text}, ids=ids)))["choices"][0]["delta"]["content"] == text
        assert it.message()["content"] == text


def test_ids_that_stand_elsewhere_are_taken_out_too() -> None:
    odd = json.loads(chunk({"content": "a"}, ids=[1]))
    odd["choices"][0]["stop_reason"] = None
    odd["kv_transfer_params"] = {"secret": 1}
    event = read(answer().feed(json.dumps(odd).encode()))
    assert "token_ids" not in event["choices"][0]
    assert "kv_transfer_params" not in event


def test_ids_stay_for_who_asked_for_them() -> None:
    event = read(answer(keep_token_ids=True).feed(chunk({"content": "a"}, ids=[1, 2])))
    assert event["choices"][0]["token_ids"] == [1, 2]


def test_the_finish_the_usage_and_done_are_held_back() -> None:
    it = answer(include_usage=True)
    it.feed(first([7, 8, 9]))
    it.feed(chunk({"content": "a"}, ids=[1]))
    assert it.feed(chunk({"content": "!"}, ids=[2], finish_reason="stop", stop_reason=None)) == b""
    before, taken, after = it.complete, it.feed(usage()), it.complete
    assert (before, taken, after) == (False, b"", True)
    *events, done = it.end().split(b"\n\n")[:-1]
    assert done == b"data: [DONE]"
    finish, cost = (json.loads(event[6:]) for event in events)
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert cost["usage"] == USAGE
    assert cost["choices"] == []
    assert it.message() == {"role": "assistant", "content": "a!"}
    assert it.usage.cached_tokens == 2


def test_usage_is_left_out_for_who_did_not_ask() -> None:
    it = answer()
    it.feed(chunk({"content": "a"}, ids=[1], finish_reason="stop"))
    it.feed(usage())
    assert b"usage" not in it.end()


def test_with_several_choices_the_last_finish_is_held_back() -> None:
    it = answer(choices=2)
    assert it.feed(chunk({"content": "a"}, ids=[1], finish_reason="stop"))
    assert it.feed(chunk({"content": "b"}, ids=[2], index=1))
    assert it.feed(chunk({"content": "c"}, ids=[3], index=1, finish_reason="length")) == b""
    assert it.message() == {
        "role": "assistant",
        "content": "a",
        "alternatives": [{"role": "assistant", "content": "bc"}],
    }
    assert (it.completion_token_ids, it.finish_reason) == ([1], "stop")


def test_a_tool_call_in_pieces_is_put_together() -> None:
    it = answer()
    call = {"id": "call-1", "type": "function", "index": 0, "function": {"name": "weather"}}
    it.feed(chunk({"tool_calls": [call]}))
    it.feed(chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]}))
    it.feed(chunk({"tool_calls": [{"index": 0, "function": {"arguments": '"Oslo"}'}}]}))
    it.feed(chunk({"reasoning": "hm"}))
    assert it.message() == {
        "role": "assistant",
        "content": None,
        "reasoning": "hm",
        "tool_calls": [
            {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        ],
    }


def test_the_model_is_known_by_the_client_s_name() -> None:
    other = json.loads(chunk({"content": "a"}, ids=[1]))
    event = read(answer().feed(json.dumps({**other, "model": "/models/m"}).encode()))
    assert (event["id"], event["model"]) == (ID, "m")


ANOTHER_S = ["chatcmpl-" + "f" * 32, ID.upper(), "cmpl-" + ID.removeprefix("chatcmpl-"), ID + "-0", "", None, [ID]]


@pytest.mark.parametrize("another", ANOTHER_S)
@pytest.mark.parametrize("begun", [False, True])
def test_a_chunk_of_another_request_s_answer_is_neither_given_out_nor_kept(another: Any, begun: bool) -> None:
    it = answer()
    if begun:
        it.feed(chunk({"content": "ours"}, ids=[1]))
    theirs = {**json.loads(chunk({"content": "theirs"}, ids=[2], finish_reason="stop")), "id": another, "usage": USAGE}
    with pytest.raises(AnswerBroken, match="another request") as refused:
        it.feed(json.dumps(theirs).encode())
    assert "theirs" not in str(refused.value)
    assert it.begun is begun
    assert it.message()["content"] == ("ours" if begun else "")
    assert it.completion_token_ids == ([1] if begun else [])
    assert (it.finish_reason, it.complete, it.usage.cached_tokens) == (None, False, None)


def test_the_cost_of_another_request_is_not_this_one_s() -> None:
    it = answer()
    it.feed(chunk({"content": "a"}, ids=[1], finish_reason="stop"))
    with pytest.raises(AnswerBroken, match="another request"):
        it.feed(usage().replace(ID.encode(), b"chatcmpl-other"))
    assert not it.complete


@pytest.mark.parametrize("another", ANOTHER_S)
def test_a_whole_answer_to_another_request_is_neither_given_out_nor_kept(another: Any) -> None:
    it = answer()
    with pytest.raises(AnswerBroken, match="another request"):
        it.take_whole(json.dumps({**WHOLE, "id": another}).encode())
    assert not it.begun
    assert it.message()["content"] == ""
    assert it.completion_token_ids == []


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"hello",
        b"[]",
        b"7",
        b"{}",
        b'{"id":"x"}',
        b"\xff",
        b'{"error":{"message":"boom","type":"InternalServerError","code":500}}',
        b'{"error":"boom"}',
        chunk({"content": "a"}, index=5),
        chunk({"content": "a"}).replace(b'"delta"', b'"alpha"'),
        chunk({"tool_calls": [{"id": "x"}]}),
    ],
)
def test_what_is_no_chunk_is_an_error_and_nothing_of_it_is_passed_on(payload: bytes) -> None:
    with pytest.raises(AnswerBroken) as broken:
        answer().feed(payload)
    assert "boom" not in str(broken.value)


def test_a_stream_cut_short_knows_what_it_has_seen() -> None:
    it = answer()
    it.feed(first([7, 8, 9]))
    it.feed(chunk({"content": "a"}, ids=[1, 2]))
    assert (it.usage.prompt_tokens, it.usage.cached_tokens, it.usage.completion_tokens) == (3, None, 2)
    assert it.finish_reason is None


WHOLE: dict[str, Any] = {
    "id": ID,
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hi"},
            "finish_reason": "stop",
            "logprobs": None,
            "token_ids": [1, 2],
        }
    ],
    "usage": USAGE,
    "prompt_token_ids": [7, 8, 9],
    "kv_transfer_params": {"holdfast": {}},
    "prompt_logprobs": None,
}


def test_a_whole_answer_is_cleaned_and_kept() -> None:
    it = answer()
    it.take_whole(json.dumps(WHOLE).encode())
    public = json.loads(it.whole())
    assert set(public) == {"id", "object", "created", "model", "choices", "usage"}
    assert "token_ids" not in public["choices"][0]
    assert public["id"] == ID
    assert it.message() == {"role": "assistant", "content": "hi"}
    assert (it.prompt_token_ids, it.completion_token_ids) == ([7, 8, 9], [1, 2])


def test_a_whole_answer_always_says_what_was_cached() -> None:
    bare = {**WHOLE, "usage": {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2}}
    it = answer()
    it.take_whole(json.dumps(bare).encode())
    assert json.loads(it.whole())["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_what_was_computed_is_told_by_why_it_had_to_be() -> None:
    it = answer()
    it.take_whole(json.dumps(WHOLE).encode())
    account = Account(3, 0, {Cause.NEW: 2, Cause.BLOCK_TAIL: 1})
    details = json.loads(it.whole(account))["usage"]["prompt_tokens_details"]
    assert details["computed_tokens"] == {"new": 2, "block_tail": 1}
    assert "divergence" not in details


def test_a_completion_keeps_its_text_and_the_ids_of_its_prompt() -> None:
    it = answer(TurnKind.COMPLETION)
    choice = {"index": 0, "text": "hi", "finish_reason": None, "prompt_token_ids": [7], "token_ids": [1]}
    head = {"id": ID, "object": "text_completion", "created": 1, "model": "m"}
    event = read(it.feed(json.dumps({**head, "choices": [choice]}).encode()))
    assert event["choices"] == [{"index": 0, "text": "hi", "finish_reason": None}]
    assert (it.prompt_token_ids, it.completion_token_ids) == ([7], [1])
    assert it.message()["content"] == "hi"


@pytest.mark.parametrize("missing", ["id", "choices", "usage"])
def test_a_whole_answer_without_its_parts_is_an_error(missing: str) -> None:
    cut = {name: value for name, value in WHOLE.items() if name != missing}
    with pytest.raises(AnswerBroken):
        answer().take_whole(json.dumps(cut).encode())
    with pytest.raises(AnswerBroken):
        answer(choices=2).take_whole(json.dumps(WHOLE).encode())
