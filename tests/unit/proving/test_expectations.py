"""What a proof expects of a request: a mode's every pair, and the counts of tokens that it means."""

import pytest

from api.proving.expectations import REACH, Bounds, Pair, Reach, bounds
from appliance.identity import Isolation


def test_every_mode_says_what_every_pair_finds() -> None:
    assert REACH.keys() == set(Isolation)
    for reach in REACH.values():
        assert reach.keys() == set(Pair)


@pytest.mark.parametrize("mode", Isolation)
def test_no_mode_lets_another_tenant_find_anything_nor_a_session_less_than_its_own(mode: Isolation) -> None:
    assert REACH[mode][Pair.OTHER_TENANT] is Reach.NOTHING
    assert REACH[mode][Pair.SAME_SESSION] is Reach.EVERYTHING
    assert REACH[mode][Pair.SIBLING] is Reach.EVERYTHING


def test_what_was_forgotten_is_found_by_nobody_but_for_the_systems_part_that_others_share() -> None:
    found = {mode: REACH[mode][Pair.FORGOTTEN] for mode in Isolation}
    assert found == {
        Isolation.SESSION: Reach.NOTHING,
        Isolation.TENANT_PREFIX: Reach.AT_MOST_SYSTEM,
        Isolation.TENANT: Reach.NOTHING,
    }


@pytest.mark.parametrize(
    ("reach", "wanted"),
    [
        (Reach.NOTHING, Bounds(0, 0)),
        (Reach.SYSTEM, Bounds(480, 512)),  # 16 whole blocks of 520 tokens, and one may be computed again
        (Reach.AT_MOST_SYSTEM, Bounds(0, 512)),
        (Reach.EVERYTHING, Bounds(960, 1024)),  # of 1024 tokens the last one is computed: 31 whole blocks
    ],
)
def test_tokens_are_counted_in_whole_blocks(reach: Reach, wanted: Bounds) -> None:
    assert bounds(reach, system_tokens=520, prompt_tokens=1024, block_size=32) == wanted


def test_no_block_that_holds_a_users_word_may_be_shared() -> None:
    for system_tokens in range(512, 544):
        found = bounds(Reach.SYSTEM, system_tokens=system_tokens, prompt_tokens=1024, block_size=32)
        assert found.most <= system_tokens
