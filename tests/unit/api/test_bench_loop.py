"""The benchmark's loop: who is asked what under which salt, and what comes out for programs.

The engine and the gateway are one small server here, which remembers what was asked and finds prefixes again by salt.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from api.stateful_bench import BenchFailed, Target, run_loop, summary
from appliance.engine.client import EngineClient
from appliance.engine.demo.agent_loop import agent_expected_answer, agent_task_messages

BLOCK = 4
GATEWAYS_SALT = "the gateway's own"
TURNS = 4


def _ids(messages: list[dict[str, str]]) -> list[int]:
    """A token a word, and one that ends each message."""
    text = "".join(f"{message['content']} <end> " for message in messages)
    return [sum(word.encode()) for word in text.split()]


@dataclass
class FakeEngine:
    """Answers `ok`, a token, to everything; keeps full blocks by salt."""

    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    kept: dict[str, list[list[int]]] = field(default_factory=dict)
    answer: str = "ok"
    fails_in: int | None = None

    async def through_gateway(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.fails_in is not None and len(self.asked) >= self.fails_in:
            return web.json_response({"error": {"message": "the vault is sealed"}}, status=503)
        self.asked.append(("gateway", {**body, "authorization": request.headers["Authorization"]}))
        return await self._stream(request, body, GATEWAYS_SALT, ids=False)

    async def directly(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(("engine", body))
        return await self._stream(request, body, body["cache_salt"], ids=True)

    async def tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": _ids((await request.json())["messages"])})

    async def _stream(self, request: web.Request, body: dict[str, Any], salt: str, *, ids: bool) -> web.StreamResponse:
        prompt = _ids(body["messages"])
        cached = max((_shared(known, prompt) for known in self.kept.get(salt, ())), default=0) // BLOCK * BLOCK
        self.kept.setdefault(salt, []).append(prompt)
        delta: dict[str, Any] = {"content": self.answer}
        choice: dict[str, Any] = {"index": 0, "delta": delta, "token_ids": _ids([{"content": self.answer}])[:-1]}
        usage = {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": cached}}
        chunks: list[Any] = [{"choices": [choice]}, {"choices": [], "usage": usage}]
        if ids:
            chunks[0]["prompt_token_ids"] = prompt
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in (*(json.dumps(chunk) for chunk in chunks), "[DONE]"):
            await response.write(f"data: {event}\n\n".encode())
        return response

    @asynccontextmanager
    async def serving(self, folder: Path) -> AsyncIterator[Target]:
        """Served on a Unix socket as the engine, and on loopback as the gateway."""
        engine, gateway = web.Application(), web.Application()
        engine.router.add_post("/v1/chat/completions", self.directly)
        engine.router.add_post("/tokenize", self.tokenize)
        gateway.router.add_post("/v1/chat/completions", self.through_gateway)
        runners = web.AppRunner(engine), web.AppRunner(gateway)
        for runner in runners:
            await runner.setup()
        await web.UnixSite(runners[0], str(folder / "engine.sock")).start()
        site = web.TCPSite(runners[1], "127.0.0.1", 0)
        await site.start()
        port = runners[1].addresses[0][1]
        client = EngineClient(folder / "engine.sock")
        try:
            yield Target(f"http://127.0.0.1:{port}/v1", "hf_key", client, "the-model", BLOCK)
        finally:
            for runner in runners:
                await runner.cleanup()


def _shared(left: list[int], right: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


async def test_stateless_calls_share_no_salt_vanilla_ones_share_one_and_the_gateway_is_sent_none(
    tmp_path: Path,
) -> None:
    engine = FakeEngine()
    async with engine.serving(tmp_path) as target:
        await run_loop(target, turns=TURNS)
    salts = [body["cache_salt"] for where, body in engine.asked if where == "engine"]
    through_gateway = [body for where, body in engine.asked if where == "gateway"]
    # One more than the arms' own: what only a first request costs is paid before them, under a salt of its own.
    assert len(salts) == 2 * TURNS + 1
    assert sorted(salts.count(salt) for salt in set(salts)) == [1] * (TURNS + 1) + [TURNS]
    assert len(through_gateway) == TURNS
    assert all("cache_salt" not in body and body["authorization"] == "Bearer hf_key" for body in through_gateway)


async def test_the_arms_are_asked_turn_by_turn_and_begin_in_turn(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with engine.serving(tmp_path) as target:
        await run_loop(target, turns=3)
    rounds = [engine.asked[at : at + 3] for at in range(1, 10, 3)]
    assert [[len(body["messages"]) for _, body in one] for one in rounds] == [[2] * 3, [4] * 3, [6] * 3]
    assert [[where for where, _ in one].index("gateway") for one in rounds] == [2, 1, 0]


async def test_each_turn_resends_the_conversation_with_the_answers_that_were_given(tmp_path: Path) -> None:
    engine = FakeEngine(answer="as you say")
    async with engine.serving(tmp_path) as target:
        await run_loop(target, turns=2)
    expected = [*agent_task_messages(0), {"role": "assistant", "content": "as you say"}, *agent_task_messages(1)]
    assert [body["messages"] for _, body in engine.asked[-3:]] == [expected] * 3


async def test_a_run_that_begins_later_is_told_what_came_before(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with engine.serving(tmp_path) as target:
        samples = await run_loop(target, arms=("stateful",), first=2, turns=2)
    history: list[dict[str, str]] = []
    for turn in range(2):
        history += [*agent_task_messages(turn), {"role": "assistant", "content": agent_expected_answer(turn)}]
    asked = [body["messages"] for where, body in engine.asked if where == "gateway"]
    assert asked[0] == [*history, *agent_task_messages(2)]
    assert asked[1] == [*asked[0], {"role": "assistant", "content": "ok"}, *agent_task_messages(3)]
    assert len(samples["stateful"]) == 2


async def test_what_programs_read_has_the_promised_names_and_adds_up(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with engine.serving(tmp_path) as target:
        samples = await run_loop(target, turns=TURNS)
        figures = json.loads(json.dumps(summary(samples, target)))
    assert {"stateless", "vanilla", "stateful", "prefill_reduction", "ttft_reduction", "identical_output"} <= set(
        figures
    )
    for arm in ("stateless", "vanilla", "stateful"):
        assert {"prefill_tokens_per_turn", "ttft_p50_s", "ttft_p90_s"} <= set(figures[arm])
        assert sum(figures[arm]["account_per_turn"].values()) == figures[arm]["prefill_tokens_per_turn"]
    assert figures["stateless"]["prefill_tokens_per_turn"] == figures["stateless"]["prompt_tokens_per_turn"]
    assert figures["stateful"]["prefill_tokens_per_turn"] == figures["vanilla"]["prefill_tokens_per_turn"]
    assert figures["prefill_reduction"] == pytest.approx(
        1 - figures["stateful"]["prefill_tokens_per_turn"] / figures["stateless"]["prefill_tokens_per_turn"]
    )
    assert figures["identical_output"] is True
    assert figures["first_divergence"] is None


async def test_a_turn_that_is_refused_ends_the_run_with_what_was_said(tmp_path: Path) -> None:
    engine = FakeEngine(fails_in=4)
    async with engine.serving(tmp_path) as target:
        with pytest.raises(BenchFailed, match=r"503.*the vault is sealed"):
            await run_loop(target, turns=TURNS)
