"""Which name a request gives its session, by header and by body."""

from typing import Any

import pytest

from api.openai.errors import RequestError
from api.openai.hints import ends_session, read_hints
from appliance.sessions import Origin, SessionHints


@pytest.mark.parametrize(
    ("headers", "body", "hints"),
    [
        ({}, {}, SessionHints()),
        ({b"x-session-id": b"a"}, {}, SessionHints("a", origin=Origin.HEADER)),
        ({b"session-id": b"b", b"x-session-id": b"a"}, {}, SessionHints("a", origin=Origin.HEADER)),
        ({b"x-dynamo-session-id": b"a", b"session-id": b"b"}, {}, SessionHints("a", origin=Origin.HEADER)),
        ({b"x-session-id": b"a", b"x-parent-session-id": b"p"}, {}, SessionHints("a", "p", origin=Origin.HEADER)),
        (
            {b"x-dynamo-session-id": b"a", b"x-dynamo-parent-session-id": b"p"},
            {},
            SessionHints("a", "p", origin=Origin.HEADER),
        ),
        ({b"x-claude-code-session-id": b"s"}, {}, SessionHints("s", origin=Origin.HEADER)),
        (
            {b"x-claude-code-session-id": b"s", b"x-claude-code-agent-id": b"a"},
            {},
            SessionHints("s/a", "s", origin=Origin.HEADER),
        ),
        (
            {
                b"x-claude-code-session-id": b"s",
                b"x-claude-code-agent-id": b"a",
                b"x-claude-code-parent-agent-id": b"p",
            },
            {},
            SessionHints("s/a", "s/p", origin=Origin.HEADER),
        ),
        ({b"x-session-id": b"a"}, {"previous_response_id": "r"}, SessionHints("a", origin=Origin.HEADER)),
        ({}, {"previous_response_id": "r"}, SessionHints(previous_response_id="r", origin=Origin.BODY)),
        ({}, {"conversation": "c", "prompt_cache_key": "k"}, SessionHints("c", origin=Origin.BODY)),
        ({}, {"conversation": {"id": "c"}}, SessionHints("c", origin=Origin.BODY)),
        ({}, {"prompt_cache_key": "k"}, SessionHints("k", origin=Origin.BODY)),
        ({b"x-parent-session-id": b"p"}, {"prompt_cache_key": "k"}, SessionHints("k", "p", origin=Origin.BODY)),
        ({b"x-parent-session-id": b"p"}, {}, SessionHints()),
    ],
)
def test_the_first_that_names_it_does(headers: dict[bytes, bytes], body: dict[str, Any], hints: SessionHints) -> None:
    assert read_hints(headers, body) == hints


@pytest.mark.parametrize("value", ["", " ", "a b", "x" * 257, "caf\u00e9", "a\n", "\x00", 7, True, ["a"]])
@pytest.mark.parametrize("field", ["previous_response_id", "conversation", "prompt_cache_key"])
def test_a_name_that_cannot_be_one_is_an_error(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        read_hints({}, {field: value})
    assert refused.value.param == field


def test_a_header_that_cannot_be_a_name_is_an_error() -> None:
    for value in (b"", b"a b", b"\xff", b"x" * 257):
        with pytest.raises(RequestError):
            read_hints({b"x-session-id": value}, {})


def test_a_harness_s_word_that_a_session_is_over_is_advice_and_ours_goes_before_it() -> None:
    assert not ends_session({})
    assert ends_session({b"x-session-end": b"true"})
    assert ends_session({b"x-dynamo-session-final": b"True"})
    assert not ends_session({b"x-dynamo-session-final": b"perhaps"})
    assert not ends_session({b"x-session-end": b"false", b"x-dynamo-session-final": b"true"})
    with pytest.raises(RequestError):
        ends_session({b"x-session-end": b"perhaps"})
