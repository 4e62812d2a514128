"""A turn written as a difference reads back whole."""

import copy
import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import to_json

from appliance.sessions.deltas import (
    Reader,
    ReadTurn,
    Tip,
    Tips,
    TranscriptBroken,
    encode_request,
    encode_token_ids,
    said_messages,
    token_array,
)
from appliance.sessions.misses import Circumstances, Ran, shared_tokens
from appliance.sessions.turn import Message

NOTHING_KNOWN = Circumstances()


def tip_of(number: int, ids: "array[int]", parameters: bytes = b"{}") -> Tip:
    return Tip(number, (), parameters, Ran("model", ids, len(ids), 0, 0.0, 0.0, NOTHING_KNOWN))


_message = st.builds(
    lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "tool"]), st.text(max_size=20)
)
_ids = st.lists(st.integers(0, 2**32 - 1), max_size=20)


@given(st.lists(st.tuples(st.lists(_message, max_size=3), _ids, _ids, st.booleans(), st.booleans()), max_size=6))
def test_every_turn_reads_back_whole_whatever_it_shared(
    turns: list[tuple[list[dict[str, str]], list[int], list[int], bool, bool]],
) -> None:
    reader, previous = Reader(), list[dict[str, str]]()
    skipping, read_before = Reader(), list[tuple[ReadTurn, ReadTurn]]()
    tip: Tip | None = None
    for number, (added, prompt, completion, keeps_history, tip_is_lost) in enumerate(turns, start=1):
        messages = [*previous, *added] if keeps_history else added
        answer = {"role": "assistant", "content": f"answer {number}"}
        parameters = {"temperature": len(added) % 2}
        ids = token_array([*(tip.ran.token_ids if tip else ()), *prompt] if keeps_history else prompt, completion)
        base = None if tip_is_lost else tip
        shared = len(previous) if keeps_history and base is not None else 0
        circumstances = Circumstances(32, f"life {number}", 15.0) if number % 2 else NOTHING_KNOWN
        request = encode_request(base, shared, messages, to_json(parameters), circumstances)
        shared_ids = 0 if base is None else shared_tokens(base.ran.token_ids, ids)
        blob = encode_token_ids(base, shared_ids, ids, len(ids) - len(completion))

        read = reader.add(number, request, answer, blob)

        if number == len(turns):
            assert skipping.add(number, request, answer, blob) == read
        else:
            skipping.skip(number, request, answer, blob)
        read_before.append((read, copy.deepcopy(read)))
        assert read.messages == messages
        assert read.parameters == parameters
        assert read.token_ids == ids
        assert [*read.prompt_token_ids, *read.completion_token_ids] == list(ids)
        assert list(read.completion_token_ids) == completion
        assert read.shared_ids in (None, shared_ids)
        assert read.circumstances == circumstances
        tip = tip_of(number, ids, to_json(parameters))
        previous = [*messages, answer]
    assert all(then == now for then, now in read_before), "what was handed out is not changed by what follows"


def test_an_extension_costs_what_it_adds_and_not_what_it_repeats() -> None:
    history = [{"role": "user", "content": "x" * 100_000}]
    ids = array("I", range(100_000))
    tip = tip_of(1, ids)
    longer = [*history, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]

    assert len(encode_request(tip, 2, longer, b"{}", NOTHING_KNOWN)) < 200
    assert len(encode_token_ids(tip, len(ids), token_array([*ids, 7, 8], [9]), len(ids) + 2)) < 64


def test_a_turn_whose_base_is_gone_is_refused_and_named() -> None:
    blob = encode_token_ids(None, 0, array("I"), 0)
    request = encode_request(tip_of(4, array("I")), 1, [{"role": "user"}], b"[]", NOTHING_KNOWN)
    with pytest.raises(TranscriptBroken, match="turn 5"):
        Reader().add(5, request, {"role": "assistant"}, blob)


def test_what_was_said_before_a_turn_written_whole_is_passed_over_unread() -> None:
    reader, ids = Reader(), array("I", [1, 2])
    reader.skip(1, b"never read", {"role": "assistant"}, encode_token_ids(None, 0, ids, 1))
    whole = encode_request(tip_of(1, ids, b'{"n":1}'), 0, [{"role": "user"}], b'{"n":1}', NOTHING_KNOWN)
    reader.skip(2, whole, {"role": "assistant"}, encode_token_ids(tip_of(1, ids), 2, ids, 1))
    longer = encode_request(tip_of(2, ids, b'{"n":1}'), 2, [{}, {}, {"role": "tool"}], b'{"n":1}', NOTHING_KNOWN)
    read = reader.add(3, longer, {"role": "assistant"}, encode_token_ids(tip_of(2, ids), 2, ids, 1))
    assert read.messages == [{"role": "user"}, {"role": "assistant"}, {"role": "tool"}]
    assert read.parameters == {"n": 1}
    assert read.token_ids == ids


def test_a_turn_with_token_ids_missing_is_refused() -> None:
    blob = encode_token_ids(None, 0, array("I", [1, 2, 3]), 2)
    with pytest.raises(TranscriptBroken, match="2 token ids"):
        Reader().add(1, encode_request(None, 0, [], b"{}", NOTHING_KNOWN), {"role": "assistant"}, blob[:-4])


def test_what_was_said_is_remembered_with_a_turn_and_goes_before_what_a_turn_s_account_is_told_by() -> None:
    said: list[Message] = [{"role": "user", "content": "x" * 600, "name": None}, {"role": "assistant", "content": "ab"}]
    ran = Ran("model", array("I", range(100)), 100, 0, 0.0, 0.0, NOTHING_KNOWN)
    with_text = Tip(1, (), b"{}", ran, said_messages(said))
    assert with_text.messages() == [{"role": "user", "content": "x" * 600}, said[1]]
    without, text = with_text.size() - with_text.text_size(), with_text.text_size()
    tips = Tips(3 * without + text)
    for session in ("one", "two", "three"):
        tips.put(session, with_text)
    kept = [tips.get(session) for session in ("one", "two", "three")]
    assert [tip.said == with_text.said for tip in kept if tip is not None] == [False, False, True]
    tips = Tips(8 * text)  # of which a quarter is for texts, whatever goes for it
    for session in map(str, range(20)):
        tips.put(session, with_text)
    left = [tip for session in map(str, range(20)) if (tip := tips.get(session)) is not None]
    assert [bool(tip.said) for tip in left] == [False] * (6 * text // without - 2) + [True, True]
    tips.clear()
    assert tips.get("19") is None


def test_what_is_remembered_of_turns_is_bounded_whatever_comes_and_goes() -> None:
    rng = random.Random(1)  # noqa: S311 (the same every time)
    tips, put = Tips(20_000), dict[str, Tip]()
    for _ in range(2000):
        session = str(rng.randrange(40))
        if rng.random() < 0.2:
            tips.drop(session)
            assert tips.get(session) is None
            continue
        ids = array("I", range(rng.randrange(600)))
        said = said_messages([{"role": "user", "content": "x" * rng.randrange(4000)}])
        put[session] = Tip(1, (), b"{}", Ran("model", ids, len(ids), 0, 0.0, 0.0, NOTHING_KNOWN), said)
        tips.put(session, put[session])
        held = [tip for each in map(str, range(40)) if (tip := tips.get(each)) is not None]
        assert sum(tip.size() for tip in held) == tips._held <= 20_000
        assert sum(tip.text_size() for tip in held) == tips._held_texts
