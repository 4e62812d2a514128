"""What sessions of one tenant find of each other's blocks on a real engine's pool, and what they never do."""

import pytest

from appliance.engine.inside.connector import amendments
from appliance.engine.protocol import SharedPrefix, token_digest
from tests.engine.in_process import BLOCK, EngineInProcess, words

PREFIX = 3 * BLOCK + 10  # tokens that are shared; three blocks lie wholly within them


def prompt(rest: int = 1, length: int = 7 * BLOCK) -> list[int]:
    """A prompt that begins with the shared tokens; those behind differ with `rest`."""
    return [*words(50, PREFIX), *words(rest, length - PREFIX)]


def shared(salt: str = "tenant", tokens: int = PREFIX) -> SharedPrefix:
    return SharedPrefix(salt, tokens, token_digest(words(50, tokens)))


def ask(engine: EngineInProcess, session: str, tokens: list[int], sharing: SharedPrefix | None) -> int:
    answer = engine.turn(tokens, salt=f"salt-of-{session}", session=session, shared=sharing)
    assert answer.cached_tokens is not None
    return answer.cached_tokens


def test_another_session_finds_the_shared_blocks_and_not_one_more_of_the_same_prompt(engine: EngineInProcess) -> None:
    assert ask(engine, "first", prompt(), shared()) == 0
    assert ask(engine, "second", prompt(), shared()) == 3 * BLOCK
    assert ask(engine, "third", prompt(rest=2), shared()) == 3 * BLOCK
    assert ask(engine, "first", prompt(), shared()) == 6 * BLOCK, "its own it finds whole, but for the last block"


@pytest.mark.parametrize("tokens", [3 * BLOCK, 4 * BLOCK - 1])
def test_the_boundary_is_the_last_block_wholly_within(engine: EngineInProcess, tokens: int) -> None:
    whole = words(50, 7 * BLOCK)
    sharing = shared(tokens=tokens)
    assert ask(engine, "first", whole, sharing) == 0
    assert ask(engine, "second", whole, sharing) == 3 * BLOCK
    assert ask(engine, "first", whole, sharing) == 6 * BLOCK


def test_less_than_a_block_is_not_shared(engine: EngineInProcess) -> None:
    assert ask(engine, "first", words(50, 7 * BLOCK), shared(tokens=BLOCK - 1)) == 0
    assert ask(engine, "second", words(50, 7 * BLOCK), shared(tokens=BLOCK - 1)) == 0


def test_another_tenant_and_a_later_epoch_find_nothing(engine: EngineInProcess) -> None:
    assert ask(engine, "first", prompt(), shared()) == 0
    assert ask(engine, "second", prompt(), shared("tenant-at-a-later-epoch")) == 0
    assert ask(engine, "third", prompt(), None) == 0


def test_a_session_of_its_own_and_one_that_shares_find_nothing_of_each_other(engine: EngineInProcess) -> None:
    assert ask(engine, "session", prompt(), None) == 0
    assert ask(engine, "session", prompt(), shared()) == 0, "the mode was changed"
    assert ask(engine, "session", prompt(), None) == 6 * BLOCK


def test_a_prompt_that_does_not_begin_with_what_was_counted_shares_nothing(engine: EngineInProcess) -> None:
    other = [*words(51, PREFIX), *words(1, 100)]
    assert ask(engine, "first", other, shared()) == 0
    assert ask(engine, "second", other, shared()) == 0
    assert ask(engine, "second", other, shared()) > 0


def test_without_our_hand_in_the_hashes_everything_is_private(
    engine: EngineInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amendments, "_shared_prefix_of", lambda _: None)
    assert ask(engine, "first", prompt(), shared()) == 0
    assert ask(engine, "second", prompt(), shared()) == 0
    assert ask(engine, "second", prompt(), shared()) == 6 * BLOCK


def test_what_is_computed_while_answering_stays_private(engine: EngineInProcess) -> None:
    first = engine.turn(prompt(), salt="a", session="a", shared=shared(), max_tokens=3 * BLOCK)
    said = [*prompt(), *first.token_ids, *words(9, 10)]
    assert engine.turn(said, salt="b", session="b", shared=shared()).cached_tokens == 3 * BLOCK
    again = engine.turn(said, salt="a", session="a", shared=shared())
    assert again.cached_tokens is not None
    assert again.cached_tokens >= 9 * BLOCK
