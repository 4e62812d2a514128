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
from appliance.sessions.removal import remove_keys, remove_principals, remove_some_sessions
from appliance.store import Change, Store, tables
from appliance.vault import KeyPurpose, Vault

_MARK = "throwaway/"  # in the table `meta`, before the tenant's id
_INSERT_MARK = insert(tables.meta)
_DELETE_MARK = delete(tables.meta).where(tables.meta.c.name == bindparam("b_name"))
_KEPT_KEYS = (KeyPurpose.AUDIT, KeyPurpose.WRAPPING)


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
    removed = [mark.removeprefix(_MARK) for mark in marks]
    for tenant_id in removed:
        remove_keys(db, tenant_id, but=_KEPT_KEYS)
        while remove_some_sessions(db, tenant_id):
            pass
        remove_principals(db, tenant_id)
    return removed
