"""Whatever sessions do, on vLLM's real block pool: no request that fits waits for a lease, and nothing is lost.

A seed decides what happens: turns, branches, children, cancellations, closes, ends that are told, silence, floods
that preempt. Then a request comes that fits beside those that run, and must run at once.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from appliance.engine.protocol import TurnEnd
from tests.engine.in_process import BLOCK, BOUND, MAX_MODEL_LEN, POOL, EngineInProcess, words


def _deed(chance: random.Random) -> tuple[Any, ...]:
    """What happens next, from a seed alone."""
    session = chance.randrange(6)
    kinds: list[tuple[Any, ...]] = [
        ("turn", session, chance.randint(1, 250), chance.randint(1, 40)),
        ("turn", session, chance.randint(1, 250), chance.randint(1, 40)),
        ("branch", session, chance.randint(0, 250), chance.randint(1, 40)),
        ("child", session, chance.randint(1, 120), chance.randint(1, 40)),
        ("cold", chance.randint(1, 900), chance.randint(1, 100)),
        ("flood", chance.randint(3, 6)),
        ("cancel", chance.randrange(10)),
        ("step", chance.randint(1, 12)),
        ("step", chance.randint(1, 12)),
        ("wait", chance.choice([0.5, 5.0, 20.0, 700.0])),
        ("close", session),
        ("told", session, chance.choice(["tool_use", "end_turn", "other"])),
    ]
    return chance.choice(kinds)


@dataclass
class _World:
    engine: EngineInProcess
    histories: dict[str, list[int]] = field(default_factory=dict)
    number: int = 0

    def do(self, deed: tuple[Any, ...]) -> None:
        """Have one thing happen."""
        getattr(self, deed[0])(*deed[1:])

    def fresh(self, length: int) -> list[int]:
        """Words that nobody had."""
        self.number += 1
        return words(1000 + self.number, length)

    def ask(self, session: str, prompt: list[int], max_tokens: int) -> None:
        prompt = prompt[: MAX_MODEL_LEN - 100]
        self.histories[session] = prompt
        number = int(session.partition("-")[2].partition(".")[0])
        self.engine.submit(
            prompt,
            salt=session.partition(".")[0],
            session=session,
            turn=f"turn-of-{session}",
            tenant=f"tenant-{number % 2}",
            parent=session.partition(".")[0] if "." in session else "",
            strict=number == 5,
            tenant_share=0.2 if number % 2 else 0.0,
            tenant_cap=0.4,
            session_cap=0.3,
            max_tokens=max_tokens,
        )

    def turn(self, session: int, length: int, max_tokens: int) -> None:
        name = f"session-{session}"
        self.ask(name, self.histories.get(name, []) + self.fresh(length), max_tokens)

    def branch(self, session: int, kept: int, max_tokens: int) -> None:
        name = f"session-{session}"
        self.ask(name, self.histories.get(name, [])[:kept] + self.fresh(40), max_tokens)

    def child(self, session: int, length: int, max_tokens: int) -> None:
        self.ask(
            f"session-{session}.child", self.histories.get(f"session-{session}", []) + self.fresh(length), max_tokens
        )

    def cold(self, length: int, max_tokens: int) -> None:
        self.engine.submit(self.fresh(length), salt=f"cold-{self.number}", max_tokens=max_tokens)

    def flood(self, requests: int) -> None:
        for _ in range(requests):
            self.cold(5 * BLOCK, 150)

    def cancel(self, place: int) -> None:
        live = [name for name, answer in self.engine.answers.items() if answer.finish_reason is None]
        if live:
            self.engine.cancel(live[place % len(live)])
            self.engine.answers[live[place % len(live)]].finish_reason = "abort"

    def step(self, times: int) -> None:
        self.engine.step(times)

    def wait(self, seconds: float) -> None:
        self.engine.clock.advance(seconds)
        self.engine.tick()

    def close(self, session: int) -> None:
        self.engine.report(release=[f"session-{session}"])

    def told(self, session: int, stop: str) -> None:
        name = f"session-{session}"
        self.engine.ended(TurnEnd(name, f"tenant-{session % 2}", f"turn-of-{name}", stop, 10, 30.0))


@pytest.mark.parametrize("seed", range(12))
def test_no_request_that_fits_waits_and_nothing_is_lost(engine: EngineInProcess, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    wanted = chance.randint(1, 30)
    world = _World(engine)
    preempt = engine.scheduler._preempt_request

    def preempt_only_without_leases(*given_: Any, **named: Any) -> None:
        idle = [block for block in engine.connector.leased_block_ids() if engine.pool.blocks[block].ref_cnt == 1]
        assert not idle, "a running request is preempted while leases hold what it lacks"
        preempt(*given_, **named)

    engine.scheduler._preempt_request = preempt_only_without_leases
    try:
        for _ in range(25):
            world.do(_deed(chance))
            engine.assert_references_add_up()
            assert len(engine.connector.leased_block_ids()) <= BOUND
        while engine.scheduler.waiting or any(
            request.num_computed_tokens < request.num_prompt_tokens for request in engine.scheduler.running
        ):
            engine.step()
        held = {
            block.block_id
            for manager in engine.scheduler.kv_cache_manager.coordinator.single_type_managers
            for blocks in manager.req_to_blocks.values()
            for block in blocks
        }
        room = POOL - len(held) - 2 * engine.running()
        if wanted <= room and engine.running() < engine.scheduler.max_num_running_reqs:
            running = {request.request_id for request in engine.scheduler.running}
            name = engine.submit(world.fresh(wanted * BLOCK - 1), salt="wanted", max_tokens=2)
            engine.step()
            left = {request.request_id for request in engine.scheduler.running} - running
            assert left or engine.answers[name].finish_reason, "a request that fits waits"
        engine.drain()
    finally:
        engine.scheduler._preempt_request = preempt
        engine.cancel_all()
        engine.drain()
    sessions = [*(lease.session for lease in engine.report().leases)]
    engine.report(release=sessions)
    engine.assert_nothing_is_held()
