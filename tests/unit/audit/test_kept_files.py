"""The small files beside the log: wherever writing one fails it is whole, and says what it said, or what is new."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.audit.configuration import LAST_START, Configuration, Model, last_start, remember
from appliance.audit.log import LogUnwritable
from appliance.audit.notes import Algorithm, SigningKey
from appliance.audit.siem.cursor import Cursor, Position
from appliance.audit.siem.destinations import Destination
from appliance.audit.siem.known import Known
from appliance.audit.siem.saved import load, save
from appliance.audit.signing import SIGNING_KEY, public_key, signing_key
from appliance.audit.tree import Frontier
from appliance.audit.verify import verify_log
from appliance.audit.witness import Witness, WitnessStateUnusable, own_key
from appliance.audit.witnessing import last_seen, make_request, take_reply
from appliance.vault import RootKey, Vault
from tests.unit.audit.making import KEY, ORIGIN, Keys, drafts, make_log, open_log, sign
from tests.unit.vault.keystore import MemoryKeys

FAILURES = [
    *((call, number) for call in ("pwrite", "fsync", "replace") for number in (errno.EIO, errno.ENOSPC)),
    *(("open", number) for number in (errno.EIO, errno.ENOSPC, errno.EMFILE)),
]
WITNESS = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)
FILES: dict[str, Any] = {name: Path(f"/etc/siem/{name}") for name in ("ca", "certificate", "private_key")}
SOC = Destination(name="soc", url="syslog+tls://siem.example", **FILES)


def _opened_vault() -> Vault:
    vault = Vault(keys := MemoryKeys())
    vault.open(RootKey(b"r" * 32))
    keys.add(vault.new_system_keys())
    return vault


VAULT = _opened_vault()


def _read_known(path: Path) -> int:
    known = Known.load(path, ORIGIN)
    assert known is not None
    return known.end


def _read_start(path: Path) -> int:
    known = last_start(path.parent, VAULT)
    assert known is not None
    return int(known.settings["state"])


KEPT: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], int]]] = {
    "soc.cursor": (
        lambda path, state: Cursor(path, ORIGIN).save(Position(state, state)),
        lambda path: Cursor(path, ORIGIN).load().next,
    ),
    "destinations.json": (
        lambda path, state: save(path, [SOC], state, Keys()),
        lambda path: load(path, Keys()).version,
    ),
    "known": (lambda path, state: Known(ORIGIN, Frontier(), 0, (bytes(32),) * state).save(path), _read_known),
    LAST_START: (
        lambda path, state: remember(path.parent, VAULT, Configuration({"state": str(state)}, Model("", "", ""))),
        _read_start,
    ),
}


class Disk:
    """A disk on which one call of a kind fails, once: the `fails_at`th."""

    def __init__(self, call: str, number: int) -> None:
        self._call = call
        self._number = number
        self._calls = 0
        self.fails_at = 0

    @property
    def has_failed(self) -> bool:
        return self._calls >= self.fails_at

    @contextlib.contextmanager
    def failing_next(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.fails_at, self._calls = self.fails_at + 1, 0
        with monkeypatch.context() as patched:
            for name in {self._call, "rename"} if self._call == "replace" else {self._call}:
                patched.setattr(os, name, self._counted(getattr(os, name)))
            yield

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **named: Any) -> Any:
            self._calls += 1
            if self._calls == self.fails_at:
                raise OSError(self._number, os.strerror(self._number))
            return real(*given, **named)

        return step


@pytest.mark.parametrize(("call", "number"), FAILURES)
@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_is_whole_wherever_writing_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str, number: int
) -> None:
    write, read = KEPT[name]
    path, disk, state = tmp_path / name, Disk(call, number), 1
    write(path, state)
    while True:
        with disk.failing_next(monkeypatch):
            try:
                write(path, state + 1)
            except OSError as error:
                told = error.errno
            else:
                told = 0
        assert told == (number if disk.has_failed else 0), "it is told, and by no other name"
        assert read(path) in ((state, state + 1) if told else (state + 1,))
        if not told:
            break
        state += 2
        write(path, state)
        assert read(path) == state
    assert disk.fails_at > 1


@pytest.mark.parametrize(("call", "number"), FAILURES)
def test_a_signing_key_is_whole_or_not_there_wherever_writing_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    disk = Disk(call, number)
    while True:
        directory = tmp_path / str(disk.fails_at)
        cause = ""
        with disk.failing_next(monkeypatch):
            try:
                signing_key(directory, VAULT)
            except LogUnwritable as error:
                cause = error.cause
        assert (SIGNING_KEY in cause, os.strerror(number) in cause) == (disk.has_failed, disk.has_failed)
        key = signing_key(directory, VAULT)
        assert key.verifier() == public_key(directory)
        assert signing_key(directory, VAULT).verifier() == key.verifier()
        if not disk.has_failed:
            break
    assert disk.fails_at > 2


@pytest.mark.parametrize(("call", "number"), FAILURES)
def test_a_witnesss_key_is_whole_or_not_there_wherever_writing_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    disk = Disk(call, number)
    while True:
        directory = tmp_path / str(disk.fails_at)
        cause = ""
        with disk.failing_next(monkeypatch):
            try:
                own_key(directory, "witness.example")
            except WitnessStateUnusable as error:
                cause = error.cause
        assert (os.strerror(number) in cause) == disk.has_failed
        key = own_key(directory, "witness.example")
        assert own_key(directory, "another").verifier() == key.verifier()
        assert key.name == "witness.example"
        if not disk.has_failed:
            break
    # Its content, its name and its folder's: none of them is only in memory.
    assert disk.fails_at > (3 if call == "fsync" else 1)


@pytest.mark.parametrize(("call", "number"), FAILURES)
def test_what_a_witness_saw_and_said_is_whole_wherever_writing_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    log, witness, disk = tmp_path / "audit", Witness(tmp_path / "witness", WITNESS), Disk(call, number)
    log_key, witness_key = KEY.verifier(), WITNESS.verifier()
    make_log(log, 1)

    def be_witnessed(grown: int) -> None:
        last = witness.last(log_key)
        request = make_request(log, old_size=0 if last is None else last.size)
        assert (
            take_reply(log, request, witness.cosign(request, log_key, 1_700_000_000), log_key, witness_key).size
            == grown
        )

    be_witnessed(1)
    grown = 1
    while True:
        grown += 1
        opened = open_log(log)
        opened.append(drafts([grown]))
        opened.publish(sign)
        opened.close()
        failed = True
        with disk.failing_next(monkeypatch), contextlib.suppress(OSError, WitnessStateUnusable):
            be_witnessed(grown)
            failed = False
        last = witness.last(log_key)
        assert last is not None
        # What the log keeps is never ahead of what the witness remembers.
        assert last_seen(log, witness_key) in (grown - 1, last.size)
        assert verify_log(log, log_key, witnesses=[witness_key]).size == grown
        be_witnessed(grown)
        assert last_seen(log, witness_key) == grown
        if not failed:
            break
    assert disk.fails_at > 1
