"""What makes up a tenant in the database, and taking it away: within a transaction of the caller's.

Rule: keys go first. Which sessions' keys are a tenant's is known by its sessions' rows alone.
"""

from collections.abc import Collection
from typing import Final

from sqlalchemy import Connection, delete, select

from appliance.store import tables
from appliance.vault import KeyPurpose

SHREDDED: Final = "shredded/"  # in the table `meta`, before the id of a tenant of which something is left to do
_SESSIONS_AT_ONCE: Final = 100
_TURNS_AT_ONCE: Final = 500


def remove_keys(db: Connection, tenant_id: str, *, but: Collection[KeyPurpose] = ()) -> None:
    """Delete a tenant's keys, those of its sessions and those that a rotation retired; those `but` of its own stay."""
    keys = tables.keys.c
    sessions = select(tables.sessions.c.session_id).where(tables.sessions.c.tenant_id == tenant_id)
    db.execute(delete(tables.keys).where(keys.scope.in_(sessions)))
    kept = [purpose.value for purpose in but]
    db.execute(delete(tables.keys).where(keys.scope == tenant_id, keys.purpose.not_in(kept)))


def remove_principals(db: Connection, tenant_id: str) -> bool:
    """Delete a tenant's row, its principals and their API keys, with what those have used; whether it was there."""
    api_keys = select(tables.api_keys.c.key_id).where(tables.api_keys.c.tenant_id == tenant_id)
    db.execute(delete(tables.quota_days).where(tables.quota_days.c.api_key_id.in_(api_keys)))
    for table in (tables.api_keys, tables.principals):
        db.execute(delete(table).where(table.c.tenant_id == tenant_id))
    return db.execute(delete(tables.tenants).where(tables.tenants.c.tenant_id == tenant_id)).rowcount == 1


def remove_some_sessions(db: Connection, tenant_id: str) -> bool:
    """Delete some of a tenant's turns and sessions, a bounded number; whether there may be more."""
    sessions, turns, chain = tables.sessions, tables.turns, tables.chain
    some = select(sessions.c.session_id).where(sessions.c.tenant_id == tenant_id).limit(_SESSIONS_AT_ONCE)
    session_ids = db.execute(some).scalars().all()
    if not session_ids:
        for table in (chain, tables.trees):
            db.execute(delete(table).where(table.c.tenant_id == tenant_id))
        return False
    of_them = select(turns.c.turn_id).where(turns.c.session_id.in_(session_ids)).limit(_TURNS_AT_ONCE)
    turn_ids = db.execute(of_them).scalars().all()
    if turn_ids:
        db.execute(delete(turns).where(turns.c.turn_id.in_(turn_ids)))
    else:
        db.execute(delete(chain).where(chain.c.session_id.in_(session_ids)))
        db.execute(delete(sessions).where(sessions.c.session_id.in_(session_ids)))
    return True
