"""What happens to acknowledged writes, and to whoever waits, when something breaks. Each fault is caused for real."""

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, bindparam, delete, exc, insert, select, text

from appliance.store import (
    Change,
    DatabaseKeys,
    Erasures,
    Store,
    StoreFull,
    StoreUnavailable,
    checkpoints,
    connections,
    key_changes,
    tables,
)
from appliance.store import store as store_module
from appliance.store.errors import meaning
from appliance.vault import Vault
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
    monkeypatch.setattr(checkpoints, "_OVERDUE_BYTES", 1 << 20)
    path = tmp_path / "holdfast.db"
    store = Store.open(f"sqlite:///{path}")
    longest = 0
    for start in range(0, 640, 8):
        await asyncio.gather(*(store.write([named(str(start + n), "x" * 4000)]) for n in range(8)))
        longest = max(longest, (tmp_path / "holdfast.db-wal").stat().st_size)
    written = 640 * 4096  # and three times that went through the log
    assert longest < written / 2
    assert path.stat().st_size > written / 2
    assert len(await store.read(names)) == 640
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
        query = text("SELECT oid FROM pg_database WHERE datname = current_database()")
        folder = postgres.data / "base" / str(store.read_blocking(lambda db: db.execute(query).scalar_one()))
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


async def test_a_deleted_key_is_in_no_file_after_erasing(
    store: Store, vault: Vault, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    postgres = request.getfixturevalue("postgres") if store.dialect == "postgresql" else None
    records = [vault.new_session_key("ten_1", f"ses_{number}") for number in range(120)]
    await asyncio.gather(*(store.write(key_changes([record])) for record in records))
    before = await asyncio.to_thread(bytes_on_disk, store, tmp_path, postgres)
    assert all(record.wrapped in before for record in records)

    kept, shredded = records[::3], [*records[1::3], *records[2::3]]
    drop = delete(tables.keys).where(tables.keys.c.key_id == bindparam("b_id"))
    await asyncio.gather(*(store.write([Change(drop, {"b_id": record.key_id})]) for record in shredded))
    await store.erase()

    after = await asyncio.to_thread(bytes_on_disk, store, tmp_path, postgres)
    assert [record.key_id for record in shredded if record.wrapped in after] == []
    assert all(record.wrapped in after for record in kept)
    keys = DatabaseKeys(store)
    assert [keys.load(record.key_id) for record in kept] == kept


async def test_a_stale_copy_of_a_key_that_a_rearranged_page_kept_is_gone_too(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path / 'holdfast.db'}")
    chance = random.Random(99)  # noqa: S311 (a churn that is the same every time)
    living: dict[str, bytes] = {}
    dead: list[bytes] = []
    for added in (400, *[60] * 60):
        await store.transact(partial(churn, chance=chance, living=living, dead=dead, added=added))
        await store._alone(lambda _: cut_log(store))
        before = await asyncio.to_thread(bytes_on_disk, store, tmp_path, None)
        if any(secret in before for secret in dead):
            break
    else:
        pytest.fail("zeroing what is deleted leaves no copy any more: rewriting the keys has become needless")
    await store.erase()
    after = await asyncio.to_thread(bytes_on_disk, store, tmp_path, None)
    assert [secret for secret in dead if secret in after] == []
    assert all(secret in after for secret in living.values())
    store.close()


def cut_log(store: Store) -> None:
    assert store._checkpoints is not None
    assert store._checkpoints.cut()


def churn(db: Connection, *, chance: random.Random, living: dict[str, bytes], dead: list[bytes], added: int) -> None:
    """Add, grow and delete keys in random order."""
    keys = tables.keys
    for _ in range(added):
        secret = chance.randbytes(40)
        row: dict[str, object] = {"key_id": f"key_{chance.randbytes(16).hex()}", "scope": chance.randbytes(18).hex()}
        row |= {"purpose": "session", "parent_id": None, "version": 1, "wrapped": secret, "uses_reserved": 1}
        row |= {"root_id": "root", "created_at": 0.0, "retired": False}
        db.execute(insert(keys), row)
        living[str(row["key_id"])] = secret
    for key_id in chance.sample(sorted(living), len(living)):
        drawn = chance.random()
        if drawn < 0.3:
            uses = 1 << chance.choice((1, 15, 40))
            db.execute(keys.update().where(keys.c.key_id == key_id).values(uses_reserved=uses))
        elif drawn < 0.5:
            db.execute(delete(keys).where(keys.c.key_id == key_id))
            dead.append(living.pop(key_id))


@contextmanager
def reading_keys(store: Store) -> "Iterator[None]":
    """Within it a read that lasts, as a backup does, has seen the table of keys."""
    reading, let_go = threading.Event(), threading.Event()

    def slow(db: Connection) -> None:
        db.execute(select(tables.keys)).all()
        reading.set()
        assert let_go.wait(60)

    thread = threading.Thread(target=store.read_blocking, args=(slow,))
    thread.start()
    try:
        assert reading.wait(10)
        yield
    finally:
        let_go.set()
        thread.join()


async def test_erasing_says_so_when_a_read_holds_what_was_deleted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_ERASE_PAUSE_S", 0)
    await store.write([named("a")])
    with reading_keys(store), pytest.raises(StoreUnavailable, match="may still be on the disk"):
        await store.erase()
    await store.erase()


async def test_the_log_is_cut_to_nothing_when_the_read_that_held_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_ERASE_PAUSE_S", 0)
    store = Store.open(f"sqlite:///{tmp_path / 'holdfast.db'}")
    await store.write([named("a")])
    with reading_keys(store), pytest.raises(StoreUnavailable):
        await store.erase()
    await store.erase()
    assert (tmp_path / "holdfast.db-wal").stat().st_size == 0
    store.close()


async def test_those_who_wait_for_an_erasure_that_is_held_up_write_the_keys_anew_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_ERASE_PAUSE_S", 0)
    how: list[bool] = []
    erase = store.erase

    async def watched(*, is_rewritten: bool) -> None:
        how.append(is_rewritten)
        await erase(is_rewritten=is_rewritten)

    monkeypatch.setattr(store, "erase", watched)
    await store.write([Erasures.due()])
    with reading_keys(store):
        assert await asyncio.gather(*(store.erasures.erase() for _ in range(5))) == [False] * 5
        assert not await store.erasures.erase()
    assert await asyncio.gather(*(store.erasures.erase() for _ in range(5))) == [True] * 5
    assert how == [False, True, True]


async def test_commits_go_on_while_erasing_waits_for_a_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_ERASE_PAUSE_S", 3600)
    with reading_keys(store):
        erasing = asyncio.create_task(store.erase())
        await asyncio.sleep(0)  # it is in the writer's queue
        await store.write([named("a")])
        await store.write([named("b")])
        assert not erasing.done()
        erasing.cancel()
    assert {"a", "b"} <= await store.read(names)
