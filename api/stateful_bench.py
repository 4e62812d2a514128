"""What keeping state is worth: one scripted agent loop, asked three ways of one engine in one run.

- `stateless`: at the engine itself, every call under a salt of its own, so that nothing is found again.
- `vanilla`: at the engine itself, one salt: vLLM's own prefix caching, with nobody contending.
- `stateful`: through the gateway, as a client that resends everything and names no session.

Rules:

- The arms take turns, a turn each, and begin in turn, so that what slows the machine slows all three.
- Every arm sends back the answers that it was given itself.
- A prefilled token is one that the engine computed: the prompt's tokens less those that it says it found. Each is
  accounted for.
- Nothing here is estimated: counts are the engine's, times are a monotonic clock's.
"""

import dataclasses
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import aiohttp
from pydantic_core import from_json, to_json

from appliance.engine.client import EngineClient
from appliance.engine.demo.agent_loop import (
    AGENT_MAX_ANSWER_TOKENS,
    AGENT_TURNS,
    agent_history,
    agent_task_messages,
)
from appliance.errors import Fault, HoldfastError
from appliance.sessions import Cause
from appliance.sessions.deltas import token_array
from appliance.sessions.misses import Circumstances, Ran, account_of

COMPARED_TURNS = 10  # the last ones: the longest contexts
_CHAT = "/v1/chat/completions"
_TURN_DEADLINE_S = 300.0
_HALF = 0.5
_NINE_TENTHS = 0.9


class BenchFailed(HoldfastError):
    """A turn of the benchmark was not answered."""

    code: ClassVar[str] = "bench_failed"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Account:
    """Why a turn's prefilled tokens were prefilled; the parts add up to them.

    Attributes:
        new: not part of the conversation before.
        tail: computed before, but in a block that was not full, or the answer's last token, which never is.
        template: the template wrote the older part of the prompt differently than before.
        tokenization: the answer's text reads back as other tokens than those that were generated.
        lost: computed before, in a full block, and not found again.
    """

    new: int = 0
    tail: int = 0
    template: int = 0
    tokenization: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn of one arm. Times in seconds, the rest in tokens."""

    text: str
    ttft_s: float
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    cached_tokens: int
    margins: Sequence[float]
    account: Account = field(default_factory=Account)

    @property
    def prefilled(self) -> int:
        """Prompt tokens that the engine computed."""
        return len(self.prompt_ids) - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two arms first said something else.

    Attributes:
        arm: the one that differs from `stateless`.
        turn: counted from 0.
        token: of the answer, counted from 0.
        logit_margin: how much more likely the best token was than the second, as a difference of logarithms, where
            they parted: near 0, rounding decides. None: it was not measured.
    """

    arm: str
    turn: int
    token: int
    logit_margin: float | None


@dataclass(frozen=True, slots=True)
class Target:
    """The appliance that is measured."""

    endpoint: str
    api_key: str
    engine: EngineClient
    model: str
    block_size: int


class _Arm(Protocol):
    async def ask(self, messages: Sequence[dict[str, str]]) -> Sample: ...


Progress = Callable[[int, dict[str, Sample]], None]


async def run_loop(
    target: Target,
    *,
    arms: Sequence[str] = ("stateless", "vanilla", "stateful"),
    first: int = 0,
    turns: int = AGENT_TURNS,
    margins: bool = False,
    progress: Progress = lambda _turn, _samples: None,
) -> dict[str, list[Sample]]:
    """Run the agent loop on every arm, then close the target's client; a sample a turn, in order.

    Args:
        first: the turn to begin with; what came before it is told as it should have gone.
        turns: how many turns are asked.
        margins: measure by how much each generated token won.
        progress: told of each turn when all arms have done it.

    Raises:
        BenchFailed: a turn was not answered.
    """
    limits = aiohttp.ClientTimeout(total=_TURN_DEADLINE_S)
    async with target.engine, aiohttp.ClientSession(timeout=limits) as http:
        asked: dict[str, _Arm] = {
            "stateless": _Direct(target, lambda: secrets.token_hex(32), margins=margins),
            "vanilla": _Direct(target, _constant(secrets.token_hex(32)), margins=margins),
            "stateful": _ThroughGateway(target, http, margins=margins),
        }
        histories = {name: agent_history(first) for name in arms}
        samples: dict[str, list[Sample]] = {name: [] for name in arms}
        # What only a first request costs (connections, caches of the tokenizer) belongs to no arm.
        await _Direct(target, lambda: secrets.token_hex(32), margins=margins).ask(agent_task_messages(0))
        for turn in range(first, first + turns):
            for place in range(len(arms)):
                name = arms[(place + turn) % len(arms)]
                history = histories[name]
                history += agent_task_messages(turn)
                sample = await asked[name].ask(history)
                history.append({"role": "assistant", "content": sample.text})
                before = samples[name][-1] if samples[name] else None
                account = account_for(before, sample, target.block_size, stateless=name == "stateless")
                samples[name].append(dataclasses.replace(sample, account=account))
            progress(turn - first, {name: samples[name][-1] for name in arms})
    return samples


def account_for(before: Sample | None, now: Sample, block_size: int, *, stateless: bool = False) -> Account:
    """Why the prefilled tokens of `now` were prefilled, when `before` was the turn before it."""
    if before is None or stateless:
        return Account(new=now.prefilled)
    account = account_of(_ran(before, block_size), _ran(now, block_size))
    computed = dict(account.computed)
    new, tail = computed.pop(Cause.NEW, 0), computed.pop(Cause.BLOCK_TAIL, 0)
    rewritten = computed.pop(Cause.DIVERGED, 0)
    in_answer = account.diverged_at is not None and account.diverged_at >= len(before.prompt_ids)
    return Account(
        new=new,
        tail=tail,
        template=0 if in_answer else rewritten,
        tokenization=rewritten if in_answer else 0,
        lost=sum(computed.values()),
    )


def _ran(sample: Sample, block_size: int) -> Ran:
    ids = token_array(sample.prompt_ids, sample.answer_ids)
    return Ran("", ids, len(sample.prompt_ids), sample.cached_tokens, 0.0, 0.0, Circumstances(block_size))


def first_divergence(samples: dict[str, list[Sample]]) -> Divergence | None:
    """The earliest turn in which an arm said something else than `stateless`; None: they never did."""
    reference = samples["stateless"]
    for turn, expected in enumerate(reference):
        for arm, arm_samples in samples.items():
            said = arm_samples[turn]
            if list(said.answer_ids) == list(expected.answer_ids) and said.text == expected.text:
                continue
            token = _shared(expected.answer_ids, said.answer_ids)
            margin = expected.margins[token] if token < len(expected.margins) else None
            return Divergence(arm, turn, token, margin)
    return None


def summary(samples: dict[str, list[Sample]], target: Target) -> dict[str, Any]:
    """The figures as `--json` prints them. Those of an arm, and the reductions, are of the last turns.

    `ttft_over_vanilla_p50_s` is of all turns but the first: the median of how much later the first token came than in
    the same turn of `vanilla`, which what slows the machine for a while changes less than a difference of medians.
    """
    divergence = first_divergence(samples)
    figures: dict[str, Any] = {name: _arm_figures(arm[-COMPARED_TURNS:]) for name, arm in samples.items()}
    stateless, stateful = figures["stateless"], figures["stateful"]
    return figures | {
        "prefill_reduction": 1 - stateful["prefill_tokens_per_turn"] / stateless["prefill_tokens_per_turn"],
        "ttft_reduction": 1 - stateful["ttft_p50_s"] / stateless["ttft_p50_s"],
        "ttft_over_vanilla_p50_s": _later_p50_s(samples["stateful"], samples["vanilla"]),
        "identical_output": divergence is None,
        "first_divergence": None if divergence is None else dataclasses.asdict(divergence),
        "model": target.model,
        "block_size": target.block_size,
        "turns": len(samples["stateless"]),
        "compared_turns": min(COMPARED_TURNS, len(samples["stateless"])),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _later_p50_s(arm: Sequence[Sample], other: Sequence[Sample]) -> float:
    """Seconds by which the first token came later, turn by turn; of a single turn, that one's."""
    later = [mine.ttft_s - its.ttft_s for mine, its in zip(arm, other, strict=True)]
    return percentile(later[1:] or later, _HALF)


def _arm_figures(samples: Sequence[Sample]) -> dict[str, Any]:
    count = len(samples)
    return {
        "prefill_tokens_per_turn": sum(sample.prefilled for sample in samples) / count,
        "prompt_tokens_per_turn": sum(len(sample.prompt_ids) for sample in samples) / count,
        "answer_tokens_per_turn": sum(len(sample.answer_ids) for sample in samples) / count,
        "ttft_p50_s": percentile([sample.ttft_s for sample in samples], _HALF),
        "ttft_p90_s": percentile([sample.ttft_s for sample in samples], _NINE_TENTHS),
        "account_per_turn": {
            part.name: sum(getattr(sample.account, part.name) for sample in samples) / count
            for part in dataclasses.fields(Account)
        },
    }


def _constant(value: str) -> Callable[[], str]:
    return lambda: value


def _body(model: str, messages: Sequence[dict[str, str]], *, margins: bool) -> dict[str, Any]:
    asked = {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": AGENT_MAX_ANSWER_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    return asked | ({"logprobs": True, "top_logprobs": 2} if margins else {})


class _Direct:
    """At the engine's own socket."""

    def __init__(self, target: Target, salt: Callable[[], str], *, margins: bool) -> None:
        self._target = target
        self._salt = salt
        self._margins = margins

    async def ask(self, messages: Sequence[dict[str, str]]) -> Sample:
        target = self._target
        body = to_json({**_body(target.model, messages, margins=self._margins), "cache_salt": self._salt()})
        reading = _Reading()
        request_id = secrets.token_hex(16)
        async with target.engine.stream(_CHAT, body, request_id=request_id) as payloads:
            async for payload in payloads:
                reading.take(payload)
        return reading.sample()


class _ThroughGateway:
    """As an OpenAI client that names no session."""

    def __init__(self, target: Target, http: aiohttp.ClientSession, *, margins: bool) -> None:
        self._target = target
        self._http = http
        self._margins = margins

    async def ask(self, messages: Sequence[dict[str, str]]) -> Sample:
        target = self._target
        body = to_json(_body(target.model, messages, margins=self._margins))
        headers = {"authorization": f"Bearer {target.api_key}", "content-type": "application/json"}
        url = target.endpoint + _CHAT.removeprefix("/v1")
        reading = _Reading()
        async with self._http.post(url, data=body, headers=headers) as response:
            if response.status != 200:
                raise _failed(f"the gateway answered {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if line.startswith(b"data: "):
                    reading.take(line[len(b"data: ") :].strip())
        sample = reading.sample()
        prompt_ids = await self._prompt_ids(messages)
        if len(prompt_ids) != reading.prompt_tokens:
            raise _failed(f"the engine counted {reading.prompt_tokens} prompt tokens and renders {len(prompt_ids)}")
        return dataclasses.replace(sample, prompt_ids=prompt_ids)

    async def _prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """What the engine makes of the messages; the gateway keeps a prompt's token ids to itself."""
        body = to_json({"model": self._target.model, "messages": messages, "add_generation_prompt": True})
        status, answer = await self._target.engine.call("/tokenize", body, request_id=secrets.token_hex(16))
        if status != 200:
            raise _failed(f"the engine does not render the prompt (status {status})")
        ids: list[int] = from_json(answer)["tokens"]
        return ids


class _Reading:
    """One answer as it streams in."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._first: float | None = None
        self._text: list[str] = []
        self._prompt_ids: Sequence[int] = ()
        self._answer_ids: list[int] = []
        self._margins: list[float] = []
        self._usage: dict[str, Any] | None = None

    @property
    def prompt_tokens(self) -> int:
        return 0 if self._usage is None else int(self._usage["prompt_tokens"])

    def take(self, payload: bytes) -> None:
        if self._first is None:
            self._first = time.perf_counter() - self._began
        if payload == b"[DONE]":
            return
        chunk = from_json(payload)
        if "error" in chunk:
            raise _failed(str(chunk["error"])[:300])
        self._usage = chunk.get("usage") or self._usage
        self._prompt_ids = chunk.get("prompt_token_ids") or self._prompt_ids
        for choice in chunk["choices"]:
            self._text.append(choice["delta"].get("content") or "")
            self._answer_ids += choice.get("token_ids") or ()
            for token in (choice.get("logprobs") or {}).get("content") or ():
                best = sorted((top["logprob"] for top in token["top_logprobs"]), reverse=True)
                self._margins.append(best[0] - best[1] if len(best) > 1 else math.inf)

    def sample(self) -> Sample:
        if self._first is None or self._usage is None:
            raise _failed("an answer came without its usage")
        cached = (self._usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Sample(
            text="".join(self._text),
            ttft_s=self._first,
            prompt_ids=self._prompt_ids,
            answer_ids=self._answer_ids,
            cached_tokens=cached,
            margins=self._margins,
        )


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    for at, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return at
    return min(len(left), len(right))


def _failed(cause: str) -> BenchFailed:
    return BenchFailed(
        "a turn of the benchmark was not answered", cause=cause, remedy="`holdfast logs` tells more; then run it again"
    )
