"""What an agent's harness advises of a turn: `nvext.agent_hints` in the body, as NVIDIA Dynamo's clients send it.

Rules:

- Advice, never an order: what it moves is the turn's place among its own tenant's, within what the tenant may ask for.
- No hint is an error. One that is not known, or not of its type, is dropped and named like any other field.
- What was made of the hints is said in `X-Holdfast-Hints`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

FIELD: Final = "nvext"
_HINTS: Final = "agent_hints"
_LARGEST: Final = (1 << 31) - 1  # signed 32 bits, as Dynamo has `priority`


@dataclass(frozen=True, slots=True)
class AgentHints:
    """What was advised; None: nothing.

    Attributes:
        priority: higher goes first among the tenant's turns, before what is resident; may be negative.
        strict_priority: a tier, before any priority; not negative.
        osl: expected length of the answer, in tokens.
        speculative_prefill: the session's next turn follows: have its KV at hand.
    """

    priority: int | None = None
    strict_priority: int | None = None
    osl: int | None = None
    speculative_prefill: bool | None = None

    def allowed(self, most_priority: int) -> "AgentHints":
        """The hints as they are acted on where so much priority may be asked for."""
        return AgentHints(
            None if self.priority is None else min(max(self.priority, -most_priority), most_priority),
            None if self.strict_priority is None else min(self.strict_priority, most_priority),
            self.osl,
            self.speculative_prefill,
        )

    def header(self, *, recalls: bool) -> str | None:
        """The value of `X-Holdfast-Hints`, of hints as they are acted on; None without any.

        Args:
            recalls: what of the session is on the disk alone can be brought back before it is asked for.
        """
        said = [
            f"{name}={value}"
            for name, value in (
                ("priority", self.priority),
                ("strict_priority", self.strict_priority),
                ("osl", self.osl),
            )
            if value is not None
        ]
        if self.speculative_prefill is not None:
            said.append(f"speculative_prefill={'recall' if recalls and self.speculative_prefill else 'no-effect'}")
        return ", ".join(said) or None


NO_HINTS: Final = AgentHints()


def read_agent_hints(request: Mapping[str, Any], drop: Callable[[str], None]) -> AgentHints:
    """The hints of a request's body; `drop` is told the names of what cannot be understood."""
    extensions = request.get(FIELD)
    if extensions is None:
        return NO_HINTS
    if not isinstance(extensions, dict):
        drop(FIELD)
        return NO_HINTS
    for name in extensions:
        if name != _HINTS:
            drop(f"{FIELD}.{name}")
    given = extensions.get(_HINTS)
    if given is None:
        return NO_HINTS
    if not isinstance(given, dict):
        drop(f"{FIELD}.{_HINTS}")
        return NO_HINTS
    read: dict[str, Any] = {}
    for name, value in given.items():
        fits = _FITS.get(name)
        if fits is None or (value is not None and not fits(value)):
            drop(f"{FIELD}.{_HINTS}.{name}")
        else:
            read[name] = value
    return AgentHints(**read)


def _whole(lowest: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and lowest <= value <= _LARGEST


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "priority": _whole(-_LARGEST),
    "strict_priority": _whole(0),
    "osl": _whole(1),
    "speculative_prefill": lambda value: isinstance(value, bool),
}
