"""Bodies are read within their bounds."""

from collections.abc import MutableMapping
from typing import Any

import pytest

from api import bodies
from api.answers import Receive, Request
from api.bodies import ClientGone, HeldBodies, read_body, refuse_many_values
from api.openai.errors import BodyTooLarge, BodyTooSlow, TooManyTurns, TooManyValues


def arriving(*parts: bytes, ends: bool = True) -> tuple[Receive, list[int]]:
    """A connection that delivers these parts, and which of them were taken."""
    taken: list[int] = []

    async def receive() -> MutableMapping[str, Any]:
        number = len(taken)
        taken.append(number)
        if number == len(parts):
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": parts[number], "more_body": not ends or number < len(parts) - 1}

    return receive, taken


async def test_a_body_in_parts_is_put_together() -> None:
    request = Request("r", {})
    assert await read_body(request, arriving(b"a", b"", b"bc")[0], 3, HeldBodies()) == b"abc"
    assert request.body_read
    assert await read_body(request, arriving(b"")[0], 3, HeldBodies()) == b""


async def test_no_more_than_the_bound_is_taken() -> None:
    receive, taken = arriving(*[b"x" * 10] * 100)
    request = Request("r", {})
    with pytest.raises(BodyTooLarge):
        await read_body(request, receive, 35, HeldBodies())
    assert len(taken) == 4
    assert not request.body_read


async def test_a_client_that_leaves_is_noticed() -> None:
    with pytest.raises(ClientGone):
        await read_body(Request("r", {}), arriving(b"a", ends=False)[0], 10, HeldBodies())


async def test_a_trickle_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_DEADLINE_S", 0.0)

    async def never() -> MutableMapping[str, Any]:
        raise TimeoutError

    with pytest.raises(BodyTooSlow):
        await read_body(Request("r", {}), never, 10, HeldBodies())


async def test_bodies_that_arrive_at_once_have_a_bound_together() -> None:
    held = HeldBodies(most_bytes=10, usual_bytes=2)
    assert await read_body(Request("r", {}), arriving(b"abcd", b"efgh")[0], 12, held) == b"abcdefgh"
    with pytest.raises(TooManyTurns):
        await read_body(Request("r", {}), arriving(b"ijk", b"lmnop")[0], 12, held)
    assert held.held_bytes == 6  # what was refused is not held
    held.give_back(8)
    assert await read_body(Request("r", {}), arriving(b"0123456789ab")[0], 12, held) == b"0123456789ab"
    assert held.held_bytes == 10


async def test_a_body_of_usual_length_is_let_in_whatever_the_long_ones_hold() -> None:
    held = HeldBodies(held_bytes=10, most_bytes=10, usual_bytes=2)
    assert await read_body(Request("r", {}), arriving(b"a", b"b")[0], 12, held) == b"ab"
    held.give_back(2)
    assert held.held_bytes == 10


async def test_what_did_not_arrive_is_not_held() -> None:
    held = HeldBodies(usual_bytes=0)
    with pytest.raises(ClientGone):
        await read_body(Request("r", {}), arriving(b"abc", ends=False)[0], 10, held)
    with pytest.raises(BodyTooLarge):
        await read_body(Request("r", {}), arriving(b"abc", b"defg")[0], 5, held)
    assert held.held_bytes == 0


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1", b'""', b'{"a":1}'])
def test_a_body_has_so_many_values_and_no_more(value: bytes) -> None:
    with pytest.raises(TooManyValues):
        refuse_many_values(b"[" + b",".join([value] * 1001) + b"]", 1000)
    refuse_many_values(b"[" + b",".join([value] * 300) + b"]", 1000)
