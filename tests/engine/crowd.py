"""Sessions that do whatever a list of deeds says, on an engine in the test's process, and what must hold meanwhile.

Rules:

- The deeds decide what happens and nothing else does, so that hypothesis can shorten a list that goes wrong.
- Whether a request waits for a lease is not reckoned as the connector reckons it. Wherever vLLM finds no room for a
  request, it is asked once more as though every idle block that leases hold were free: it must say no again.
- A crowd leaves its engine as it found it, whatever went wrong, so that the next one can use it.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st
from vllm.v1.request import Request, RequestStatus

from appliance.engine.protocol import TurnEnd
from tests.engine.in_process import BLOCK, BOUND, MAX_MODEL_LEN, EngineInProcess, words

SESSIONS = 6
STRICT_SESSION = 5
_LONGEST_ANSWER = 100  # tokens

Deed = tuple[Any, ...]
"""What happens: the name of a method of `Crowd`, and its arguments."""

_session = st.integers(0, SESSIONS - 1)
_answer = st.integers(1, 40)
_priority = st.integers(0, 2)
DEEDS: st.SearchStrategy[list[Deed]] = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), _session, st.integers(1, 250), _answer, _priority),
        st.tuples(st.just("turn"), _session, st.integers(1, 250), _answer, _priority),
        st.tuples(st.just("branch"), _session, st.integers(0, 250), _answer, _priority),
        st.tuples(st.just("child"), _session, st.integers(1, 120), _answer, _priority),
        st.tuples(st.just("cold"), st.integers(1, 900), st.integers(1, _LONGEST_ANSWER), _priority),
        st.tuples(st.just("flood"), st.integers(3, 6), _priority),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("step"), st.integers(1, 60)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 5.0, 20.0, 700.0])),
        st.tuples(st.just("close"), _session),
        st.tuples(st.just("told"), _session, st.sampled_from(["tool_use", "end_turn", "other"])),
        st.tuples(st.just("copies_take"), st.integers(0, 12)),
        st.tuples(st.just("yields_ahead"), st.integers(0, 4)),
    ),
    min_size=10,
    max_size=40,
)


@dataclass
class Seen:
    """What happened to a crowd, so that a test can tell that it put to the test what it is about.

    Attributes:
        happened: how often a request was let in late (`waited`), with KV that was loaded while it waited (`loaded`),
            or was thrown off the device (`preempted`).
        wrong: what must not happen, in words.
    """

    happened: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def live(engine: EngineInProcess, deeds: Sequence[Deed], seen: Seen) -> None:
    """Have the deeds done, hold the engine to account after each, and see that nothing is left of them."""
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    engine.start_anew()
    seen.wrong.clear()
    crowd = Crowd(engine)
    with _watched(engine, seen), _copies_of(engine, seen) as crowd.copies:
        try:
            for name, *arguments in deeds:
                getattr(crowd, name)(*arguments)
                engine.assert_references_add_up()
                engine.assert_nobody_s_rows_are_empty()
                assert len(engine.connector.leased_block_ids()) <= BOUND
                assert not seen.wrong, seen.wrong[0]
            engine.drain()
            assert not seen.wrong, seen.wrong[0]
        finally:
            engine.connector.most_ahead = 0
            engine.cancel_all()
            engine.drain()
            engine.settle()
            engine.report(release=[lease.session for lease in engine.report().leases])
            engine.settle()
    engine.assert_nothing_is_held()


class Crowd:
    """Sessions that branch, have agents, are strict, belong to two tenants with shares and caps, and cold requests."""

    def __init__(self, engine: EngineInProcess) -> None:
        self.copies = _Copies()
        self._engine = engine
        self._histories: dict[str, list[int]] = {}
        self._prompts = 0

    def turn(self, session: int, length: int, answer: int, priority: int) -> None:
        name = f"session-{session}"
        self._ask(name, self._histories.get(name, []) + self._fresh(length), answer, priority)

    def branch(self, session: int, kept: int, answer: int, priority: int) -> None:
        name = f"session-{session}"
        self._ask(name, self._histories.get(name, [])[:kept] + self._fresh(40), answer, priority)

    def child(self, session: int, length: int, answer: int, priority: int) -> None:
        history = self._histories.get(f"session-{session}", [])
        self._ask(f"session-{session}.child", history + self._fresh(length), answer, priority)

    def cold(self, length: int, answer: int, priority: int) -> None:
        self._engine.submit(
            self._fresh(length), salt=f"cold-{self._prompts}", max_tokens=answer, priority=self._allowed(priority)
        )

    def flood(self, requests: int, priority: int) -> None:
        for _ in range(requests):
            self.cold(5 * BLOCK, 150, priority)

    def step(self, times: int) -> None:
        self._engine.step(times)

    def cancel(self, place: int) -> None:
        live = [name for name, answer in self._engine.answers.items() if answer.finish_reason is None]
        if live:
            self._engine.cancel(live[place % len(live)])
            self._engine.answers[live[place % len(live)]].finish_reason = "abort"

    def wait(self, seconds: float) -> None:
        self._engine.clock.advance(seconds)
        self._engine.tick()

    def close(self, session: int) -> None:
        self._engine.report(release=[f"session-{session}"])

    def told(self, session: int, stop: str) -> None:
        name = f"session-{session}"
        self._engine.ended(TurnEnd(name, _tenant(session), f"turn-of-{name}", stop, 10, 30.0))

    def copies_take(self, steps: int) -> None:
        self.copies.steps = steps

    def yields_ahead(self, blocks: int) -> None:
        self._engine.connector.most_ahead = blocks

    def _ask(self, session: str, prompt: list[int], answer: int, priority: int) -> None:
        prompt = prompt[: MAX_MODEL_LEN - _LONGEST_ANSWER]
        self._histories[session] = prompt
        parent = session.partition(".")[0]
        number = int(parent.partition("-")[2])
        self._engine.submit(
            prompt,
            salt=parent,
            session=session,
            turn=f"turn-of-{session}",
            tenant=_tenant(number),
            parent=parent if parent != session else "",
            strict=number == STRICT_SESSION,
            tenant_share=0.2 if number % 2 else 0.0,
            tenant_cap=0.4,
            session_cap=0.3,
            max_tokens=answer,
            priority=self._allowed(priority),
        )

    def _fresh(self, length: int) -> list[int]:
        """Words that nobody had."""
        self._prompts += 1
        return words(1000 + self._prompts, length)

    def _allowed(self, priority: int) -> int:
        return priority if self._engine.scheduler.policy.value == "priority" else 0


def _tenant(session: int) -> str:
    return f"tenant-{session % 2}"


class _WouldFit(Exception):
    """vLLM found the room that it was told of."""


@contextmanager
def _watched(engine: EngineInProcess, seen: Seen) -> Iterator[None]:
    """Look at every request that vLLM finds no room for: it waits then, or another is thrown off the device."""
    scheduler, manager = engine.scheduler, engine.scheduler.kv_cache_manager
    allocate, preempt = manager.allocate_slots, scheduler._preempt_request

    def idle_leased(hit_ids: frozenset[int]) -> int:
        leased = engine.connector.leased_block_ids()
        return sum(engine.pool.blocks[each].ref_cnt == 1 and each not in hit_ids for each in leased)

    def allocate_and_look(request: Request, *arguments: Any, **named: Any) -> Any:
        resumed = request.num_computed_tokens > 0 and request.status != RequestStatus.RUNNING
        blocks = allocate(request, *arguments, **named)
        if blocks is not None:
            seen.happened["loaded"] += resumed
            return blocks
        hits = named.get("new_computed_blocks")
        hit_ids = frozenset() if hits is None else frozenset(it.block_id for group in hits.blocks for it in group)
        idle_blocks = idle_leased(hit_ids)
        free_blocks = engine.pool.get_num_free_blocks()
        seen.happened["waited"] += 1
        with (
            patch.object(engine.pool, "get_num_free_blocks", lambda: free_blocks + idle_blocks),
            patch.object(manager.coordinator, "allocate_new_computed_blocks", side_effect=_WouldFit),
            patch.object(manager.coordinator, "allocate_new_blocks", side_effect=_WouldFit),
        ):
            try:
                allocate(request, *arguments, **named)
            except _WouldFit:
                seen.wrong.append(
                    f"{request.status.name} {request.request_id} at {request.num_computed_tokens} tokens waits, with "
                    f"{free_blocks} blocks free and {idle_blocks} more that leases hold for nobody that runs"
                )
        return None

    def preempt_and_count(*arguments: Any, **named: Any) -> None:
        seen.happened["preempted"] += 1
        preempt(*arguments, **named)

    with (
        patch.object(manager, "allocate_slots", allocate_and_look),
        patch.object(scheduler, "_preempt_request", preempt_and_count),
    ):
        yield


class _Copies:
    """How long the worker's copies between tiers take from now on, in steps of the engine."""

    steps = 0


@contextmanager
def _copies_of(engine: EngineInProcess, seen: Seen) -> Iterator[_Copies]:
    """Have copies between tiers take as long as they are told to; none where the engine has no tiers."""
    copies, worker = _Copies(), engine.copying_worker()
    if worker is None:
        yield copies
        return
    under_way: deque[tuple[int, Any]] = deque()
    steps, waited_for = 0, set[int]()
    finished, wait, submit, copy = worker.get_finished, worker.wait, worker.submit_store, worker._copy
    asked: dict[int, list[bytes]] = {}

    def pages(sources: Any, chunk: tuple[int, int, int]) -> bytes:
        source, _, group = chunk
        return b"".join(sources[tensor][source, :size].tobytes() for tensor, size in worker._pages_of_group[group])

    def submit_and_note(job_id: int, *specs: Any) -> bool:
        done: bool = submit(job_id, *specs)
        job = worker._leaving[job_id]
        asked[id(job)] = [pages(worker._device, chunk) for chunk in job.chunks]
        return done

    def copy_and_compare(job: Any, sources: Any, targets: Any, chunks: int) -> None:
        if id(job) in asked:
            now = [pages(sources, chunk) for chunk in job.chunks[job.done : job.done + chunks]]
            if now != asked[id(job)][job.done : job.done + chunks]:
                seen.wrong.append("a block of the device was given away before it was copied")
            if job.done + chunks == len(job.chunks):
                del asked[id(job)]
        copy(job, sources, targets, chunks)

    def finished_by_now() -> list[Any]:
        nonlocal steps
        steps += 1
        under_way.extend((steps + copies.steps, result) for result in finished())
        over = [(due, result) for due, result in under_way if due <= steps or result.job_id in waited_for]
        for each in over:
            under_way.remove(each)
            waited_for.discard(each[1].job_id)
        return [result for _, result in over]

    def wait_for(job_ids: set[int]) -> None:
        waited_for.update(job_ids)
        wait(job_ids)

    with (
        patch.object(worker, "get_finished", finished_by_now),
        patch.object(worker, "wait", wait_for),
        patch.object(worker, "submit_store", submit_and_note),
        patch.object(worker, "_copy", copy_and_compare),
    ):
        yield copies
        copies.steps = 0
        engine.settle()
