"""Who there was before there was a log is in it, whatever fails while that is recorded."""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api import founding
from appliance.audit import AuditUnavailable, Event
from appliance.audit.entry import Draft, open_record, seal
from appliance.audit.events import KEY_CREATED, PRINCIPAL_CREATED, SYSTEM, TENANT_CREATED, VAULT_OPENED
from appliance.audit.reading import LogReader
from tests.unit.api.pauses import Enough, Pauses
from tests.unit.audit.making import Clock, Keys, open_log, sign

pytestmark = pytest.mark.anyio
COUNTS = ((TENANT_CREATED, "tenant", 20), (PRINCIPAL_CREATED, "principal", 50), (KEY_CREATED, "key", 50))
FOUNDING = [
    Event(kind, SYSTEM, target=(what, f"{what}_{number}")) for kind, what, count in COUNTS for number in range(count)
]
EVERYBODY = [event.target for event in FOUNDING]
AT_ONCE = 50


class Node:
    """A log, and what an appliance has that is older."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.clock = Clock()
        self.began_s = self.clock.wall_ns / 1e9
        self.log = open_log(folder, clock=self.clock)
        self.refuse_at: set[int] = set()  # which appends are not taken
        self.appends = 0
        self.asked_until: list[float] = []
        monkeypatch.setattr(founding, "_founding", self._founding)
        opened = asyncio.Event()
        opened.set()
        self.services: Any = SimpleNamespace(
            audit=SimpleNamespace(opened=opened, directory=folder, record=self.record),
            vault=Keys(),
            lifecycle=SimpleNamespace(started_at=self.began_s),
        )

    async def _founding(self, _: object, until: float) -> list[Event]:
        self.asked_until.append(until)
        return list(FOUNDING)

    async def record(self, *events: Event, privileged: bool = False) -> int:
        self.appends += 1
        if self.appends in self.refuse_at:
            raise AuditUnavailable("nothing is recorded", cause="no answer", remedy="Wait")
        drafts = [self._draft(event) for event in events]
        sequence = self.log.append(drafts, privileged=privileged)
        self.log.publish(sign)
        return sequence

    def _draft(self, event: Event) -> Draft:
        kind, record = event.kind.number, event.record({})
        return seal(kind, record, keys=Keys(), scope="system", actor="", session="", random=os.urandom(32))

    async def tell(self) -> None:
        await founding.tell_founding(self.services)

    def named(self) -> list[tuple[str, str]]:
        log = LogReader(self.folder)
        records = [open_record(entry, sealed, Keys()).record for entry, sealed in log.backwards(log.size)]
        targets = [(each["target"]["kind"], each["target"]["id"]) for each in records if "target" in each]
        return [target for target in reversed(targets) if target[0] != "vault"]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path / "audit", monkeypatch)


async def _opened(node: Node) -> None:
    await node.record(Event(VAULT_OPENED, SYSTEM, target=("vault", "root")))


async def test_an_append_that_fails_is_tried_again_and_nobody_is_named_twice(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _opened(node)
    node.refuse_at = {3, 4}  # the second part
    Pauses(monkeypatch, founding, most=3)
    await node.tell()
    assert node.named() == EVERYBODY


async def test_a_start_that_ends_in_between_leaves_the_rest_to_the_next(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _opened(node)
    node.refuse_at = {3}
    Pauses(monkeypatch, founding, most=1)
    with pytest.raises(Enough):
        await node.tell()
    assert node.named() == EVERYBODY[:AT_ONCE]
    node.services.lifecycle.started_at += 1000.0
    for _ in range(2):
        await node.tell()
        assert node.named() == EVERYBODY
    # What is younger than the log was recorded when it was made.
    first_entry_s = LogReader(node.folder).entry(0).wall_ns / 1e9
    assert node.asked_until == [node.began_s, first_entry_s, first_entry_s]


async def test_a_long_log_is_not_searched(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await _opened(node)
    monkeypatch.setattr(founding, "_SHORT", 0)
    await node.tell()
    assert node.named() == []
