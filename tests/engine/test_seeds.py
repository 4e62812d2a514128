"""A request's seed gives the same tokens however its prompt was computed: at once, in steps, or beside others."""

import pytest

from tests.engine.in_process import STEP_TOKENS, EngineInProcess, words

PROMPT = words(1, 200)  # tokens; two of them are more than a step
SEED = 7
DRAWN = 12  # tokens


@pytest.fixture
def alone(engine: EngineInProcess) -> list[int]:
    return engine.turn(PROMPT, salt="alone", seed=SEED, max_tokens=DRAWN).token_ids


def test_a_prompt_that_takes_several_steps_may_have_a_seed(engine: EngineInProcess) -> None:
    long = words(2, 2 * STEP_TOKENS + 100)
    first, second = (engine.turn(long, salt=salt, seed=SEED, max_tokens=DRAWN).token_ids for salt in "ab")
    assert first == second
    assert len(first) == DRAWN
    assert engine.turn(long, salt="c", seed=SEED + 1, max_tokens=DRAWN).token_ids != first


def test_a_seed_gives_the_same_beside_others_whose_prompts_share_its_steps(
    engine: EngineInProcess, alone: list[int]
) -> None:
    names = [engine.submit(PROMPT, salt=f"beside-{n}", seed=SEED, max_tokens=DRAWN) for n in range(3)]
    others = [engine.submit(words(3 + n, 150), salt=f"other-{n}", max_tokens=DRAWN) for n in range(2)]
    engine.drain()
    assert [engine.answers[name].token_ids for name in names] == [alone] * 3
    assert all(len(engine.answers[name].token_ids) == DRAWN for name in others)


def test_a_seed_gives_the_same_whether_the_prompt_was_kept_or_computed(
    engine: EngineInProcess, alone: list[int]
) -> None:
    again = engine.turn(PROMPT, salt="alone", seed=SEED, max_tokens=DRAWN)
    assert again.cached_tokens == 192
    assert again.token_ids == alone


def test_nothing_is_drawn_from_a_seed_before_the_prompt_is_computed(engine: EngineInProcess) -> None:
    name = engine.submit(words(4, STEP_TOKENS + 100), seed=SEED, max_tokens=2)
    engine.step()
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    (generator,) = runner.input_batch.generators.values()
    assert generator.get_state().equal(type(generator)().manual_seed(SEED).get_state())
    assert engine.answers[name].token_ids == []
    engine.drain()
    assert len(engine.answers[name].token_ids) == 2
