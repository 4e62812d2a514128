"""Input that is wrong, hostile, or too much: each has an answer, and none reaches the engine."""

import contextlib
import json
import re
import resource
from collections.abc import Iterator
from typing import Any

import pytest

from api.openai.fields import CHAT, COMPLETION
from benchmarks.stub import MODEL
from tests.e2e.api.conftest import Answer, Served, until

HELLO = [{"role": "user", "content": "hello"}]


def chat(served: Served, body: bytes | dict[str, Any], **headers: str) -> Answer:
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    return served.send("POST", "/v1/chat/completions", given, headers=headers)


NO_JSON = {
    "nothing": b"",
    "no json": b"hello",
    "half": b'{"model": "stub", "messages": [',
    "behind it": b'{"model": "stub"} x',
    "a list": b"[]",
    "a text": b'"hello"',
    "not a number": b'{"model": "stub", "temperature": NaN}',
    "infinity": b'{"model": "stub", "temperature": -Infinity}',
    "invalid utf-8": b'{"model": "st\xffub"}',
    "utf-16": '{"model": "stub"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"model": "stub"}',
    "half a surrogate": b'{"model": "\\ud800"}',
    "a control character": b'{"model": "a\x00b"}',
    "duplicate keys": b'{"model": "stub", "model": "other"}',
    "duplicate keys within": b'{"model": "stub", "messages": [{"role": "user", "role": "system"}]}',
    "a huge key": b'{"' + b"x" * 300 + b'": 1}',
    "a number of 5,000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "10,000 lists deep": b"[" * 10_000 + b"]" * 10_000,
    "10,000 objects deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "deep in a tool": json.dumps({"tools": []}).encode()[:-2] + b"[" * 10_000 + b"]" * 10_000 + b"]}",
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON.keys())
def test_what_is_not_strict_json_is_refused(served: Served, body: bytes) -> None:
    before = served.engine_seen()["requests"]
    for path in ("/v1/chat/completions", "/v1/completions"):
        answer = served.send("POST", path, body)
        assert (answer.status, answer.code) == (400, "malformed_json")
    assert served.engine_seen()["requests"] == before


BAD_MESSAGES: dict[str, Any] = {
    "missing": None,
    "none": [],
    "a text": "hello",
    "a list of texts": ["hello"],
    "no role": [{"content": "hello"}],
    "an unknown role": [{"role": "wizard", "content": "hello"}],
    "a role that is a list": [{"role": ["user"], "content": "hello"}],
    "no content": [{"role": "user"}],
    "content that is a number": [{"role": "user", "content": 7}],
    "no part": [{"role": "user", "content": []}],
    "a part that is a text": [{"role": "user", "content": ["hello"]}],
    "a part without a text": [{"role": "user", "content": [{"type": "text"}]}],
    "a part of an unknown type": [{"role": "user", "content": [{"type": "smell", "smell": "x"}]}],
    "a tool's answer to nothing": [{"role": "tool", "content": "x"}],
    "a tool call without a name": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"arguments": "{}"}}]}],
    "a tool call that is none": [{"role": "assistant", "tool_calls": ["x"]}],
    "tool calls that are no list": [{"role": "assistant", "tool_calls": {}}],
}


@pytest.mark.parametrize("messages", BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_messages_that_are_none_are_refused_by_name(served: Served, messages: Any) -> None:
    answer = chat(served, {"model": MODEL, "messages": messages})
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert answer.json["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": "http://evil.example/"}},
        {"type": "video_url", "video_url": {"url": "http://evil.example/"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "prompt_embeds", "prompt_embeds": "AAAA"},
    ],
    ids=lambda part: part["type"],
)
def test_media_is_refused_and_reaches_nothing(served: Served, part: dict[str, Any]) -> None:
    before = served.engine_seen()["requests"]
    answer = chat(served, {"model": MODEL, "messages": [{"role": "user", "content": [part]}]})
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert "text only" in answer.json["error"]["message"]
    assert served.engine_seen()["requests"] == before


def test_100_000_messages_are_refused(served: Served) -> None:
    answer = chat(served, {"model": MODEL, "messages": [{"role": "user", "content": "x"}] * 100_000})
    assert (answer.status, answer.code) == (400, "too_many_values")


def test_a_message_more_than_allowed_is_one_too_many(served: Served) -> None:
    answer = chat(served, {"model": MODEL, "messages": [{"role": "user", "content": "x"}] * 20_001})
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert "20001" in answer.json["error"]["message"]


@pytest.mark.parametrize("value", [b"[],", b"{},", b"1,", b'{"a":[]},'])
def test_a_body_of_many_values_is_refused_before_it_is_parsed(served: Served, value: bytes) -> None:
    before = served.gateway.cpu_s
    answer = chat(served, b'{"x":[' + value * ((15 << 20) // len(value)) + b"0]}")
    assert (answer.status, answer.code) == (400, "too_many_values")
    assert "gateway.max_json_values" in answer.json["error"]["cause"]
    assert served.gateway.cpu_s - before < 0.5  # parsing it takes several seconds


def test_a_key_that_may_not_ask_now_is_refused_before_its_body_is_read(served: Served) -> None:
    key = served.new_key(principal="hasty", requests_per_minute=1).secret
    assert served.ask(api_key=key).status == 200
    refused = served.send("POST", "/v1/completions", headers={"Content-Length": str(8 << 20)}, api_key=key)
    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert refused.headers["connection"] == "close"


OUT_OF_BOUNDS: list[dict[str, Any]] = [
    {"model": ""},
    {"model": None},
    {"model": 7},
    {"model": "x" * 300},
    {"stream": "yes"},
    {"stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": "x"},
    {"stream": True, "stream_options": {"include_usage": "x"}},
    {"temperature": -1},
    {"temperature": "hot"},
    {"temperature": True},
    {"top_p": 0},
    {"top_k": -5},
    {"n": 0},
    {"n": 9},
    {"n": 1.5},
    {"max_tokens": 0},
    {"max_tokens": "many"},
    {"max_completion_tokens": -1},
    {"seed": 1 << 64},
    {"stop": [""]},
    {"stop": ["x"] * 5},
    {"stop": {"a": 1}},
    {"stop_token_ids": [-1]},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"1": 101}},
    {"logprobs": 5},
    {"top_logprobs": 21, "logprobs": True},
    {"top_logprobs": 2},
    {"tools": []},
    {"tools": [{"type": "function"}]},
    {"tools": [{"type": "function", "function": {"name": ""}}]},
    {"tools": [{"type": "retrieval", "function": {"name": "x"}}]},
    {"tools": [{"type": "function", "function": {"name": "x", "parameters": "x"}}]},
    {"tool_choice": "auto"},
    {"tool_choice": {"type": "function"}, "tools": [{"type": "function", "function": {"name": "x"}}]},
    {"response_format": "json"},
    {"response_format": {"type": "structural_tag", "format": {}}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "x"}}},
    {"reasoning_effort": "heroic"},
    {"previous_response_id": "a b"},
    {"prompt_cache_key": "x" * 300},
    {"conversation": {"id": 7}},
]


@pytest.mark.parametrize("fields", OUT_OF_BOUNDS, ids=lambda fields: json.dumps(fields)[:60])
def test_a_field_out_of_its_bounds_is_refused_by_name(served: Served, fields: dict[str, Any]) -> None:
    answer = chat(served, {"model": MODEL, "messages": HELLO, **fields})
    assert (answer.status, answer.code) == (400, "invalid_request"), answer
    assert answer.json["error"]["param"].partition(".")[0].partition("[")[0] in fields


def test_a_number_that_only_json_can_write_is_refused(served: Served) -> None:
    answer = chat(served, b'{"model": "stub", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}')
    assert (answer.status, answer.json["error"]["param"]) == (400, "temperature")


@pytest.mark.parametrize("prompt", [None, 7, [], ["a", "b"], [[1], [2]], [1, "a"], [-1], [1.5], {"a": 1}])
def test_a_prompt_that_is_none_is_refused(served: Served, prompt: Any) -> None:
    answer = served.send("POST", "/v1/completions", json.dumps({"model": MODEL, "prompt": prompt}).encode())
    assert (answer.status, answer.json["error"]["param"]) == (400, "prompt")


VALUES: dict[str, Any] = {
    "cache_salt": "mine",
    "priority": -100,
    "session_id": "another's",
    "kv_transfer_params": {"holdfast": {"session": "x"}, "do_remote_prefill": True},
    "vllm_xargs": {"session_id": "x", "kv_transfer_params": "x"},
    "chat_template": "{{ 7 * 7 }}",
    "prompt_embeds": "AAAA",
}


@pytest.mark.parametrize("name", sorted(CHAT.denied | {"unheard_of", "guided_json", "metadata", "store"}))
def test_a_field_that_is_not_on_the_list_is_dropped_and_named_in_a_chat(served: Served, name: str) -> None:
    answer = chat(served, {"model": MODEL, "messages": HELLO, name: VALUES.get(name, True)})
    assert answer.status == 200
    assert answer.headers["x-holdfast-dropped"] == name
    reached = served.engine_seen()["bodies"][-1]
    assert name not in reached or reached[name] != VALUES.get(name, True)


CONTROL = {
    "kv_transfer_params": {"do_remote_prefill": True, "release": ["another's"], "holdfast": {"session": "another's"}},
    "vllm_xargs": {"session_id": "another's", "release": "another's"},
    "session_id": "another's",
    "cache_salt": "another's",
}


def test_control_fields_of_a_request_that_is_refused_here_do_not_come_to_the_engine(served: Served) -> None:
    before = served.engine_seen()
    assert chat(served, {"model": MODEL, "messages": HELLO, "temperature": 99, **CONTROL}).status == 400
    assert served.engine_seen()["bodies"] == before["bodies"]


def test_control_fields_of_a_request_that_the_engine_rejects_did_not_come_to_it(served: Served) -> None:
    asked = [{"role": "user", "content": '@stub {"status": 400}'}]
    answer = chat(served, {"model": MODEL, "messages": asked, **CONTROL})
    assert (answer.status, answer.code) == (400, "engine_refused")
    reached = served.engine_seen()["bodies"][-1]
    assert reached["messages"] == asked
    assert "another's" not in json.dumps(reached)
    assert set(reached["kv_transfer_params"]) == {"holdfast"}


# What decides something here, what decides something in vLLM 0.32, what proxies and tracers send, what nobody knows.
CLIENTS_HEADERS = {
    "X-Session-ID": "mine",
    "X-Parent-Session-ID": "parent",
    "X-Request-ID": "of-the-client",
    "X-Data-Parallel-Rank": "1",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "a=b",
    "baggage": "a=b",
    "X-Forwarded-For": "10.0.0.1",
    "X-Unheard-Of": "x",
    "Accept": "text/plain",
    "Accept-Encoding": "gzip",
    "Content-Type": "application/json; charset=latin-1",
    "Cookie": "a=b",
    "User-Agent": "somebody",
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_no_header_of_a_clients_reaches_the_engine(served: Served, path: str, stream: bool) -> None:
    asked = {"messages": HELLO} if "chat" in path else {"prompt": "hello"}
    body = json.dumps({"model": MODEL, "stream": stream, **asked}).encode()
    assert served.send("POST", path, body, headers=CLIENTS_HEADERS).status == 200
    seen = served.engine_seen()
    sent = [(name.lower(), value) for name, value in seen["headers"][-1]]
    named = dict(sent)
    request_id, length = named.pop("x-request-id"), named.pop("content-length")
    assert named == {
        "host": "engine", "content-type": "application/json", "accept": "application/json, text/event-stream"
    }  # fmt: skip
    assert len(sent) == len(named) + 2, "each once"
    assert re.fullmatch(r"[0-9a-z_-]{16,}", request_id)
    assert request_id != CLIENTS_HEADERS["X-Request-ID"]
    assert int(length) > len(body)


@pytest.mark.parametrize("name", sorted(COMPLETION.denied | {"unheard_of", "best_of", "messages"}))
def test_a_field_that_is_not_on_the_list_is_dropped_and_named_in_a_completion(served: Served, name: str) -> None:
    body = {"model": MODEL, "prompt": "hello", name: VALUES.get(name, True)}
    answer = served.send("POST", "/v1/completions", json.dumps(body).encode())
    assert answer.status == 200
    assert answer.headers["x-holdfast-dropped"] == name
    reached = served.engine_seen()["bodies"][-1]
    assert name not in reached or reached[name] != VALUES.get(name, True)


def test_what_is_dropped_inside_of_fields_is_named_too(served: Served) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {}}], "audio": {"id": 1}}]
    tools = [{"type": "function", "function": {"name": "x", "evil": 1}, "cache_control": {}}]
    answer = chat(served, {"model": MODEL, "messages": messages, "tools": tools})
    assert answer.status == 200
    assert set(answer.headers["x-holdfast-dropped"].split(", ")) == {
        "messages[].audio",
        "messages[].content[].cache_control",
        "tools[].cache_control",
        "tools[].function.evil",
    }
    reached = json.dumps(served.engine_seen()["bodies"][-1])
    assert "cache_control" not in reached
    assert "evil" not in reached


def test_names_of_what_was_dropped_are_few_and_safe(served: Served) -> None:
    odd = {f"x\r\nSet-Cookie: {number}": 1 for number in range(50)}
    answer = chat(served, {"model": MODEL, "messages": HELLO, **odd})
    assert answer.status == 200
    assert "set-cookie" not in answer.headers
    assert answer.headers["x-holdfast-dropped"].endswith("and 30 more")


def test_nothing_reaches_the_engine_but_the_list_and_what_the_gateway_adds(served: Served) -> None:
    everything = dict.fromkeys(CHAT.denied | {"unheard_of"}, "x")
    assert chat(served, {"model": MODEL, "messages": HELLO, "temperature": 0.5, **everything}).status == 200
    reached = served.engine_seen()["bodies"][-1]
    assert set(reached) == {"messages", "model", "temperature", "cache_salt", "kv_transfer_params", "return_token_ids"}
    assert len(reached["cache_salt"]) == 64
    assert set(reached["kv_transfer_params"]) == {"holdfast"}


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
def test_a_body_of_200_mb_is_refused_without_being_held(served: Served, announced: bool) -> None:
    before = served.gateway.rss_bytes
    piece, pieces = b"x" * (1 << 20), 200
    framing = f"Content-Length: {len(piece) * pieces}" if announced else "Transfer-Encoding: chunked"
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {served.api_key}\r\n{framing}\r\n\r\n"
    )
    chunk = piece if announced else b"%x\r\n%s\r\n" % (len(piece), piece)
    sent = 0
    highest = before
    answered = b""
    with served.connect() as connection:
        connection.sendall(head.encode())
        try:
            while sent < pieces:
                connection.sendall(chunk)
                sent += 1
                highest = max(highest, served.gateway.rss_bytes)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass
        try:
            while part := connection.recv(1 << 16):
                answered += part
        except ConnectionResetError:
            pass
    assert sent < pieces, "the connection was closed before all of it was taken"
    assert highest - before < 64 << 20
    assert answered == b"" or answered.startswith(b"HTTP/1.1 413")
    assert served.ask().status == 200


def test_a_body_too_large_is_told_so(served: Served) -> None:
    answer = served.send("POST", "/v1/chat/completions", headers={"Content-Length": str(200 << 20)})
    assert (answer.status, answer.code) == (413, "body_too_large")
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("name", ["X-Session-ID", "x-dynamo-session-id", "x-claude-code-session-id", "session-id"])
@pytest.mark.parametrize("value", ["a b", "x" * 257, "caf\u00e9", "\x7f"])
def test_a_session_id_that_cannot_be_one_is_refused(served: Served, name: str, value: str) -> None:
    answer = chat(served, {"model": MODEL, "messages": HELLO}, **{name: value})
    assert answer.status == 400


def test_a_refusal_that_quotes_the_salt_is_not_repeated(served: Served) -> None:
    answer = served.ask('@stub {"status": 400, "quote_salt": true}')
    assert (answer.status, answer.code) == (400, "engine_refused")
    assert served.engine_seen()["bodies"][-1]["cache_salt"].encode() not in answer.body
    plain = served.ask('@stub {"status": 400}')
    assert "as it was told to" in plain.json["error"]["message"]


@contextlib.contextmanager
def full_disk(served: Served) -> Iterator[None]:
    """Within it, the gateway can extend no file, nor write behind the first page of one."""
    pid = served.gateway.process.pid
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_when_the_disk_is_full_a_turn_is_refused_by_name_and_goes_on_when_there_is_room(
    served: Served, stream: bool
) -> None:
    session = f"full-{stream}"
    before = served.engine_seen()["requests"]
    with full_disk(served):
        answer = served.ask('hello @stub {"chunks": 2}', session=session, stream=stream)
    assert served.engine_seen()["requests"] == before + 1  # it was answered, and could not be kept
    if stream:
        error = answer.events[-1]["error"]
        assert "[DONE]" not in answer.events
        assert not any(event.get("choices", [{}])[0].get("finish_reason") for event in answer.events)
    else:
        assert answer.status == 503
        error = answer.json["error"]
        assert "choices" not in answer.json
    assert error["code"] == "store_full"
    assert str(served.state_dir) in error["message"]
    assert served.ask("room again", session=session).status == 200
    turns = served.transcript(served.newest_session().session_id).turns
    assert [turn.new_messages[-1]["content"] for turn in turns] == ["room again"]


def test_a_store_that_cannot_be_written_is_not_ready_until_it_can(served: Served) -> None:
    with full_disk(served):
        assert served.ask().code == "store_full"
        until(lambda: served.send("GET", "/readyz").status == 503)
        store = served.send("GET", "/readyz").json["parts"]["store"]
    assert store == {"ready": False, "why": "there is no room left on its disk"}
    until(lambda: served.send("GET", "/readyz").status == 200)
