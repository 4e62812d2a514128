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
    """One turn, whole again.

    Attributes:
        shared: so many messages were there in the turn before it, its answer included.
        token_ids: of the prompt, then those generated.
        prompt_length: how many of them are the prompt's.
        shared_ids: how many of them those of the turn before begin with, too; None: the turn was written without it.
    """

    messages: list[Message]
    shared: int
    parameters: dict[str, Any]
    token_ids: "array[int]"
    prompt_length: int
    shared_ids: int | None
    circumstances: Circumstances

    @property
    def prompt_token_ids(self) -> "array[int]":
        """Those that the engine was given."""
        return self.token_ids[: self.prompt_length]

    @property
    def completion_token_ids(self) -> "array[int]":
        """Those that it generated."""
        return self.token_ids[self.prompt_length :]


@dataclass(slots=True)
class _Latest:
    """The turn that was read last, changed in place into the next one: a turn costs what it adds."""

    number: int
    messages: list[Message]  # with the answer
    parameters: dict[str, Any]
    token_ids: "array[int]"


@dataclass(slots=True)
class Reader:
    """Puts the turns of one session together again, fed in order of their numbers."""

    _latest: _Latest | None = field(default=None)

    def add(self, number: int, request: bytes, answer: Message, token_ids: bytes) -> ReadTurn:
        """Read turn `number`.

        Raises:
            TranscriptBroken: it builds on a turn that was not just read, or lengths disagree.
        """
        record, prompt_length, shared_ids = self._take(number, request, answer, token_ids)
        latest = self._latest_of(number, number)
        return ReadTurn(
            messages=latest.messages[:-1],
            shared=record["shared"],
            parameters=latest.parameters,
            token_ids=latest.token_ids[:],
            prompt_length=prompt_length,
            shared_ids=shared_ids,
            circumstances=Circumstances.from_wire(record.get("circumstances")),
        )

    def skip(self, number: int, request: bytes, answer: Message, token_ids: bytes) -> None:
        """Read turn `number` only because those after it build on it.

        Raises:
            TranscriptBroken: as `add`.
        """
        self._take(number, request, answer, token_ids)

    def _take(
        self, number: int, request: bytes, answer: Message, token_ids: bytes
    ) -> tuple[dict[str, Any], int, int | None]:
        record = from_json(request)
        base, shared = record["base"], record["shared"]
        messages = self._latest_of(number, base).messages if base else []
        if "parameters_of" in record:
            parameters = self._latest_of(number, record["parameters_of"]).parameters
        else:
            parameters = record["parameters"]
        ids_base, shared_ids, prompt_length, completion_length = _IDS_HEADER.unpack_from(token_ids)
        ids = self._latest_of(number, ids_base).token_ids if ids_base else array(_UINT32)
        del ids[shared_ids:]
        ids.frombytes(memoryview(token_ids)[_IDS_HEADER.size :])
        if len(ids) != prompt_length + completion_length:
            raise _broken(number, f"it holds {len(ids)} token ids and promises {prompt_length + completion_length}")
        del messages[shared:]
        messages += record["messages"]
        messages.append(answer)
        self._latest = _Latest(number, messages, parameters, ids)
        return record, prompt_length, shared_ids if ids_base else None

    def _latest_of(self, number: int, base: int) -> _Latest:
        if self._latest is None or self._latest.number != base:
            raise _broken(number, f"it builds on turn {base}, which is not there")
        return self._latest


def _broken(number: int, cause: str) -> TranscriptBroken:
    return TranscriptBroken(
        f"turn {number} of the transcript cannot be read",
        cause=cause,
        remedy="Restore the database from a backup; run `holdfast doctor` to see what else is damaged",
    )
