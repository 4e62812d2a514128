"""Every prefilled token is accounted for, once."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.stateful_bench import Account, Divergence, Sample, account_for, first_divergence, percentile

BLOCK = 4


def sample(
    prompt: list[int], answer: list[int], cached: int = 0, text: str = "", margins: tuple[float, ...] = ()
) -> Sample:
    return Sample(text, 0.1, prompt, answer, cached, margins)


def test_a_pure_extension_prefills_what_is_new_and_the_tail_of_a_block() -> None:
    before = sample([1, 2, 3, 4, 5], [6, 7])
    now = sample([1, 2, 3, 4, 5, 6, 7, 8, 9], [10], cached=4)
    assert account_for(before, now, BLOCK) == Account(new=2, tail=3)


def test_an_answer_that_reads_back_as_other_tokens_is_laid_to_tokenization() -> None:
    before = sample([1, 2, 3, 4], [5, 6, 7])
    now = sample([1, 2, 3, 4, 56, 7, 8], [9], cached=4)
    assert account_for(before, now, BLOCK) == Account(tokenization=3)


def test_an_older_part_that_was_written_differently_is_laid_to_the_template() -> None:
    before = sample([1, 2, 3, 4, 5, 6], [7])
    now = sample([1, 2, 3, 4, 99, 7, 8, 9], [9], cached=4)
    assert account_for(before, now, BLOCK) == Account(new=1, template=3)


def test_what_was_there_and_is_not_found_again_is_lost() -> None:
    before = sample([1, 2, 3, 4, 5, 6, 7, 8], [9])
    now = sample([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11], cached=0)
    assert account_for(before, now, BLOCK) == Account(new=1, tail=1, lost=8)


def test_without_state_everything_is_new() -> None:
    now = sample([1, 2, 3], [4])
    assert account_for(None, now, BLOCK) == account_for(now, now, BLOCK, stateless=True) == Account(new=3)


_ids = st.lists(st.integers(0, 2), max_size=30)


@given(_ids, _ids, _ids, st.integers(0, 10))
def test_the_parts_are_never_negative_and_add_up(
    prompt: list[int], answer: list[int], added: list[int], found: int
) -> None:
    before = sample(prompt, answer)
    for following in ([*prompt, *answer, *added], added, [*prompt, *added]):
        cached = min(found * BLOCK, len(following) // BLOCK * BLOCK)
        shared = next(
            (at for at, (a, b) in enumerate(zip([*prompt, *answer], following, strict=False)) if a != b),
            min(len(prompt) + len(answer), len(following)),
        )
        cached = min(cached, shared // BLOCK * BLOCK)
        now = sample(following, [], cached=cached)
        parts = dataclasses.astuple(account_for(before, now, BLOCK))
        assert min(parts) >= 0
        assert sum(parts) == now.prefilled


def test_the_first_divergence_is_named_with_its_margin() -> None:
    same = sample([1], [5, 6, 7], text="abc", margins=(3.0, 2.0, 0.01))
    other = sample([1], [5, 6, 8], text="abd")
    samples = {"stateless": [same, same], "vanilla": [same, same], "stateful": [same, other]}
    assert first_divergence(samples) == Divergence("stateful", 1, 2, 0.01)
    samples["stateful"][1] = same
    assert first_divergence(samples) is None


@pytest.mark.parametrize(("share", "expected"), [(0.5, 5), (0.9, 9), (1.0, 10), (0.0, 1)])
def test_a_percentile_is_a_value_that_was_measured(share: float, expected: float) -> None:
    assert percentile([float(value) for value in range(10, 0, -1)], share) == expected
