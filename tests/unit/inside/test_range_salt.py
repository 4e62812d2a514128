"""Which salt a block's hash takes; in doubt the request's own, for all of it."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine.inside.range_salt import BlockSalt, salt_of_block, shared_prefix
from appliance.engine.protocol import LEASE_FIELD, Lease, SharedPrefix, lease_params, token_digest

PROMPT = list(range(100))
SHARED = SharedPrefix("5a17", 70, token_digest(PROMPT[:70]))


def transfer(shared: SharedPrefix | None = SHARED, **changes: Any) -> dict[str, Any]:
    params = lease_params(Lease("s", "t", 15.0, shared=shared))
    params[LEASE_FIELD] = {**params[LEASE_FIELD], **changes}  # type: ignore[dict-item]
    return params


def test_a_prompt_that_begins_with_the_tokens_that_were_counted_is_shared_so_far() -> None:
    assert shared_prefix(transfer(), "own", PROMPT) == SHARED


@pytest.mark.parametrize(
    ("params", "own_salt", "prompt"),
    [
        (None, "own", PROMPT),
        ({}, "own", PROMPT),
        (transfer(None), "own", PROMPT),
        (transfer(), None, PROMPT),
        (transfer(), "", PROMPT),
        (transfer(), "own", None),
        (transfer(), "own", PROMPT[:69]),
        (transfer(), "own", [*PROMPT[:69], 7, *PROMPT[70:]]),
        (transfer(), "own", PROMPT[1:]),
        (transfer(session=""), "own", PROMPT),
        (transfer(more=1), "own", PROMPT),
        ({LEASE_FIELD: None}, "own", PROMPT),
    ],
)
def test_in_doubt_nothing_is_shared(params: Any, own_salt: str | None, prompt: list[int] | None) -> None:
    assert shared_prefix(params, own_salt, prompt) is None


@given(tokens=st.integers(0, 300), block=st.sampled_from([1, 16, 32]), blocks=st.integers(1, 12))
def test_the_shared_blocks_come_first_and_the_request_s_own_salt_in_the_very_next_one(
    tokens: int, block: int, blocks: int
) -> None:
    shared = SharedPrefix("5a17", tokens, "0" * 64)
    bounds = list(pairwise(range(0, (blocks + 1) * block, block)))
    salts = [salt_of_block(shared, start, end) for start, end in bounds]
    whole = [number for number, (_, end) in enumerate(bounds) if end <= tokens]
    if not whole:
        assert set(salts) == {BlockSalt.AS_IT_IS}, "vLLM puts the request's own salt into the first block"
        return
    assert salts[0] is BlockSalt.SHARED
    own = [number for number, salt in enumerate(salts) if salt is BlockSalt.OWN]
    assert own == [len(whole)][: blocks - len(whole)]


def test_a_prompt_that_shares_nothing_is_salted_as_vllm_does_it() -> None:
    assert salt_of_block(None, 0, 32) is salt_of_block(None, 32, 64) is BlockSalt.AS_IT_IS
