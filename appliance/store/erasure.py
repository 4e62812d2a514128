"""Makes a deletion true on disk.

What must be gone is the wrapped key: without it, what it encrypted is noise. So the table of keys is written anew and
every file that held the old one is cut, which takes time in proportion to the number of keys and not to that of
transcripts.

- SQLite overwrites what is deleted with zeros (`secure_delete`), but a page that was rearranged may keep a stale copy
  of a row in its gap: every key is moved to pages that were zeroed, and the WAL is cut to nothing.
- PostgreSQL writes the table to a new file and cuts the old one (`VACUUM FULL`). Its own write-ahead log and its
  archives keep what was written until they are recycled: rotating the tenant's key makes that worthless too.
"""

from sqlalchemy import Engine, text

from appliance.store.checkpoints import Checkpoints

_DEADLINE_S = 600


def rewrite_sqlite_keys(checkpoints: Checkpoints, engine: Engine) -> None:
    """Rewrite the keys that are left, and cut the log. Runs in the writer's thread, outside of a transaction.

    Raises:
        StoreUnavailable: a reader kept the log from being cut within its time.
    """
    with engine.begin() as db:
        for statement in (
            "CREATE TEMP TABLE keys_left AS SELECT * FROM main.keys",  # in memory: temp_store
            "DELETE FROM main.keys",
            "INSERT INTO main.keys SELECT * FROM temp.keys_left",
            "DROP TABLE temp.keys_left",
        ):
            db.exec_driver_sql(statement)
    checkpoints.cut()


def rewrite_postgresql_keys(engine: Engine) -> None:
    """Rewrite the keys that are left into a new file. Runs in the writer's thread, outside of a transaction."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(text(f"SET statement_timeout = '{_DEADLINE_S}s'"))
        try:
            db.execute(text("VACUUM (FULL) keys"))
        finally:
            db.execute(text("RESET statement_timeout"))
