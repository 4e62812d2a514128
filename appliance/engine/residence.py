"""What the gateway knows of sessions' KV: how much of each is on the device, and how large its next prompt will be.

Rules:

- What a turn left is there while its lease stands. A report of the engine's says better, as long as it is fresh and the
  session had no turn since it was asked for.
- A guess that is wrong makes somebody wait longer or shorter, never anything false.
- Bounded: the sessions used last.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from appliance.engine.protocol import LeaseReport

Key = tuple[str, str]  # tenant label, session label
_SESSIONS: Final = 10_000
_FRESH_S: Final = 5.0
_LEARNT_FROM_ONE: Final = 0.05  # of a mean, what one more turn counts
_TOKENS_PER_BYTE: Final = 0.25  # until a turn has been seen
_OUTPUT_TOKENS: Final = 256.0


@dataclass(slots=True)
class _Left:
    tokens: int  # prompt and answer
    prompt_tokens: int
    prompt_bytes: int
    ended_at: float
    until: float


class Residence:
    """Of the sessions of one engine.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left: OrderedDict[Key, _Left] = OrderedDict()
        self._reported: Mapping[Key, int] = {}
        self._asked_at = float("-inf")
        self._tokens_per_byte = _TOKENS_PER_BYTE
        self._output_tokens = _OUTPUT_TOKENS

    def ended(
        self,
        key: Key,
        *,
        prompt_bytes: int,
        prompt_tokens: int,
        output_tokens: int,
        idle_timeout_s: float,
    ) -> None:
        """A turn has ended, and left this much."""
        if not prompt_tokens:
            return
        now = self._clock()
        self._left[key] = _Left(prompt_tokens + output_tokens, prompt_tokens, prompt_bytes, now, now + idle_timeout_s)
        self._left.move_to_end(key)
        if len(self._left) > _SESSIONS:
            self._left.popitem(last=False)
        if prompt_bytes:
            self._tokens_per_byte += _LEARNT_FROM_ONE * (prompt_tokens / prompt_bytes - self._tokens_per_byte)
        self._output_tokens += _LEARNT_FROM_ONE * (output_tokens - self._output_tokens)

    def told(self, report: LeaseReport, asked: Iterable[Key], asked_at: float) -> None:
        """What the engine reported of the sessions that it was `asked` about; `asked_at`: when, by the clock."""
        there = {(lease.tenant, lease.session): lease.tokens for lease in report.leases}
        self._reported = {key: there.get(key, 0) for key in asked}
        self._asked_at = asked_at

    def resident_tokens(self, key: Key) -> int:
        """How much of a session's history is on the device, as far as is known."""
        now, left = self._clock(), self._left.get(key)
        reported = self._reported.get(key) if now - self._asked_at <= _FRESH_S else None
        if reported is not None and (left is None or left.ended_at < self._asked_at):
            return reported
        return left.tokens if left is not None and now < left.until else 0

    def prompt_tokens(self, key: Key, prompt_bytes: int) -> int:
        """What a prompt of so many bytes is expected to have: as dense as the session's last, else as the mean."""
        left = self._left.get(key)
        dense = self._tokens_per_byte
        if left is not None and left.prompt_bytes:
            dense = left.prompt_tokens / left.prompt_bytes
        return max(1, round(prompt_bytes * dense))

    def output_tokens(self, *, at_most: int | None, hinted: int | None) -> int:
        """What an answer is expected to have: what its client says, else the mean."""
        expected = round(self._output_tokens) if hinted is None else hinted
        return max(1, expected if at_most is None else min(expected, at_most))
