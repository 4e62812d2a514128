"""A client of the data listener's application in the gateway's own process: how a proof asks.

A request goes the whole way of a client's: guard, key, quotas, allow-list, session, audit log, engine, transcript. What
it does not pass is the socket.
"""

import asyncio
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json

from api.answers import App
from appliance.errors import HoldfastError

TIERS = ("device", "dram", "disk")
_PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Said:
    """What came of a request.

    Attributes:
        cached_tokens: of the prompt, found on the engine, in whatever tier.
        tier_tokens: the same, by the tier that served them; empty where that is not told.
        first_token_s: from asking to the first event of the stream.
        logprob_tokens: the texts of the tokens that log-probabilities were given for; None: none were given.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    tier_tokens: Mapping[str, int]
    first_token_s: float
    logprob_tokens: Sequence[str] | None

    def from_tier(self, tier: str) -> int:
        """How many tokens a tier gave. An engine that does not tell has the device alone."""
        return self.tier_tokens.get(tier, 0) if self.tier_tokens else self.cached_tokens if tier == TIERS[0] else 0


class AnswerMissing(HoldfastError):
    """A request of a proof was refused, or broken off."""

    code = "proof_request_failed"


class Asker:
    """Asks an application as the owner of one API key.

    Args:
        app: the data listener's.
        host: one that the listener allows.
    """

    def __init__(self, app: App, host: str, secret: str, model: str) -> None:
        self._app = app
        self._host = host
        self._secret = secret
        self._model = model

    async def ask(
        self, messages: Sequence[Mapping[str, str]], *, session: str, parent: str | None = None, **fields: Any
    ) -> Said:
        """Ask for a chat completion.

        Raises:
            AnswerMissing: it was refused, or broken off; says by which code.
        """
        body = to_json(
            {
                "model": self._model,
                "messages": list(messages),
                "stream": True,
                "stream_options": {"include_usage": True},
                "temperature": 0,
                "max_tokens": 1,
                **fields,
            }
        )
        headers = [
            (b"host", self._host.encode()),
            (b"authorization", b"Bearer " + self._secret.encode()),
            (b"content-length", b"%d" % len(body)),
            (b"x-session-id", session.encode()),
            *([] if parent is None else [(b"x-parent-session-id", parent.encode())]),
        ]
        scope: MutableMapping[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": _PATH,
            "raw_path": _PATH.encode(),
            "query_string": b"",
            "headers": headers,
            "client": None,
        }
        answered = _Answered(body)
        began = time.perf_counter()
        await self._app(scope, answered.receive, answered.send)
        return answered.said(began)


class _Answered:
    """The other side of one request."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._status = 0
        self._received = bytearray()
        self._first_at: float | None = None

    async def receive(self) -> MutableMapping[str, Any]:
        body, self._body = self._body, None
        if body is None:
            await _never()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message.get("body"):
            if self._first_at is None:
                self._first_at = time.perf_counter()
            self._received += message["body"]

    def said(self, began: float) -> Said:
        if self._status != 200 or self._first_at is None:
            raise _failed(self._code(bytes(self._received)))
        text: list[str] = []
        tokens: list[str] | None = None
        finish_reason, usage = "", None
        for event in bytes(self._received).split(b"\n\n"):
            payload = event.removeprefix(b"data: ")
            if not payload or payload == b"[DONE]":
                continue
            chunk = from_json(payload)
            if "error" in chunk:
                raise _failed(str(chunk["error"].get("code")))
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text.append(choice["delta"].get("content") or "")
                finish_reason = choice.get("finish_reason") or finish_reason
                if choice.get("logprobs"):
                    tokens = (tokens or []) + [each["token"] for each in choice["logprobs"]["content"]]
        if usage is None:
            raise _failed("no usage")
        details = usage.get("prompt_tokens_details") or {}
        return Said(
            text="".join(text),
            finish_reason=finish_reason,
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=details.get("cached_tokens") or 0,
            tier_tokens={tier: details[f"{tier}_tokens"] for tier in TIERS if f"{tier}_tokens" in details},
            first_token_s=self._first_at - began,
            logprob_tokens=tokens,
        )

    def _code(self, received: bytes) -> str:
        try:
            return str(from_json(received)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return f"status {self._status}"


async def _never() -> None:
    """What a client that waits for its answer sends; it is cancelled with the request."""
    await asyncio.get_running_loop().create_future()


def _failed(code: str) -> AnswerMissing:
    return AnswerMissing(
        "the proof could not be finished",
        cause=f"one of its requests failed: {code}",
        remedy="`holdfast status` tells what is in the way; then prove it again",
    )
