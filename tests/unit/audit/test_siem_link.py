"""What the gateway and its exporter say to each other: every question has an answer."""

import asyncio
import logging
import socket

import pytest

from appliance.audit.siem.link import TRY_OUT, ExporterLost, Link
from appliance.errors import HoldfastError

pytestmark = pytest.mark.anyio


async def _pair(served: Exception | bytes) -> tuple[Link, Link]:
    async def serve(_kind: int, _body: bytes) -> bytes:
        if isinstance(served, Exception):
            raise served
        return served

    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    _, asks = await loop.create_connection(lambda: Link(serve), sock=ours)
    _, answers = await loop.create_connection(lambda: Link(serve), sock=theirs)
    return asks, answers


@pytest.mark.parametrize(
    ("served", "cause"),
    [
        (UnicodeError("label too long"), "UnicodeError: label too long"),
        (ExporterLost("gone", cause="it said so", remedy="none"), "it said so"),
        (b"x" * (2 << 20), "Malformed: a frame of 2097152 bytes"),
    ],
    ids=["a-defect", "an-error", "too-much"],
)
async def test_what_cannot_be_answered_is_told_at_once(
    served: Exception | bytes, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    asks, answers = await _pair(served)
    try:
        with caplog.at_level(logging.ERROR), pytest.raises(HoldfastError) as told:
            async with asyncio.timeout(10.0):
                await asks.ask(TRY_OUT)
        assert told.value.cause == cause
        assert bool(caplog.records) == ("Error:" in cause or "Malformed" in cause)
    finally:
        asks.close()
        answers.close()
        await asyncio.gather(asks.lost, answers.lost)
