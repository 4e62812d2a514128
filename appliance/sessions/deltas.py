"""How a turn is written down without repeating the turn before it.

An agent resends everything, so a transcript that kept each request whole would grow with the square of its length. A
turn is kept as what it adds to the turn before it (`base`), or whole (`base` 0) where that one is not at hand.

Rules:

- Reading needs the turns in order and nothing else; `Reader` raises on a base that is not the turn before.
- What a record does not change it does not repeat: messages, parameters and token ids alike. One with all its messages
  has its parameters, too: what was said before it can be passed over unread.
- A message is the same as before only if it is so in every field: what recognises a session overlooks some of them.
"""

import struct
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, ClassVar

from pydantic_core import from_json, to_json

from appliance.errors import Fault, HoldfastError
from appliance.sessions.misses import Circumstances, Ran
from appliance.sessions.turn import Message

_IDS_HEADER = struct.Struct("<IIII")  # base turn, shared ids, prompt ids, completion ids
_UINT32 = "I"
_WHOLE = b'{"base":0,'  # how a request begins that has all its messages
_NOT_WHOLE = b',"parameters_of":'  # is nowhere in it unless as this key, for quotes in a text are escaped


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
    said: Sequence[bytes] = ()  # `said_messages` of them; empty where there was no room for it

    @property
    def token_ids(self) -> "array[int]":
        """Of the prompt, then those generated."""
        return self.ran.token_ids

    def size(self) -> int:
        """Bytes held, roughly."""
        return 64 * len(self.chain) + self.text_size() + len(self.parameters) + 4 * len(self.token_ids) + 256

    def text_size(self) -> int:
        """Bytes of that which are what was said."""
        return sum(map(len, self.said)) + 48 * len(self.said)

    def messages(self) -> list[Message]:
        """The request's messages and the answer."""
        return [dict(from_json(said)) for said in self.said]


class Tips:
    """The latest turn of sessions in use, the least recently used dropped first; bounded in bytes.

    What was said goes first, down to a quarter of the bytes: without it a turn's account can still be told, and only
    not what is at the place where it parted from the one before.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._held = 0
        self._held_texts = 0
        self._tips: OrderedDict[str, Tip] = OrderedDict()
        self._with_text: OrderedDict[str, None] = OrderedDict()

    def get(self, session_id: str) -> Tip | None:
        return self._tips.get(session_id)

    def put(self, session_id: str, tip: Tip) -> None:
        self.drop(session_id)
        self._tips[session_id] = tip
        self._held += tip.size()
        if tip.said:
            self._with_text[session_id] = None
            self._held_texts += tip.text_size()
        while self._held > self._capacity:
            if self._held_texts > self._capacity // 4:
                self._drop_text(next(iter(self._with_text)))
            else:
                self.drop(next(iter(self._tips)))

    def drop(self, session_id: str) -> None:
        if session_id in self._tips:
            self._drop_text(session_id)
            self._held -= self._tips.pop(session_id).size()

    def clear(self) -> None:
        self._tips.clear()
        self._with_text.clear()
        self._held = self._held_texts = 0

    def _drop_text(self, session_id: str) -> None:
        tip = self._tips[session_id]
        self._held -= tip.text_size()
        self._held_texts -= tip.text_size()
        self._with_text.pop(session_id, None)
        self._tips[session_id] = replace(tip, said=())


def said_messages(messages: Sequence[Message]) -> list[bytes]:
    """Each message as JSON, its fields in order, as they go to the engine. None is absence."""
    return [
        to_json(sorted((name, value) for name, value in message.items() if value is not None)) for message in messages
    ]


def message_chain(said: Sequence[bytes]) -> list[bytes]:
    """A hash of 32 bytes after each message: of it and all before it."""
    link, chain = b"", []
    for each in said:
        link = sha256(link + each).digest()
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
    if tip is not None and shared_messages and parameters == tip.parameters:
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
class Reader:
    """Puts the turns of one session together again, fed in order of their numbers.

    What was read last is changed in place into what is read next, so that a turn costs what it adds, and what is handed
    out is a copy. After an error the reader is of no use.
    """

    _number: int = 0  # of the turn whose ids these are
    _token_ids: "array[int]" = field(default_factory=lambda: array(_UINT32))
    _said_number: int = 0  # of the turn whose messages and parameters these are
    _messages: list[Message] = field(default_factory=list)  # with the answer
    _parameters: dict[str, Any] = field(default_factory=dict)
    _passed: list[tuple[int, bytes, Message]] = field(default_factory=list)  # and not read: nobody asked yet

    def add(self, number: int, request: bytes, answer: Message, token_ids: bytes) -> ReadTurn:
        """Read turn `number`.

        Raises:
            TranscriptBroken: it builds on a turn that was not just read, or lengths disagree.
        """
        for passed in self._passed:
            self._take_said(*passed)
        self._passed.clear()
        record = self._take_said(number, request, answer)
        prompt_length, shared_ids = self._take_ids(number, token_ids)
        return ReadTurn(
            messages=self._messages[:-1],
            shared=record["shared"],
            parameters=self._parameters,
            token_ids=self._token_ids[:],
            prompt_length=prompt_length,
            shared_ids=shared_ids,
            circumstances=Circumstances.from_wire(record.get("circumstances")),
        )

    def skip(self, number: int, request: bytes, answer: Message, token_ids: bytes) -> None:
        """Pass over turn `number`: only those after it may want it.

        Raises:
            TranscriptBroken: as `add`, where it is known by now.
        """
        if request.startswith(_WHOLE) and _NOT_WHOLE not in request:
            self._passed.clear()
        self._passed.append((number, request, answer))
        self._take_ids(number, token_ids)

    def _take_said(self, number: int, request: bytes, answer: Message) -> dict[str, Any]:
        record: dict[str, Any] = from_json(request)
        for base in (record["base"], record.get("parameters_of", 0)):
            if base and base != self._said_number:
                raise _misses_base(number, base)
        if record["base"]:
            del self._messages[record["shared"] :]
        else:
            self._messages = []
        self._messages += record["messages"]
        self._messages.append(answer)
        self._parameters = record.get("parameters", self._parameters)
        self._said_number = number
        return record

    def _take_ids(self, number: int, blob: bytes) -> tuple[int, int | None]:
        """How many ids the prompt has, and how many are those of the turn before; None: written without it."""
        base, shared, prompt_length, completion_length = _IDS_HEADER.unpack_from(blob)
        if base and base != self._number:
            raise _misses_base(number, base)
        del self._token_ids[shared if base else 0 :]
        self._token_ids.frombytes(memoryview(blob)[_IDS_HEADER.size :])
        ids = self._token_ids
        if len(ids) != prompt_length + completion_length:
            raise _broken(number, f"it holds {len(ids)} token ids and promises {prompt_length + completion_length}")
        self._number = number
        return prompt_length, shared if base else None


def _misses_base(number: int, base: int) -> TranscriptBroken:
    return _broken(number, f"it builds on turn {base}, which is not there")


def _broken(number: int, cause: str) -> TranscriptBroken:
    return TranscriptBroken(
        f"turn {number} of the transcript cannot be read",
        cause=cause,
        remedy="Restore the database from a backup; run `holdfast doctor` to see what else is damaged",
    )
