"""From a client's body to a `Turn`: what may pass is taken, checked and bounded; the rest is dropped and named.

Rules:

- Nothing of the body reaches the engine that is not on the allow-list in `fields`, checked for type and bounds here.
  Messages, tools and formats are allow-lists too, down to their keys.
- What is dropped is named, at most `_NAMED` of it, in words that are safe in a header.
- Media in a message is an error, not dropped: an answer without it would be an answer to another question.
- The JSON is strict: no duplicate keys, no NaN, no lone surrogates, at most 200 levels deep (pydantic_core's bound).
- No I/O.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic_core import from_json, to_json

from api.bodies import count_of
from api.openai.agent_hints import AgentHints, read_agent_hints
from api.openai.errors import MalformedBody, RequestError
from api.openai.fields import CHAT, COMPLETION, MAX_STOPS, Fields
from api.openai.schemas import check_schemas
from appliance.sessions import Message, SessionHints, Turn, TurnKind

MAX_CHOICES: Final = 8
_MAX_NAME = 256  # characters
_MAX_TOOLS = 512
_MAX_TOOL_CALLS = 256
_MAX_PARTS = 1024
_MAX_PROMPT_IDS = 1 << 20
_INT64 = 1 << 63
_NAMED = 20

_COMMON_KEYS = frozenset({"role", "content", "name"})
_MESSAGE_KEYS: Mapping[str, frozenset[str]] = {
    "system": _COMMON_KEYS,
    "developer": _COMMON_KEYS,
    "user": _COMMON_KEYS,
    "assistant": _COMMON_KEYS | {"tool_calls", "function_call", "refusal", "reasoning", "reasoning_content"},
    "tool": _COMMON_KEYS | {"tool_call_id"},
    "function": _COMMON_KEYS,
}
_MEDIA_PARTS = frozenset(
    {
        "audio",
        "audio_embeds",
        "audio_url",
        "file",
        "image",
        "image_embeds",
        "image_pil",
        "image_url",
        "input_audio",
        "input_file",
        "input_image",
        "prompt_embeds",
        "video",
        "video_url",
    }
)
_UNSAFE_IN_NAME = re.compile(r"[^A-Za-z0-9_.\[\]-]")


@dataclass(slots=True)
class Dropped:
    """The names of what did not pass, in the order of their appearance."""

    names: dict[str, None] = field(default_factory=dict)

    def add(self, name: str) -> None:
        """Name one; names beyond `_NAMED` are counted only."""
        self.names[_UNSAFE_IN_NAME.sub("?", name[:80])] = None

    def header(self) -> str | None:
        """The value of `X-Holdfast-Dropped`, None when nothing was."""
        if not self.names:
            return None
        listed = list(self.names)[:_NAMED]
        rest = len(self.names) - len(listed)
        return ", ".join(listed) + (f", and {rest} more" if rest else "")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that may pass.

    Attributes:
        turn: what is asked, for the sessions.
        prompt: a completion's prompt; None for a chat.
        choices: how many answers were asked for.
        max_tokens: the bound that the client set on each answer, if any.
        include_usage: the client wants the usage at the end of the stream.
        keep_token_ids: the client wants token ids in the answer.
        agent_hints: what its harness advises.
    """

    turn: Turn
    prompt: str | list[int] | None
    stream: bool
    include_usage: bool
    keep_token_ids: bool
    choices: int
    max_tokens: int | None
    dropped: Dropped
    agent_hints: AgentHints


def read_chat(body: bytes | bytearray, hints: "HintsReader", *, max_messages: int) -> Asked:
    """Decode the body of `/v1/chat/completions`.

    Raises:
        RequestError: names the field and what is allowed.
    """
    request = _object(body)
    dropped = Dropped()
    passed = _passed(request, CHAT, _CHAT_CHECKS, dropped)
    messages = _messages(request.get("messages"), max_messages, dropped)
    if passed.get("top_logprobs") and not passed.get("logprobs"):
        raise _invalid("top_logprobs", "it needs logprobs to be true")
    if "tool_choice" in passed and passed["tool_choice"] != "none" and "tools" not in passed:
        raise _invalid("tool_choice", "it needs tools")
    check_schemas("tools", _compiled_parameters(passed.get("tools", ()), passed.get("tool_choice")))
    max_tokens = passed.get("max_completion_tokens", passed.get("max_tokens"))
    return _asked(request, TurnKind.CHAT, passed, messages, None, max_tokens, hints, dropped)


def read_completion(body: bytes | bytearray, hints: "HintsReader") -> Asked:
    """Decode the body of `/v1/completions`.

    Raises:
        RequestError: names the field and what is allowed.
    """
    request = _object(body)
    dropped = Dropped()
    passed = _passed(request, COMPLETION, _COMPLETION_CHECKS, dropped)
    prompt = _prompt(request.get("prompt"))
    return _asked(request, TurnKind.COMPLETION, passed, (), prompt, passed.get("max_tokens", 16), hints, dropped)


HintsReader = Callable[[Mapping[str, Any]], SessionHints]
"""Reads what a request says of its session, given the body."""


def _asked(
    request: dict[str, Any],
    kind: TurnKind,
    passed: dict[str, Any],
    messages: Sequence[Message],
    prompt: str | list[int] | None,
    max_tokens: int | None,
    hints: HintsReader,
    dropped: Dropped,
) -> Asked:
    stream = _flag(request, "stream")
    options = request.get("stream_options")
    include_usage = False
    if options is not None:
        if not isinstance(options, dict):
            raise _invalid("stream_options", "it must be an object")
        if not stream:
            raise _invalid("stream_options", "it is allowed only when stream is true")
        include_usage = _flag(options, "include_usage", within="stream_options.")
        for name in options:
            if name != "include_usage":
                dropped.add(f"stream_options.{name}")
    model = request.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= _MAX_NAME:
        raise _invalid("model", "it must be the name of a model; GET /v1/models lists them")
    parameters = passed if prompt is None else {**passed, "prompt": prompt}
    return Asked(
        turn=Turn(kind, model, messages, parameters, hints(request)),
        prompt=prompt,
        stream=stream,
        include_usage=include_usage,
        keep_token_ids=_flag(request, "return_token_ids"),
        choices=passed.get("n", 1),
        max_tokens=max_tokens,
        dropped=dropped,
        agent_hints=read_agent_hints(request, dropped.add),
    )


# The body


def _object(body: bytes | bytearray) -> dict[str, Any]:
    try:
        request = from_json(bytes(body), allow_inf_nan=False)
        # Duplicates, which from_json lets pass. Each has a colon that what was read has not, and where nothing is
        # written as \u003a a text has as many here as there: equal counts spare reading it all a second time.
        if b"\\u" in body or count_of(body, b":") != count_of(to_json(request), b":"):
            json.loads(body, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise MalformedBody(
            "the body cannot be read",
            cause=f"it is not strict JSON: {str(error)[:200]}",
            remedy="Send one JSON object in UTF-8, without duplicate keys, nested at most 200 deep",
        ) from None
    if not isinstance(request, dict):
        raise MalformedBody(
            "the body cannot be read", cause="it is JSON but no object", remedy="Send one JSON object in UTF-8"
        )
    if any(len(name) > _MAX_NAME for name in request):
        raise MalformedBody(
            "the body cannot be read",
            cause=f"the name of a field is longer than {_MAX_NAME} characters",
            remedy="Send the fields of the OpenAI API",
        )
    return request


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    names = {name for name, _ in pairs}
    if len(names) != len(pairs):
        raise ValueError("a key appears twice in one object")


def _passed(
    request: dict[str, Any], fields: Fields, checks: Mapping[str, "_Check"], dropped: Dropped
) -> dict[str, Any]:
    passed: dict[str, Any] = {}
    for name, value in request.items():
        check = checks.get(name)
        if check is None:
            if name not in fields.handled:
                dropped.add(name)
        elif value is not None:
            passed[name] = check(name, value, dropped)
    return passed


def _flag(request: Mapping[str, Any], name: str, *, within: str = "") -> bool:
    value = request.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _invalid(within + name, "it must be true or false")
    return value


def _invalid(param: str, cause: str) -> RequestError:
    return RequestError(
        f"{param} cannot be used", cause=cause, remedy="Correct the field, or leave it out", param=param
    )


# Messages


def _messages(value: Any, max_messages: int, dropped: Dropped) -> Sequence[Message]:
    if not isinstance(value, list) or not value:
        raise _invalid("messages", "it must be a list of at least one message")
    if len(value) > max_messages:
        raise RequestError(
            "the conversation has too many messages",
            cause=f"it has {len(value)}; allowed are {max_messages}",
            remedy="Summarise or leave out the oldest messages",
            param="messages",
        )
    return [_message(index, message, dropped) for index, message in enumerate(value)]


def _message(index: int, message: Any, dropped: Dropped) -> Message:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise _invalid(where, "a message must be an object")
    role = message.get("role")
    keys = _MESSAGE_KEYS.get(role) if isinstance(role, str) else None
    if keys is None:
        raise _invalid(f"{where}.role", f"it must be one of {', '.join(_MESSAGE_KEYS)}")
    content = message.get("content")
    if isinstance(content, str) and len(message) == 2 and role != "tool":
        return message  # by far the most of them: nothing to leave out
    kept: dict[str, Any] = {}
    for name, given in message.items():
        if name not in keys:
            dropped.add(f"messages[].{name}")
        elif name == "content":
            kept[name] = _content(where, role, given, dropped)
        elif given is not None:
            kept[name] = _MESSAGE_CHECKS[name](f"{where}.{name}", given, dropped)
    if content is None and role != "assistant":
        raise _invalid(f"{where}.content", f"a message of the role {role} must have one")
    if role == "tool" and "tool_call_id" not in kept:
        raise _invalid(f"{where}.tool_call_id", "a message of the role tool must have one")
    return kept


def _content(where: str, role: Any, content: Any, dropped: Dropped) -> Any:
    if isinstance(content, str) or (content is None and role == "assistant"):
        return content
    if not isinstance(content, list) or not 0 < len(content) <= _MAX_PARTS:
        raise _invalid(f"{where}.content", f"it must be a text, or a list of 1 to {_MAX_PARTS} parts")
    return [_part(f"{where}.content[{index}]", part, dropped) for index, part in enumerate(content)]


def _part(where: str, part: Any, dropped: Dropped) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in _MEDIA_PARTS:
        raise RequestError(
            f"{where} cannot be used",
            cause=f"a part of the type {kind} carries media or points to it, and this appliance takes text only",
            remedy="Send text parts only",
            param=where,
        )
    if kind not in ("text", "refusal"):
        raise _invalid(where, "a part must be an object of the type text")
    text = part.get(kind)
    if not isinstance(text, str):
        raise _invalid(f"{where}.{kind}", "it must be a text")
    for name in part:
        if name not in ("type", kind):
            dropped.add(f"messages[].content[].{name}")
    return {"type": kind, kind: text}


def _tool_calls(param: str, value: Any, dropped: Dropped) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > _MAX_TOOL_CALLS:
        raise _invalid(param, f"it must be a list of at most {_MAX_TOOL_CALLS} calls")
    calls = []
    for index, call in enumerate(value):
        where = f"{param}[{index}]"
        if not isinstance(call, dict) or call.get("type", "function") != "function":
            raise _invalid(where, "a call must be an object of the type function")
        if not isinstance(call.get("id"), str):
            raise _invalid(f"{where}.id", "it must be a text")
        for name in call:
            if name not in ("id", "type", "function"):
                dropped.add(f"messages[].tool_calls[].{name}")
        called = _called(f"{where}.function", call.get("function"), dropped)
        calls.append({"id": call["id"], "type": "function", "function": called})
    return calls


def _called(param: str, value: Any, dropped: Dropped) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _invalid(param, "it must be an object with a name and arguments")
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise _invalid(param, "its name and its arguments must be texts")
    for key in value:
        if key not in ("name", "arguments"):
            dropped.add(f"messages[].tool_calls[].function.{key}")
    return {"name": name, "arguments": arguments}


# The prompt of a completion


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(item) is int and 0 <= item < 1 << 31 for item in value):
        if len(value) <= _MAX_PROMPT_IDS:
            return value
        raise _invalid("prompt", f"it has more than {_MAX_PROMPT_IDS} token ids")
    raise _invalid("prompt", "it must be one text, or one list of token ids; more prompts are more requests")


# Fields

_Check = Callable[[str, Any, Dropped], Any]


def _number(low: float, high: float) -> _Check:
    def check(param: str, value: Any, _: Dropped) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _invalid(param, "it must be a number")
        if not low <= value <= high:
            raise _invalid(param, f"it must be from {low:g} to {high:g}")
        return value

    return check


def _integer(low: int, high: int) -> _Check:
    def check(param: str, value: Any, _: Dropped) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _invalid(param, "it must be a whole number")
        if not low <= value <= high:
            raise _invalid(param, f"it must be from {low} to {high}")
        return value

    return check


def _boolean(param: str, value: Any, _: Dropped) -> bool:
    if not isinstance(value, bool):
        raise _invalid(param, "it must be true or false")
    return value


def _text(param: str, value: Any, _: Dropped) -> str:
    if not isinstance(value, str):
        raise _invalid(param, "it must be a text")
    return value


def _one_of(*words: str) -> _Check:
    def check(param: str, value: Any, _: Dropped) -> str:
        if not isinstance(value, str) or value not in words:
            raise _invalid(param, f"it must be one of {', '.join(words)}")
        return value

    return check


def _stop(param: str, value: Any, _: Dropped) -> str | list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(isinstance(text, str) for text in texts):
        raise _invalid(param, f"it must be a text or a list of at most {MAX_STOPS} texts")
    if any(not 0 < len(text) <= 1024 for text in texts):
        raise _invalid(param, "each text must have 1 to 1024 characters")
    return texts


def _stop_token_ids(param: str, value: Any, _: Dropped) -> list[int]:
    if not isinstance(value, list) or len(value) > 64 or not all(type(i) is int and 0 <= i < 1 << 31 for i in value):
        raise _invalid(param, "it must be a list of at most 64 token ids")
    return value


def _logit_bias(param: str, value: Any, dropped: Dropped) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > 1024:
        raise _invalid(param, "it must be an object of at most 1024 token ids")
    bias = _number(-100, 100)
    if not all(name.isascii() and name.isdigit() and len(name) <= 10 for name in value):
        raise _invalid(param, "its names must be token ids")
    return {name: bias(f"{param}.{name}", given, dropped) for name, given in value.items()}


def _tools(param: str, value: Any, dropped: Dropped) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_TOOLS:
        raise _invalid(param, f"it must be a list of 1 to {_MAX_TOOLS} tools")
    return [_tool(f"{param}[{index}]", tool, dropped) for index, tool in enumerate(value)]


_FUNCTION_TYPES: Mapping[str, type] = {"name": str, "description": str, "parameters": dict, "strict": bool}


def _tool(param: str, tool: Any, dropped: Dropped) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise _invalid(param, "a tool must be an object of the type function with a function")
    for name in tool:
        if name not in ("type", "function"):
            dropped.add(f"tools[].{name}")
    function: dict[str, Any] = {}
    for name, given in tool["function"].items():
        wanted = _FUNCTION_TYPES.get(name)
        if wanted is None:
            dropped.add(f"tools[].function.{name}")
        elif given is not None:
            if not isinstance(given, wanted):
                raise _invalid(f"{param}.function.{name}", f"it must be of the type {wanted.__name__}")
            function[name] = given
    if not 0 < len(function.get("name", "")) <= _MAX_NAME:
        raise _invalid(f"{param}.function.name", f"it must have 1 to {_MAX_NAME} characters")
    return {"type": "function", "function": function}


def _tool_choice(param: str, value: Any, dropped: Dropped) -> str | dict[str, Any]:
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise _invalid(param, "it must be none, auto, required, or the function to call")
        return value
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or value.get("type") != "function" or not isinstance(function.get("name"), str):
        raise _invalid(param, "it must be none, auto, required, or the function to call")
    for name in value:
        if name not in ("type", "function"):
            dropped.add(f"{param}.{name}")
    return {"type": "function", "function": {"name": function["name"]}}


def _compiled_parameters(tools: Sequence[dict[str, Any]], tool_choice: Any) -> list[dict[str, Any]]:
    """The schemas that the engine holds the answer to; those of other tools are only shown to the model."""
    forced = tool_choice not in (None, "none", "auto")
    functions = [tool["function"] for tool in tools]
    return [it["parameters"] for it in functions if "parameters" in it and (forced or it.get("strict"))]


_SCHEMA_TYPES: Mapping[str, type] = {"name": str, "description": str, "schema": dict, "strict": bool}


def _response_format(param: str, value: Any, dropped: Dropped) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise _invalid(param, "its type must be text, json_object or json_schema")
    for name in value:
        if name not in ("type", "json_schema"):
            dropped.add(f"{param}.{name}")
    if kind != "json_schema":
        return {"type": kind}
    described = value.get("json_schema")
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise _invalid(f"{param}.json_schema", "it must be an object with a name and a schema")
    kept: dict[str, Any] = {}
    for name, given in described.items():
        wanted = _SCHEMA_TYPES.get(name)
        if wanted is None:
            dropped.add(f"{param}.json_schema.{name}")
        elif given is not None:
            if not isinstance(given, wanted):
                raise _invalid(f"{param}.json_schema.{name}", f"it must be of the type {wanted.__name__}")
            kept[name] = given
    if not isinstance(kept.get("name"), str):
        raise _invalid(f"{param}.json_schema.name", "it must be a text")
    check_schemas(f"{param}.json_schema.schema", [kept["schema"]])
    return {"type": kind, "json_schema": kept}


_MESSAGE_CHECKS: Mapping[str, _Check] = {
    "role": _text,
    "name": _text,
    "refusal": _text,
    "reasoning": _text,
    "reasoning_content": _text,
    "tool_call_id": _text,
    "tool_calls": _tool_calls,
    "function_call": _called,
}

_SAMPLING_CHECKS: Mapping[str, _Check] = {
    "frequency_penalty": _number(-2, 2),
    "ignore_eos": _boolean,
    "logit_bias": _logit_bias,
    "min_p": _number(0, 1),
    "min_tokens": _integer(0, 1 << 31),
    "n": _integer(1, MAX_CHOICES),
    "presence_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 10),
    "response_format": _response_format,
    "seed": _integer(-_INT64, _INT64 - 1),
    "stop": _stop,
    "stop_token_ids": _stop_token_ids,
    "temperature": _number(0, 2),
    "top_k": _integer(-1, 1 << 31),
    "top_p": _number(0.0001, 1),
}
_CHAT_CHECKS: Mapping[str, _Check] = {
    **_SAMPLING_CHECKS,
    "logprobs": _boolean,
    "max_completion_tokens": _integer(1, 1 << 31),
    "max_tokens": _integer(1, 1 << 31),
    "parallel_tool_calls": _boolean,
    "reasoning_effort": _one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "tool_choice": _tool_choice,
    "tools": _tools,
    "top_logprobs": _integer(0, 20),
}
_COMPLETION_CHECKS: Mapping[str, _Check] = {
    **_SAMPLING_CHECKS,
    "logprobs": _integer(0, 20),
    "max_tokens": _integer(1, 1 << 31),
}
