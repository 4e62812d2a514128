"""Brings a database to the schema of this version, and refuses one that is newer or was never released.

Alembic is imported only when there is something to do: it costs a quarter of a second that a start does not have.
"""

import logging
import shlex
from pathlib import Path

from sqlalchemy import Connection, Engine, text

from appliance.store.errors import SchemaTooNew, SchemaUnreleased, StoreEmpty
from appliance.store.migrations import HEAD, UNRELEASED

_MIGRATIONS = Path(__file__).parent / "migrations"
_ADVISORY_LOCK = 0x486F6C64  # two gateways that start at once migrate one after the other


def upgrade(engine: Engine, place: str, *, create: bool) -> None:
    """Create or migrate the schema, in one transaction.

    Raises:
        StoreEmpty: there is none, and none is to be created.
        SchemaTooNew: the database is at a revision that this version does not know.
        SchemaUnreleased: it is at one that no release ever wrote.
    """
    with engine.begin() as db:
        if db.dialect.name == "postgresql":
            db.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK})
        revision = _revision(db)
        if revision is None and not create:
            raise StoreEmpty(place, "it has no tables of an appliance")
        if revision != HEAD:
            _run_migrations(db, revision, place)


def _revision(db: Connection) -> str | None:
    if not db.dialect.has_table(db, "alembic_version"):
        return None
    found = db.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    return None if found is None else str(found)


def _run_migrations(db: Connection, revision: str | None, place: str) -> None:
    if revision in UNRELEASED:
        raise SchemaUnreleased(
            f"{place} was written by a version in development",
            cause=f"its schema is at revision {revision}, which was never released; what it encrypted does not open",
            remedy=_start_again(db, place),
        )
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = db
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if revision is not None and revision not in known:
        raise SchemaTooNew(
            f"{place} was written by a newer version",
            cause=f"its schema is at revision {revision}; this version knows revisions up to {HEAD}",
            remedy="Start the version that wrote it, or restore a backup that this version made",
        )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    command.upgrade(config, HEAD)


def _start_again(db: Connection, place: str) -> str:
    if db.dialect.name != "sqlite":
        return "Make a new database and name it in store.url; nothing of the old one can be carried over"
    directory = Path(place).parent
    return (
        f"Remove the directory, a demonstration's too, with `rm -r {shlex.quote(str(directory))}`, and start "
        "again with `holdfast init` or `holdfast up --demo`"
    )
