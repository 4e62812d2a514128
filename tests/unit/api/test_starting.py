"""The start is recorded and the log signed, however often that fails first; and nothing is open unrecorded."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api import marking, server, starting
from api.admin import routes
from api.admin.asking import Asker
from appliance.audit import AuditUnavailable, Event
from appliance.audit.events import BACKUP_RESTORED, GATEWAY_STARTED, VAULT_OPENED, VAULT_REFUSED
from appliance.audit.restores import ANNOUNCED, Restore
from appliance.settings import load_settings
from appliance.vault import RootKey, Vault
from appliance.vault.errors import PlaintextSwap
from tests.unit.vault.keystore import MemoryKeys

pytestmark = pytest.mark.anyio
DEADLINE_S = 30.0


class Audit:
    """A log in a list, which takes nothing for some tries; and a key that cannot be had for some."""

    def __init__(self, *, record_fails: int = 0, sign_fails: int = 0) -> None:
        self.events: list[Event] = []
        self.opened = asyncio.Event()
        self.begun = asyncio.Event()
        self.record_fails = record_fails
        self.sign_fails = sign_fails

    async def record(self, *events: Event, privileged: bool = False) -> int:
        assert privileged
        if self.record_fails:
            self.record_fails -= 1
            raise AuditUnavailable("nothing is recorded", cause="no answer", remedy="Wait")
        self.events += events
        self.begun.set()
        return len(self.events)

    async def sign(self) -> None:
        if self.sign_fails:
            self.sign_fails -= 1
            raise AuditUnavailable("nothing is signed", cause="no answer", remedy="Wait")
        self.opened.set()

    @property
    def told(self) -> list[str]:
        return [event.kind.action for event in self.events]


class Gateway(SimpleNamespace):
    """The parts of a gateway that a start is about."""

    def __init__(self, state_dir: Path, *, sealed: bool = False, **failing: int) -> None:
        keys = MemoryKeys()
        vault = Vault(keys)
        vault.open(RootKey(b"r" * 32))
        keys.add(vault.new_system_keys())
        if sealed:
            vault.seal()
        super().__init__(
            audit=Audit(**failing),
            vault=vault,
            sessions=SimpleNamespace(forget_texts=lambda: None),
            settings=load_settings({}, environment={}, state_dir=state_dir),
            lifecycle=SimpleNamespace(restores_told=False),
            engine_process=None,
            unsealing=asyncio.Lock(),
        )

    async def unseal(self) -> bool:
        """Whether the vault was opened by this."""

        async def body() -> bytes:
            return b"passphrase"

        request: Any = SimpleNamespace(body=body, app=SimpleNamespace(state=self))
        asker = Asker(caller=None, source="0", audit=self.audit)
        return (await routes._unseal(request, self, asker)).changed  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_AGAIN_S", 0.001)
    monkeypatch.setattr(routes, "open_root", lambda *_: RootKey(b"r" * 32))


async def start(gateway: Gateway) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await starting.record_start(gateway, [])  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["warn", "refuse"])
def test_each_start_of_the_engine_asks_how_swap_is_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    devices: list[str] = []
    monkeypatch.setattr(server, "plaintext_swap_devices", lambda: devices)
    settings = load_settings({"vault": {"plaintext_swap": policy}}, environment={}, state_dir=tmp_path)
    nobody: Any = None
    process = server._engine_process(server._engine_spec(settings), nobody, nobody, settings)
    process._may_start()
    devices.append("/dev/sdz9")  # turned on while the gateway runs
    if policy == "warn":
        process._may_start()
    else:
        with pytest.raises(PlaintextSwap, match="plaintext swap") as refused:
            process._may_start()
        assert "/dev/sdz9" in refused.value.cause


async def test_a_start_that_could_not_be_recorded_is_recorded_later_and_the_log_signed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = Gateway(tmp_path, record_fails=3, sign_fails=3)
    await start(gateway)
    assert len(caplog.records) == 2, "each is said once"
    assert gateway.audit.told == ["gateway.started", "vault.opened"]
    assert gateway.audit.opened.is_set()


async def test_a_vault_that_is_opened_later_has_the_log_signed_though_its_opener_failed_to(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, sealed=True, sign_fails=1)
    starts = asyncio.create_task(start(gateway))
    await gateway.audit.begun.wait()
    with pytest.raises(AuditUnavailable):
        await gateway.unseal()
    await starts
    assert gateway.audit.opened.is_set()
    assert gateway.audit.told == ["gateway.started", "vault.opened"]


async def test_where_the_opening_cannot_be_recorded_the_vault_is_sealed_again(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, sealed=True, record_fails=1)
    with pytest.raises(AuditUnavailable):
        await gateway.unseal()
    assert gateway.vault.sealed
    assert await gateway.unseal()
    assert [event.kind for event in gateway.audit.events] == [VAULT_OPENED]
    assert not gateway.vault.sealed
    assert gateway.audit.opened.is_set()


async def test_an_open_vault_whose_log_is_not_signed_is_signed_by_who_unseals_it_once_more(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, sealed=True, sign_fails=1)
    with pytest.raises(AuditUnavailable):
        await gateway.unseal()
    assert not await gateway.unseal()
    assert gateway.audit.opened.is_set()
    assert [event.kind for event in gateway.audit.events] == [VAULT_OPENED]


async def test_a_wrong_passphrase_is_recorded_and_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "open_root", lambda *_: RootKey(b"x" * 32))
    gateway = Gateway(tmp_path, sealed=True)
    with pytest.raises(Exception, match="root key"):
        await gateway.unseal()
    assert gateway.vault.sealed
    assert [event.kind for event in gateway.audit.events] == [VAULT_REFUSED]


async def test_an_announcement_that_cannot_be_removed_is_recorded_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    restore = Restore(1.0, 0.0, "1", 1, "none-there", "", 0, "")
    (tmp_path / ANNOUNCED).write_bytes(restore.line())
    monkeypatch.setattr(marking, "recorded", refused)
    gateway = Gateway(tmp_path, sign_fails=1)
    await start(gateway)
    await marking.tell_restores(gateway)  # type: ignore[arg-type]  # as whoever compares log and database does
    kinds = [event.kind for event in gateway.audit.events]
    assert kinds == [BACKUP_RESTORED, GATEWAY_STARTED, VAULT_OPENED]
    assert "the next start records it again" in caplog.text
