"""What an answer says of what is shared in one tier. Pure.

Rules:

- What was found and must not be is `FAIL`, in whatever tier it was.
- What was not found counts only where the tier is shown to have had it: then it is `PASS` where nothing must be found,
  and `FAIL` where something must. Else it is `UNKNOWN`: it may have been given up.
- What must be found counts only where the tier itself gave some of it. What came from a tier behind, while this one had
  it, is `FAIL`: this one did not give it. What came from a tier above, where it was still, is `UNKNOWN`.
- Who shows what a tier had is a control: a session that nobody forgot, which asks for its own prompt again.
"""

import enum
from collections.abc import Sequence

from api.proving.asking import TIERS, Said
from api.proving.expectations import Bounds, Reach, bounds


class Verdict(enum.StrEnum):
    """What came of one check."""

    PASS = "PASS"  # noqa: S105 (no secret)
    FAIL = "FAIL"
    UNKNOWN = "UNKNOWN"
    NOT_CONFIGURED = "NOT CONFIGURED"


def shows(controls: Sequence[Said], tier: str, *, block_size: int) -> bool:
    """Whether each control found its whole prompt again, and the tier gave some of it."""
    return all(
        control.from_tier(tier)
        and control.cached_tokens
        >= bounds(Reach.EVERYTHING, system_tokens=0, prompt_tokens=control.prompt_tokens, block_size=block_size).least
        for control in controls
    )


def judged(said: Said, wanted: Bounds, tier: str, *, was_there: bool) -> tuple[Verdict, str]:
    """The verdict on an answer, and what was found, in words.

    Args:
        wanted: how much must be found of the prompt, and how much may.
        tier: where the prompt was to be found.
        was_there: whether it is shown that the tier had the prompt.
    """
    served = {each: tokens for each, tokens in said.tier_tokens.items() if tokens}
    told = ", ".join(f"{tokens} from {each}" for each, tokens in served.items())
    found = f"{said.cached_tokens} tokens; {told}" if told else f"{said.cached_tokens} tokens"
    if said.cached_tokens > wanted.most:
        return Verdict.FAIL, found
    if not was_there and (not wanted.least or said.cached_tokens < wanted.least):
        return (
            Verdict.UNKNOWN,
            f"{found}; {tier} is not shown to have had it: it was given up, or never stored",
        )
    if said.cached_tokens < wanted.least:
        return Verdict.FAIL, found
    if not wanted.least or said.from_tier(tier):
        return Verdict.PASS, found
    if was_there and not served.keys().isdisjoint(TIERS[TIERS.index(tier) + 1 :]):
        return Verdict.FAIL, f"{found}; {tier} had it, and did not give it"
    return Verdict.UNKNOWN, f"{found}; {tier} was not needed for it"
