"""A restore of the database: the audit log goes on, tells of it, and is not alarmed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from api.admin.client import AdminClient
from tests.e2e.api.conftest import until
from tests.e2e.cli.conftest import PASSPHRASE, Appliance, free_port

# Each test runs a dozen commands, each a process of its own, on a machine that may be busy.
pytestmark = pytest.mark.timeout(300)


def marked(appliance: Appliance) -> AdminClient:
    """The admin API of an appliance whose log and database were compared since its start."""
    admin = AdminClient(appliance.state_dir)

    def compared() -> bool:
        newest = admin.audit_entries(action="store.marked", limit=1).entries
        starts = admin.audit_entries(action="gateway.started", limit=1).entries
        return bool(newest) and newest[0].sequence > starts[0].sequence

    until(compared)
    return admin


def audit_part(admin: AdminClient) -> tuple[str, str]:
    part = next(part for part in admin.status().parts if part.name == "audit")
    return part.state, part.detail


def restores(admin: AdminClient) -> list[tuple[int, dict[str, Any]]]:
    """The events of restores, the oldest first."""
    entries = admin.audit_entries(action="backup.restored").entries
    return [(entry.sequence, entry.record or {}) for entry in reversed(entries)]


def backed_up(appliance: Appliance, tmp_path: Path) -> Path:
    """A backup of the running appliance, which then goes on and is ended."""
    file = tmp_path / f"{appliance.state_dir.name}.tar"
    marked(appliance)
    outcome = appliance.ok("backup", str(file))
    assert "Not included: the audit log" in outcome.err
    for name in ("treasury", "claims"):
        appliance.ok("tenant", "create", name)
    # The marks go on, too: the database in the backup is older than the log by them.
    appliance.ok("down")
    appliance.up()
    marked(appliance)
    return file


def verified(appliance: Appliance, key: str, *, at_least: int, log: Path | None = None) -> Any:
    folder = log or appliance.state_dir / "audit"
    return appliance.json("audit", "verify", "--log", str(folder), "--key", key, "--at-least", str(at_least))


def test_the_log_goes_on_through_a_restore_and_tells_of_it(appliance: Appliance, tmp_path: Path) -> None:
    appliance.init()
    appliance.up()
    file = backed_up(appliance, tmp_path)
    key = appliance.json("audit", "status")["public_key"]
    appliance.ok("down")
    before = verified(appliance, key, at_least=1)
    assert before["unsigned"] == 0

    outcome = appliance.ok("restore", str(file), "--replace", "state", "--json")
    assert "The audit log goes on" in outcome.err
    kept = Path(outcome.json["kept"])
    appliance.up()
    admin = marked(appliance)
    status = admin.audit_status()
    assert (status.public_key, status.alarm) == (key, None)
    assert [tenant.name for tenant in admin.tenants().tenants] == ["default"]
    ((sequence, record),) = restores(admin)
    assert sequence == before["size"]
    assert record["counts"]["log_entries"] == before["size"]
    assert 0 <= record["counts"]["backup_age_s"] < 300
    assert (record["details"]["log"], record["details"]["log_key"]) == ("carried-over", key)
    assert record["actor"]["kind"] == "user"
    assert admin.audit_entries(action="older_copy.found").entries == []
    state, detail = audit_part(admin)
    assert state == "ready"
    assert f"entry {sequence}" in detail
    assert "restored" in appliance.ok("audit", "status").out

    appliance.ok("down")
    assert verified(appliance, key, at_least=before["size"] + 2)["size"] > before["size"]
    verified(appliance, key, at_least=before["size"], log=kept / "audit")
    shutil.rmtree(kept)  # which a person does who is sure
    verified(appliance, key, at_least=before["size"] + 2)
    appliance.up()
    admin = marked(appliance)
    assert len(restores(admin)) == 1
    assert admin.audit_status().restored is None
    assert audit_part(admin)[0] == "ready"


def test_a_restore_is_told_by_a_start_that_is_sealed_and_explains_the_older_copy_when_it_is_not(
    appliance: Appliance, tmp_path: Path
) -> None:
    appliance.init_sealed()
    appliance.up()
    appliance.ok("unseal", "--passphrase-fd", "0", secret=PASSPHRASE)
    file = tmp_path / "appliance.tar"
    marked(appliance)
    appliance.ok("backup", str(file))
    appliance.ok("down")
    appliance.up()
    appliance.ok("unseal", "--passphrase-fd", "0", secret=PASSPHRASE)
    marked(appliance)
    appliance.ok("down")
    appliance.ok("restore", str(file), "--replace", "state")
    for _ in range(2):  # one that nobody unseals, and one that somebody does
        appliance.up()
        assert not (appliance.state_dir / "restored.jsonl").exists()
        appliance.ok("down")
    appliance.up()
    appliance.ok("unseal", "--passphrase-fd", "0", secret=PASSPHRASE)
    admin = marked(appliance)
    assert len(restores(admin)) == 1
    assert audit_part(admin)[0] == "ready"
    assert admin.audit_entries(action="older_copy.found").entries == []


def test_a_fresh_machine_begins_a_log_that_names_the_former_one(appliance: Appliance, tmp_path: Path) -> None:
    appliance.init()
    appliance.up()
    file = backed_up(appliance, tmp_path)
    key = appliance.json("audit", "status")["public_key"]
    fresh = Appliance(tmp_path / "fresh", free_port(), appliance.engine_socket)
    try:
        outcome = fresh.ok("restore", str(file), "--json")
        assert "a new one begins at the next start" in outcome.err
        assert key in outcome.err
        shutil.copy(appliance.state_dir / "root.key", fresh.state_dir / "root.key")
        fresh.up()
        admin = marked(fresh)
        ((sequence, record),) = restores(admin)
        assert sequence == 0
        assert (record["details"]["log"], record["details"]["log_key"]) == ("none-there", key)
        assert record["counts"]["log_entries"] == outcome.json["restore"]["log_entries"] > 0
        status = admin.audit_status()
        assert (status.public_key == key, status.alarm) == (False, None)
        assert audit_part(admin)[0] == "ready"
    finally:
        fresh.end()


def test_a_log_that_the_backup_has_no_key_for_is_kept_and_named_in_the_new_one(
    appliance: Appliance, tmp_path: Path
) -> None:
    other = Appliance(tmp_path / "other", free_port(), appliance.engine_socket)
    try:
        other.init()
        other.up()
        file = backed_up(other, tmp_path)
        other.ok("down")
    finally:
        other.end()
    appliance.init()
    appliance.up()
    marked(appliance)
    key = appliance.json("audit", "status")["public_key"]
    appliance.ok("down")
    size = verified(appliance, key, at_least=1)["size"]
    outcome = appliance.ok("restore", str(file), "--replace", "state", "--json")
    folder = appliance.state_dir / outcome.json["restore"]["log_folder"]
    assert str(folder) in outcome.err
    shutil.copy(other.state_dir / "root.key", appliance.state_dir / "root.key")
    shutil.rmtree(outcome.json["kept"])
    appliance.up()
    admin = marked(appliance)
    ((sequence, record),) = restores(admin)
    assert (sequence, record["counts"]["log_entries"]) == (0, size)
    assert record["details"]["log"] == "set-aside"
    assert (record["details"]["log_key"], record["details"]["log_folder"]) == (key, folder.name)
    assert audit_part(admin)[0] == "ready"
    assert admin.audit_status().public_key != key
    verified(appliance, key, at_least=size, log=folder)


def test_an_older_copy_that_no_restore_announced_alarms_until_it_is_acknowledged(
    appliance: Appliance, tmp_path: Path
) -> None:
    appliance.init()
    appliance.up()
    file = backed_up(appliance, tmp_path)
    appliance.ok("down")
    appliance.ok("restore", str(file), "--replace", "state")
    # An announcement of another copy than the one that is there: it was put there by hand.
    announced = json.loads((appliance.state_dir / "restored.jsonl").read_text())
    announced["mark"] += 1
    (appliance.state_dir / "restored.jsonl").write_text(json.dumps(announced) + "\n")
    for _ in range(2):
        appliance.up()
        admin = marked(appliance)
        state, detail = audit_part(admin)
        assert state == "degraded"
        assert "holdfast audit acknowledge" in detail
        assert len(admin.audit_entries(action="older_copy.found").entries) == 1
        appliance.ok("down")
    appliance.up()
    marked(appliance)
    assert appliance.json("audit", "acknowledge") == {"acknowledged": "database"}
    assert appliance.json("audit", "acknowledge") == {"acknowledged": None}
    assert audit_part(admin)[0] == "ready"
    (acknowledged,) = admin.audit_entries(action="older_copy.acknowledged").entries
    assert acknowledged.record is not None
    assert acknowledged.record["actor"]["role"] == "admin"
    appliance.ok("down")
    appliance.up()
    assert audit_part(marked(appliance))[0] == "ready"
