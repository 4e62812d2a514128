"""Reading and writing, on both kinds of database."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
from sqlalchemy import Connection, delete, insert, select, text

from appliance.store import (
    BackupFailed,
    BackupUnsupported,
    Change,
    Store,
    StoreBusy,
    StoreConflict,
    StoreDefect,
    StoreUnavailable,
    tables,
)
from appliance.store import (
    store as store_module,
)
from appliance.store.writer import Writer
from tests.postgres import PostgresServer

INSERT = insert(tables.meta)
DELETE_ALL = delete(tables.meta)


def named(name: str, value: str = "") -> Change:
    return Change(INSERT, {"name": name, "value": value})


def names(db: Connection) -> list[str]:
    return list(db.execute(select(tables.meta.c.name).order_by(tables.meta.c.name)).scalars())


class Gate:
    """Work that holds the writer's thread until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def __call__(self, db: Connection) -> None:
        self.entered.set()
        assert self.let_go.wait(10)


async def held(store: Store) -> tuple[Gate, "asyncio.Task[None]"]:
    gate = Gate()
    task = asyncio.create_task(store.transact(gate))
    assert await asyncio.to_thread(gate.entered.wait, 10)
    return gate, task


async def test_a_write_is_there_for_the_next_read(store: Store) -> None:
    await store.write([named("a", "1"), named("b", "2")])
    assert await store.read(names) == ["a", "b"]


async def test_a_commit_on_sqlite_waits_until_its_log_is_on_the_disk(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path / 'new.db'}")
    pragmas = ("journal_mode", "synchronous")
    try:
        set_to = await store.transact(lambda db: [db.execute(text(f"PRAGMA {each}")).scalar() for each in pragmas])
    finally:
        store.close()
    assert set_to == ["wal", 2]  # FULL: the log is synced at every commit, not at checkpoints only


async def test_a_commit_on_postgresql_waits_for_the_disk_whatever_the_database_is_set_to(
    postgres: PostgresServer,
) -> None:
    with postgres.database() as url:
        store = Store.open(url)
        database = await store.read(lambda db: db.execute(text("SELECT current_database()")).scalar())
        await store.transact(lambda db: db.execute(text(f'ALTER DATABASE "{database}" SET synchronous_commit = off')))
        store.close()
        store = Store.open(url)
        try:
            assert await store.transact(lambda db: db.execute(text("SHOW synchronous_commit")).scalar()) == "on"
        finally:
            store.close()


async def test_a_write_outlives_the_store(store: Store, database_url: str) -> None:
    await store.write([named("a")])
    store.close()
    again = Store.open(database_url)
    assert again.read_blocking(names) == ["a"]
    again.close()


async def test_a_change_set_is_written_whole_or_not_at_all(store: Store) -> None:
    await store.write([named("taken")])
    with pytest.raises(StoreConflict):
        await store.write([named("new"), named("taken")])
    assert await store.read(names) == ["taken"]


async def test_in_a_group_only_the_change_set_that_breaks_a_constraint_fails(store: Store) -> None:
    await store.write([named("taken")])
    gate, task = await held(store)
    writes = [asyncio.create_task(store.write([named(name)])) for name in ("a", "taken", "b", "c")]
    await asyncio.sleep(0)
    gate.let_go.set()
    outcomes = await asyncio.gather(task, *writes, return_exceptions=True)
    assert [type(outcome).__name__ for outcome in outcomes[1:]] == ["NoneType", "StoreConflict", "NoneType", "NoneType"]
    assert await store.read(names) == ["a", "b", "c", "taken"]


async def test_in_a_group_only_the_change_set_with_a_defect_fails(store: Store) -> None:
    gate, task = await held(store)
    writes = [
        asyncio.create_task(store.write([change]))
        for change in (named("a"), Change(INSERT, {"name": object(), "value": ""}), named("b"))
    ]
    await asyncio.sleep(0)
    gate.let_go.set()
    outcomes = await asyncio.gather(task, *writes, return_exceptions=True)
    assert outcomes[1] is None
    assert isinstance(outcomes[2], StoreDefect)
    assert outcomes[3] is None
    assert await store.read(names) == ["a", "b"]


async def test_what_waited_together_is_committed_together(store: Store) -> None:
    commits = 0
    execute = Writer._execute

    def counted(writer: Writer, together: list[object]) -> None:
        nonlocal commits
        commits += 1
        execute(writer, together)  # type: ignore[arg-type]

    gate, task = await held(store)
    writes = [asyncio.create_task(store.write([named(f"{number:03}")])) for number in range(200)]
    await asyncio.sleep(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "_execute", counted)
        gate.let_go.set()
        await asyncio.gather(task, *writes)
    assert commits == 1
    assert len(await store.read(names)) == 200


async def test_changes_keep_their_order_within_a_change_set_whatever_they_share_a_commit_with(store: Store) -> None:
    gate, task = await held(store)
    writes = [
        asyncio.create_task(store.write([named("first")])),
        asyncio.create_task(store.write([Change(DELETE_ALL, {}), named("after the deletion")])),
    ]
    await asyncio.sleep(0)
    gate.let_go.set()
    await asyncio.gather(task, *writes)
    assert "after the deletion" in await store.read(names)


async def test_rows_that_name_other_columns_lose_none_of_them(store: Store) -> None:
    insert_key = insert(tables.keys)
    row: dict[str, object] = {"scope": "system", "purpose": "records", "version": 1, "wrapped": b"w"}
    row |= {"uses_reserved": 0, "root_id": "root", "created_at": 0.0, "retired": False}
    gate, task = await held(store)
    writes = [
        asyncio.create_task(store.write([Change(insert_key, row | {"key_id": "top"})])),
        asyncio.create_task(store.write([Change(insert_key, row | {"key_id": "child", "parent_id": "top"})])),
    ]
    await asyncio.sleep(0)
    gate.let_go.set()
    await asyncio.gather(task, *writes)
    parents = select(tables.keys.c.key_id, tables.keys.c.parent_id)
    rows = await store.read(lambda db: {row.key_id: row.parent_id for row in db.execute(parents)})
    assert rows == {"top": None, "child": "top"}


async def test_a_transaction_returns_what_its_work_returns(store: Store) -> None:
    def work(db: Connection) -> list[str]:
        db.execute(INSERT, {"name": "a", "value": ""})
        return names(db)

    assert await store.transact(work) == ["a"]


async def test_a_transaction_whose_work_raises_leaves_nothing(store: Store) -> None:
    def work(db: Connection) -> None:
        db.execute(INSERT, {"name": "a", "value": ""})
        raise LookupError("not today")

    with pytest.raises(LookupError, match="not today"):
        await store.transact(work)
    assert await store.read(names) == []


async def test_what_runs_in_the_writer_may_not_wait_for_the_writer(store: Store) -> None:
    with pytest.raises(RuntimeError, match="must not wait"):
        await store.transact(lambda _: store.write_blocking([named("a")]))


async def test_a_read_cannot_write(store: Store) -> None:
    with pytest.raises(StoreUnavailable, match=r"(?i)read-?only"):
        await store.read(lambda db: db.execute(INSERT, {"name": "a", "value": ""}))
    assert await store.read(names) == []


async def test_a_write_that_nobody_waits_for_any_more_is_written_all_the_same(store: Store) -> None:
    gate, task = await held(store)
    write = asyncio.create_task(store.write([named("a")]))
    await asyncio.sleep(0)
    write.cancel()
    gate.let_go.set()
    await task
    await store.write([named("b")])
    assert await store.read(names) == ["a", "b"]


async def test_closing_writes_what_is_waiting(store: Store, database_url: str) -> None:
    gate, task = await held(store)
    write = asyncio.create_task(store.write([named("a")]))
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(store.close))
    gate.let_go.set()
    await asyncio.gather(task, write, closing)
    again = Store.open(database_url)
    assert again.read_blocking(names) == ["a"]
    again.close()


async def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.write([named("a")])
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.read(names)


async def test_what_waits_to_be_written_is_bounded(store: Store) -> None:
    gate, task = await held(store)
    store._writer._capacity = 3
    writes = [asyncio.create_task(store.write([named(f"{number}")])) for number in range(5)]
    await asyncio.sleep(0)
    gate.let_go.set()
    outcomes = await asyncio.gather(task, *writes, return_exceptions=True)
    assert sum(isinstance(outcome, StoreBusy) for outcome in outcomes) == 2
    assert len(await store.read(names)) == 3


async def test_what_waits_to_be_read_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_WAITING_READS", 1)
    reading, let_go = threading.Event(), threading.Event()

    def slow(_: Connection) -> None:
        reading.set()
        assert let_go.wait(10)

    first = asyncio.create_task(store.read(slow))
    assert await asyncio.to_thread(reading.wait, 10)
    with pytest.raises(StoreBusy):
        await store.read(names)
    let_go.set()
    await first
    assert await store.read(names) == []


async def test_no_error_holds_what_was_to_be_written(store: Store) -> None:
    await store.write([named("taken")])
    with pytest.raises(StoreConflict) as conflict:
        await store.write([named("taken", "words of a person")])
    with pytest.raises(StoreDefect) as defect:
        await store.write([Change(INSERT, {"name": "words of a person", "value": object()})])
    with pytest.raises(StoreDefect) as read:
        await store.read(lambda db: db.execute(text("SELECT :words FROM nowhere"), {"words": "words of a person"}))
    for error in (conflict, defect, read):
        assert "words of a person" not in f"{error.value!s} {error.value!r}"


async def test_a_backup_is_a_whole_database_of_that_moment(store: Store, database_url: str, tmp_path: Path) -> None:
    if store.dialect != "sqlite":
        with pytest.raises(BackupUnsupported, match="pg_dump"):
            await store.backup(tmp_path / "copy.db")
        return
    await store.write([named("before")])
    await store.backup(tmp_path / "copy.db")
    await store.write([named("after")])
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    copy = Store.open(f"sqlite:///{tmp_path / 'copy.db'}")
    assert copy.read_blocking(names) == ["before"]
    copy.close()


async def test_a_backup_replaces_nothing_and_leaves_nothing_half_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_text("precious")
    with pytest.raises(BackupFailed if store.dialect == "sqlite" else BackupUnsupported):
        await store.backup(tmp_path / "copy.db")
    assert (tmp_path / "copy.db").read_text() == "precious"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".copy")]  # noqa: PTH208 (async)


def test_only_a_file_is_exclusive(store: Store) -> None:
    assert store.exclusive == (store.dialect == "sqlite")


def test_the_password_of_a_server_is_in_no_message(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable) as error:
        Store.open(f"postgresql://someone:secret@/nowhere?host={tmp_path}")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "sqlite:///:memory:", "mysql://localhost/x"])
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        Store.open(url)


def test_the_files_of_a_database_are_for_their_owner_alone(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path / 'holdfast.db'}")
    store.write_blocking([named("a")])
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    store.close()
    assert "holdfast.db-wal" in modes
    assert set(modes.values()) == {0o600}
