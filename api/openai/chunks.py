"""What the engine answers, taken apart: what the client may see goes on, the rest is kept for the transcript.

Rules:

- Every chunk is parsed. What goes to the client is the engine's own bytes where cutting the token ids off is all that
  has to be done, and is written anew from an allow-list of keys everywhere else.
- The end is held back: the chunk that finishes the last choice, the usage and `[DONE]` are given out by `end()` only,
  after the turn has been committed.
- What is no chunk of ours raises `AnswerBroken`; nothing of it reaches the client. Ours is what carries the id that the
  engine was asked under: an answer to another request is refused, whatever went wrong between here and the engine.
- No I/O.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic_core import from_json, to_json

from api.openai.errors import AnswerBroken
from appliance.sessions import Account, Message, TurnKind

_DONE_EVENT: Final = b"data: [DONE]\n\n"
_PUBLIC: Final = frozenset(
    {"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"}
)
_PUBLIC_CHOICE: Final = frozenset(
    {"index", "delta", "message", "text", "logprobs", "finish_reason", "stop_reason", "token_ids"}
)
_IDS: Final = b',"token_ids":['
_IDS_END: Final = b"]}]}"
_DIGITS: Final = b"0123456789,"


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def message(self) -> dict[str, Any]:
        text = "".join(self.text)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.reasoning:
            message["reasoning"] = "".join(self.reasoning)
        if self.tool_calls:
            message["content"] = text or None
            message["tool_calls"] = [self.tool_calls[index] for index in sorted(self.tool_calls)]
        return message


@dataclass(frozen=True, slots=True)
class Usage:
    """What a turn cost, in tokens. `cached_tokens` is None where the engine did not get to say."""

    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int

    def public(self, account: Account | None) -> dict[str, Any]:
        """As OpenAI writes it, why the rest of the prompt was computed, and where it parted from the turn before."""
        details: dict[str, Any] = {"cached_tokens": self.cached_tokens or 0}
        if account is not None:
            details["computed_tokens"] = account.computed
            if (parted := account.divergence) is not None:
                details["divergence"] = {
                    "token": parted.token,
                    "message": parted.message,
                    "role": parted.role,
                    "change": parted.change,
                }
            if account.served is not None:
                details |= {f"{tier}_tokens": tokens for tier, tokens in account.served.by_tier().items()}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": details,
        }


class Answer:
    """What one turn has been answered so far.

    Args:
        response_id: what the client knows the answer by, and the engine says it is.
        model: what the client calls the model.
        keep_token_ids: the client asked for token ids: leave them in.

    Attributes:
        begun: the engine has answered something.
    """

    def __init__(
        self, kind: TurnKind, response_id: str, model: str, *, choices: int, include_usage: bool, keep_token_ids: bool
    ) -> None:
        self._kind = kind
        self._id = response_id
        self._model = model
        self._include_usage = include_usage
        self._keep_token_ids = keep_token_ids
        self._choices = [_Choice() for _ in range(choices)]
        self._unfinished = choices
        self._held: list[bytes] = []
        self._usage: Usage | None = None
        self._head: dict[str, Any] = {}
        self._whole: dict[str, Any] = {}
        self.prompt_token_ids: Sequence[int] = ()
        self.begun = False

    # A streamed answer

    def feed(self, payload: bytes) -> bytes:
        """Take in one payload of the engine's stream; return the event that may be sent at once, or nothing.

        Raises:
            AnswerBroken: the engine reports a failure, or the payload is no chunk of this answer.
        """
        try:
            chunk = from_json(payload)
            self._refuse_failure(chunk)
            self._refuse_another_s(chunk)
            if chunk["model"] != self._model:
                chunk["model"] = self._model
                payload = b""
            if chunk.get("usage") is not None:
                self._usage = _usage(chunk["usage"])
            choices = chunk["choices"]
            if not choices:
                return b""
            for choice in choices:
                self._take_delta(chunk, choice)
            event = b"data: " + self._public_chunk(payload, chunk) + b"\n\n"
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _no_answer(error) from None
        self._head = chunk
        self.begun = True
        if self._unfinished:
            return event
        self._held.append(event)
        return b""

    @property
    def complete(self) -> bool:
        """Whether every choice is finished and it is known what they cost."""
        return not self._unfinished and self._usage is not None

    def end(self, account: Account | None = None) -> bytes:
        """The last events of a complete stream: to be sent once the turn is durable."""
        usage = b""
        if self._include_usage:
            head = {name: self._head[name] for name in ("id", "object", "created", "model")}
            usage = b"data: " + to_json({**head, "choices": [], "usage": self.usage.public(account)}) + b"\n\n"
        return b"".join((*self._held, usage, _DONE_EVENT))

    def _take_delta(self, chunk: dict[str, Any], given: dict[str, Any]) -> None:
        choice = self._choices[given["index"]]
        if self._kind is TurnKind.CHAT:
            delta = given["delta"]
            text = delta.get("content")
            if delta.get("reasoning"):
                choice.reasoning.append(delta["reasoning"])
            for call in delta.get("tool_calls") or ():
                _add_call(choice.tool_calls, call)
            prompt_ids = chunk.get("prompt_token_ids")
        else:
            text = given["text"]
            prompt_ids = given.get("prompt_token_ids")
        if text:
            choice.text.append(text)
        if prompt_ids:
            self.prompt_token_ids = prompt_ids
        ids = given.get("token_ids")
        if ids:
            choice.token_ids.extend(ids)
        if given.get("finish_reason") is not None and choice.finish_reason is None:
            choice.finish_reason = given["finish_reason"]
            self._unfinished -= 1

    def _public_chunk(self, payload: bytes, chunk: dict[str, Any]) -> bytes:
        choices = chunk["choices"]
        plain = payload and len(choices) == 1 and chunk.keys() <= _PUBLIC and choices[0].keys() <= _PUBLIC_CHOICE
        if plain and "usage" not in chunk:
            if self._keep_token_ids or "token_ids" not in choices[0]:
                return payload
            # A quote within a text is escaped, so the last `,"token_ids":[` is the key itself; where nothing but
            # digits and the closing brackets follow it, the choice is without it when that is cut off.
            cut = payload.rfind(_IDS)
            tail = payload[cut + len(_IDS) : -len(_IDS_END)]
            if cut > 0 and payload.endswith(_IDS_END) and not tail.translate(None, _DIGITS):
                return payload[:cut] + b"}]}"
        return to_json({**_only(chunk, _PUBLIC - {"usage"}), "choices": [self._public_choice(c) for c in choices]})

    def _public_choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        public = _only(choice, _PUBLIC_CHOICE)
        if not self._keep_token_ids:
            public.pop("token_ids", None)
        return public

    # A whole answer

    def take_whole(self, body: bytes) -> None:
        """Take in an answer that is not streamed.

        Raises:
            AnswerBroken: it is no answer, or not this one.
        """
        try:
            whole = from_json(body)
            self._refuse_failure(whole)
            self._refuse_another_s(whole)
            for given in whole["choices"]:
                self._take_choice(whole, given)
            self._usage = _usage(whole["usage"])
            self._whole = {
                **_only(whole, _PUBLIC),
                "model": self._model,
                "choices": [self._public_choice(choice) for choice in whole["choices"]],
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _no_answer(error) from None
        if self._unfinished:
            raise _no_answer(None)
        self.begun = True

    def whole(self, account: Account | None = None) -> bytes:
        """What the client gets of an answer that is not streamed."""
        return to_json({**self._whole, "usage": self.usage.public(account)})

    def _take_choice(self, whole: dict[str, Any], given: dict[str, Any]) -> None:
        choice = self._choices[given["index"]]
        if self._kind is TurnKind.CHAT:
            message = given["message"]
            choice.text.append(message.get("content") or "")
            if message.get("reasoning"):
                choice.reasoning.append(message["reasoning"])
            for index, call in enumerate(message.get("tool_calls") or ()):
                _add_call(choice.tool_calls, {"index": index, **call})
            prompt_ids = whole.get("prompt_token_ids")
        else:
            choice.text.append(given["text"])
            prompt_ids = given.get("prompt_token_ids")
        if prompt_ids:
            self.prompt_token_ids = prompt_ids
        choice.token_ids.extend(given.get("token_ids") or ())
        choice.finish_reason = given["finish_reason"]
        if choice.finish_reason is not None:
            self._unfinished -= 1

    # What is kept

    @property
    def usage(self) -> Usage:
        """What the engine said it cost; what was seen of it, when the engine did not get to say."""
        if self._usage is not None:
            return self._usage
        return Usage(len(self.prompt_token_ids), None, sum(len(choice.token_ids) for choice in self._choices))

    @property
    def completion_token_ids(self) -> Sequence[int]:
        """Of the first choice: the one that is the answer in the transcript."""
        return self._choices[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended; None when it has not."""
        return self._choices[0].finish_reason

    def message(self) -> Message:
        """The assistant's message for the transcript; further choices are kept in it as `alternatives`."""
        message = self._choices[0].message()
        if len(self._choices) > 1:
            message["alternatives"] = [choice.message() for choice in self._choices[1:]]
        return message

    def texts(self) -> list[str]:
        """What each choice says, without its reasoning and its tool calls."""
        return ["".join(choice.text) for choice in self._choices]

    def _refuse_failure(self, chunk: Any) -> None:
        if "error" in chunk:
            kind = chunk["error"].get("type") if isinstance(chunk["error"], dict) else None
            raise AnswerBroken(
                "the engine broke off the answer",
                cause=f"it reported {str(kind)[:80] if kind else 'an error'}",
                remedy="Send the request again; `holdfast logs engine` tells more",
            )

    def _refuse_another_s(self, given: dict[str, Any]) -> None:
        if given["id"] != self._id:
            raise AnswerBroken(
                "the engine's answer is not to this request",
                cause="it carries the id of another request: nothing of it was given out",
                remedy="Send the request again; if it recurs, restart the engine: `holdfast logs engine` tells more",
            )


def _usage(given: dict[str, Any]) -> Usage:
    details = given.get("prompt_tokens_details") or {}
    return Usage(int(given["prompt_tokens"]), int(details.get("cached_tokens") or 0), int(given["completion_tokens"]))


def _only(given: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in names}


def _add_call(calls: dict[int, dict[str, Any]], delta: dict[str, Any]) -> None:
    call = calls.setdefault(delta["index"], {"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
    if delta.get("id"):
        call["id"] = delta["id"]
    function = delta.get("function") or {}
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _no_answer(error: Exception | None) -> AnswerBroken:
    told = f"{type(error).__name__}" if error is not None else "a choice is missing"
    return AnswerBroken(
        "the engine's answer cannot be read",
        cause=f"it is not in the form that this version expects ({told})",
        remedy="Send the request again; `holdfast doctor` compares versions",
    )
