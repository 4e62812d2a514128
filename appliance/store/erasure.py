"""Makes a deletion true on disk.

What must be gone is the wrapped key: without it, what it encrypted is noise. So the table of keys is written anew and
every file that held the old one is cut, which takes time in proportion to the number of keys and not to that of
transcripts.

- SQLite overwrites what is deleted with zeros (`secure_delete`), but a page that was rearranged may keep a stale copy
  of a row in its gap: every key is moved to pages that were zeroed, and the WAL is cut to nothing.
- PostgreSQL writes the table to a new file and cuts the old one (`VACUUM FULL`). Its own write-ahead log and its
  archives keep what was written until they are recycled: rotating the tenant's key makes that worthless too.

Both run in the writer's thread, outside of a transaction, and wait there for whoever reads only for a moment.
"""

from sqlalchemy import Engine, exc, text

_DEADLINE_S = 600
_LOCK_WAIT_MS = 50
_LOCK_NOT_AVAILABLE = "55P03"  # PostgreSQL, appendix A


def rewrite_sqlite_keys(engine: Engine) -> None:
    """Rewrite the keys that are left; the log has the former ones until it is cut."""
    with engine.begin() as db:
        for statement in (
            "CREATE TEMP TABLE keys_left AS SELECT * FROM main.keys",  # in memory: temp_store
            "DELETE FROM main.keys",
            "INSERT INTO main.keys SELECT * FROM temp.keys_left",
            "DROP TABLE temp.keys_left",
        ):
            db.exec_driver_sql(statement)


def rewrite_postgresql_keys(engine: Engine) -> bool:
    """Rewrite the keys that are left into a new file; False: a transaction, `pg_dump`'s say, holds the table."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(text(f"SET statement_timeout = '{_DEADLINE_S}s'"))
        db.execute(text(f"SET lock_timeout = '{_LOCK_WAIT_MS}ms'"))
        try:
            db.execute(text("VACUUM (FULL) keys"))
        except exc.DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            return False
        finally:
            db.execute(text("RESET lock_timeout"))
            db.execute(text("RESET statement_timeout"))
    return True
