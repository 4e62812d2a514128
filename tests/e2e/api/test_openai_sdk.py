"""The openai SDK as the client: what its users get, and which exceptions they catch."""

import uuid
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from benchmarks.stub import MODEL
from tests.e2e.api.conftest import Served

SAID = "".join(f" word{number}" for number in range(14))
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def said(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def test_a_chat_completion_is_answered_whole(served: Served) -> None:
    with served.sdk() as client:
        answer = client.chat.completions.create(model=MODEL, messages=said("x" * 400))
    assert answer.choices[0].message.content == SAID
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 100
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 50


def test_a_stream_gives_the_same_words_and_ends(served: Served) -> None:
    with served.sdk() as client:
        chunks = list(client.chat.completions.create(model=MODEL, messages=said("hello"), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_comes_last_in_a_stream_that_asked_for_it(served: Served) -> None:
    with served.sdk() as client:
        *chunks, last = client.chat.completions.create(
            model=MODEL, messages=said("x" * 400), stream=True, stream_options={"include_usage": True}
        )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (100, 15)
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 50


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_that_parted_from_the_one_before_says_where_and_no_other_does(served: Served, stream: bool) -> None:
    question: ChatCompletionMessageParam = {"role": "user", "content": "x" * 400}
    reworded: ChatCompletionMessageParam = {"role": "assistant", "content": SAID.replace("word3", "marzipan")}
    with served.sdk(**{"X-Session-ID": uuid.uuid4().hex}) as client:
        first = details(client, [question], stream=stream)
        parted = details(client, [question, reworded, question], stream=stream)
    assert "divergence" not in first
    assert parted["divergence"] == {"token": 100, "message": 2, "role": "assistant", "change": "content"}
    assert parted["computed_tokens"]["diverged"] > 0


def details(client: openai.OpenAI, messages: list[ChatCompletionMessageParam], *, stream: bool) -> dict[str, Any]:
    """What the usage says of a prompt beyond what OpenAI's does, whichever way it is asked for."""
    if stream:
        *_, last = client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
        )
        usage = last.usage
    else:
        usage = client.chat.completions.create(model=MODEL, messages=messages).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return usage.prompt_tokens_details.model_extra or {}


def test_a_completion_s_prompt_that_parted_says_at_which_token(served: Served) -> None:
    with served.sdk(**{"X-Session-ID": uuid.uuid4().hex}) as client:
        client.completions.create(model=MODEL, prompt=list(range(40)))
        usage = client.completions.create(model=MODEL, prompt=[*range(30), *range(100, 110)]).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    extra = usage.prompt_tokens_details.model_extra or {}
    assert extra["divergence"] == {"token": 30, "message": None, "role": None, "change": "prompt"}


@pytest.mark.parametrize("stream", [False, True])
def test_no_token_id_and_nothing_of_the_engines_is_in_an_answer(served: Served, stream: bool) -> None:
    answer = served.ask(stream=stream)
    for word in (b"token_ids", b"kv_transfer_params", b"prompt_text", b"cache_salt"):
        assert word not in answer.body


def test_token_ids_are_there_for_who_asks_for_them(served: Served) -> None:
    assert served.ask(return_token_ids=True).json["choices"][0]["token_ids"] == list(range(15))
    events = served.ask(return_token_ids=True, stream=True).events
    assert [i for event in events[:-1] for i in event["choices"][0].get("token_ids") or ()] == list(range(15))


def test_a_tool_call_is_handed_over_and_its_result_is_taken(served: Served) -> None:
    with served.sdk() as client:
        asked = said('@stub {"tool": "weather"}')
        answer = client.chat.completions.create(model=MODEL, messages=asked, tools=[WEATHER])
        assert answer.choices[0].finish_reason == "tool_calls"
        calls = answer.choices[0].message.tool_calls
        assert calls is not None
        (call,) = calls
        assert call.type == "function"
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Oslo"}')
        asked.append({"role": "assistant", "tool_calls": [call.model_dump()]})  # type: ignore[list-item]
        asked.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
        final = client.chat.completions.create(model=MODEL, messages=asked, tools=[WEATHER])
    assert final.choices[0].message.content == SAID
    session = served.newest_session()
    assert session.turns == 2
    second = served.transcript(session.session_id).turns[1]
    assert [message["role"] for message in second.new_messages] == ["tool"]


def test_a_streamed_tool_call_is_put_together_in_the_transcript(served: Served) -> None:
    with served.sdk() as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=said('Streamed. @stub {"tool": "weather"}'), tools=[WEATHER], stream=True
        )
        calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function is not None
    assert calls[0].function.name == "weather"
    (turn,) = served.transcript(served.newest_session().session_id).turns
    assert turn.answer["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}


def test_a_completion_is_answered_streamed_and_not(served: Served) -> None:
    with served.sdk() as client:
        whole = client.completions.create(model=MODEL, prompt="Once")
        streamed = list(client.completions.create(model=MODEL, prompt="Once", stream=True))
        of_ids = client.completions.create(model=MODEL, prompt=[1, 2, 3])
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in streamed) == SAID
    assert of_ids.usage is not None
    assert of_ids.usage.prompt_tokens == 3


def test_several_choices_are_answered_and_kept(served: Served) -> None:
    with served.sdk() as client:
        whole = client.chat.completions.create(model=MODEL, messages=said("Several"), n=3)
        streamed = list(client.chat.completions.create(model=MODEL, messages=said("Several"), n=3, stream=True))
    assert [choice.message.content for choice in whole.choices] == [SAID] * 3
    assert {chunk.choices[0].index for chunk in streamed} == {0, 1, 2}
    (turn,) = served.transcript(served.newest_session().session_id).turns
    assert [other["content"] for other in turn.answer["alternatives"]] == [SAID] * 2


def test_models_are_listed_and_found(served: Served) -> None:
    with served.sdk() as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")


def test_a_wrong_key_is_an_authentication_error(served: Served) -> None:
    with served.sdk("hf_wrong") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.chat.completions.create(model=MODEL, messages=said("hello"))
    assert refused.value.code == "invalid_api_key"
    assert "holdfast key create" in refused.value.message


def test_a_model_that_the_key_may_not_use_is_a_permission_error(served: Served) -> None:
    key = served.new_key(models=["another"]).secret
    with served.sdk(key) as client:
        with pytest.raises(openai.PermissionDeniedError) as refused:
            client.chat.completions.create(model=MODEL, messages=said("hello"))
        assert refused.value.code == "model_not_allowed"
        assert list(client.models.list()) == []
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(MODEL)


def test_a_model_that_is_not_served_is_a_not_found_error(served: Served) -> None:
    with served.sdk() as client, pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-9", messages=said("hello"))
    assert refused.value.code == "model_not_found"
    assert refused.value.param == "model"


def test_what_the_request_lacks_is_a_bad_request_error(served: Served) -> None:
    with served.sdk() as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=[])
    assert refused.value.param == "messages"


def test_too_many_requests_are_a_rate_limit_error_that_says_when(served: Served) -> None:
    key = served.new_key(requests_per_minute=1).secret
    with served.sdk(key) as client:
        client.chat.completions.create(model=MODEL, messages=said("hello"))
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model=MODEL, messages=said("hello"))
    assert refused.value.code == "rate_limit_exceeded"
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 60


def test_a_day_s_tokens_are_reserved_then_settled(served: Served) -> None:
    key = served.new_key(tokens_per_day=200).secret
    with served.sdk(key) as client:
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model=MODEL, messages=said("hello"), max_tokens=500)
        assert refused.value.code == "daily_tokens_spent"
        for _ in range(3):  # 16 tokens each, of which 150 are reserved while it runs
            client.chat.completions.create(model=MODEL, messages=said("hello"), max_tokens=120)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model=MODEL, messages=said("hello"), max_tokens=150)


def test_a_context_longer_than_the_model_is_openai_s_error(served: Served) -> None:
    with served.sdk() as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=said("long " * 10_000))
    assert refused.value.code == "context_length_exceeded"
    assert "maximum context length is 8192" in refused.value.message
    assert refused.value.param == "messages"
    with served.sdk() as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="long " * 10_000)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


def test_a_stream_that_breaks_raises_in_the_sdk(served: Served) -> None:
    with served.sdk() as client:
        stream = client.chat.completions.create(model=MODEL, messages=said('@stub {"error_after": 3}'), stream=True)
        with pytest.raises(openai.APIError) as broken:
            list(stream)
    assert broken.value.code == "engine_lost"
