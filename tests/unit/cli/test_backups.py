"""Backups: what is in one, what is refused, and that a restore is whole or nothing."""

import asyncio
import fcntl
import hashlib
import io
import json
import os
import sqlite3
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api import backups, server
from api.backups import (
    ApplianceInUse,
    BackupDamaged,
    BackupTooNew,
    BackupUnreadable,
    RestoreFailed,
    RestoreWouldReplace,
    restore_backup,
    stream_backup,
    verify_backup,
)
from api.replica import replica_of
from appliance.audit.restores import ANNOUNCED
from appliance.settings import Settings, load_settings
from appliance.store import Store
from appliance.vault import RootKey, create_key_file_seal

MADE_AT = 1_800_000_000.0


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """The state directory of an appliance that could be backed up: a real database, and stand-ins beside it."""
    folder = tmp_path / "state"
    (folder / "run").mkdir(parents=True, mode=0o700)
    Store.open(f"sqlite:///{folder / 'holdfast.db'}").close()
    (folder / "root.sealed").write_bytes(create_key_file_seal(RootKey.generate(), folder / "root.key"))
    (folder / "demo-api-key").write_text("hf_never in a backup")
    (folder / "holdfast.toml").write_text("demo = true\n")
    return folder


@pytest.fixture
def backup(state_dir: Path, tmp_path: Path) -> Path:
    """A whole backup of it."""

    async def write() -> None:
        store = Store.open(f"sqlite:///{state_dir / 'holdfast.db'}")
        settings = Settings.model_validate({"state_dir": state_dir})
        with (tmp_path / "backup.tar").open("wb") as file:
            async for piece in stream_backup(store, settings, now=lambda: MADE_AT):
                file.write(piece)
        store.close()

    asyncio.run(write())
    return tmp_path / "backup.tar"


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        found = {}
        for about in archive:
            content = archive.extractfile(about)
            assert content is not None
            found[about.name] = content.read()
        return found


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def test_its_size_is_known_before_anything_of_it_is_given_out(state_dir: Path) -> None:
    settings = Settings.model_validate({"state_dir": state_dir})
    given: list[int] = []
    told: list[int] = []

    async def admitted(size: int) -> None:
        assert not given
        told.append(size)

    async def refused(_: int) -> None:
        raise PermissionError

    async def write() -> None:
        store = Store.open(f"sqlite:///{state_dir / 'holdfast.db'}")
        async for piece in stream_backup(store, settings, admitted=admitted):
            given.append(len(piece))  # noqa: PERF401  (what is given is looked at meanwhile)
        with pytest.raises(PermissionError):
            await anext(stream_backup(store, settings, admitted=refused))
        store.close()

    asyncio.run(write())
    assert told == [sum(given)]
    assert not list((state_dir / "run").iterdir())


def test_a_backup_holds_what_is_sealed_and_no_secret(backup: Path, state_dir: Path) -> None:
    found = members(backup)
    assert list(found) == ["manifest.json", "holdfast.db", "root.sealed", "holdfast.toml"]
    assert b"never in a backup" not in backup.read_bytes()
    assert (state_dir / "root.key").read_bytes() not in backup.read_bytes()
    manifest = verify_backup(backup)
    assert (manifest.created_at, manifest.seal) == (MADE_AT, "key-file")
    assert manifest.files[0].sha256 == hashlib.sha256(found["holdfast.db"]).hexdigest()


def test_a_backup_leaves_no_copy_of_the_database_behind(backup: Path, state_dir: Path) -> None:
    assert list((state_dir / "run").iterdir()) == []


def test_what_a_killed_gateway_left_of_a_backup_is_removed_at_the_next_start(state_dir: Path) -> None:
    run = state_dir / "run"
    for name in ("backup-x1y2", "engine"):
        (run / name).mkdir()
        (run / name / "holdfast.db").write_text("a copy")
    with server._only_gateway(run):
        assert sorted(path.name for path in run.iterdir()) == ["engine", "lock"]


def test_a_restore_into_nothing_gives_the_same_files(backup: Path, tmp_path: Path) -> None:
    restored = restore_backup(backup, tmp_path / "new" / "state", replace=False)
    assert restored.kept is None
    assert restored.key_file_missing
    put_back = tmp_path / "new" / "state"
    for name, content in members(backup).items():
        if name != "manifest.json":
            placed = "holdfast.toml.from-backup" if name == "holdfast.toml" else name
            assert (put_back / placed).read_bytes() == content
            assert (put_back / placed).stat().st_mode & 0o777 == 0o600
    assert put_back.stat().st_mode & 0o777 == 0o700
    with sqlite3.connect(put_back / "holdfast.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


def test_an_appliance_is_set_aside_only_when_that_is_said_and_is_kept(backup: Path, state_dir: Path) -> None:
    (state_dir / "models" / "mine").mkdir(parents=True)
    replica = replica_of(state_dir)
    with pytest.raises(RestoreWouldReplace, match="--replace state"):
        restore_backup(backup, state_dir, replace=False)
    restored = restore_backup(backup, state_dir, replace=True, now=lambda: MADE_AT)
    assert restored.kept == state_dir.with_name("state.before-restore-20270115T080000Z")
    assert (restored.kept / "holdfast.db").exists()
    assert (state_dir / "root.key").read_bytes() == (restored.kept / "root.key").read_bytes()
    assert (state_dir / "demo-api-key").stat().st_mode & 0o777 == 0o600
    assert (state_dir / "models" / "mine").is_dir()
    assert replica_of(state_dir) == replica, "its engine was started again, no other took its place"
    assert not restored.key_file_missing


def test_settings_of_a_backup_are_put_beside_and_not_used(backup: Path, state_dir: Path, tmp_path: Path) -> None:
    evil = b'[engine]\npython = "/evil"\n'
    files = members(backup)
    files["holdfast.toml"] = evil

    def vouch(manifest: Any) -> None:
        manifest["files"][2].update(size=len(evil), sha256=hashlib.sha256(evil).hexdigest())

    manifest_change(vouch)(files)
    forged = packed(tmp_path / "forged.tar", files)

    anew = restore_backup(forged, tmp_path / "new", replace=False)
    assert anew.settings_to_review == tmp_path / "new" / "holdfast.toml.from-backup"
    assert anew.settings_to_review.read_bytes() == evil
    assert load_settings(environment={}, state_dir=tmp_path / "new").engine.python is None

    replaced = restore_backup(forged, state_dir, replace=True)
    assert replaced.settings_to_review is not None
    assert (state_dir / "holdfast.toml").read_text() == "demo = true\n"
    assert load_settings(environment={}, state_dir=state_dir).engine.python is None


def test_settings_that_are_the_same_need_no_review(backup: Path, state_dir: Path) -> None:
    assert restore_backup(backup, state_dir, replace=True).settings_to_review is None
    assert not (state_dir / "holdfast.toml.from-backup").exists()


def test_the_log_goes_on_in_what_was_put_back_and_the_one_that_is_kept_is_whole_too(
    backup: Path, state_dir: Path
) -> None:
    files = {"journal": b"frames", "checkpoint": b"note", "tile/0/000": b"hashes"}
    for name, content in files.items():
        (state_dir / "audit" / name).parent.mkdir(parents=True, exist_ok=True)
        (state_dir / "audit" / name).write_bytes(content)
    (state_dir / "audit.before-restore-1").mkdir()
    (state_dir / "audit.before-restore-1" / "journal").write_bytes(b"earlier")
    (state_dir / "siem").mkdir()
    (state_dir / "siem" / "destinations.json").write_bytes(b"{}")
    (state_dir / ANNOUNCED).write_bytes(b"of a restore that no start has recorded\n")
    restored = restore_backup(backup, state_dir, replace=True, now=lambda: MADE_AT + 60)
    assert (restored.restore.log, restored.restore.log_folder) == ("carried-over", "audit")
    assert restored.kept is not None
    for place in (state_dir, restored.kept):
        assert {name: (place / "audit" / name).read_bytes() for name in files} == files
        assert (place / "audit.before-restore-1" / "journal").read_bytes() == b"earlier"
        assert (place / "siem" / "destinations.json").exists()
    assert (state_dir / "audit").stat().st_mode & 0o777 == 0o700
    unrecorded, line = (state_dir / ANNOUNCED).read_bytes().splitlines()
    assert unrecorded == b"of a restore that no start has recorded"
    assert json.loads(line)["restored_at"] == MADE_AT + 60
    assert (state_dir / ANNOUNCED).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["holdfast.db-lock", "audit/lock"])
def test_nothing_is_replaced_while_the_database_or_the_log_is_open(backup: Path, state_dir: Path, name: str) -> None:
    (state_dir / "audit").mkdir()
    (state_dir / name).touch()
    with (state_dir / name).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ApplianceInUse, match="holdfast down"):
            restore_backup(backup, state_dir, replace=True)
    assert [path for path in state_dir.parent.iterdir() if path.name.startswith(".state")] == []


def test_a_backup_whose_database_is_none_is_refused(backup: Path, state_dir: Path, tmp_path: Path) -> None:
    files = members(backup)
    files["holdfast.db"] = notes = b"these are my notes, and no database" * 40

    def vouch(manifest: Any) -> None:
        manifest["files"][0].update(size=len(notes), sha256=hashlib.sha256(notes).hexdigest())

    manifest_change(vouch)(files)
    with pytest.raises(BackupDamaged, match="not a database"):
        restore_backup(packed(tmp_path / "notes.tar", files), state_dir, replace=True)
    assert (state_dir / "holdfast.db").read_bytes() != notes


Change = Callable[[dict[str, bytes]], object]


def manifest_change(change: Callable[[Any], None]) -> Change:
    def apply(files: dict[str, bytes]) -> None:
        manifest = json.loads(files["manifest.json"])
        change(manifest)
        files["manifest.json"] = json.dumps(manifest).encode()

    return apply


def one_bit(files: dict[str, bytes]) -> None:
    flipped = bytearray(files["holdfast.db"])
    flipped[5000] ^= 1
    files["holdfast.db"] = bytes(flipped)


DAMAGES: dict[str, Change] = {
    "one bit of the database": one_bit,
    "the end of the database is missing": lambda files: files.update({"holdfast.db": files["holdfast.db"][:-1]}),
    "the seal is missing": lambda files: files.pop("root.sealed"),
    "there is something more": lambda files: files.update({"root.key": b"x"}),
    "a name with a folder in it": lambda files: files.update({"../evil": b"x"}),
    "no manifest": lambda files: files.pop("manifest.json"),
    "a manifest that is no JSON": lambda files: files.update({"manifest.json": b"{"}),
    "a manifest of something else": manifest_change(lambda manifest: manifest.update(format="zip")),
    "a manifest without the seal": manifest_change(lambda manifest: manifest["files"].pop(1)),
    "a manifest that lists what is never in one": manifest_change(
        lambda manifest: manifest["files"].append({"name": "root.key", "size": 1, "sha256": ""})
    ),
    "a manifest that leads out": manifest_change(lambda manifest: manifest["files"][0].update(name="../holdfast.db")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_refused_before_anything_is_written(damage: Change, backup: Path, tmp_path: Path) -> None:
    files = members(backup)
    damage(files)
    # The manifest comes first, as it is written.
    first = {"manifest.json": files.pop("manifest.json")} if "manifest.json" in files else {}
    damaged = packed(tmp_path / "damaged.tar", first | files)
    with pytest.raises(BackupDamaged, match="not a whole backup"):
        restore_backup(damaged, tmp_path / "new", replace=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kept", [0, 100, 600, 5000])
def test_a_backup_that_was_cut_short_is_refused(kept: int, backup: Path, tmp_path: Path) -> None:
    (tmp_path / "short.tar").write_bytes(backup.read_bytes()[:kept])
    with pytest.raises(BackupDamaged):
        verify_backup(tmp_path / "short.tar")


def test_a_link_in_place_of_a_file_is_refused(backup: Path, tmp_path: Path) -> None:
    files = members(backup)
    path = packed(tmp_path / "link.tar", {"manifest.json": files["manifest.json"]})
    with tarfile.open(path, "a") as archive:
        about = tarfile.TarInfo("holdfast.db")
        about.type, about.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(about)
    with pytest.raises(BackupDamaged):
        verify_backup(path)


def test_a_newer_format_says_which_version_wrote_it(backup: Path, tmp_path: Path) -> None:
    files = members(backup)
    manifest_change(lambda manifest: manifest.update(version=2, holdfast="9.9"))(files)
    with pytest.raises(BackupTooNew, match=r"9\.9"):
        verify_backup(packed(tmp_path / "new.tar", files))


def test_a_backup_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackupUnreadable, match="No such file"):
        verify_backup(tmp_path / "none.tar")


def test_a_restore_that_fails_changes_nothing(backup: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "holdfast.db")

    before = {path.name: path.read_bytes() for path in state_dir.iterdir() if path.is_file()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RestoreFailed, match="nothing was changed"):
        restore_backup(backup, state_dir, replace=True)
    assert {path.name: path.read_bytes() for path in state_dir.iterdir() if path.is_file()} == before
    assert [path for path in state_dir.parent.iterdir() if path.name.startswith(".state")] == []


def test_two_restores_within_one_second_keep_both_former_states(backup: Path, state_dir: Path) -> None:
    first = restore_backup(backup, state_dir, replace=True, now=lambda: MADE_AT)
    (state_dir / "in-use").write_text("the appliance of the second in between")
    second = restore_backup(backup, state_dir, replace=True, now=lambda: MADE_AT)
    assert first.kept == state_dir.with_name("state.before-restore-20270115T080000Z")
    assert second.kept == state_dir.with_name("state.before-restore-20270115T080000Z-2")
    assert (first.kept / "holdfast.db").exists()
    assert (second.kept / "in-use").exists()


def test_two_logs_that_are_set_aside_within_one_second_are_both_kept(backup: Path, state_dir: Path) -> None:
    sealed_under_another_key = b"\x01" + bytes(64)
    for content in (b"first", b"second"):
        (state_dir / "audit").mkdir()
        (state_dir / "audit" / "signing-key").write_bytes(sealed_under_another_key)
        (state_dir / "audit" / "journal").write_bytes(content)
        assert restore_backup(backup, state_dir, replace=True, now=lambda: MADE_AT).restore.log == "set-aside"
    kept = sorted(state_dir.glob("audit.before-restore-*"))
    assert [(folder / "journal").read_bytes() for folder in kept] == [b"first", b"second"]


@pytest.mark.parametrize("step", ["the name", "the swap"])
def test_a_restore_that_fails_at_its_last_steps_leaves_the_appliance_that_is_there(
    step: str, backup: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(one: Path, other: Path) -> None:
        raise OSError(5, "Input/output error", str(other))

    before = {path.name: path.read_bytes() for path in state_dir.iterdir() if path.is_file()}
    owner, name = (Path, "rename") if step == "the name" else (backups, "_rename_exchange")
    monkeypatch.setattr(owner, name, refused)
    with pytest.raises(RestoreFailed, match="nothing was changed"):
        restore_backup(backup, state_dir, replace=True)
    assert {path.name: path.read_bytes() for path in state_dir.iterdir() if path.is_file()} == before
    assert sorted(path.name for path in state_dir.parent.iterdir()) == ["backup.tar", "state"]


def test_a_restore_that_cannot_move_the_models_says_where_they_are(
    backup: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (state_dir / "models" / "mine").mkdir(parents=True)
    (state_dir / "only-here").touch()
    rename = Path.rename

    def busy(self: Path, target: Path) -> Path:
        if self.name == "models":
            raise OSError(16, "Device or resource busy", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(RestoreFailed, match=r"kept in .*/state\.before-restore-20270115T080000Z: move models"):
        restore_backup(backup, state_dir, replace=True, now=lambda: MADE_AT)
    kept = state_dir.with_name("state.before-restore-20270115T080000Z")
    assert (kept / "models" / "mine").is_dir()
    assert (kept / "only-here").exists()
    assert (state_dir / "holdfast.db").exists()
