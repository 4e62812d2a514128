"""Tenants that were made for a proof, and are removed with everything of theirs, whatever happens in between.

Rules:

- A tenant is marked in the database by the transaction that makes it. Removing goes by the marks, so that a gateway
  that was killed, whenever it was, removes at its next start what it left. The mark stays until the removal is in the
  audit log.
- What goes: its rows in every table, and its sessions' keys. What stays is the key that its records in the audit log
  are under, and the one that wraps that: the log stays readable.
- Their keys' rows are erased from the files with the next deletion that is: nothing was said under them but made-up
  text.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, delete, insert, select

from appliance.identity import Identity, Isolation, Tenant
from appliance.store import Change, Store, tables
from appliance.vault import KeyPurpose, Vault

_MARK = "throwaway/"  # in the table `meta`, before the tenant's id
_INSERT_MARK = insert(tables.meta)
_DELETE_MARK = delete(tables.meta).where(tables.meta.c.name == bindparam("b_name"))
_KEPT_KEYS = (KeyPurpose.AUDIT.value, KeyPurpose.WRAPPING.value)


class Throwaways:
    """The throwaway tenants of one appliance."""

    def __init__(self, store: Store, vault: Vault) -> None:
        self._store = store
        self._vault = vault

    async def create_tenant(
        self, identity: Identity, name: str, *, idle_timeout_s: float | None = None, isolation: Isolation
    ) -> Tenant:
        """A tenant that the next `remove_all` removes, be it after a restart.

        Raises:
            NameTaken: there is one of that name.
        """
        return await identity.create_tenant(
            name,
            idle_timeout_s=idle_timeout_s,
            isolation=isolation,
            also=lambda tenant_id: [Change(_INSERT_MARK, {"name": _MARK + tenant_id, "value": ""})],
        )

    async def remove_all(self) -> list[str]:
        """Remove every tenant that is marked; their ids, to be recorded. Needs no key."""
        removed = await self._store.transact(_remove)
        for tenant_id in removed:
            self._vault.forget(tenant_id)
        return removed

    async def recorded(self, tenant_ids: Sequence[str]) -> None:
        """That these were removed is in the audit log: their marks go."""
        await self._store.write([Change(_DELETE_MARK, {"b_name": _MARK + each}) for each in tenant_ids])


def _remove(db: Connection) -> list[str]:
    meta = tables.meta
    marks = db.execute(select(meta.c.name).where(meta.c.name.startswith(_MARK, autoescape=True))).scalars().all()
    for mark in marks:
        tenant_id = mark.removeprefix(_MARK)
        sessions = select(tables.sessions.c.session_id).where(tables.sessions.c.tenant_id == tenant_id)
        api_keys = select(tables.api_keys.c.key_id).where(tables.api_keys.c.tenant_id == tenant_id)
        keys = tables.keys.c
        db.execute(delete(tables.quota_days).where(tables.quota_days.c.api_key_id.in_(api_keys)))
        db.execute(delete(tables.keys).where(keys.scope.in_(sessions)))
        db.execute(delete(tables.keys).where(keys.scope == tenant_id, keys.purpose.not_in(_KEPT_KEYS)))
        for table in (tables.chain, tables.turns, tables.sessions, tables.trees, tables.api_keys, tables.principals):
            db.execute(delete(table).where(table.c.tenant_id == tenant_id))
        db.execute(delete(tables.tenants).where(tables.tenants.c.tenant_id == tenant_id))
    return [mark.removeprefix(_MARK) for mark in marks]
