"""A gateway removes what is older than its retention, and says what it removed, and by whose word."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.admin.client import Refused
from api.roots import open_root
from appliance.audit.entry import seal
from appliance.audit.events import ADMIN_ACTED, SYSTEM, Event
from appliance.audit.log import AuditLog, Head, Stamp
from appliance.audit.notes import Checkpoint, VerifierKey, sign_checkpoint
from appliance.audit.signing import signing_key
from appliance.audit.verify import Verified, verify_log
from appliance.store import DatabaseKeys, Store
from appliance.vault import SYSTEM_SCOPE, Vault
from benchmarks.running import make_appliance, running_gateway, running_stub
from tests.e2e.api.conftest import Served, until
from tests.e2e.cli.test_audit_commands import run_holdfast

DAYS = 500
ENTRIES = 24 * 256
DUE = 5 * 256  # what is older than 400 days of it: the last 64 entries of the fifth bundle are 401 days old
OVERRIDE = {
    "HOLDFAST_AUDIT__RETENTION_DAYS": "100",
    "HOLDFAST_AUDIT__RETENTION_OVERRIDE": '{ by = "D. Officer", reason = "nobody here is high-risk" }',
}


def _make_old_log(state_dir: Path) -> None:
    """The log of an appliance that ran for 500 days until an hour ago, on one boot."""
    store = Store.open(f"sqlite:///{state_dir / 'holdfast.db'}")
    vault = Vault(DatabaseKeys(store))
    vault.open(open_root(state_dir, b""))
    key = signing_key(state_dir / "audit", vault)
    now_ns = time.time_ns() - 3600 * 1_000_000_000
    began_ns = now_ns - DAYS * 86_400 * 1_000_000_000
    taken = 0

    def clock() -> Stamp:
        lived_ns = (now_ns - began_ns) * taken // ENTRIES
        return Stamp(began_ns + lived_ns, 1_000_000_000 + lived_ns)

    log = AuditLog.open(state_dir / "audit", boot_id=b"o" * 16, clock=clock)
    while taken < ENTRIES:
        drafts = [
            seal(
                ADMIN_ACTED.number,
                Event(ADMIN_ACTED, SYSTEM, target=("number", str(taken + number))).record({}),
                keys=vault,
                scope=SYSTEM_SCOPE,
                actor="",
                session="",
                random=(taken + number).to_bytes(32, "big"),
            )
            for number in range(64)
        ]
        log.append(drafts)
        taken += len(drafts)
    log.publish(lambda head: _signed(head, key))
    log.close()
    vault.seal()
    store.close()


def _signed(head: Head, key: Any) -> str:
    return sign_checkpoint(Checkpoint(key.name, head.size, head.root), key)


@pytest.fixture
def old(tmp_path: Path) -> Iterator["_Old"]:
    state_dir, engine = tmp_path / "state", tmp_path / "engine.sock"
    api_key = make_appliance(state_dir)
    _make_old_log(state_dir)
    with running_stub(engine):
        yield _Old(state_dir, engine, api_key)


class _Old:
    """An appliance with an old log, to be started."""

    def __init__(self, state_dir: Path, engine: Path, api_key: str) -> None:
        self.state_dir = state_dir
        self._engine = engine
        self._api_key = api_key

    @contextlib.contextmanager
    def served(self, **environment: str) -> Iterator[Served]:
        with running_gateway(self.state_dir, self._engine, environment=environment) as gateway:
            yield Served(self.state_dir, self._engine, gateway, self._api_key)

    def verified(self) -> Verified:
        key = VerifierKey.parse((self.state_dir / "audit/log.vkey").read_text().strip())
        return verify_log(self.state_dir / "audit", key)


def _oldest(served: Served) -> int:
    return served.admin.audit_status().oldest_kept or 0


def _is_free(lock: Path) -> bool:
    """Whether the appender, which outlives its gateway for a moment, has gone."""
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_start_removes_what_is_old_and_tells(old: _Old) -> None:
    with old.served() as served:
        until(lambda: _oldest(served) > 0)
        status = served.admin.audit_status()
        assert status.oldest_kept == DUE
        assert status.oldest_kept_time_s is not None
        assert 395 * 86_400 < time.time() - status.oldest_kept_time_s < 400 * 86_400
        assert (status.retention_days, status.retention_overridden, status.alarm) == (400, False, None)
        (told,) = served.admin.audit_entries(action="log.entries_removed").entries
        assert told.record is not None
        assert told.record["counts"]["last"] == DUE - 1
        assert served.admin.audit_entry(DUE).record is not None
        with pytest.raises(Refused) as gone:
            served.admin.audit_entry(DUE - 1)
        assert gone.value.code == "audit_entry_removed"
        with pytest.raises(Refused, match="not in the audit log any more"):
            served.admin.audit_entries(before=1000)
        page = served.admin.audit_entries(before=DUE + 6)
        assert (len(page.entries), page.oldest_kept) == (6, DUE)
        shown = run_holdfast(served, "audit", "show", "0")
        assert shown.returncode != 0
        assert "removed" in shown.stderr
        listed = run_holdfast(served, "audit", "search", "--before", f"{DUE + 6}").stdout
        assert f"The entries before {DUE} were removed" in listed
        assert "400 days" in run_holdfast(served, "audit", "status").stdout
        proof = run_holdfast(served, "audit", "prove", f"{DUE}", "--output", str(old.state_dir / "proof"))
        assert proof.returncode == 0, proof.stderr
        assert run_holdfast(served, "audit", "verify-proof", str(old.state_dir / "proof")).returncode == 0
        verified = run_holdfast(served, "audit", "verify").stdout
        assert f"{DUE} entries were removed by retention (400 days)" in verified
        assert served.ask("hello").status == 200
    whole = old.verified()
    assert whole.removed is not None
    assert (whole.removed.kept_from, whole.removed.missing) == (DUE, 0)
    with old.served() as served:
        until(lambda: served.admin.audit_status().oldest_kept == DUE)
        part = next(part for part in served.admin.status().parts if part.name == "audit")
        assert part.state == "ready", part.detail


def test_less_than_six_months_is_recorded_with_whose_word_it_is_before_it_acts(old: _Old) -> None:
    with old.served(**OVERRIDE) as served:
        until(lambda: _oldest(served) > 0)
        assert served.admin.audit_status().retention_overridden
        assert "under six months" in run_holdfast(served, "audit", "status").stdout
        (said,) = served.admin.audit_entries(action="retention.overridden").entries
        (removed,) = served.admin.audit_entries(action="log.entries_removed").entries
        assert said.sequence < removed.sequence
        assert said.record is not None
        assert said.record["details"] == {"by": "D. Officer", "why": "nobody here is high-risk"}
        assert said.record["counts"] == {"retention_days": 100}
        assert said.record["actor"]["kind"] == "user"
        assert _oldest(served) == 6 * 256, "a quarter of what there is, and not all that is old"


def test_a_gateway_killed_while_it_removes_goes_on(old: _Old) -> None:
    folder = old.state_dir / "audit/record"
    with old.served() as served:
        until(lambda: not (folder / "000").exists())
        served.gateway.process.kill()
        served.gateway.process.wait()
    until(lambda: _is_free(old.state_dir / "audit/lock"))
    assert old.verified().removed is not None
    with old.served() as served:
        until(lambda: _oldest(served) == DUE)
        alarm = served.admin.audit_status().alarm
        assert alarm is None or "have no mark" in alarm  # it may have been killed before this log's first one
        assert not served.admin.audit_entries(action="log.entries_missing").entries
    assert old.verified().removed is not None


def test_an_old_bundle_that_somebody_deleted_is_told_and_is_no_retention(old: _Old) -> None:
    for folder in ("record", "tile/entries"):
        (old.state_dir / "audit" / folder / "000").unlink()
    with old.served(HOLDFAST_AUDIT__RETENTION_DAYS="600") as served:
        until(lambda: "from 0 to 255" in (served.admin.audit_status().alarm or ""))
        part = next(part for part in served.admin.status().parts if part.name == "audit")
        assert (part.state, "from 0 to 255" in part.detail) == ("degraded", True)
        assert len(served.admin.audit_entries(action="log.entries_missing").entries) == 1
        done = run_holdfast(served, "audit", "verify")
        assert done.returncode == 6
        assert "entry 0 is missing" in done.stderr
