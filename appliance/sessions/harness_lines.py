"""Lines that an agent's harness writes into the system prompt for its own accounting, another one for every call.

They say nothing to a model, and what stands behind them is computed again for every call. Known ones:

- `x-anthropic-billing-header: cc_version=…; cc_entrypoint=…; cch=…;`, which Claude Code puts before its system prompt;
  `cch` is another one in every request (https://github.com/vllm-project/vllm/pull/36829).

Rules:

- Pure. Only a whole line that begins like a known one is taken out, and the line end behind it; nothing else changes.
- Only messages of the roles `system` and `developer` are looked at: what a user or a tool says is theirs.
- What a message without such a line is, it stays: the same object.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from appliance.sessions.turn import Message

_LINE: Final = re.compile(r"^x-anthropic-billing-header:[^\r\n]*(?:\r\n|\r|\n|\Z)", re.MULTILINE)
_BEGINNING: Final = "x-anthropic-billing-header:"
_ROLES: Final = frozenset({"system", "developer"})


def without_harness_lines(text: str) -> tuple[str, int]:
    """`text` without known lines, and how many there were."""
    return _LINE.subn("", text) if _BEGINNING in text else (text, 0)


def take_out_harness_lines(messages: Sequence[Message]) -> tuple[Sequence[Message], int]:
    """The messages as they are without known lines, and how many lines that were.

    A text part that was nothing but such a line is left out of its message.
    """
    taken_out = 0
    kept: list[Message] = []
    for message in messages:
        content, lines = (message.get("content"), 0) if message.get("role") in _ROLES else (None, 0)
        if isinstance(content, str):
            content, lines = without_harness_lines(content)
        elif isinstance(content, list):
            content, lines = _without_in_parts(content)
        kept.append({**message, "content": content} if lines else message)
        taken_out += lines
    return (kept, taken_out) if taken_out else (messages, 0)


def _without_in_parts(parts: list[Any]) -> tuple[list[Any], int]:
    taken_out = 0
    kept: list[Any] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        without, lines = without_harness_lines(text) if isinstance(text, str) else ("", 0)
        if not lines:
            kept.append(part)
        elif without:
            kept.append({**part, "text": without})
        taken_out += lines
    return kept, taken_out
