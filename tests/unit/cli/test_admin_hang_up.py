"""Who asks the admin API for what takes long, and hangs up, is not worked for any more."""

import asyncio
import os
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from api.admin.routes import admin_app
from appliance.audit import Event
from appliance.sessions import UnknownSession
from tests.unit.cli.test_admin_rules import OWN_UID, PID, gateway

pytestmark = pytest.mark.anyio


class SlowSessions:
    """Reads until it is told to stop."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.stopped = asyncio.Event()

    async def explanation(self, *_: object, **__: object) -> NoReturn:
        """Why it takes so long."""
        await self._read()

    async def transcript(self, *_: object, **__: object) -> NoReturn:
        """What was said."""
        await self._read()

    async def summary(self, *_: object) -> NoReturn:
        """What may be known of it."""
        raise UnknownSession("no", cause="", remedy="")

    async def _read(self) -> NoReturn:
        self.reads.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()
        raise AssertionError


async def ask_and_hang_up(services: Any, path: str) -> None:
    """A GET whose client is gone as soon as it is worked on."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": (f"uid={OWN_UID}", PID),
        "server": None,
    }
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await services.sessions.reads.wait()
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        pass

    await admin_app(services)(scope, receive, send)


@pytest.mark.parametrize("what", ["why", "transcript"])
async def test_a_session_is_read_no_further_when_who_asked_hangs_up(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: OWN_UID)
    services: SimpleNamespace = gateway()
    services.sessions = SlowSessions()
    async with asyncio.timeout(10):
        await ask_and_hang_up(services, f"/v1/sessions/ses_1/{what}")
        await services.sessions.stopped.wait()
    events: list[Event] = services.audit.events
    if what == "transcript":
        assert (events[-1].kind.action, events[-1].reason) == ("transcript.read", "asker_gone")
        assert events[-1].session_id == "ses_1"
