"""Sessions come, branch, hang up and go idle at random; no block is ever lost and none is held twice."""

import random

import pytest

from tests.engine.in_process import BLOCK, BOUND, MAX_MODEL_LEN, EngineInProcess, words


class _Crowd:
    """A driver with a seed: what it does next depends on nothing else."""

    def __init__(self, engine: EngineInProcess, seed: int) -> None:
        self._engine = engine
        self._random = random.Random(seed)  # noqa: S311
        self._histories: dict[str, list[int]] = {}
        self._live: list[str] = []
        self._number = seed * 1000

    def act(self) -> None:
        """Do one thing."""
        deed = self._random.choices(
            [self._turn, self._branch, self._cold, self._cancel, self._step, self._wait, self._tick, self._release],
            weights=[6, 2, 3, 2, 12, 2, 1, 1],
        )[0]
        deed()

    def _submit(self, prompt: list[int], session: str | None) -> None:
        salt = session.partition("/")[0] if session is not None else f"cold-{self._number}"
        self._live.append(
            self._engine.submit(
                prompt,
                salt=salt,
                session=session,
                idle_timeout_s=self._random.choice([0.0, 2.0, 15.0]),
                max_tokens=self._random.randint(1, 60),
            )
        )

    def _fresh_words(self, most: int) -> list[int]:
        self._number += 1
        return words(self._number, self._random.randint(1, most))

    def _turn(self) -> None:
        session = f"session-{self._random.randrange(8)}"
        prompt = self._histories.get(session, []) + self._fresh_words(200)
        if len(prompt) > MAX_MODEL_LEN - 100:
            prompt = self._fresh_words(200)
        self._histories[session] = prompt
        self._submit(prompt, session)

    def _branch(self) -> None:
        if self._histories:
            session, history = self._random.choice(sorted(self._histories.items()))
            prompt = history[: self._random.randint(0, len(history))] + self._fresh_words(60)
            self._submit(prompt, self._random.choice([session, f"{session}/child"]))

    def _cold(self) -> None:
        self._submit(self._fresh_words(MAX_MODEL_LEN - 100), None)

    def _cancel(self) -> None:
        if self._live:
            self._engine.cancel(self._live.pop(self._random.randrange(len(self._live))))

    def _step(self) -> None:
        self._engine.step(self._random.randint(1, 8))

    def _wait(self) -> None:
        self._engine.clock.advance(self._random.choice([0.5, 3.0, 20.0]))

    def _tick(self) -> None:
        self._engine.tick()

    def _release(self) -> None:
        self._engine.report(release=[f"session-{self._random.randrange(8)}"])


@pytest.mark.parametrize("seed", range(6))
def test_references_add_up_whatever_sessions_do(engine: EngineInProcess, seed: int) -> None:
    crowd = _Crowd(engine, seed)
    for _ in range(150):
        crowd.act()
        engine.assert_references_add_up()
        report = engine.report()
        assert report.leased_blocks <= BOUND
        assert all(lease.tokens <= BOUND * BLOCK for lease in report.leases)
    engine.drain()
    engine.clock.advance(15.0)
    assert engine.tick() is None
    engine.assert_references_add_up()
    engine.report(release=[lease.session for lease in engine.report().leases])
    engine.assert_nothing_is_held()
