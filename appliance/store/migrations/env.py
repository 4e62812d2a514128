"""Runs Alembic's migrations on the connection that `schema.upgrade` hands over."""

from alembic import context
from sqlalchemy import Connection


def _connection() -> Connection:
    connection = context.config.attributes["connection"]
    if not isinstance(connection, Connection):
        raise TypeError("migrations run through appliance.store.schema only")
    return connection


context.configure(connection=_connection(), render_as_batch=True)
context.run_migrations()
