"""How a turn is written down without repeating the turn before it.

An agent resends everything, so a transcript that kept each request whole would grow with the square of its length. A
turn is kept as what it adds to the turn before it (`base`), or whole (`base` 0) where that one is not at hand.

Rules:

- Reading needs the turns in order and nothing else; `Reader` raises on a base that is not the turn before.
- What a record does not change it does not repeat: messages, parameters and token ids alike.
- A message is the same as before only if it is so in every field: what recognises a session overlooks some of them.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, ClassVar

from pydantic_core import from_json, to_json

from appliance.errors import Fault, HoldfastError
from appliance.sessions.misses import Circumstances, Ran
from appliance.sessions.turn import Message

_IDS_HEADER = struct.Struct("<IIII")  # base turn, shared ids, prompt ids, completion ids
_UINT32 = "I"


class TranscriptBroken(HoldfastError):
    """A transcript's turns do not fit together."""

    code: ClassVar[str] = "transcript_broken"
    fault: ClassVar[Fault] = Fault.INTERNAL


@dataclass(frozen=True, slots=True)
class Tip:
    """What is remembered of a session's latest turn, to write the next one as a difference."""

    number: int
    chain: Sequence[bytes]  # `message_chain` of the request's messages and the answer
    parameters: bytes
    ran: Ran

    @property
    def token_ids(self) -> "array[int]":
        """Of the prompt, then those generated."""
        return self.ran.token_ids

    def size(self) -> int:
        """Bytes held, roughly."""
        return 64 * len(self.chain) + len(self.parameters) + 4 * len(self.token_ids) + 256


def message_chain(messages: Sequence[Message]) -> list[bytes]:
    """A hash of 32 bytes after each message: of it and all before it, as they go to the engine. None is absence."""
    link, chain = b"", []
    for message in messages:
        said = sorted((name, value) for name, value in message.items() if value is not None)
        link = sha256(link + to_json(said)).digest()
        chain.append(link)
    return chain


def token_array(prompt: Sequence[int], completion: Sequence[int]) -> "array[int]":
    """Prompt and completion ids as one array of 32-bit integers."""
    ids = array(_UINT32, prompt)
    ids.extend(completion)
    return ids


def encode_request(
    tip: Tip | None,
    shared_messages: int,
    messages: Sequence[Message],
    parameters: bytes,
    circumstances: Circumstances,
) -> bytes:
    """A request as JSON: what it adds to the turn `tip`.

    Args:
        tip: the turn to build on, or None to write the request whole.
        shared_messages: how many leading messages are those of the turn `tip`, its answer included.
        messages: all of the request's messages.
        parameters: the rest of the request, as JSON.
        circumstances: what held on the engine.
    """
    record: dict[str, Any] = {"base": 0, "shared": 0, "messages": list(messages)}
    if tip is not None and shared_messages:
        record = {"base": tip.number, "shared": shared_messages, "messages": list(messages[shared_messages:])}
    if tip is not None and parameters == tip.parameters:
        record["parameters_of"] = tip.number
    else:
        record["parameters"] = from_json(parameters)
    record["circumstances"] = circumstances.to_wire()
    return to_json(record)


def encode_token_ids(tip: Tip | None, shared: int, ids: "array[int]", prompt_length: int) -> bytes:
    """Token ids as a header and the ids that the turn `tip` does not share, little-endian.

    Args:
        shared: how many leading ids are those of the turn `tip`.
    """
    base = tip.number if tip is not None and shared else 0
    header = _IDS_HEADER.pack(base, shared, prompt_length, len(ids) - prompt_length)
    return header + ids[shared:].tobytes()


@dataclass(frozen=True, slots=True)
class ReadTurn:
    """One turn, whole again. The first `shared` messages were there in the turn before it."""

    messages: list[Message]
    shared: int
    parameters: dict[str, Any]
    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    circumstances: Circumstances


@dataclass(frozen=True, slots=True)
class _Previous:
    number: int
    messages: list[Message]  # with the answer
    parameters: dict[str, Any]
    token_ids: "array[int]"


@dataclass(slots=True)
class Reader:
    """Puts the turns of one session together again, fed in order of their numbers."""

    _previous: _Previous | None = field(default=None)

    def add(self, number: int, request: bytes, answer: Message, token_ids: bytes) -> ReadTurn:
        """Read turn `number`.

        Raises:
            TranscriptBroken: it builds on a turn that was not just read, or lengths disagree.
        """
        record = from_json(request)
        base, shared = record["base"], record["shared"]
        messages = [*self._base(number, base).messages[:shared], *record["messages"]] if base else record["messages"]
        if "parameters_of" in record:
            parameters = self._base(number, record["parameters_of"]).parameters
        else:
            parameters = record["parameters"]
        prompt_length, ids = self._token_ids(number, token_ids)
        self._previous = _Previous(number, [*messages, answer], parameters, ids)
        circumstances = Circumstances.from_wire(record.get("circumstances"))
        prompt, completion = ids[:prompt_length].tolist(), ids[prompt_length:].tolist()
        return ReadTurn(messages, shared, parameters, prompt, completion, circumstances)

    def _token_ids(self, number: int, blob: bytes) -> tuple[int, "array[int]"]:
        base, shared, prompt_length, completion_length = _IDS_HEADER.unpack_from(blob)
        ids = self._base(number, base).token_ids[:shared] if base else array(_UINT32)
        ids.frombytes(blob[_IDS_HEADER.size :])
        if len(ids) != prompt_length + completion_length:
            raise _broken(number, f"it holds {len(ids)} token ids and promises {prompt_length + completion_length}")
        return prompt_length, ids

    def _base(self, number: int, base: int) -> _Previous:
        if self._previous is None or self._previous.number != base:
            raise _broken(number, f"it builds on turn {base}, which is not there")
        return self._previous


def _broken(number: int, cause: str) -> TranscriptBroken:
    return TranscriptBroken(
        f"turn {number} of the transcript cannot be read",
        cause=cause,
        remedy="Restore the database from a backup; run `holdfast doctor` to see what else is damaged",
    )
