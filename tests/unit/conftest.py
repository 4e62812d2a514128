"""Databases for the tests of the rooms that have rows: SQLite and a real PostgreSQL, one after the other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.store import DatabaseKeys, Store, key_changes
from appliance.vault import RootKey, Vault
from tests.postgres import PostgresServer, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with today's tables, to copy."""
    template = tmp_path_factory.mktemp("sqlite") / "template.db"
    Store.open(f"sqlite:///{template}").close()
    return template


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of its own for each test, on each kind of database."""
    if request.param == "sqlite":
        database = tmp_path / "holdfast.db"
        database.touch(mode=0o600)
        database.write_bytes(request.getfixturevalue("sqlite_template").read_bytes())
        yield f"sqlite:///{database}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        with server.database() as url:
            yield url


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store.open(database_url)
    yield store
    store.close()


@pytest.fixture
def vault(store: Store) -> Vault:
    """An open vault with the system's keys and those of `ten_1` and `ten_2`, stored."""
    vault = Vault(DatabaseKeys(store))
    vault.open(RootKey(b"r" * 32))
    for records in (vault.new_system_keys(), vault.new_tenant_keys("ten_1"), vault.new_tenant_keys("ten_2")):
        store.write_blocking(key_changes(records))
    return vault
