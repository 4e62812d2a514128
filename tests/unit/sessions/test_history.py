"""A history's links say whether two requests begin with the same conversation."""

import hashlib
import hmac
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from appliance.sessions.history import answered_positions, canonical_message, history_links, shared_length


def _chain(link: bytes, messages: Iterable[bytes]) -> list[bytes]:
    links = []
    for message in messages:
        link = hmac.digest(b"key", link + hashlib.sha256(message).digest(), "sha256")
        links.append(link)
    return links


def test_what_clients_change_when_they_send_an_answer_back_does_not_change_its_link() -> None:
    ours = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    theirs = {
        "role": "assistant",
        "content": "",
        "refusal": None,
        "tool_calls": [{"id": "other", "function": {"arguments": "{}", "name": "f"}, "type": "function", "index": 0}],
    }
    assert canonical_message(ours) == canonical_message(theirs)


def test_a_text_part_says_the_same_as_a_string() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    assert canonical_message(parts) == canonical_message({"role": "user", "content": "hello"})


def test_two_parts_do_not_say_the_same_as_their_text_run_together() -> None:
    two = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert canonical_message(two) != canonical_message({"role": "user", "content": "ab"})


def test_the_same_words_of_another_role_are_another_message() -> None:
    assert canonical_message({"role": "user", "content": "x"}) != canonical_message({"role": "tool", "content": "x"})


def test_another_principals_same_history_has_no_link_in_common() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert not set(history_links(_chain, "prn_1", messages)) & set(history_links(_chain, "prn_2", messages))


def test_a_chain_goes_on_from_the_links_that_are_known_of_it() -> None:
    messages = [{"role": "user", "content": text} for text in ("a", "b", "c")]
    whole = history_links(_chain, "prn_1", messages)
    assert [history_links(_chain, "prn_1", messages, whole[:known]) for known in range(4)] == [whole] * 4


def test_answers_are_looked_for_from_the_end() -> None:
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    assert answered_positions([{"role": role} for role in roles]) == [5, 3]


_texts = st.lists(st.sampled_from(["a", "b", "c"]), max_size=12)


@given(_texts, _texts)
def test_shared_length_is_the_length_of_the_common_beginning(left: list[str], right: list[str]) -> None:
    expected = 0
    while expected < min(len(left), len(right)) and left[expected] == right[expected]:
        expected += 1
    links = [
        history_links(_chain, "p", [{"role": "user", "content": text} for text in texts]) for texts in (left, right)
    ]
    assert shared_length(*links) == expected
