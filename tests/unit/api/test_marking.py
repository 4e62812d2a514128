"""The marks of log and database: what fails is tried again, after a pause, and ends nothing."""

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api import marking
from appliance.audit import marks
from appliance.audit.events import OLDER_COPY, STORE_MARKED, Event
from appliance.audit.marks import Marks
from appliance.audit.node import NodeAudit
from appliance.store.errors import StoreFull
from appliance.vault import Vault, VaultSealed
from tests.unit.api.pauses import Enough, Pauses
from tests.unit.audit.making import Keys, make_log
from tests.unit.vault.keystore import MemoryKeys

pytestmark = pytest.mark.anyio
EVERY_S = 60.0
MOST_TRIES = 10


class OpenKeys(Keys):
    """A vault that can be sealed."""

    sealed = False


class Store:
    """A database that remembers marks; or has no room for them."""

    def __init__(self) -> None:
        self.marks = Marks(0, 0)
        self.full = False
        self.tries = 0

    async def read(self, _: Callable[..., Any]) -> Marks:
        return self.marks

    async def transact(self, write: Callable[[Any], None]) -> None:
        self.tries += 1
        assert self.tries < MOST_TRIES, "it is tried without a pause"
        if self.full:
            raise StoreFull("the database cannot be written", cause="no room", remedy="Make room")
        write(self)

    def execute(self, statement: Any) -> None:
        values = statement.compile().params
        if "value" in values:
            self.marks = Marks(*json.loads(values["value"]))


class Audit(SimpleNamespace):
    """A log in a list; `told`: what is called with each of its events."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory=directory, opened=asyncio.Event(), older="", events=[], told=lambda _: None)
        self.witnesses = SimpleNamespace(version=None, learn=lambda: None)
        self.compared = asyncio.Event()
        self.retention = SimpleNamespace(held="")
        self.opened.set()

    async def record(self, *events: Event, privileged: bool = False) -> int:
        self.events += events
        for event in events:
            self.told(event)
        return 0


@pytest.fixture
def services(tmp_path: Path) -> Any:
    make_log(tmp_path / "audit", 5000, batch=250)  # the journal let go of the first bundles
    return SimpleNamespace(
        audit=Audit(tmp_path / "audit"),
        store=Store(),
        vault=OpenKeys(),
        settings=SimpleNamespace(state_dir=tmp_path),
        lifecycle=SimpleNamespace(restores_told=False),
        exports=SimpleNamespace(changed=asyncio.Event(), version=3),
    )


async def test_a_folder_that_cannot_be_looked_into_ends_nothing_and_is_tried_again(
    services: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records, stat = str(services.audit.directory / "record"), os.stat

    def refused(path: Any, *args: Any, **named: Any) -> os.stat_result:
        if str(path).startswith(records):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return stat(path, *args, **named)

    monkeypatch.setattr(os, "stat", refused)
    pauses = Pauses(monkeypatch, marking, most=2)
    with pytest.raises(Enough):
        await marking.keep_marks(services)
    assert pauses.slept_s == [EVERY_S] * 2
    assert services.audit.events == []
    assert "Input/output error" in caplog.text
    assert not services.audit.compared.is_set()
    held = services.audit.retention.held
    assert held.startswith("log and database could not be compared: the audit log cannot be read")


async def test_any_error_of_the_system_is_tried_again(services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    services.store.read = refused
    pauses = Pauses(monkeypatch, marking, most=2)
    with pytest.raises(Enough):
        await marking.keep_marks(services)
    assert pauses.slept_s == [EVERY_S] * 2


async def test_what_fails_is_tried_once_a_minute_though_the_destinations_have_changed(
    services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.store.full = True
    services.exports.changed.set()
    pauses = Pauses(monkeypatch, marking, most=3)
    with pytest.raises(Enough):
        await marking.keep_marks(services)
    assert pauses.slept_s == [EVERY_S] * 3
    assert services.store.tries == 3


async def test_destinations_that_change_while_a_mark_is_made_are_marked_at_once(services: Any) -> None:
    marks: asyncio.Queue[int] = asyncio.Queue()

    def told(event: Event) -> None:
        assert event.kind is STORE_MARKED
        if event.counts["mark"] == 1:
            services.exports.version = 4
            services.exports.changed.set()
        marks.put_nowait(int(event.counts["destinations"]))

    services.audit.told = told
    marking_task = asyncio.create_task(marking.keep_marks(services))
    async with asyncio.timeout(30):
        assert [await marks.get(), await marks.get()] == [3, 4]
    marking_task.cancel()


async def test_where_the_log_has_no_mark_within_reach_that_is_an_event_and_an_alarm_that_marks_carry_on(
    services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "MOST_LOOKED_AT", 4000)
    services.store.marks = Marks(6, 6)
    told = asyncio.Event()
    services.audit.told = lambda event: told.set() if event.kind is STORE_MARKED else None
    services.audit.alarm = "cannot be told"
    marking_task = asyncio.create_task(marking.keep_marks(services))
    async with asyncio.timeout(30):
        await told.wait()
    marking_task.cancel()
    found, mark = services.audit.events
    assert (found.kind, found.target) == (OLDER_COPY, ("copy", "unknown"))
    assert (mark.counts["mark"], mark.details) == (7, {"older_copy": "unknown"})
    assert services.audit.older == "unknown"


def test_the_alarm_says_that_it_cannot_be_told(tmp_path: Path) -> None:
    audit = NodeAudit(tmp_path, Vault(MemoryKeys()), versions={})
    audit.older = "unknown"
    assert audit.alarm.startswith("it cannot be told whether the log or the database was put back")
    assert "`holdfast audit acknowledge`" in audit.alarm


async def test_while_the_vault_is_sealed_no_mark_is_made_and_none_is_said_to_be_there(services: Any) -> None:
    assert await marking.mark(services, 0) == 1
    services.vault.sealed = True
    with pytest.raises(VaultSealed):
        await marking.mark(services, 1)
    assert (len(services.audit.events), services.store.marks) == (1, Marks(meant=2, made=1))
    services.vault.sealed = False

    def seal(_: Event) -> None:
        services.vault.sealed = True

    services.audit.told = seal
    with pytest.raises(VaultSealed):
        await marking.mark(services, 1)
    assert services.store.marks == Marks(meant=2, made=1)
