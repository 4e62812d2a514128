"""Sessions that no agent lived, of the kind that agents live: policies are judged on them as on those that were.

They are drawn from what is published of 710 sessions of coding agents, not from those at hand: the quantiles of the
gaps after each stop reason, how many sessions end after each, how large prompts are, how much of each is found
again. Sessions are slow or quick throughout: a session's own pace explains a fourth of what differs in the logarithm of
its gaps. The same seed makes the same sessions.
"""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Final

BLOCK: Final = 64  # tokens; as the simulator counts what is found again
_TOOL_USE, _END_TURN = 0, 1  # as the simulator says it
_ENDS_ITS_TURN: Final = 0.054  # so that sessions have 68 turns in the mean, given how many end after each stop
_OVER: Final = {_TOOL_USE: 0.008, _END_TURN: 0.13}
_OWN_PACE: Final = 0.23  # of the variance
_MOST_TURNS: Final = 600
_NORMAL: Final = NormalDist()

# Shares, and what they do not exceed; in between linear in the logarithm.
_Quantiles = Sequence[tuple[float, float]]
_GAPS_S: Final[dict[int, _Quantiles]] = {
    _TOOL_USE: ((0.0, 0.5), (0.5, 8.6), (0.9, 71.0), (0.99, 612.0), (1.0, 3600.0)),
    _END_TURN: ((0.0, 2.0), (0.5, 210.0), (0.9, 2979.0), (0.99, 39_529.0), (1.0, 80_000.0)),
}
_SERVED_IN_S: Final[_Quantiles] = ((0.0, 1.0), (0.1, 3.4), (0.5, 6.1), (0.9, 15.0), (0.99, 48.0), (1.0, 120.0))
_OUTPUT_TOKENS: Final[_Quantiles] = ((0.0, 20.0), (0.25, 130.0), (0.5, 205.0), (0.9, 800.0), (1.0, 4000.0))
_FIRST_PROMPT: Final[_Quantiles] = ((0.0, 10_000.0), (0.5, 20_000.0), (0.9, 80_000.0), (1.0, 160_000.0))
_GROWTH: Final[_Quantiles] = ((0.0, 120.0), (0.25, 400.0), (0.5, 1000.0), (0.9, 5000.0), (1.0, 30_000.0))
_MOST_TOKENS: Final[_Quantiles] = ((0.0, 120_000.0), (0.5, 230_000.0), (1.0, 255_000.0))  # then it is summed up
_LOSES_A_BLOCK: Final = 0.041
_SUMMED_UP: Final = 0.012  # besides those that grow too long
_KEPT: Final = (0.05, 0.18)  # of a prompt that was summed up
_LEFT: Final = (0.15, 0.4)  # so long is the next one


def made_sessions(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """So many sessions, as the simulator loads them."""
    chance = random.Random(seed)
    return [_session(chance, f"made-{each}") for each in range(number)]


def _session(chance: random.Random, name: str) -> dict[str, Any]:
    pace = chance.gauss()
    most = _drawn(_MOST_TOKENS, chance.random())
    prompt, found, lost, gap_s = _drawn(_FIRST_PROMPT, chance.random()), 0, 0, 0.0
    first_tokens = int(prompt)
    turns: list[tuple[float, float, int, int, int, int, int]] = []
    while len(turns) < _MOST_TURNS:
        stop = _END_TURN if chance.random() < _ENDS_ITS_TURN else _TOOL_USE
        output = int(_drawn(_OUTPUT_TOKENS, chance.random()))
        turns.append((gap_s, _drawn(_SERVED_IN_S, chance.random()), int(prompt), output, found, lost, stop))
        if chance.random() < _OVER[stop]:
            break
        own, other = math.sqrt(_OWN_PACE) * pace, math.sqrt(1 - _OWN_PACE) * chance.gauss()
        gap_s = _drawn(_GAPS_S[stop], _NORMAL.cdf(own + other))
        blocks = int(prompt) // BLOCK
        grown = prompt + output + _drawn(_GROWTH, chance.random())
        if grown > most or chance.random() < _SUMMED_UP:
            kept = int(chance.uniform(*_KEPT) * blocks)
            prompt, found, lost = max(chance.uniform(*_LEFT) * prompt, (kept + 1) * BLOCK), kept * BLOCK, blocks - kept
        else:
            lost = int(chance.random() < _LOSES_A_BLOCK)
            prompt, found = grown, (blocks - lost) * BLOCK
    return {"name": name, "P": min(12_000, first_tokens), "key": name, "main": turns, "subs": []}


def _drawn(quantiles: _Quantiles, share: float) -> float:
    for (low, from_value), (high, to_value) in pairwise(quantiles):
        if share <= high:
            part = (share - low) / (high - low)
            return math.exp(math.log(from_value) + part * (math.log(to_value) - math.log(from_value)))
    return quantiles[-1][1]
