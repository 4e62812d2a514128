"""Every field that vLLM's request models know is on one of our lists: a new one has to be decided on by a person."""

import pytest
from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from api.openai.fields import CHAT, COMPLETION, MAX_STOPS, Fields
from appliance.engine.protocol import Lease, lease_params

# What the gateway itself puts into the engine's body.
OURS = {
    "cache_salt": "ab" * 32,
    "kv_transfer_params": lease_params(Lease("s", "t", 15.0, turn="u")),
    "return_token_ids": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}

MODELS = pytest.mark.parametrize(
    ("model", "fields"),
    [(ChatCompletionRequest, CHAT), (CompletionRequest, COMPLETION)],
    ids=["chat", "completion"],
)


@MODELS
def test_every_field_of_the_engine_is_on_exactly_one_list(
    model: type[ChatCompletionRequest] | type[CompletionRequest], fields: Fields
) -> None:
    known = set(model.model_fields)
    ours_alone = {"conversation", "nvext", "previous_response_id", "prompt_cache_key"}
    assert fields.passed | fields.denied | (fields.handled - ours_alone) == known
    assert not fields.passed & fields.denied
    assert not fields.passed & fields.handled
    assert not fields.denied & fields.handled


@MODELS
def test_what_the_gateway_adds_is_known_to_the_engine(
    model: type[ChatCompletionRequest] | type[CompletionRequest], fields: Fields
) -> None:
    asked = (
        {"messages": [{"role": "user", "content": "hello"}]} if "messages" in fields.handled else {"prompt": "hello"}
    )
    request = model.model_validate({"model": "m", **asked, **OURS})
    assert request.cache_salt == OURS["cache_salt"]
    assert request.kv_transfer_params == OURS["kv_transfer_params"]
    assert request.return_token_ids is True
    assert request.stream_options is not None
    assert request.stream_options.include_usage is True


@MODELS
def test_as_many_stops_may_pass_as_the_engine_takes(
    model: type[ChatCompletionRequest] | type[CompletionRequest], fields: Fields
) -> None:
    asked: dict[str, object] = (
        {"messages": [{"role": "user", "content": "hello"}]} if "messages" in fields.handled else {"prompt": "hello"}
    )
    model.model_validate({"model": "m", **asked, "stop": ["x" * 1024] * MAX_STOPS})
    with pytest.raises(ValidationError, match="stop"):
        model.model_validate({"model": "m", **asked, "stop": ["x"] * (MAX_STOPS + 1)})


def test_no_field_that_says_whose_cache_it_is_may_pass() -> None:
    for fields in (CHAT, COMPLETION):
        assert {"cache_salt", "priority", "session_id", "kv_transfer_params", "vllm_xargs"} <= fields.denied
