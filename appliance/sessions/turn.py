"""What crosses the rooms for one turn: who it says it belongs to, what it asks, how it ended.

Frozen values without behaviour. A `Turn` is already decoded and allow-listed; the wire's own types stay in `api`.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]


class TurnKind(enum.StrEnum):
    """Which of the engine's two ways of asking a turn uses."""

    CHAT = "chat"
    COMPLETION = "completion"


class TurnState(enum.StrEnum):
    """How a turn ended."""

    COMPLETE = "complete"  # the engine finished
    INTERRUPTED = "interrupted"  # the client left, or the engine was lost: what was generated until then is kept
    FAILED = "failed"  # nothing was generated


class Origin(enum.StrEnum):
    """How a session was recognised."""

    HEADER = "header"
    BODY = "body"
    INFERRED = "inferred"
    NEW = "new"


@dataclass(frozen=True, slots=True)
class SessionHints:
    """What a request says of its session. Every name is the client's own and is scoped to its principal."""

    client_id: str | None = None
    parent_client_id: str | None = None
    previous_response_id: str | None = None
    origin: Origin = Origin.NEW  # where `client_id` was found


@dataclass(frozen=True, slots=True)
class Turn:
    """One request to a model.

    `parameters` is the allow-listed request without its messages or prompt. `messages` is empty for a completion, whose
    text or token ids are in `parameters["prompt"]`.
    """

    kind: TurnKind
    model: str
    messages: Sequence[Message]
    parameters: Mapping[str, Any]
    hints: SessionHints = field(default_factory=SessionHints)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a turn ended. Token ids are the engine's own, in order; `answer` is the assistant's message or the text.

    `cached_tokens` is None where the engine did not get to say how much of the prompt it found. `ran_s` is from when to
    when it ran by a clock that nobody sets, which no other process's can be compared with; None: not known.
    `first_token_s` is how long after the engine was to be asked the first token came, a wait for its place included;
    None: the answer was not streamed, or none came.
    """

    response_id: str
    state: TurnState
    answer: Message
    prompt_token_ids: Sequence[int]
    completion_token_ids: Sequence[int]
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    finish_reason: str | None
    started_at: float
    ended_at: float
    ran_s: tuple[float, float] | None = None
    first_token_s: float | None = None
