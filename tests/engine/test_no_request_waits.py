"""Whatever sessions do, on vLLM's real block pool: no request that fits waits for a lease, and nothing is lost.

Hypothesis makes up what happens: turns, branches, children, cancellations, closes, ends that are told, silence, floods
that preempt. Then a request comes that fits beside those that run, and must run at once.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.engine.protocol import TurnEnd
from tests.engine.in_process import BLOCK, BOUND, MAX_MODEL_LEN, POOL, EngineInProcess, words

_SESSIONS = st.integers(0, 5)
_DEEDS = st.one_of(
    st.tuples(st.just("turn"), _SESSIONS, st.integers(1, 250), st.integers(1, 40)),
    st.tuples(st.just("branch"), _SESSIONS, st.integers(0, 250), st.integers(1, 40)),
    st.tuples(st.just("child"), _SESSIONS, st.integers(1, 120), st.integers(1, 40)),
    st.tuples(st.just("cold"), st.integers(1, 900), st.integers(1, 100)),
    st.tuples(st.just("flood"), st.integers(3, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 5.0, 20.0, 700.0])),
    st.tuples(st.just("close"), _SESSIONS),
    st.tuples(st.just("told"), _SESSIONS, st.sampled_from(["tool_use", "end_turn", "other"])),
)


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


@pytest.mark.timeout(900)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deeds=st.lists(_DEEDS, min_size=3, max_size=25), wanted=st.integers(1, 30))
def test_no_request_that_fits_waits_and_nothing_is_lost(
    engine: EngineInProcess, deeds: list[tuple[Any, ...]], wanted: int
) -> None:
    world = _World(engine)
    preempt = engine.scheduler._preempt_request

    def preempt_only_without_leases(*given_: Any, **named: Any) -> None:
        idle = [block for block in engine.connector.leased_block_ids() if engine.pool.blocks[block].ref_cnt == 1]
        assert not idle, "a running request is preempted while leases hold what it lacks"
        preempt(*given_, **named)

    engine.scheduler._preempt_request = preempt_only_without_leases
    try:
        for deed in deeds:
            world.do(deed)
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
