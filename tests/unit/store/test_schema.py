"""The schema: made by migrations, the same as the tables say, and refused when it is newer."""

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, insert, select, text

from appliance.identity import Identity
from appliance.store import (
    DatabaseKeys,
    SchemaTooNew,
    SchemaUnreleased,
    Store,
    StoreEmpty,
    StoreUnavailable,
    migrations,
    tables,
)
from appliance.vault import RootKey, Vault
from tests.postgres import PostgresServer


def migrate_to(revision: str | None, db: Connection) -> None:
    db.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


async def test_the_migrations_make_the_tables(store: Store) -> None:
    def differences(db: Connection) -> object:
        return compare_metadata(MigrationContext.configure(db, opts={"compare_type": True}), tables.metadata)

    assert await store.read(differences) == []


async def test_the_migrations_make_the_primary_keys(store: Store) -> None:
    def made(db: Connection) -> dict[str, list[str]]:
        return {
            table: db.dialect.get_pk_constraint(db, table)["constrained_columns"] for table in tables.metadata.tables
        }

    declared = {name: list(table.primary_key.columns.keys()) for name, table in tables.metadata.tables.items()}
    assert await store.read(made) == declared


def test_the_head_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [migrations.HEAD]


async def test_rows_of_the_first_schema_open_after_the_migration(store: Store, vault: Vault, database_url: str) -> None:
    made = await Identity(store, vault).create_tenant("Harbour Bank", idle_timeout_s=30.0)
    undone = (
        "ALTER TABLE tenants DROP COLUMN audit_digests",
        "ALTER TABLE tenants DROP COLUMN cache_epoch",
        "ALTER TABLE tenants DROP COLUMN harness_lines",
        "DROP INDEX ix_sessions_tree_id",
        "ALTER TABLE sessions DROP COLUMN over_at",
    )
    await store.transact(lambda db: [db.execute(text(statement)) for statement in undone])
    await store.transact(lambda db: migrate_to("0001_bound", db))
    store.close()
    with contextlib.closing(Store.open(database_url)) as migrated:
        again = Vault(DatabaseKeys(migrated))
        again.open(RootKey(b"r" * 32))
        identity = Identity(migrated, again)
        assert await identity.tenants() == [made]
        changed = await identity.choose_digests(made, on=True)
        assert changed.audit_digests
        assert await identity.tenants() == [changed]


async def test_a_newer_schema_is_refused_and_left_alone(store: Store, database_url: str) -> None:
    await store.transact(lambda db: db.execute(insert(tables.meta), {"name": "a", "value": ""}))
    await store.transact(lambda db: migrate_to("9999", db))
    store.close()
    with pytest.raises(SchemaTooNew, match="9999"):
        Store.open(database_url)
    with pytest.raises(SchemaTooNew):  # the first refusal has let the file go
        Store.open(database_url)


async def test_a_schema_that_was_never_released_is_refused_with_what_to_remove(store: Store, database_url: str) -> None:
    await store.transact(lambda db: migrate_to("0001", db))
    store.close()
    with pytest.raises(SchemaUnreleased, match="development") as refused:
        Store.open(database_url)
    if database_url.startswith("sqlite"):
        directory = Path(database_url.removeprefix("sqlite:///")).parent
        assert f"rm -r {directory}" in refused.value.remedy
        assert "demonstration" in refused.value.remedy
    else:
        assert "store.url" in refused.value.remedy


def test_a_database_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_bytes(b"these are my notes, and no database" * 40)
    with pytest.raises(StoreUnavailable, match="not a database"):
        Store.open(f"sqlite:///{tmp_path / 'notes.db'}")
    assert (tmp_path / "notes.db").read_bytes().startswith(b"these are my notes")


def test_a_database_without_tables_gets_them(postgres: PostgresServer) -> None:
    store = Store.open(postgres.empty_database())
    assert store.read_blocking(lambda db: db.execute(select(tables.meta)).all()) == []
    store.close()


@pytest.mark.parametrize("there", [None, b""], ids=["missing", "empty"])
def test_a_file_that_has_to_be_there_is_not_made(tmp_path: Path, there: bytes | None) -> None:
    path = tmp_path / "holdfast.db"
    if there is not None:
        path.write_bytes(there)
    with pytest.raises(StoreEmpty, match="empty, or not this appliance's"):
        Store.open(f"sqlite:///{path}", create=False)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == (
        [] if there is None else [(path.name, b"")]
    )


def test_tables_that_have_to_be_there_are_not_made(postgres: PostgresServer) -> None:
    url = postgres.empty_database()
    for _ in range(2):
        with pytest.raises(StoreEmpty, match="no tables"):
            Store.open(url, create=False)


def test_a_database_of_something_else_gets_no_tables(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE notes (text)")
    with pytest.raises(StoreEmpty, match="no tables"):
        Store.open(f"sqlite:///{tmp_path / 'other.db'}", create=False)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        assert other.execute("SELECT name FROM sqlite_schema").fetchall() == [("notes",)]


def test_opening_a_current_database_does_not_import_alembic(database_url: str) -> None:
    Store.open(database_url).close()
    code = (
        f"import sys; from appliance.store import Store; Store.open({database_url!r}); print('alembic' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "False"
