"""What of a body passes, what is dropped and named, and what is an error."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.openai.errors import MalformedBody, RequestError
from api.openai.fields import CHAT, COMPLETION
from api.openai.wire import Asked, Dropped, read_chat, read_completion
from appliance.sessions import SessionHints, TurnKind


def chat(**fields: Any) -> Asked:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}
    return read_chat(json.dumps(body).encode(), lambda _: SessionHints(), max_messages=10)


def completion(**fields: Any) -> Asked:
    return read_completion(json.dumps({"model": "m", "prompt": "hi", **fields}).encode(), lambda _: SessionHints())


def test_a_plain_chat_passes_as_it_is() -> None:
    asked = chat(temperature=0.5, stop="END", seed=7, stream=True, stream_options={"include_usage": True})
    assert asked.turn.kind is TurnKind.CHAT
    assert asked.turn.messages == [{"role": "user", "content": "hello"}]
    assert asked.turn.parameters == {"temperature": 0.5, "stop": ["END"], "seed": 7}
    assert (asked.stream, asked.include_usage, asked.choices, asked.prompt) == (True, True, 1, None)
    assert asked.dropped.header() is None


def test_null_means_not_given() -> None:
    asked = chat(temperature=None, tools=None, stream=None, stop=None, n=None)
    assert asked.turn.parameters == {}
    assert asked.stream is False


def test_the_newer_name_of_the_bound_on_tokens_wins() -> None:
    assert chat(max_tokens=5).max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=7).max_tokens == 7
    assert chat().max_tokens is None
    assert completion().max_tokens == 16


@pytest.mark.parametrize(
    ("given_prompt", "prompt"), [("a", "a"), (["a"], "a"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ("", "")]
)
def test_a_prompt_is_one_text_or_one_list_of_ids(given_prompt: Any, prompt: Any) -> None:
    asked = completion(prompt=given_prompt)
    assert asked.prompt == prompt
    assert asked.turn.parameters == {"prompt": prompt}
    assert asked.turn.messages == ()


def test_an_assistant_may_say_nothing_but_a_call() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    asked = chat(messages=messages)
    (kept,) = asked.turn.messages
    assert kept["tool_calls"] == [{key: value for key, value in call.items() if key != "index"}]
    assert asked.dropped.header() == "messages[].tool_calls[].index"


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "function"])
def test_every_role_may_speak(role: str) -> None:
    assert chat(messages=[{"role": role, "content": "x", "name": "n"}]).turn.messages[0]["role"] == role


def test_a_tool_says_which_call_it_answers() -> None:
    said = {"role": "tool", "tool_call_id": "1", "content": "rain"}
    assert chat(messages=[said]).turn.messages == [said]
    with pytest.raises(RequestError) as refused:
        chat(messages=[{"role": "tool", "content": "rain"}])
    assert refused.value.param == "messages[0].tool_call_id"


def test_a_schema_passes_and_what_is_beside_it_does_not() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "grammar": "evil"}, "more": 1}
    asked = chat(response_format=wanted)
    assert asked.turn.parameters["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": schema},
    }
    assert asked.dropped.header() == "response_format.more, response_format.json_schema.grammar"


def test_names_of_what_was_dropped_are_bounded_and_safe_in_a_header() -> None:
    dropped = Dropped()
    for name in ("plain", "a\r\nb", "\u00e9", "x" * 500, *(f"n{number}" for number in range(30))):
        dropped.add(name)
    header = dropped.header()
    assert header is not None
    assert header.startswith("plain, a??b, ?, " + "x" * 80 + ", n0")
    assert header.endswith(", and 14 more")
    assert header.isascii()
    assert header.isprintable()


def test_the_lists_do_not_overlap() -> None:
    for fields in (CHAT, COMPLETION):
        assert not fields.passed & fields.denied
        assert not fields.passed & fields.handled
        assert not fields.denied & fields.handled


@given(
    st.dictionaries(
        st.sampled_from(sorted(CHAT.passed | CHAT.denied | CHAT.handled)) | st.text(max_size=20),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=8,
    )
)
def test_whatever_is_sent_only_what_is_on_the_list_passes(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}).encode()
    with contextlib.suppress(RequestError):
        asked = read_chat(body, lambda _: SessionHints(), max_messages=10)
        assert set(asked.turn.parameters) <= CHAT.passed


@given(st.binary(max_size=200))
def test_whatever_bytes_are_sent_they_are_a_request_or_an_error_that_says_what_to_do(body: bytes) -> None:
    with pytest.raises(RequestError):
        read_chat(body, lambda _: SessionHints(), max_messages=10)


@pytest.mark.parametrize("body", [b"[" * 10_000, b'{"a":' * 10_000, b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff"])
def test_what_is_not_strict_json_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        read_completion(body, lambda _: SessionHints())


_PLAIN = '"model": "m", "messages": [{"role": "user", "content": "hello"}]'


@pytest.mark.parametrize(
    "body",
    [
        '{%s, "seed": 1, "seed": 1}',
        '{%s, "user":"a:b" ,"user" : "a:b"}',
        '{%s, "user": "\\u003a\\u003a", "metadata": {"a": 1, "a": 1}}',
        '{%s, "us\\u0065r": "a", "user": "b"}',
    ],
)
def test_a_key_that_comes_twice_is_refused_whatever_hides_it(body: str) -> None:
    with pytest.raises(MalformedBody):
        read_chat((body % _PLAIN).encode(), lambda _: SessionHints(), max_messages=10)


@pytest.mark.parametrize("said", [r"a: b", r"\"a\": {\"b\": 1}", r":", r"\u003a", r"\u0022:", r"\\\":", r"\n:"])
def test_colons_in_a_text_are_no_keys(said: str) -> None:
    body = '{"model": "m" , "messages" :[{"role":"user", "content" : "' + said + '"}]}'
    (message,) = read_chat(body.encode(), lambda _: SessionHints(), max_messages=10).turn.messages
    assert message["content"] == json.loads(body)["messages"][0]["content"]
