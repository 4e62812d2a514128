"""What is set otherwise than at the last start is recorded once, and takes nothing of the administrators' reserve."""

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api import configuration
from appliance.audit import AuditUnavailable, Event
from appliance.audit.configuration import Configuration, Model, effective, remember
from appliance.settings import load_settings
from appliance.vault import RootKey, Vault
from tests.unit.api.pauses import Pauses
from tests.unit.vault.keystore import MemoryKeys

pytestmark = pytest.mark.anyio
CHANGED: dict[str, Any] = {
    "gateway": {"port": 9000},
    "sessions": {"idle_timeout_s": 20.0},
    "engine": {"max_num_seqs": 7},
}


class Node:
    """An appliance that is set otherwise than at its last start.

    Attributes:
        fails: for each append, whether it does.
    """

    def __init__(self, folder: Path) -> None:
        keys = MemoryKeys()
        vault = Vault(keys)
        vault.open(RootKey(b"r" * 32))
        keys.add(vault.new_system_keys())
        before = load_settings({}, environment={}, state_dir=folder)
        engine = str(before.engine.socket)
        remember(folder, vault, Configuration(effective(before), Model("", engine, "")))
        opened = asyncio.Event()
        opened.set()
        self.told: list[str] = []
        self.fails: Iterator[bool] = iter(())
        self.services: Any = SimpleNamespace(
            audit=SimpleNamespace(opened=opened, directory=folder, record=self.record),
            vault=vault,
            settings=load_settings(CHANGED, environment={}, state_dir=folder),
            engine_process=None,
        )

    async def record(self, *events: Event, privileged: bool = False) -> int:
        assert not privileged
        if next(self.fails, False):
            raise AuditUnavailable("nothing is recorded", cause="no room", remedy="Make room")
        self.told += [event.target[1] for event in events]
        return 0


WHAT = ["engine.max_num_seqs", "gateway.port", "sessions.idle_timeout_s"]


async def test_on_a_disk_without_room_for_the_copy_the_changes_are_recorded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def full(*given: Any) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        remember(*given)

    node = Node(tmp_path)
    monkeypatch.setattr(configuration, "remember", full)
    pauses = Pauses(monkeypatch, configuration, most=4)
    await configuration.tell_configuration(node.services)
    assert sorted(node.told) == WHAT
    assert pauses.slept_s == [60.0] * 3
    await configuration.tell_configuration(node.services)
    assert sorted(node.told) == WHAT, "the next start is as this one"


async def test_what_was_recorded_is_not_recorded_again_because_the_rest_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path)
    node.fails = iter((False, True, False, True))
    monkeypatch.setattr(configuration, "_AT_ONCE", 1)
    Pauses(monkeypatch, configuration, most=4)
    await configuration.tell_configuration(node.services)
    assert sorted(node.told) == WHAT
