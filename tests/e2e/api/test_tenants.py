"""What is set for a tenant is in force, shown and recorded; what is set for one that does not exist is told."""

import asyncio
import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from api.admin.client import AdminClient, Refused
from api.roots import open_root
from appliance.audit import Actor
from appliance.cli import holdfast
from appliance.identity import Identity, Isolation
from appliance.sessions import Sessions, Shredding, Throwaways
from appliance.settings import SessionSettings
from appliance.store import DatabaseKeys, Store
from appliance.vault import Vault
from benchmarks.running import make_appliance, running_gateway, running_stub
from tests.e2e.api.conftest import Served, serving, until

TOML = """
[sessions.tenants."tenant"]
retention = "strict"
idle_timeout_s = 7
kv_share = 0.25
kv_cap = 0.5

[sessions.tenants."tresury"]
retention = "strict"

[admission.weight_by_tenant]
tresury = 2.0
"""
OF_NOBODY = ['sessions.tenants."tresury"', 'admission.weight_by_tenant."tresury"']


@contextlib.contextmanager
def _started(place: Path, **environment: str) -> Iterator[Served]:
    state_dir, engine = place / "state", place / "engine.sock"
    with running_stub(engine), running_gateway(state_dir, engine, environment=environment) as gateway:
        yield Served(state_dir, engine, gateway, (state_dir / "api-key").read_text().strip())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where an appliance is."""
    make_appliance(tmp_path / "state")
    return tmp_path


def _leave_a_throwaway(state_dir: Path) -> str:
    """What a proof leaves whose gateway was killed; the id of its tenant."""
    store = Store.open(f"sqlite:///{state_dir / 'holdfast.db'}")
    vault = Vault(DatabaseKeys(store))
    vault.open(open_root(state_dir, b""))

    async def leave() -> str:
        throwaways = Throwaways(store, vault)
        tenant = await throwaways.create_tenant(Identity(store, vault), "proof 0123", isolation=Isolation.SESSION)
        return tenant.tenant_id

    try:
        return asyncio.run(leave())
    finally:
        store.close()


def _shred_and_be_killed(state_dir: Path) -> str:
    """Destroy the keys of a new tenant, as a gateway does that is killed just after; its id."""
    store = Store.open(f"sqlite:///{state_dir / 'holdfast.db'}")
    vault = Vault(DatabaseKeys(store))
    vault.open(open_root(state_dir, b""))
    identity = Identity(store, vault)
    shredding = Shredding(store, vault, identity, Sessions(store, vault, SessionSettings()))

    async def shred() -> str:
        tenant = await identity.create_tenant("doomed")
        shredded, _ = await shredding.shred(
            tenant.tenant_id, Actor("principal", "prn_1", "admin"), "uid=1000", end_turns=lambda: asyncio.sleep(0)
        )
        return shredded.tenant_id

    try:
        return asyncio.run(shred())
    finally:
        store.close()


def _told(served: Served, *arguments: str) -> str:
    said = CliRunner().invoke(holdfast, ["--state-dir", str(served.state_dir), *arguments], catch_exceptions=False)
    return said.output


def _records(served: Served, action: str) -> list[dict[str, Any]]:
    entries = served.admin.audit_entries(limit=1000, action=action).entries[::-1]
    return [entry.record for entry in entries if entry.record is not None]


def test_a_name_that_no_tenant_has_is_told_wherever_an_operator_looks_until_there_is_one(place: Path) -> None:
    (place / "state" / "holdfast.toml").write_text(TOML)
    with _started(place) as served:
        assert served.admin.status().settings_of_nobody == OF_NOBODY
        assert OF_NOBODY[0] in _told(served, "status")
        checks = {each["check"]: each for each in json.loads(_told(served, "--json", "doctor"))["checks"]}
        assert checks["tenant names"]["verdict"] == "WARN"
        assert OF_NOBODY[0] in checks["tenant names"]["found"]
        log = served.state_dir / "log" / "gateway.log"
        until(lambda: all(f"{setting} applies to nobody" in log.read_text() for setting in OF_NOBODY))
        served.admin.create_tenant("tresury")
        assert served.admin.status().settings_of_nobody == []
        assert "tresury" not in _told(served, "status")


def test_what_is_kept_of_a_tenants_sessions_is_shown(place: Path) -> None:
    (place / "state" / "holdfast.toml").write_text(TOML)
    with _started(place) as served:
        served.admin.create_tenant("other", idle_timeout_s=40.0)
        kept = {each.name: each.keeping for each in served.admin.tenants().tenants}
        assert kept["tenant"].model == "stub"
        assert (kept["tenant"].retention, kept["tenant"].idle_timeout_s) == ("strict", 7.0)
        assert (kept["tenant"].kv_share, kept["tenant"].kv_cap) == (0.25, 0.5)
        assert (kept["other"].retention, kept["other"].idle_timeout_s) == ("soft", 40.0)
        assert kept["other"].idle_timeout_after_tool_use_s == 40.0
        listed = _told(served, "tenant", "list")
        assert "strict 7 s" in listed
        assert "soft 40 s" in listed
        shown = _told(served, "tenant", "show", "tenant")
        assert "strict: everything is dropped at the idle timeout" in shown
        assert "others leave it 25%" in shown
        with pytest.raises(Refused, match="there is no tenant"):
            served.admin.tenant("nobody")


def test_what_is_set_for_a_tenant_goes_to_the_engine_with_each_of_its_turns_and_with_no_other(place: Path) -> None:
    (place / "state" / "holdfast.toml").write_text(TOML)
    with _started(place) as served:
        leases = []
        for key, stream in (
            (served.api_key, False),
            (served.api_key, True),
            (served.new_key(tenant="a").secret, False),
        ):
            assert served.ask(api_key=key, stream=stream).status == 200
            leases.append(served.engine_seen()["bodies"][-1]["kv_transfer_params"]["holdfast"])
        told = [(each["strict"], each["idle_timeout_s"], each["tenant_share"], each["tenant_cap"]) for each in leases]
        assert told == [(True, 7.0, 0.25, 0.5), (True, 7.0, 0.25, 0.5), (False, 15.0, 0.0, 1.0)]


def test_a_choice_of_isolation_is_recorded_with_who_chose_it_and_what_it_was_before(place: Path) -> None:
    with _started(place) as served:
        _told(served, "tenant", "isolation", "tenant", "tenant-prefix")
        (record,) = _records(served, "tenant.changed")
        (tenant,) = served.admin.tenants().tenants
        assert tenant.isolation == "tenant-prefix"
        assert record["target"] == {"kind": "tenant", "id": tenant.tenant_id}
        assert record["details"] == {"setting": "isolation", "old": "session", "new": "tenant-prefix"}
        assert record["actor"]["role"] == "admin"
        key = served.new_key()
        with pytest.raises(Refused, match="may not"):
            type(served.admin)(served.state_dir, api_key=key.secret).change_tenant(tenant.tenant_id, isolation="tenant")
        assert served.admin.tenants().tenants == [tenant]
        assert len(_records(served, "tenant.changed")) == 1
        assert _records(served, "admin.refused")


def test_nothing_is_proved_while_turns_run_and_that_is_recorded(tmp_path: Path) -> None:
    with serving(tmp_path, environment={"HOLDFAST_ENGINE__MAX_NUM_SEQS": "2"}) as served:
        asking = threading.Thread(target=served.ask, args=('@stub {"first_pause_s": 2}',))
        asking.start()
        until(lambda: served.admin.status().running_turns == 1)
        with pytest.raises(Refused) as refused:
            served.admin.prove_isolation(rounds=8)
        asking.join()
        assert refused.value.record()["code"] == "too_busy_to_prove"
        assert "1 turns run" in refused.value.cause
        (record,) = _records(served, "isolation.proved")
        assert (record["outcome"], record["reason"]) == ("failure", "too_busy_to_prove")
        assert [each.name for each in served.admin.tenants().tenants] == ["tenant"]


def test_what_a_proof_left_that_was_killed_is_removed_at_the_next_start_and_recorded(place: Path) -> None:
    tenant_id = _leave_a_throwaway(place / "state")
    with _started(place) as served:
        assert [each.name for each in served.admin.tenants().tenants] == ["tenant"]
        (record,) = _records(served, "tenant.removed")
        assert record["target"] == {"kind": "tenant", "id": tenant_id}
        assert record["actor"]["kind"] == "system"


def test_what_a_gateway_left_that_was_killed_while_it_shredded_is_done_at_the_next_start(place: Path) -> None:
    tenant_id = _shred_and_be_killed(place / "state")
    with _started(place) as served:
        until(lambda: bool(_records(served, "tenant.shredded")))
        (record,) = _records(served, "tenant.shredded")
        assert record["target"] == {"kind": "tenant", "id": tenant_id}
        assert (record["actor"]["id"], record["source"]) == ("prn_1", "uid=1000")
        until(lambda: _marks(served) == [])
    with _started(place) as served:
        assert len(_records(served, "tenant.shredded")) == 1


def _marks(served: Served) -> list[tuple[str]]:
    """Of tenants whose shredding is not finished."""
    with contextlib.closing(sqlite3.connect(served.state_dir / "holdfast.db")) as db:
        return db.execute("SELECT name FROM meta WHERE name LIKE 'shredded/%'").fetchall()


def _wrapping_keys(state_dir: Path) -> set[str]:
    """The ids of the keys that others are under now."""
    with contextlib.closing(sqlite3.connect(state_dir / "holdfast.db")) as db:
        return {key_id for (key_id,) in db.execute("SELECT DISTINCT parent_id FROM keys WHERE parent_id IS NOT NULL")}


def _read(served: Served, session_id: str) -> list[int]:
    """The numbers of the turns that its own principal reads of a session."""
    return [turn.number for turn in AdminClient(served.state_dir, api_key=served.api_key).transcript(session_id).turns]


def test_keys_are_rotated_while_it_serves_and_all_can_be_read_after_a_restart(place: Path) -> None:
    with _started(place) as served:
        assert served.ask(session="job").status == 200
        session_id = served.newest_session().session_id
        before = _wrapping_keys(served.state_dir)
        assert "keys of tenant (ten_" in _told(served, "key", "rotate", "--tenant", "tenant")
        assert "keys of the system are under a new key" in _told(served, "key", "rotate", "--system")
        assert not before & _wrapping_keys(served.state_dir)
        assert served.ask(session="job").status == 200
        assert _read(served, session_id) == [1, 2]
        (tenant,) = served.admin.tenants().tenants
        of_tenant, of_system = _records(served, "keys.rotated")
        assert of_tenant["target"] == {"kind": "keys", "id": tenant.tenant_id}
        assert of_tenant["details"] == {"keys": "5", "erased": "true"}  # the tenant's four, and the session's
        assert (of_tenant["tenant_id"], "tenant_id" in of_system) == (tenant.tenant_id, False)
        assert of_system["target"]["id"] == "system"
    with _started(place) as served:
        assert _read(served, session_id) == [1, 2]
        assert served.ask(session="job").status == 200


@pytest.mark.parametrize("words", [(), ("--system", "--tenant", "tenant")])
def test_whose_keys_are_rotated_has_to_be_said(served: Served, words: tuple[str, ...]) -> None:
    assert "say whose keys" in _told(served, "key", "rotate", *words)
    assert _records(served, "keys.rotated") == []


def test_keys_of_a_tenant_that_is_not_there_are_not_rotated(served: Served) -> None:
    with pytest.raises(Refused) as refused:
        served.admin.rotate_keys("nobody")
    assert refused.value.code == "admin_not_found"


def _key(served: Served, tenant: str, role: str) -> str:
    return served.admin.create_key(tenant=tenant, principal=f"the {role}", role=role).secret


def _outside(served: Served, statement: str, *values: str) -> None:
    """Write into the database as somebody does who has none of its keys."""
    with contextlib.closing(sqlite3.connect(served.state_dir / "holdfast.db", isolation_level=None)) as db:
        db.execute(statement, values)


def _tenant_id(served: Served, name: str) -> str:
    return next(each.tenant_id for each in served.admin.tenants().tenants if each.name == name)


def _code(asked: Callable[..., object], *given: str, **named: str) -> str:
    with pytest.raises(Refused) as refused:
        asked(*given, **named)
    return refused.value.code


@pytest.mark.parametrize("role", ["admin", "operator", "auditor"])
def test_a_tenants_key_whose_tenant_was_removed_in_the_database_opens_nothing_of_anybodys(
    place: Path, role: str
) -> None:
    with _started(place) as served:
        served.ask("nobody else's business")
        session_id = served.newest_session().session_id
        theirs = served.new_key(tenant="tenant")
        served.admin.create_tenant("stranger")
        secret = _key(served, "stranger", role)
        stranger = AdminClient(served.state_dir, api_key=secret)
        _outside(served, "DELETE FROM tenants WHERE tenant_id = ?", _tenant_id(served, "stranger"))
        for asked, given in (
            (stranger.tenants, []),
            (stranger.keys, []),
            (stranger.sessions, []),
            (stranger.transcript, [session_id]),
            (stranger.forget, [session_id]),
            (stranger.revoke_key, [theirs.key.key_id]),
        ):
            assert _code(asked, *given) == "invalid_api_key"
        assert _code(stranger.create_key, tenant="tenant", principal="eve", role="auditor") == "invalid_api_key"
        assert served.ask("hello", api_key=secret).status == 401
        assert served.ask("hello", api_key=theirs.secret).status == 200


def test_a_damaged_row_of_another_tenants_is_in_nobodys_way_and_names_nobody(place: Path) -> None:
    with _started(place) as served:
        served.admin.create_tenant("other")
        other_id = _tenant_id(served, "other")
        others = served.admin.create_key(tenant="other", principal="agent")
        mine = AdminClient(served.state_dir, api_key=_key(served, "tenant", "admin"))
        _outside(served, "UPDATE tenants SET isolation = 'tenant' WHERE tenant_id = ?", other_id)
        _outside(served, "UPDATE api_keys SET expires_at = 1 WHERE key_id = ?", others.key.key_id)
        assert {key.tenant for key in mine.keys().keys} == {"tenant"}
        assert [tenant.name for tenant in mine.tenants().tenants] == ["tenant"]
        made = mine.create_key(principal="agent").key
        assert mine.revoke_key(made.key_id).revoked_at is not None
        assert mine.tenant("tenant").name == "tenant"
        for named in ("other", other_id, "nobody"):
            assert _code(mine.tenant, named) == "admin_not_found"
            assert _code(mine.keys, tenant=named) == "admin_not_found"
            assert _code(mine.sessions, tenant=named) == "admin_not_found"
        assert _code(mine.revoke_key, others.key.key_id) == "admin_not_found"
        assert served.admin.revoke_key(mine.create_key(principal="agent").key.key_id).revoked_at is not None
        listed = served.admin.tenants()
        assert [tenant.name for tenant in listed.tenants] == ["tenant"]
        assert [damaged.tenant_id for damaged in listed.damaged] == [other_id]
        assert f"in row {other_id} is refused" in listed.damaged[0].why
        assert _code(served.admin.tenant, other_id) == "value_tampered"


DAMAGES = {
    "a bound value": "UPDATE tenants SET isolation = 'tenant' WHERE tenant_id = ?",
    "its name": "UPDATE tenants SET name = x'00' WHERE tenant_id = ?",
    "a name of another type": "UPDATE tenants SET name = 'in plain text' WHERE tenant_id = ?",
    "a version that is none": "UPDATE tenants SET row_version = 'seven' WHERE tenant_id = ?",
    "a moment that is none": "UPDATE tenants SET created_at = 'never' WHERE tenant_id = ?",
    "how it is found": "UPDATE tenants SET name_lookup = x'00' WHERE tenant_id = ?",
    "its keys": "UPDATE keys SET wrapped = x'00' WHERE scope = ?",
    "the loss of its keys": "DELETE FROM keys WHERE scope = ?",
}


def test_a_tenant_whose_row_or_key_is_damaged_is_named_by_its_id_and_shredded(place: Path) -> None:
    with _started(place) as served:
        keys = {damage: served.new_key(tenant=damage, principal="agent") for damage in DAMAGES}
        assert [served.ask(api_key=key.secret, session="one").status for key in keys.values()] == [200] * len(keys)
        ids = {damage: str(key.key.tenant_id) for damage, key in keys.items()}
        wrapped = [each for tenant_id in ids.values() for each in _wrapped_keys(served, tenant_id)]
    for damage, statement in DAMAGES.items():
        _outside(served, statement, ids[damage])
    with _started(place) as served:
        assert {each.tenant_id for each in served.admin.tenants().damaged} == set(ids.values())
        listed = _told(served, "tenant", "list")
        assert all(f"DAMAGED: {tenant_id}: " in listed for tenant_id in ids.values())
        for damage, tenant_id in ids.items():
            assert served.ask(api_key=keys[damage].secret).status >= 400, damage
            refused = _told(served, "tenant", "shred", tenant_id, "--yes", damage)
            assert f"the name given is not {tenant_id}" in refused
            told = _succeeds(served, "tenant", "shred", tenant_id, "--yes", tenant_id)
            assert f"Shredded {tenant_id}: its keys are destroyed" in told
            record = _records(served, "tenant.shredded")[-1]
            assert record["target"] == {"kind": "tenant", "id": tenant_id}
            assert record["counts"] == {"sessions": 1, "turns": 1}
            code = "key_missing" if damage == "the loss of its keys" else "value_tampered"
            assert record["details"] == {"erased": "true", "row": code}, damage
            assert _code(served.admin.shred_tenant, tenant_id) == "admin_not_found"
        listed_now = served.admin.tenants()
        assert ([each.name for each in listed_now.tenants], listed_now.damaged) == (["tenant"], [])
        files = _database_files(served)
        assert [each for each in wrapped if each in files] == []
        assert served.ask("hello").status == 200
        _succeeds(served, "audit", "verify")


def test_who_may_not_shred_a_tenant_may_not_shred_a_damaged_one_and_no_id_is_no_tenant(place: Path) -> None:
    with _started(place) as served:
        theirs = AdminClient(served.state_dir, api_key=_key(served, "tenant", "admin"))
        served.admin.create_tenant("other")
        other_id = _tenant_id(served, "other")
        _outside(served, "UPDATE tenants SET name = x'00' WHERE tenant_id = ?", other_id)
        assert _code(theirs.shred_tenant, other_id) == "admin_denied"
        assert theirs.tenants().damaged == []
        assert _code(served.admin.shred_tenant, "ten_nobody") == "admin_not_found"
        assert _code(served.admin.shred_tenant, "other") == "value_tampered", "by its id, which the record names it by"
        assert [each.tenant_id for each in served.admin.tenants().damaged] == [other_id]


def _wrapped_keys(served: Served, tenant_id: str) -> list[bytes]:
    """A tenant's wrapped keys and its sessions', as the database has them."""
    own = "SELECT wrapped FROM keys WHERE scope = ?1 OR scope IN (SELECT session_id FROM sessions WHERE tenant_id = ?1)"
    with contextlib.closing(sqlite3.connect(served.state_dir / "holdfast.db")) as db:
        return [wrapped for (wrapped,) in db.execute(own, (tenant_id,))]


def _database_files(served: Served) -> bytes:
    return b"".join(path.read_bytes() for path in served.state_dir.glob("holdfast.db*"))


def _succeeds(served: Served, *arguments: str) -> str:
    said = CliRunner().invoke(holdfast, ["--state-dir", str(served.state_dir), *arguments], catch_exceptions=False)
    assert said.exit_code == 0, said.output
    return said.output


def _assert_shredded(served: Served, tenant_id: str, sequences: list[int], turns: int) -> None:
    """The log verifies; what it has of the tenant is withheld, and that it was shredded can be read."""
    _succeeds(served, "audit", "verify")
    (shredded,) = _records(served, "tenant.shredded")
    assert shredded["target"] == {"kind": "tenant", "id": tenant_id}
    assert shredded["counts"] == {"sessions": 1, "turns": turns}
    assert shredded["details"] == {"erased": "true"}
    assert (shredded["actor"]["kind"], shredded["actor"]["role"]) == ("principal", "admin")
    found = {each.sequence: each for each in served.admin.audit_entries(limit=1000, action="turn.*").entries}
    assert sequences
    for sequence in sequences:
        assert found[sequence].record is None, "it is there, and nobody can read it"
    assert all("withheld" not in str(each) for each in _records(served, "tenant.*"))


def test_a_tenant_that_was_shredded_is_gone_and_the_log_says_so(place: Path) -> None:
    with _started(place) as served:
        key = served.new_key(tenant="doomed", principal="agent")
        tenant_id = _tenant_id(served, "doomed")
        _told(served, "tenant", "set", "doomed", "--audit-digests", "on")
        assert served.ask("hello", api_key=key.secret, session="one").status == 200
        assert served.ask("again", api_key=key.secret, session="one").status == 200
        assert served.ask("hello", session="kept").status == 200
        of_turns = served.admin.audit_entries(limit=1000, action="turn.*").entries
        theirs = [each.sequence for each in of_turns if each.record and each.record["tenant_id"] == tenant_id]
        wrapped = _wrapped_keys(served, tenant_id)
        assert len(wrapped) == 6
        assert all(each in _database_files(served) for each in wrapped)
        assert "the name given is not doomed" in _told(served, "tenant", "shred", "doomed", "--yes", "tenant")
        assert served.ask("hello", api_key=key.secret, session="one").status == 200
        assert _code(
            AdminClient(served.state_dir, api_key=_key(served, "doomed", "admin")).shred_tenant, tenant_id
        ) == ("admin_denied")
        said = json.loads(_succeeds(served, "--json", "tenant", "shred", "doomed", "--yes", "doomed"))
        assert said["tenant_id"] == tenant_id
        assert (said["erased"], said["leases_released"]) == (True, True)
        files = _database_files(served)
        assert [each for each in wrapped if each in files] == []
        refused = served.ask("hello", api_key=key.secret, session="one")
        assert (refused.status, refused.code) == (401, "invalid_api_key")
        assert [each.name for each in served.admin.tenants().tenants] == ["tenant"]
        assert [each.turns for each in served.admin.sessions().sessions] == [1]
        assert _code(served.admin.shred_tenant, tenant_id) == "admin_not_found"
        assert _code(served.admin.audit_digest, tenant=tenant_id, text="prompt", sha256="0" * 64) == "admin_not_found"
        _assert_shredded(served, tenant_id, theirs, turns=3)
        again = served.new_key(tenant="doomed", principal="agent")
        assert again.key.tenant_id != tenant_id
        assert served.ask("hello", api_key=again.secret, session="one").status == 200
    with _started(place) as served:
        _assert_shredded(served, tenant_id, theirs, turns=3)
        exported = place / "exported.jsonl"
        _succeeds(served, "audit", "export", "file", str(exported))
        vkey = json.loads(_succeeds(served, "--json", "audit", "status"))["public_key"]
        told = _succeeds(served, "audit", "verify-export", str(exported), "--key", vkey, "--allow-withheld")
        assert "(shredded)" in told
