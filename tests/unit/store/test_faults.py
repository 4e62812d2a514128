"""What happens to acknowledged writes, and to whoever waits, when something breaks. Each fault is caused for real."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, bindparam, delete, exc, insert, select, text

from appliance.store import (
    Change,
    DatabaseKeys,
    RowCipher,
    Store,
    StoreFull,
    StoreUnavailable,
    checkpoints,
    connections,
    key_changes,
    tables,
)
from appliance.store.errors import meaning
from appliance.vault import KeyPurpose, Vault
from tests.postgres import PostgresServer

INSERT = insert(tables.meta)
CHILD = Path(__file__).with_name("child.py")


def named(name: str, value: str = "") -> Change:
    return Change(INSERT, {"name": name, "value": value})


def names(db: Connection) -> set[str]:
    return set(db.execute(select(tables.meta.c.name)).scalars())


@contextmanager
def child(*arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """A process of tests/unit/store/child.py, ended with the context."""
    process = subprocess.Popen(
        [sys.executable, str(CHILD), *arguments], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Killed


@pytest.mark.parametrize("acknowledgements", [1, 60, 300])
def test_what_was_acknowledged_before_a_kill_is_there_and_nothing_is_half_written(
    database_url: str, acknowledgements: int
) -> None:
    Store.open(database_url).close()
    with child("write-pairs", database_url) as process:
        acknowledged = {line_of(process) for _ in range(acknowledgements)}
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split() if process.stdout is not None else []
        acknowledged |= {name for name in rest if len(name) == 32}
    assert process.returncode == -signal.SIGKILL
    store = Store.open(database_url)
    there = store.read_blocking(names)
    store.close()
    assert len(acknowledged) >= acknowledgements
    assert acknowledged <= {name[:-2] for name in there}
    halves: dict[str, int] = {}
    for name in there:
        halves[name[:-2]] = halves.get(name[:-2], 0) + 1
    assert set(halves.values()) == {2}


# Full


def test_a_full_disk_fails_every_waiting_write_by_name_and_writing_goes_on_when_there_is_room() -> None:
    with child("fill-disk") as process:
        said, _ = process.communicate(timeout=60)
    report: dict[str, Any] = json.loads(said)
    assert set(report["failures"]) == {"store_full"}, report
    assert report["failed_together"] == 8
    assert report["named_path"]
    assert report["lost"] == []
    assert report["half_written"] == []
    assert report["written_after"]
    assert report["readable_meanwhile"]


async def test_a_server_without_room_is_named(postgres: PostgresServer) -> None:
    with postgres.database() as url:
        store = Store.open(url)
        await store.transact(
            lambda db: db.execute(
                text(
                    "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS "
                    "$$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$"
                )
            )
        )
        await store.transact(
            lambda db: db.execute(
                text("CREATE TRIGGER no_room BEFORE INSERT ON meta FOR EACH ROW EXECUTE FUNCTION no_room()")
            )
        )
        outcomes = await asyncio.gather(*(store.write([named(str(n))]) for n in range(4)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {StoreFull}
        await store.transact(lambda db: db.execute(text("DROP TRIGGER no_room ON meta")))
        await store.write([named("after")])
        assert await store.read(names) == {"after"}
        store.close()


# Others


def test_a_file_that_another_process_has_open_is_refused_and_the_process_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'holdfast.db'}"
    store = Store.open(url)
    with child("open", url) as process:
        said, _ = process.communicate(timeout=60)
    assert said.split() == ["store_in_use", str(os.getpid())]
    store.close()
    with child("open", url) as process:
        said, _ = process.communicate(timeout=60)
    assert said.split() == ["opened"]


async def test_a_write_waits_for_a_foreign_one_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_LOCK_WAIT_S", 0.05)
    path = tmp_path / "holdfast.db"
    store = Store.open(f"sqlite:///{path}")
    intruder = sqlite3.connect(path, isolation_level=None)
    intruder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        await store.write([named("a")])
    intruder.execute("ROLLBACK")
    intruder.close()
    await store.write([named("b")])
    assert await store.read(names) == {"b"}
    store.close()


async def test_two_stores_of_one_server_write_side_by_side(postgres: PostgresServer) -> None:
    with postgres.database() as url:
        one, other = Store.open(url), Store.open(url)
        await asyncio.gather(
            *(store.write([named(f"{at}-{number}")]) for at, store in enumerate((one, other)) for number in range(20))
        )
        assert len(await one.read(names)) == 40
        one.close()
        other.close()


async def test_a_server_that_dropped_its_connections_is_connected_to_again(postgres: PostgresServer) -> None:
    with postgres.database() as url:
        store = Store.open(url)
        await store.write([named("before")])
        assert await store.read(names) == {"before"}
        postgres.administer(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'holdfast'"
        )
        await store.write([named("after")])
        assert await store.read(names) == {"before", "after"}
        store.close()


async def test_a_connection_that_is_lost_in_a_write_fails_it_and_the_next_one_is_served(
    postgres: PostgresServer,
) -> None:
    with postgres.database() as url:
        store = Store.open(url)

        def cut(db: Connection) -> None:
            db.execute(INSERT, {"name": "lost", "value": ""})
            pid = db.execute(text("SELECT pg_backend_pid()")).scalar_one()
            postgres.administer(f"SELECT pg_terminate_backend({pid})")
            db.execute(select(tables.meta))

        with pytest.raises(StoreUnavailable):
            await store.transact(cut)
        await store.write([named("next")])
        assert await store.read(names) == {"next"}
        store.close()


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        Store.open(f"postgresql://postgres@/x?host={tmp_path}")


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"nowhere/holdfast\.db"):
        Store.open(f"sqlite:///{tmp_path / 'nowhere' / 'holdfast.db'}")


def test_the_meaning_of_an_error_that_no_database_raised_is_itself() -> None:
    error = LookupError("x")
    assert meaning(error, "here", None) is error
    full = exc.OperationalError("INSERT", {}, psycopg.errors.DiskFull("no room"))
    assert isinstance(meaning(full, "here", None), StoreFull)


# The write-ahead log


async def test_the_log_is_copied_back_while_commits_go_on_and_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_EVERY_CHANGE_SETS", 10)
    monkeypatch.setattr(checkpoints, "_OVERDUE_FRAMES", 200)
    path = tmp_path / "holdfast.db"
    store = Store.open(f"sqlite:///{path}")
    for start in range(0, 1600, 8):
        await asyncio.gather(*(store.write([named(str(start + n), "x" * 4000)]) for n in range(8)))
    written = 1600 * 4096  # and three times that went through the log
    assert (tmp_path / "holdfast.db-wal").stat().st_size < written
    assert path.stat().st_size > written / 2
    assert len(await store.read(names)) == 1600
    store.close()


async def test_a_read_that_lasts_sees_one_moment_and_does_not_stop_writes(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path / 'holdfast.db'}")
    await store.write([named("before")])
    reading, let_go = threading.Event(), threading.Event()

    def slow(db: Connection) -> tuple[set[str], set[str]]:
        first = names(db)
        reading.set()
        assert let_go.wait(10)
        return first, names(db)

    task = asyncio.create_task(store.read(slow))
    assert await asyncio.to_thread(reading.wait, 10)
    await store.write([named("after")])
    let_go.set()
    assert await task == ({"before"}, {"before"})
    assert await store.read(names) == {"before", "after"}
    store.close()


# Deleted


def bytes_on_disk(store: Store, folder: Path, postgres: PostgresServer | None) -> bytes:
    """Everything that is in files of the database now."""
    if postgres is not None:
        postgres.administer("CHECKPOINT")
        folder = postgres.data / "base"
    assert store.place
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


async def test_a_deleted_key_is_in_no_file_after_erasing(
    store: Store, vault: Vault, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    postgres = request.getfixturevalue("postgres") if store.dialect == "postgresql" else None
    records = [vault.new_session_key("ten_1", f"ses_{number}") for number in range(400)]
    cipher = RowCipher(vault)
    rows = []
    for record in records:
        row: dict[str, object] = {"session_id": record.scope, "tenant_id": "ten_1", "client_id": "words" * 40}
        row |= {"principal_id": "prn_1", "tree_id": "tre_1", "epoch": 0, "model": "m", "origin": "new", "turns": 0}
        row |= {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "row_version": 1}
        row |= {"created_at": 0.0, "last_used_at": 0.0}
        rows.append(cipher.seal(tables.sessions, row, scope=record.scope, purpose=KeyPurpose.SESSION))
    inserted = insert(tables.sessions)
    # In an order that splits pages, so that stale copies of rows are left behind.
    order = sorted(range(400), key=lambda number: number * 7919 % 400)
    for start in range(0, 400, 20):
        sets = ([*key_changes([records[at]]), Change(inserted, rows[at])] for at in order[start : start + 20])
        await asyncio.gather(*(store.write(changes) for changes in sets))
    for record in records[::20]:
        DatabaseKeys(store).reserve_uses(record.key_id, 1 << 30)
    before = await asyncio.to_thread(bytes_on_disk, store, tmp_path, postgres)
    assert all(record.wrapped in before for record in records)

    shredded = [record for number, record in enumerate(records) if number % 3]
    drop_key = delete(tables.keys).where(tables.keys.c.key_id == bindparam("b_id"))
    drop_session = delete(tables.sessions).where(tables.sessions.c.session_id == bindparam("b_id"))
    for start in range(0, len(shredded), 20):
        await asyncio.gather(
            *(
                store.write([Change(drop_session, {"b_id": it.scope}), Change(drop_key, {"b_id": it.key_id})])
                for it in shredded[start : start + 20]
            )
        )
    await store.erase()

    after = await asyncio.to_thread(bytes_on_disk, store, tmp_path, postgres)
    assert [record.key_id for record in shredded if record.wrapped in after] == []
    assert [record.key_id for record in shredded if record.wrapped[:16] in after] == []
    kept = [record for number, record in enumerate(records) if not number % 3]
    assert [DatabaseKeys(store).load(record.key_id) is not None for record in kept] == [True] * len(kept)
    assert all(record.wrapped in after for record in kept)


async def test_erasing_says_so_when_a_read_holds_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_WAIT_S", 0.05)
    store = Store.open(f"sqlite:///{tmp_path / 'holdfast.db'}")
    await store.write([named("a")])
    reading, let_go = threading.Event(), threading.Event()

    def slow(db: Connection) -> None:
        names(db)
        reading.set()
        assert let_go.wait(10)

    task = asyncio.create_task(store.read(slow))
    assert await asyncio.to_thread(reading.wait, 10)
    with pytest.raises(StoreUnavailable, match="may still be on the disk"):
        await store.erase()
    let_go.set()
    await task
    await store.erase()
    assert (tmp_path / "holdfast.db-wal").stat().st_size == 0
    store.close()
