"""Sessions as they are in memory: what the turns of one share while it is in use, and what a turn is told of its own.

Rules:

- A session is in memory once, whoever asks for it: its turns that run at once see each other.
- What is here can be lost without losing anything but speed.
"""

import asyncio
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from appliance.sessions.keeping import Keeping
from appliance.sessions.labels import Label, Named
from appliance.sessions.turn import Origin


class Continuation:
    """That a turn goes on from a session's latest answer: held by the turn, and given up when that is over."""

    __slots__ = ("__weakref__",)


@dataclass(eq=False, slots=True)
class Live:
    """A session in memory, shared by its turns that run at once."""

    session_id: str
    tenant_id: str
    principal_id: str
    tree_id: str
    client_id: str | None
    epoch: int
    turns: int
    origin: Origin
    parent_session_id: str | None = None
    answered: int = 0  # the number of its latest turn that the engine finished
    continued_by: "weakref.ref[Continuation] | None" = None
    stored: bool = False
    forgotten: bool = False
    unsure: bool = False  # whether its latest turn was written is known to the store alone
    ran_until_s: float | None = None  # when its latest turn ended, by a clock that nobody sets, if it ran here
    is_over: bool = False  # its client has said so, and nothing of it was written down since
    ends: int = 0  # how often its client has said so while it was in memory
    label: Label | None = None
    salt: tuple[int, str] | None = None  # its epoch, and its own salt in that
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    __weakref__: Any = field(init=False, repr=False)

    def continued_from(self, turn_number: int) -> Continuation | None:
        """The right to go on from a turn; None: the session has gone on from there, or is about to.

        A turn that was broken off may be asked for again.
        """
        if turn_number < self.answered or (self.continued_by is not None and self.continued_by() is not None):
            return None
        continuation = Continuation()
        self.continued_by = weakref.ref(continuation)
        return continuation

    def give_up(self, continuation: Continuation | None) -> None:
        """Let another turn have the right to go on, if it is this one that has it."""
        if continuation is not None and self.continued_by is not None and self.continued_by() is continuation:
            self.continued_by = None

    @property
    def named(self) -> Named:
        return Named(self.tenant_id, self.session_id)

    @property
    def is_first_of_its_tree(self) -> bool:
        return self.tree_id == own_tree(self.session_id)


@dataclass(frozen=True, slots=True)
class Session:
    """The session that a turn belongs to.

    Attributes:
        visible_id: what the client knows it by: its own id, else ours.
        salt: the engine's `cache_salt`; 64 hexadecimal digits.
        shared_salt: of the tools and system messages, where the tenant's sessions share those and nothing else.
        lease_label: what the engine calls the session; says nothing about it.
        keeping: how long and within what bounds its KV is kept.
    """

    session_id: str
    tenant_id: str
    principal_id: str
    visible_id: str
    salt: str
    shared_salt: str | None
    lease_label: str
    tenant_label: str
    keeping: Keeping
    parent_lease_label: str  # of the agent that waits for this one; empty: none does
    origin: Origin
    _live: Live = field(repr=False, compare=False)
    _epoch: int = field(repr=False, compare=False)
    _was_over: bool = field(repr=False, compare=False)
    _ends: int = field(repr=False, compare=False)
    _links: Sequence[bytes] = field(default=(), repr=False, compare=False)  # of the request, where they were needed
    _continuation: Continuation | None = field(default=None, repr=False, compare=False)

    def was_ended(self) -> bool:
        """Whether what the engine has of it is to go: since the turn was placed in it, it was forgotten, its client has
        said that it is over, or its key was lost with a first turn that could not be stored."""
        return self._live.forgotten or self._live.ends != self._ends


def own_tree(session_id: str) -> str:
    """The tree that a session is the first of."""
    return f"tre_{session_id.removeprefix('ses_')}"


def is_over(last_used_at: float, over_at: float | None) -> bool:
    """What a session's row says of it: by the wall clock, which is all that a row has."""
    return over_at is not None and over_at >= last_used_at
