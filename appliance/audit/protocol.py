"""What producers and the appender say to each other on `audit.sock`: frames of a length, a kind, a number and a body.

Rules:

- Standard library only.
- A frame is bounded. What is malformed ends the connection: both ends are ours.
- The number of a request comes back with its answer. Answers to appends come when the entries are on the disk.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from appliance.audit.entry import MAX_SEALED_BYTES, Draft

MAX_FRAME_BYTES: Final = 1 << 20
MOST_UNANSWERED: Final = (
    4096  # entries of a producer: in so many of the newest it is looked for what may be there already
)

# Requests
APPEND: Final = 1  # drafts; answered DONE with the last one's sequence
APPEND_PRIVILEGED: Final = 2  # the same, from the reserve too
STATUS: Final = 3  # answered DONE with JSON
SIGNING_KEY: Final = 4  # the key that signs checkpoints; answered DONE
CHECKPOINT: Final = 5  # publish now; answered DONE with JSON
APPEND_AGAIN: Final = 6  # an append whose answer was lost with the appender: what is there already is not repeated
APPEND_AGAIN_PRIVILEGED: Final = 7  # the same, from the reserve too
# Answers
DONE: Final = 128
REFUSED: Final = 129  # JSON: an error's record

_HEAD: Final = struct.Struct(">IBQ")
_DRAFT: Final = struct.Struct(">BH16s16s8s8s32s32sH")
SEQUENCE: Final = struct.Struct(">Q")


class Malformed(ValueError):
    """What came is no frame."""


class Message(NamedTuple):
    """A frame without its length."""

    kind: int
    number: int
    body: bytes


def pack(kind: int, number: int, body: bytes = b"") -> bytes:
    """A frame."""
    if len(body) > MAX_FRAME_BYTES:
        raise Malformed(f"a frame of {len(body)} bytes")
    return _HEAD.pack(len(body), kind, number) + body


def take_messages(buffer: bytearray) -> list[Message]:
    """The whole frames at the beginning of `buffer`, which they leave.

    Raises:
        Malformed: a frame is longer than any that is sent.
    """
    messages: list[Message] = []
    at, size = 0, _HEAD.size
    while at + size <= len(buffer):
        length, kind, number = _HEAD.unpack_from(buffer, at)
        if length > MAX_FRAME_BYTES:
            raise Malformed(f"a frame of {length} bytes")
        begin = at + size
        if begin + length > len(buffer):
            break
        at = begin + length
        messages.append(Message(kind, number, bytes(buffer[begin:at])))
    del buffer[:at]
    return messages


def pack_drafts(drafts: Sequence[Draft]) -> bytes:
    """The body of an append."""
    return b"".join(
        [
            _DRAFT.pack(
                draft.flags,
                draft.event_class,
                draft.key_id,
                draft.nonce,
                draft.actor_tag,
                draft.session_tag,
                draft.key_commitment,
                draft.commitment,
                len(draft.sealed),
            )
            + draft.sealed
            for draft in drafts
        ]
    )


def unpack_drafts(body: bytes) -> list[Draft]:
    """The drafts of an append.

    Raises:
        Malformed: the body holds none, or something else.
    """
    drafts = []
    at = 0
    while at < len(body):
        if at + _DRAFT.size > len(body):
            raise Malformed("a draft that is cut off")
        flags, event_class, key_id, nonce, actor, session, key_commitment, commitment, length = _DRAFT.unpack_from(
            body, at
        )
        at += _DRAFT.size
        sealed = body[at : at + length]
        at += length
        if len(sealed) != length or length > MAX_SEALED_BYTES:
            raise Malformed("a draft that is cut off")
        drafts.append(Draft(event_class, flags, key_id, nonce, actor, session, key_commitment, commitment, sealed))
    if not drafts:
        raise Malformed("an append of nothing")
    return drafts
