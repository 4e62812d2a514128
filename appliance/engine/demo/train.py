"""Trains the demonstration model from nothing: tokenizer, weights, configuration, chat template.

    .venv-engine/bin/python -m appliance.engine.demo.train --output DIR --seconds 4800

Rules:

- Nothing is downloaded: conversations are made on the fly from the seed.
- Computing time is the budget: the learning rate falls to zero as it runs out, so a slower machine gives a somewhat
  worse model, not an unfinished one, and a machine that does other things besides takes longer for the same model.
  What a model must be able to do is held by tests/engine/demo.
- Short conversations first, long ones later. Short ones get holes in their positions, so that the distances of a long
  context are met cheaply (Zhu et al., "PoSE", 2023); real long contexts follow, because attention has to find one line
  among thousands, too.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from tokenizers import Tokenizer
from torch import Tensor

from appliance.engine.demo.conversations import (
    AGENT_TURNS,
    KINDS,
    Case,
    Conversation,
    agent_cases,
    copying_conversation,
    evaluation_cases,
    long_conversation,
    short_conversation,
)
from appliance.engine.demo.llama import Shape, Weights, initial_weights, load_weights, logits, save_model
from appliance.engine.demo.tokenizer import END_TAG, START_TAG, Renderer, save_tokenizer, train_tokenizer
from appliance.engine.demo.vocabulary import LISTED

_PEAK_RATE = 2e-3
_MATRIX_RATE = 2.0  # times that, for what Muon trains
_WEIGHT_DECAY = 0.05
_WARM_UP = 0.03  # of the whole time
_LONG_FROM = 0.6  # of the whole time: before that, short conversations only
_LONG_SHARES = (0.25, 0.25, 0.5, 1.0, 1.0)
_LONG_CHANCE = 0.05  # of a conversation, once long ones take part
_BATCH_TOKENS = 2048
_ROW_LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120)
_HOLES_FROM = 0.4  # of the whole time: copying is learnt sooner from whole stretches
_HOLES_CHANCE = 0.5
_COPYING_UNTIL = 0.05
_COPYING_CHANCE = 0.7
_FEW_ACTS_UNTIL = 0.2
_FEW_ACTS = 3
_ELSEWHERE = 0.15  # the weight of a token that the assistant does not say
_REPORT_EVERY_S = 120.0
_EVALUATION_ROWS = 4
_EVALUATION_SEED = 20_260_101
_LISTED_TIMES = 200


@dataclass(frozen=True, slots=True)
class Sample:
    """A rendered conversation: token ids, and for each of them whether the assistant says it."""

    tokens: list[int]
    spoken: list[bool]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one length, padded on the right; `weight` [batch, length] belongs to the token that is predicted."""

    tokens: Tensor
    positions: Tensor
    weight: Tensor


class _Clock:
    """Counts the computing time of this process, shared among its threads, against a budget."""

    def __init__(self, threads: int, budget_s: float, *, spent: float = 0.0) -> None:
        self.budget_s = budget_s
        self._threads = threads
        self._started_s = time.process_time() - spent * budget_s * threads

    def share_spent(self) -> float:
        return (time.process_time() - self._started_s) / self._threads / self.budget_s


class Encoder:
    """Conversations to tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._renderer = Renderer()
        self._end: int = tokenizer.token_to_id(END_TAG)
        self._opening: list[int] = tokenizer.encode(f"{START_TAG}assistant\n").ids

    def sample(self, conversation: Conversation) -> Sample:
        """The conversation with the assistant's words marked, each with the tag that ends them."""
        tokens: list[int] = self.tokenizer.encode(self._renderer.render(conversation)).ids
        spoken = [False] * len(tokens)
        speaking = False
        for index, token in enumerate(tokens):
            spoken[index] = speaking
            if token == self._end:
                speaking = False
            elif tokens[max(0, index + 1 - len(self._opening)) : index + 1] == self._opening:
                speaking = True
        return Sample(tokens, spoken)

    def question_and_answer(self, case: Case) -> tuple[list[int], list[int]]:
        """The prompt of a case, and the tokens that are right, with the tag that ends them."""
        prompt = self._renderer.prompt(case.messages, case.tools)
        whole = self._renderer.prompt((*case.messages, case.expected), case.tools, add_generation_prompt=False)
        answer = whole.removeprefix(prompt).removesuffix("\n")
        return self.tokenizer.encode(prompt).ids, self.tokenizer.encode(answer).ids


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write a model folder."""
    parser = argparse.ArgumentParser(description="Train the demonstration model.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; made if it is missing")
    parser.add_argument("--seconds", type=float, default=4800.0, help="computing time to train for")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="a folder that an earlier run wrote: go on from its weights")
    parser.add_argument("--done", type=float, default=0.6, help="with --resume: the share of the time that is spent")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", type=int, default=96, help="of each kind, to measure the finished model with")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    tokenizer = write_tokenizer(options.output, seed=options.seed)
    clock = _Clock(options.threads, options.seconds, spent=0.0 if options.resume is None else options.done)
    started = initial_weights(shape, seed=options.seed)
    if options.resume is not None:
        started = _resumed(started, tokenizer, options.resume)
    encoder = Encoder(tokenizer)
    weights: Weights = {}
    for weights in _train(encoder, started, shape, clock=clock, seed=f"{options.seed} from {clock.share_spent():.1f}"):
        save_model(weights, shape, options.output, tokenizer.get_vocab())
    for kind, share in _accuracy(weights, shape, encoder, cases_per_kind=options.cases).items():
        _say(f"{kind:>12}  {share:6.1%}")
    return 0


def write_tokenizer(folder: Path, *, seed: int) -> Tokenizer:
    """Train the tokenizer on conversations of its own and write its files."""
    tokenizer = train_tokenizer(_tokenizer_texts(seed))
    save_tokenizer(tokenizer, folder)
    return tokenizer


def _resumed(fresh: Weights, tokenizer: Tokenizer, folder: Path) -> Weights:
    """An earlier run's weights; a token that its tokenizer did not have begins as it does in a fresh model."""
    weights = load_weights(folder)
    before = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    known = [(now, before[token]) for token, now in tokenizer.get_vocab().items() if token in before]
    embedding = fresh["model.embed_tokens.weight"]
    here, there = (torch.tensor(ids) for ids in zip(*known, strict=True))
    embedding[here] = weights["model.embed_tokens.weight"][there]
    return {**weights, "model.embed_tokens.weight": embedding}


def _train(encoder: Encoder, weights: Weights, shape: Shape, *, clock: _Clock, seed: str) -> Iterator[Weights]:
    """Yields the weights with every report, so that an interrupted run leaves a model, and when the time is spent."""
    for weight in weights.values():
        weight.requires_grad_()
    optimizers = _optimizers(weights)
    _say(f"{sum(weight.numel() for weight in weights.values()):,} parameters, {clock.budget_s:.0f} s")
    rng = random.Random(f"training {seed}")  # noqa: S311 (a recipe, not a secret)
    batches = _batches(encoder, rng, clock)
    reported_s = clock.share_spent() * clock.budget_s
    steps = seen = 0
    recent = torch.zeros(())
    while (done := clock.share_spent()) < 1:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _rate(done)
        batch = next(batches)
        loss = _step(weights, shape, optimizers, batch)
        recent = loss if steps == 0 else recent.lerp(loss, 0.02)
        steps += 1
        seen += batch.tokens.numel()
        if done * clock.budget_s > reported_s + _REPORT_EVERY_S:
            reported_s = done * clock.budget_s
            shares = _accuracy(weights, shape, encoder, cases_per_kind=8)
            told = " ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
            _say(f"{reported_s:5.0f} s  {steps:6} steps  {seen / 1e6:5.1f} M tokens  loss {recent.item():.4f}  {told}")
            yield _as_served(weights)
    yield _as_served(weights)


def _as_served(weights: Weights) -> Weights:
    """The weights with the precision that a model file keeps."""
    return {name: weight.detach().to(torch.bfloat16).float() for name, weight in weights.items()}


def _optimizers(weights: Weights) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for what multiplies (Jordan et al., 2024), its steps sized like AdamW's (Liu et al., 2025); else AdamW."""
    embedding = weights["model.embed_tokens.weight"]
    scales = [weight for weight in weights.values() if weight.ndim == 1]
    matrices = [weight for weight in weights.values() if weight.ndim == 2 and weight is not embedding]
    rest = [
        {"params": [embedding], "weight_decay": _WEIGHT_DECAY, "peak": _PEAK_RATE},
        {"params": scales, "weight_decay": 0.0, "peak": _PEAK_RATE},
    ]
    multiplied = [{"params": matrices, "peak": _MATRIX_RATE * _PEAK_RATE}]
    return (
        torch.optim.Muon(multiplied, weight_decay=_WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), fused=True),
    )


def _step(weights: Weights, shape: Shape, optimizers: Sequence[torch.optim.Optimizer], batch: Batch) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = logits(weights, shape, batch.tokens[:, :-1], batch.positions[:, :-1])
    wanted = batch.tokens[:, 1:]
    losses = F.cross_entropy(scores.flatten(0, 1).float(), wanted.flatten(), reduction="none")
    weight = batch.weight[:, 1:].flatten()
    loss = (losses * weight).sum() / weight.sum()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def _rate(done: float) -> float:
    """The learning rate's share of its peak: a short rise, then half a cosine."""
    if done < _WARM_UP:
        return done / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def _batches(encoder: Encoder, rng: random.Random, clock: _Clock) -> Iterator[Batch]:
    """Rows of like length, in a few fixed shapes: the matrix kernels are built anew for every shape they meet."""
    waiting: dict[int, list[Sample]] = {length: [] for length in _ROW_LENGTHS}
    while True:
        spent = clock.share_spent()
        if spent > _LONG_FROM and rng.random() < _LONG_CHANCE:
            conversation = long_conversation(rng, share=rng.choice(_LONG_SHARES))
        elif spent < _COPYING_UNTIL and rng.random() < _COPYING_CHANCE:
            conversation = copying_conversation(rng)
        elif spent < _FEW_ACTS_UNTIL:
            conversation = short_conversation(rng, most_acts=_FEW_ACTS)
        else:
            conversation = short_conversation(rng)
        sample = encoder.sample(conversation)
        length = _row_length(len(sample.tokens))
        rows = waiting[length]
        rows.append(sample)
        if len(rows) * length >= _BATCH_TOKENS:
            yield _padded(rows, length, rng, holes_chance=_HOLES_CHANCE if spent > _HOLES_FROM else 0.0)
            waiting[length] = []


def _row_length(tokens: int) -> int:
    return next(length for length in _ROW_LENGTHS if length >= tokens)


def _padded(samples: Sequence[Sample], length: int, rng: random.Random, *, holes_chance: float) -> Batch:
    tokens = torch.zeros(len(samples), length + 1, dtype=torch.long)
    positions = torch.zeros(len(samples), length + 1, dtype=torch.long)
    weight = torch.zeros(len(samples), length + 1)
    for row, sample in enumerate(samples):
        count = len(sample.tokens)
        tokens[row, :count] = torch.tensor(sample.tokens)
        weight[row, :count] = torch.tensor([1.0 if spoken else _ELSEWHERE for spoken in sample.spoken])
        positions[row] = _positions(length + 1, rng, holes=rng.random() < holes_chance)
    return Batch(tokens, positions, weight)


def _positions(length: int, rng: random.Random, *, holes: bool) -> Tensor:
    steps = torch.ones(length, dtype=torch.long)
    steps[0] = 0
    if holes:
        room = Shape().max_tokens - length
        for _ in range(rng.choice((1, 1, 2, 3))):
            hole = int(room * rng.random() ** 2)
            steps[rng.randrange(1, length)] += hole
            room -= hole
    return steps.cumsum(0)


def _accuracy(weights: Weights, shape: Shape, encoder: Encoder, *, cases_per_kind: int) -> dict[str, float]:
    """The share of cases answered word by word: every right token is the likeliest one after those before it."""
    cases = {kind: evaluation_cases(kind, cases_per_kind, seed=_EVALUATION_SEED) for kind in KINDS}
    cases["agent_loop"] = agent_cases(min(cases_per_kind, AGENT_TURNS))
    shares = {}
    for kind, of_kind in cases.items():
        encoded = sorted(map(encoder.question_and_answer, of_kind), key=lambda pair: len(pair[0]))
        right = 0
        for first in range(0, len(encoded), _EVALUATION_ROWS):
            questions, answers = zip(*encoded[first : first + _EVALUATION_ROWS], strict=True)
            right += _right(weights, shape, questions, answers)
        shares[kind] = right / len(encoded)
    return shares


def _right(weights: Weights, shape: Shape, questions: Sequence[list[int]], answers: Sequence[list[int]]) -> int:
    """How many questions are answered token by token; all of them go through the model in one batch."""
    length = _row_length(max(len(question) + len(answer) for question, answer in zip(questions, answers, strict=True)))
    tokens = torch.zeros(len(questions), length, dtype=torch.long)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        tokens[row, : len(question) + len(answer)] = torch.tensor(question + answer)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        likeliest = logits(weights, shape, tokens, torch.arange(length).expand_as(tokens)).argmax(dim=-1)
    right = 0
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        first = len(question) - 1
        right += likeliest[row, first : first + len(answer)].tolist() == answer
    return right


def _tokenizer_texts(seed: int) -> Iterator[str]:
    renderer = Renderer()
    rng = random.Random(f"tokenizer {seed}")  # noqa: S311 (a recipe, not a secret)
    for _ in range(6000):
        yield renderer.render(short_conversation(rng))
    for _ in range(150):
        yield renderer.render(long_conversation(rng, share=1.0))
    # Whatever an answer may have to copy is one token: copying one is learnt soon, spelling several is not.
    for word in LISTED:
        yield f"{word} {word}\n" * _LISTED_TIMES


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
