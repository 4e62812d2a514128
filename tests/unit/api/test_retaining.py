"""Nothing is removed from the audit log before log and database were compared."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from api.retaining import keep_retention
from appliance.settings import AuditSettings


def test_what_may_tell_of_an_older_copy_is_not_removed_before_it_was_looked_for() -> None:
    async def scenario() -> None:
        ran = asyncio.Event()

        async def run() -> None:
            assert audit.compared.is_set()
            ran.set()

        audit = SimpleNamespace(compared=asyncio.Event(), opened=asyncio.Event(), retention=SimpleNamespace(run=run))
        services = cast(
            "Any", SimpleNamespace(audit=audit, settings=SimpleNamespace(audit=AuditSettings(retention_days=400)))
        )
        keeping = asyncio.create_task(keep_retention(services))
        audit.opened.set()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not ran.is_set()
        audit.compared.set()
        async with asyncio.timeout(10):
            await ran.wait()
        keeping.cancel()

    asyncio.run(scenario())
