"""What an answer had begun to give out, and did not come to its end, is recorded as cut off."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any, cast
from unittest.mock import ANY

import pytest

from api.admin.asking import Asker, with_first
from appliance.audit import AuditUnavailable, Event, NodeAudit, Outcome
from appliance.audit.events import BACKUP_MADE
from appliance.errors import HoldfastError

pytestmark = pytest.mark.anyio


class Log:
    """An audit log in a list, or one that cannot be written."""

    def __init__(self, failure: HoldfastError | None = None) -> None:
        self.events: list[Event] = []
        self._failure = failure

    def begin(self, *events: Event, privileged: bool = False) -> "asyncio.Future[int]":
        assert privileged, "an administrator's doing is recorded from the reserve, too"
        self.events += events
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        told.set_result(0) if self._failure is None else told.set_exception(self._failure)
        return told


def answer(log: Log, failure: BaseException | None = None) -> AsyncGenerator[bytes, None]:
    """A backup in three pieces, that fails before the third."""
    asker = Asker(None, "uid=1000", cast("NodeAudit", log), request_id="req_1")

    async def rest() -> AsyncGenerator[bytes, None]:
        yield b"second"
        if failure is not None:
            raise failure
        yield b"third"

    def cut_off(sent: int, error: BaseException) -> None:
        asker.was_cut_off(BACKUP_MADE, ("database", ""), sent, error)

    return cast("AsyncGenerator[bytes, None]", with_first(b"first", rest(), cut_off=cut_off))


async def test_an_answer_that_comes_to_its_end_is_recorded_by_nobody_again() -> None:
    log = Log()
    assert [piece async for piece in answer(log)] == [b"first", b"second", b"third"]
    assert log.events == []


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError(5, "the disk fails"), "internal_error"),
        (AuditUnavailable("no", cause="", remedy=""), "audit_unavailable"),
        (asyncio.CancelledError(), "asker_gone"),
    ],
)
async def test_one_that_fails_in_the_middle_is_recorded_with_how_much_was_given_out(
    failure: BaseException, reason: str
) -> None:
    log = Log()
    with pytest.raises(type(failure)):
        [piece async for piece in answer(log, failure)]
    (event,) = log.events
    assert (event.kind, event.outcome, event.reason) == (BACKUP_MADE, Outcome.FAILURE, reason)
    assert (event.counts, event.target, event.request_id) == (
        {"bytes": 11, "duration_ms": ANY},
        ("database", ""),
        "req_1",
    )


async def test_one_whose_client_is_gone_is_recorded_at_once() -> None:
    log = Log()
    pieces = answer(log)
    await anext(pieces)
    await anext(pieces)
    await pieces.aclose()
    assert [(event.reason, event.counts) for event in log.events] == [("asker_gone", {"bytes": 5, "duration_ms": ANY})]


async def test_what_cannot_be_recorded_then_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    log = Log(AuditUnavailable("no", cause="a full disk", remedy="Make room"))
    pieces: Any = answer(log)
    await anext(pieces)
    with caplog.at_level(logging.WARNING, "holdfast.gateway"):
        await pieces.aclose()
        await asyncio.sleep(0)
    assert "a full disk" in caplog.text
