"""Stands in for vLLM: answers at once, in vLLM 0.32's words, on a Unix socket. `python -m benchmarks.stub SOCKET`.

What it is for: measuring what the gateway costs, and causing the faults that an engine can have.

Rules:

- A stream is what vLLM writes with `return_token_ids` and `include_usage`: the role, `chunks` words, a finish, the
  usage, `[DONE]`; all in one write, unless told otherwise.
- What it does otherwise is asked for in the last message or prompt, behind `@stub`, as JSON: `@stub {"chunks": 3}`. See
  `Plan`.
- Its report of leases has each session that asked for one, with its last prompt, until that is released.
- `GET /stub` tells how many requests came, how many were left by their client, and the headers and bodies of the last
  ones.
"""

import asyncio
import functools
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import httptools
import uvloop

from appliance.engine.picture import (
    DISK_FAULTS,
    KV_PATH,
    NOT_STORED,
    CanaryPicture,
    DiskPicture,
    HeldPicture,
    KvPicture,
    RecallPicture,
    SessionPicture,
    TenantPicture,
    TierPicture,
)
from appliance.engine.protocol import (
    LEASE_FIELD,
    LeaseReport,
    LeasesRequest,
    LeaseState,
    TurnAccount,
    TurnEnd,
    read_leases_request,
    read_turn_ends_request,
    turn_accounts_answer,
)

MODEL = "stub"
MAX_MODEL_LEN = 8192
CHARS_PER_TOKEN = 4
_MARK = "@stub"
_OTHER_ID = "chatcmpl-of-another-request"
_KEPT_BODIES = 50
_KEPT_LEASES = 50
_BLOCKS = 100_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What one answer is to be.

    Attributes:
        chunks: how many words.
        pause_s: before each word.
        first_pause_s: before the first byte.
        die_after: kill the stub after so many words.
        drop_after: close the connection after so many words.
        garbage_after: send something that is no chunk after so many words.
        other_after: go on with what was answered to another request after so many words; in one piece: all of it.
        error_after: report a failure of the engine's own after so many words.
        status: refuse with this status.
        quote_salt: repeat the request's salt in the refusal.
        text: what to say instead of words.
        tool: call this tool with `{"city": "Oslo"}`.
    """

    chunks: int = 14
    pause_s: float = 0.0
    first_pause_s: float = 0.0
    die_after: int | None = None
    drop_after: int | None = None
    garbage_after: int | None = None
    other_after: int | None = None
    error_after: int | None = None
    status: int | None = None
    quote_salt: bool = False
    text: str | None = None
    tool: str | None = None


@dataclass(slots=True)
class Counts:
    """What the stub has seen."""

    requests: int = 0
    abandoned: int = 0


class Stub(asyncio.Protocol):
    """One connection of the gateway's."""

    counts: ClassVar[Counts] = Counts()
    bodies: ClassVar[deque[dict[str, Any]]] = deque(maxlen=_KEPT_BODIES)
    headers: ClassVar[deque[list[tuple[bytes, bytes]]]] = deque(maxlen=_KEPT_BODIES)
    released: ClassVar[deque[str]] = deque(maxlen=_KEPT_BODIES)
    awaited: ClassVar[deque[tuple[str, str]]] = deque(maxlen=_KEPT_BODIES)
    ends: ClassVar[deque[TurnEnd]] = deque(maxlen=_KEPT_BODIES)
    leases: ClassVar[dict[tuple[str, str], int]] = {}

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._body = bytearray()
        self._headers: list[tuple[bytes, bytes]] = []
        self._request_id = ""
        self._answering: asyncio.Task[None] | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by name

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  (asyncio's signature)
        if self._answering is not None and not self._answering.done():
            self.counts.abandoned += 1
            self._answering.cancel()

    # httptools' side

    def on_message_begin(self) -> None:
        self._url, self._body, self._headers, self._request_id = b"", bytearray(), [], ""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        if name.lower() == b"x-request-id":
            self._request_id = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        match self._url:
            case b"/v1/chat/completions" | b"/v1/completions":
                self.counts.requests += 1
                self.headers.append(self._headers)
                request = json.loads(self._body)
                self.bodies.append(request)
                _lease(self.leases, request)
                plan = plan_of(request)
                if plan == Plan() and request.get("stream"):
                    self._write(
                        _stream_head() + b"".join(_chunked(e) for e in _events(request, plan, self._id(request)))
                    )
                    self._write(b"0\r\n\r\n")
                else:
                    self._answering = asyncio.get_running_loop().create_task(self._answer(request, plan))
            case b"/v1/models":
                card = {"id": MODEL, "object": "model", "max_model_len": MAX_MODEL_LEN}
                self._whole(200, {"object": "list", "data": [card]})
            case b"/holdfast/leases":
                asked = read_leases_request(bytes(self._body))
                self.released.extend(asked.release)
                self.awaited.extend(asked.awaited)
                self._whole(200, _report(self.leases, asked))
            case url if url.startswith(KV_PATH.encode()):
                self._whole(200, _KEPT.to_wire())
            case b"/holdfast/turns":
                ends = read_turn_ends_request(bytes(self._body))
                self.ends.extend(end for end in ends if end is not None)
                accounts = [None if end is None else TurnAccount(end.turn, 0) for end in ends]
                self._whole(200, turn_accounts_answer(accounts))
            case b"/stub":
                seen = {"requests": self.counts.requests, "abandoned": self.counts.abandoned}
                told = [end.to_wire() for end in self.ends]
                kept = {"bodies": list(self.bodies), "released": list(self.released), "awaited": list(self.awaited)}
                headers = [[(name.decode(), value.decode()) for name, value in sent] for sent in self.headers]
                self._whole(200, {**seen, **kept, "ends": told, "headers": headers})
            case b"/health":
                self._whole(200, {})
            case _:
                self._whole(404, {"error": {"message": "no such path", "type": "NotFoundError", "code": 404}})

    # Answers

    def _id(self, request: dict[str, Any]) -> str:
        return f"{'chatcmpl' if 'messages' in request else 'cmpl'}-{self._request_id}"

    async def _answer(self, request: dict[str, Any], plan: Plan) -> None:
        await asyncio.sleep(plan.first_pause_s)
        length = len(json.dumps(request.get("messages", request.get("prompt")))) // CHARS_PER_TOKEN
        if plan.status is not None:
            said = f"salt {request.get('cache_salt')}" if plan.quote_salt else "as it was told to"
            self._whole(plan.status, {"error": {"message": said, "type": "BadRequestError", "code": plan.status}})
        elif length > MAX_MODEL_LEN:
            message = (
                f"This model's maximum context length is {MAX_MODEL_LEN} tokens. However, your prompt contains "
                f"{length} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
                "length of the input prompt."
            )
            self._whole(400, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}})
        elif request.get("stream"):
            await self._answer_slowly(request, plan)
        else:
            for _ in range(plan.chunks if plan.pause_s else 0):
                await asyncio.sleep(plan.pause_s)
            if plan.die_after is not None:
                os._exit(9)
            answer_id = self._id(request) if plan.other_after is None else _OTHER_ID
            self._whole(200, _whole_answer(request, plan, answer_id))

    async def _answer_slowly(self, request: dict[str, Any], plan: Plan) -> None:
        self._write(_stream_head())
        for number, event in enumerate(_events(request, plan, self._id(request))):
            words = number - 1
            if words == plan.die_after:
                os._exit(9)
            if words == plan.drop_after:
                assert self._transport is not None
                self._transport.close()
                return
            if words == plan.garbage_after:
                self._write(_chunked(b"data: \xff{this is no chunk\n\n"))
                continue
            if words == plan.other_after:
                event = event.replace(self._id(request).encode(), _OTHER_ID.encode())
            if words == plan.error_after:
                failure = {"error": {"message": "boom", "type": "InternalServerError", "code": 500}}
                self._write(_chunked(b"data: %s\n\n" % json.dumps(failure).encode()))
                self._write(_chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n")
                return
            self._write(_chunked(event))
            await asyncio.sleep(plan.pause_s)
        self._write(b"0\r\n\r\n")

    def _whole(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self._write(
            b"HTTP/1.1 %d Said\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
            % (status, len(body), body)
        )

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


def plan_of(request: dict[str, Any]) -> Plan:
    """What the last message, or the prompt, asks of the stub."""
    said = request["messages"][-1].get("content") if "messages" in request else request.get("prompt")
    if not isinstance(said, str) or _MARK not in said:
        return Plan()
    wanted, _ = json.JSONDecoder().raw_decode(said.partition(_MARK)[2].strip())
    known = {field.name for field in fields(Plan)}
    assert wanted.keys() <= known, wanted
    return Plan(**wanted)


def _words(plan: Plan) -> list[str]:
    return [f" word{number}" for number in range(plan.chunks)] if plan.text is None else [plan.text]


def _prompt_tokens(request: dict[str, Any]) -> int:
    prompt = request.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    if prompt is not None:
        return len(prompt) // CHARS_PER_TOKEN
    return sum(len(str(message.get("content"))) for message in request["messages"]) // CHARS_PER_TOKEN


def _prompt_ids(request: dict[str, Any]) -> list[int]:
    prompt = request.get("prompt")
    return prompt if isinstance(prompt, list) else list(range(_prompt_tokens(request)))


@functools.lru_cache(1024)
def _counted_ids(tokens: int) -> str:
    """As many ids, as JSON: an engine has its own at hand, and making them must not count as the gateway's doing."""
    return _compact(list(range(tokens)))


def _prompt_ids_as_json(request: dict[str, Any]) -> str:
    prompt = request.get("prompt")
    return _compact(prompt) if isinstance(prompt, list) else _counted_ids(_prompt_tokens(request))


def _usage(request: dict[str, Any], plan: Plan) -> dict[str, Any]:
    prompt, completion = _prompt_tokens(request), len(_words(plan)) + 1
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": prompt // 2},
    }


def _tool_call(plan: Plan) -> dict[str, Any]:
    return {
        "id": "chatcmpl-tool-0",
        "type": "function",
        "function": {"name": plan.tool, "arguments": '{"city": "Oslo"}'},
    }


def _whole_answer(request: dict[str, Any], plan: Plan, answer_id: str) -> dict[str, Any]:
    words, ids = _words(plan), bool(request.get("return_token_ids"))
    completion_ids = list(range(len(words) + 1))
    kept = {"token_ids": completion_ids if ids else None}
    reason = {"finish_reason": "tool_calls" if plan.tool else "stop", "stop_reason": None, "logprobs": None}
    choices: list[dict[str, Any]] = []
    for index in range(request.get("n", 1)):
        if "messages" in request:
            message: dict[str, Any] = {"role": "assistant", "content": "".join(words)}
            if plan.tool:
                message |= {"content": None, "tool_calls": [_tool_call(plan)]}
            choices.append({"index": index, "message": message, **reason, **kept})
        else:
            prompt = {"prompt_token_ids": _prompt_ids(request) if ids else None}
            choices.append({"index": index, "text": "".join(words), **reason, **kept, **prompt})
    return {
        "id": answer_id,
        "object": "chat.completion" if "messages" in request else "text_completion",
        "created": 1_700_000_000,
        "model": request["model"],
        "choices": choices,
        "usage": _usage(request, plan),
        "prompt_token_ids": _prompt_ids(request) if ids and "messages" in request else None,
        "kv_transfer_params": request.get("kv_transfer_params"),
    }


def _events(request: dict[str, Any], plan: Plan, answer_id: str) -> Iterator[bytes]:
    """The stream, event by event."""
    chat, ids = "messages" in request, bool(request.get("return_token_ids"))
    name = "chat.completion.chunk" if chat else "text_completion"
    head = f'data: {{"id":"{answer_id}","object":"{name}","created":1700000000,"model":{json.dumps(request["model"])}'
    words = _words(plan)
    indices = range(request.get("n", 1))
    tail = _prompt_ids_as_json(request) if ids else ""
    if chat:
        first = f',"prompt_token_ids":{tail},"prompt_text":null' if ids else ""
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        for index in indices:
            yield f'{head},"choices":[{{"index":{index},{delta}}}]{first}}}\n\n'.encode()
    for number, word in enumerate(words):
        for index in indices:
            kept = f',"token_ids":[{number}]' if ids else ""
            if chat:
                said: dict[str, Any] = {"content": word}
                if plan.tool:
                    said = {"tool_calls": [{**_tool_call(plan), "index": 0}]} if number == 0 else {}
                body = f'"delta":{_compact(said)}'
            else:
                prompt = f',"prompt_token_ids":{tail}' if ids and number == 0 else ""
                body = f'"text":{_compact(word)}'
                kept = prompt + kept
            body += f',"logprobs":null,"finish_reason":null{kept}'
            yield f'{head},"choices":[{{"index":{index},{body}}}]}}\n\n'.encode()
    reason = "tool_calls" if plan.tool else "stop"
    kept = f',"token_ids":[{len(words)}]' if ids else ""
    for index in indices:
        body = '"delta":{"content":""}' if chat else '"text":""'
        end = f'"logprobs":null,"finish_reason":"{reason}","stop_reason":null{kept}'
        yield f'{head},"choices":[{{"index":{index},{body},{end}}}]}}\n\n'.encode()
    if (request.get("stream_options") or {}).get("include_usage"):
        yield f'{head},"choices":[],"usage":{_compact(_usage(request, plan))}}}\n\n'.encode()
    yield b"data: [DONE]\n\n"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _stream_head() -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_KEPT = KvPicture(
    block_size=32,
    tiers=(TierPicture("device", "ok", 4096, 100, 40, 30, 1),),
    tenants=(TenantPicture("somebody", 1, 1, {"device": 30}, (0.25, 0.25, 0.25), 4, 2),),
    sessions=(SessionPicture("somebody", "something", 0.25, (HeldPicture("device", 30, 960, "lease", 12.5),)),),
    sessions_total=1,
    leased_sessions_total=1,
    worths_hits_per_s=(0.25, 0.25, 0.25),
    reclaimed_blocks_total=7,
    expired_leases_total=2,
    ignored_leases_total=0,
    engine_life="stub",
    # Seen, though no prompt is found there: with more tiers than the device the gateway would wait for accounts.
    disk=DiskPicture(5, 4, 3, 2, 1, dict.fromkeys(NOT_STORED, 1), dict.fromkeys(DISK_FAULTS, 2), "full", 9.0),
    canary=CanaryPicture(12, 0.001, quarantined=False, compared_age_s=8.0, dropped_samples_total=1),
    recall=RecallPicture(6, 3, 1, 0.0),
)


def _lease(leases: dict[tuple[str, str], int], request: dict[str, Any]) -> None:
    asked = (request.get("kv_transfer_params") or {}).get(LEASE_FIELD)
    if asked is not None:
        leases.pop((asked["tenant"], asked["session"]), None)
        leases[asked["tenant"], asked["session"]] = _prompt_tokens(request)
        if len(leases) > _KEPT_LEASES:
            del leases[next(iter(leases))]


def _report(leases: dict[tuple[str, str], int], asked: LeasesRequest) -> dict[str, object]:
    for key in [key for key in leases if key[1] in asked.release]:
        del leases[key]
    reported = [key for key in (leases if asked.every else asked.awaited) if key in leases]
    held = tuple(LeaseState(session, tenant, 1, leases[tenant, session], 15.0) for tenant, session in reported)
    return LeaseReport(held, 0, _BLOCKS, _BLOCKS, 32, None, 0, 0).to_wire()


async def serve(path: str) -> None:
    """Answer on the Unix socket `path` until killed."""
    server = await asyncio.get_running_loop().create_unix_server(Stub, path=path, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
