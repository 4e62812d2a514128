"""A history as a chain of keyed hashes.

Rules:

- Two requests have the same link at position n exactly if their first n messages say the same thing.
- What clients change when they send a history back is not part of a message: ids of tool calls, empty fields, names of
  extra fields, a text given as one part instead of a string.
- The key is the tenant's and the principal starts the chain, so that a link means nothing to anybody else.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic_core import to_json

from appliance.sessions.turn import Message

LinkChain = Callable[[bytes, Iterable[bytes]], list[bytes]]
"""Keyed hashes of (first link, canonical messages), each of the link before it and a message; 32 bytes a message."""


def canonical_message(message: Message) -> bytes:
    """What a message says, independent of how a client happens to write it."""
    calls = message.get("tool_calls") or ()
    return to_json(
        (
            message.get("role"),
            _canonical_content(message.get("content")),
            [_canonical_call(call) for call in calls],
        )
    )


def history_links(
    chain: LinkChain, principal_id: str, messages: Sequence[Message], known: Sequence[bytes] = ()
) -> list[bytes]:
    """The link after each message, in order; one of 32 bytes a message. `known`: those of the first messages."""
    first = known[-1] if known else principal_id.encode()
    return [*known, *chain(first, map(canonical_message, messages[len(known) :]))]


def answered_positions(messages: Sequence[Message]) -> list[int]:
    """The lengths of the prefixes that end with an answer, perhaps one of ours; longest first."""
    return [n for n in range(len(messages), 0, -1) if messages[n - 1].get("role") == "assistant"]


def shared_length(left: Sequence[bytes], right: Sequence[bytes]) -> int:
    """How many leading links two chains share. Chains that part never meet again, so bisection finds the place."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[middle - 1] == right[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _canonical_content(content: Any) -> Any:
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return texts[0] if len(texts) == 1 else texts
    return content


def _canonical_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    return (function.get("name"), function.get("arguments")) if isinstance(function, dict) else call
