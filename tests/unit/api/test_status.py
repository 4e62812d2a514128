"""What cannot be asked in time is unknown, and says why."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from api.admin import status
from appliance.audit import AuditUnavailable

pytestmark = pytest.mark.anyio


async def test_an_appender_that_does_not_answer_in_time_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_DEADLINE_S", 0.001)
    never = asyncio.Event()
    services: Any = SimpleNamespace(audit=SimpleNamespace(status=never.wait, error=None))
    with pytest.raises(AuditUnavailable) as told:
        await status.audit_status(services)
    assert told.value.cause == "its appender did not answer within 0.001 s"
    part = await status._audit(services)
    assert (part.state, "did not answer" in part.detail) == ("failed", True)
