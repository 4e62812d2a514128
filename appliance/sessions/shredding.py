"""Tenants that are shredded: nothing of theirs is left, here, and that they were shredded is in the audit log.

Rules:

- One transaction deletes all of a tenant's keys, its AUDIT and WRAPPING keys and its sessions' too, has them erased
  from the files, removes who could ask for it, and makes a mark. Killed before it, nothing has happened but that turns
  were broken off; killed after it, at any step, nobody can read anything of the tenant or ask for it, and what the
  mark stands for is finished at the next start.
- Before it, the tenant's keys are refused and no turn of its gets a session: none is written down afterwards.
- Its sessions' rows, which nobody can read any more, go after it, some at a time: other tenants' turns do not wait.
- The mark says who asked for it and how much there was, under the system's key: one that was made or changed outside is
  not believed. It stays until the shredding is in the audit log.
"""

import asyncio
import base64
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Final

from sqlalchemy import Connection, bindparam, delete, func, insert, select

from appliance.audit.events import Actor
from appliance.identity import Identity, UnknownIdentity
from appliance.sessions.endings import Sessions
from appliance.sessions.removal import SHREDDED, remove_keys, remove_principals, remove_some_sessions
from appliance.store import Change, Erasures, RowCipher, Store, tables
from appliance.vault import SYSTEM_SCOPE, Binding, KeyMissing, KeyPurpose, TamperedValue, Vault

_INSERT_MARK: Final = insert(tables.meta)
_DELETE_MARK: Final = delete(tables.meta).where(tables.meta.c.name == bindparam("b_name"))
_LOG = logging.getLogger("holdfast.sessions")


@dataclass(frozen=True, slots=True)
class ShreddedTenant:
    """A tenant whose keys are destroyed.

    Attributes:
        sessions, turns: how many it had.
        actor: who asked for it.
        source: the address that this was asked from.
        damage: why its row could not be opened, as the code of an error; empty: it could.
    """

    tenant_id: str
    sessions: int
    turns: int
    actor: Actor
    source: str
    damage: str = ""


class Shredding:
    """The shredding of tenants of one appliance.

    Attributes:
        finishing: held by who finishes what is marked.
        left: set when something was left to be finished by somebody else.
    """

    def __init__(self, store: Store, vault: Vault, identity: Identity, sessions: Sessions) -> None:
        self._store = store
        self._vault = vault
        self._rows = RowCipher(vault)
        self._identity = identity
        self._sessions = sessions
        self._one_at_a_time = asyncio.Lock()
        self.finishing = asyncio.Lock()
        self.left = asyncio.Event()

    async def shred(
        self,
        tenant_id: str,
        actor: Actor,
        source: str,
        *,
        damage: str = "",
        end_turns: Callable[[], Awaitable[None]],
    ) -> tuple[ShreddedTenant, list[str]]:
        """Destroy a tenant's keys and remove who could ask for it; its rows and its record are still to come.

        Its row need not open: which rows and keys are its own, its id says.

        Args:
            damage: as `ShreddedTenant` has it.
            end_turns: ends those that run; what has not ended when it returns is not written down any more.

        Returns:
            Also the lease labels of its sessions, for the engine: nobody can make them any more.

        Raises:
            UnknownIdentity: there is no such tenant any more.
            VaultSealed: the vault is sealed, and nothing is shredded.
            StoreFull, StoreBusy: nothing is shredded.
            StoreUnavailable: nothing is, or the store could not say.
        """
        async with self._one_at_a_time, self._identity.shutting_out(tenant_id), self._sessions.closed_to(tenant_id):
            await end_turns()
            labels = await self._sessions.give_up(tenant_id)
            sessions, turns = await self._store.read(lambda db: _count(db, tenant_id))
            shredded = ShreddedTenant(tenant_id, sessions, turns, actor, source, damage)
            await self._rows.prepare(scope=SYSTEM_SCOPE, purpose=KeyPurpose.RECORDS)
            mark = self._sealed(shredded)
            await self._store.transact(lambda db: _destroy(db, tenant_id, mark))
            self._vault.forget(tenant_id)
        return shredded, labels

    async def unfinished(self) -> list[ShreddedTenant]:
        """The tenants that are marked.

        Raises:
            VaultSealed: the vault is sealed.
        """
        meta = tables.meta
        query = select(meta.c.name, meta.c.value).where(meta.c.name.startswith(SHREDDED, autoescape=True))
        rows = await self._store.read(lambda db: db.execute(query).all())
        found = []
        for name, value in rows:
            try:
                found.append(self._opened(name, value))
            except (KeyMissing, TamperedValue, ValueError, KeyError, TypeError) as error:
                _LOG.error("the mark %s of a shredded tenant is not believed: %s", name, error)
        return found

    async def remove_rows(self, shredded: ShreddedTenant) -> None:
        """Delete what is left of a tenant's rows, some at a time."""
        while await self._store.transact(lambda db: remove_some_sessions(db, shredded.tenant_id)):
            pass

    async def recorded(self, shredded: ShreddedTenant) -> None:
        """That it was shredded is in the audit log: its mark goes."""
        await self._store.write([Change(_DELETE_MARK, {"b_name": SHREDDED + shredded.tenant_id})])

    def _sealed(self, shredded: ShreddedTenant) -> dict[str, str]:
        name = SHREDDED + shredded.tenant_id
        said = json.dumps(asdict(shredded)).encode()
        sealed = self._vault.encrypt(SYSTEM_SCOPE, KeyPurpose.RECORDS, said, _place(name))
        return {"name": name, "value": base64.b64encode(sealed).decode()}

    def _opened(self, name: str, value: str) -> ShreddedTenant:
        said = json.loads(self._vault.decrypt(base64.b64decode(value, validate=True), _place(name)))
        return ShreddedTenant(**{**said, "actor": Actor(**said["actor"])})


def _place(name: str) -> Binding:
    return Binding("meta", "value", name, SYSTEM_SCOPE, 1)


def _count(db: Connection, tenant_id: str) -> tuple[int, int]:
    """How many sessions and turns a tenant has."""
    sessions = tables.sessions
    counts = select(func.count(), func.coalesce(func.sum(sessions.c.turns), 0)).where(sessions.c.tenant_id == tenant_id)
    count, turns = db.execute(counts).one()
    return int(count), int(turns)


def _destroy(db: Connection, tenant_id: str, mark: dict[str, str]) -> None:
    remove_keys(db, tenant_id)
    if not remove_principals(db, tenant_id):
        raise UnknownIdentity(
            f"there is no tenant {tenant_id!r}",
            cause="no tenant has that id any more",
            remedy="`holdfast tenant list` names those that there are",
        )
    db.execute(_INSERT_MARK, mark)
    due = Erasures.due()
    db.execute(due.statement, due.values)
