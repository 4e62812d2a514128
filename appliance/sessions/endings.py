"""How a session ends: called over by its client, or forgotten.

Rules:

- A session that is over is kept, and its next turn goes on with it: only the engine need not hold it. Where it is the
  first of its tree, the whole tree is over.
- Forgetting deletes first and then erases what deletion left on the disk: at once, or as soon as that can be done.
- Forgetting raises the epoch of the tree, so that whatever is still resident of it cannot be reached again.
- While a tenant is shredded no turn of its gets a session, and none that has one is written down.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, delete, select, update
from sqlalchemy.engine import RowMapping

from appliance.identity import Caller, Role
from appliance.sessions.archive import SessionSummary, unknown_session
from appliance.sessions.labels import lease_label
from appliance.sessions.live import Live, Session, is_over
from appliance.sessions.registry import Registry
from appliance.store import Change, Erasures, tables
from appliance.vault import KeyMissing, TamperedValue

_MOST_ENDED = 1000  # sessions of a tree, by one word


@dataclass(frozen=True, slots=True)
class Ended:
    """Sessions that their client says are over: the one that it named, and those of its tree where it is the first.

    Attributes:
        session_ids: those that were not over already.
        lease_labels: of all of them.
    """

    session_ids: Sequence[str]
    lease_labels: Sequence[str]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A session that is no more.

    Attributes:
        session: what it was.
        erased: nothing of its key is left in the database's files; False: that could not be done yet, and will be.
    """

    session: SessionSummary
    erased: bool


class Sessions(Registry):
    """The sessions of one appliance: found, written down, ended and forgotten."""

    # Ending

    async def ending(self, caller: Caller, visible_id: str) -> Ended:
        """What it means that a client calls a session of its own over; nothing is changed yet: see `end`.

        Args:
            visible_id: the client's own id for it, or ours.

        Raises:
            UnknownSession: this principal has no session of that id.
            TamperedValue: a row of its tree was changed outside the appliance; it is named.
        """
        live = await self._named(caller, visible_id)
        together = {live.session_id: live.is_over}
        if live.is_first_of_its_tree:
            together |= await self._of_tree(live.tenant_id, live.principal_id, live.tree_id)
        return Ended(
            [session_id for session_id, over in together.items() if not over],
            [lease_label(self._vault, live.tenant_id, session_id) for session_id in together],
        )

    async def _of_tree(self, tenant_id: str, principal_id: str, tree_id: str) -> dict[str, bool]:
        """The ids of the principal's sessions in a tree, those used last, each with whether it is over."""
        sessions = tables.sessions
        query = (
            select(sessions)
            .where(sessions.c.tree_id == tree_id)
            .where(sessions.c.tenant_id == tenant_id, sessions.c.principal_id == principal_id)
            .order_by(sessions.c.last_used_at.desc())
            .limit(_MOST_ENDED)
        )
        rows = await self._store.read(lambda db: db.execute(query).mappings().all())
        found = dict(
            await self._made_of(rows, lambda row: (row["session_id"], is_over(row["last_used_at"], row["over_at"])))
        )
        for live in list(self._live.values()):  # a first turn may run, and nothing of it be stored yet
            if (live.tenant_id, live.principal_id, live.tree_id) == (tenant_id, principal_id, tree_id):
                found[live.session_id] = live.is_over
        return found

    async def end(self, ended: Ended) -> None:
        """Have sessions be over from now on.

        Raises:
            StoreFull, StoreBusy, StoreUnavailable: it will not be known after a restart that they are.
        """
        now = self._now()
        for session_id in ended.session_ids:
            live = self._live.get(session_id)
            if live is not None:
                live.is_over = True
                live.ends += 1
        if ended.session_ids:
            await self._store.write(
                [Change(_END_SESSION, {"b_session_id": each, "b_over_at": now}) for each in ended.session_ids]
            )

    def end_with_turn(self, session: Session) -> None:
        """A session is over though its last turn was not written down."""
        session._live.is_over = True
        session._live.ends += 1

    # Forgetting

    async def forget(self, caller: Caller, session_id: str) -> Forgotten:
        """Shred a session: its key, its turns and its place in the index; what is resident of it becomes unreachable.

        The session's own principal may, and an administrator or operator who may know of it.

        Raises:
            UnknownSession: there is none, or it is not this caller's to forget.
        """
        row = await self._forgettable(caller, session_id)
        live = await self._load(row)
        if live is None:
            raise unknown_session(session_id)
        async with live.lock:
            await self._store.transact(lambda db: _shred(db, session_id, live.tree_id))
            live.forgotten = True
        for other in list(self._live.values()):
            if other.tree_id == live.tree_id:
                other.epoch += 1
        self._let_go(live)
        return Forgotten(self._summary(row), erased=await self._store.erasures.erase())

    async def forgettable(self, caller: Caller, session_id: str) -> SessionSummary:
        """The session that `forget` would shred; nothing is changed.

        Raises:
            UnknownSession: as `forget`.
        """
        return self._summary(await self._forgettable(caller, session_id))

    # A whole tenant

    @contextlib.asynccontextmanager
    async def closed_to(self, tenant_id: str) -> AsyncIterator[None]:
        """Give no turn of a tenant's a session while the body runs; what is in memory of them is dropped then."""
        self._closed_to.add(tenant_id)
        try:
            yield
        finally:
            for live in self._live_of(tenant_id):
                live.forgotten = True
                self._drop(live)  # where nothing was shredded it is found in the store again
            self._closed_to.discard(tenant_id)

    async def give_up(self, tenant_id: str) -> list[str]:
        """Have no turn of a tenant's be written down any more, within `closed_to`; the lease labels of its sessions.

        There are none where the key that makes them is missing or damaged.
        """
        for live in self._live_of(tenant_id):
            async with live.lock:  # what is being written is written before this goes on
                live.forgotten = True
        query = select(tables.sessions.c.session_id).where(tables.sessions.c.tenant_id == tenant_id)
        stored = await self._store.read(lambda db: db.execute(query).scalars().all())
        for session_id in stored:
            self._tips.drop(session_id)
        session_ids = dict.fromkeys([*stored, *(live.session_id for live in self._live_of(tenant_id))])

        def labels() -> list[str]:
            return [lease_label(self._vault, tenant_id, session_id) for session_id in session_ids]

        try:
            return await asyncio.to_thread(labels)
        except (KeyMissing, TamperedValue):
            return []

    def _live_of(self, tenant_id: str) -> list[Live]:
        return [live for live in list(self._live.values()) if live.tenant_id == tenant_id]

    async def _forgettable(self, caller: Caller, session_id: str) -> RowMapping:
        row = await self.visible_row(caller, session_id)
        owns = row["principal_id"] == caller.principal.principal_id
        if not owns and caller.principal.role not in (Role.ADMIN, Role.OPERATOR):
            raise unknown_session(session_id)
        return row


def _shred(db: Connection, session_id: str, tree_id: str) -> None:
    due = Erasures.due()
    db.execute(due.statement, due.values)
    db.execute(delete(tables.chain).where(tables.chain.c.session_id == session_id))
    db.execute(delete(tables.turns).where(tables.turns.c.session_id == session_id))
    db.execute(
        update(tables.sessions).where(tables.sessions.c.parent_session_id == session_id).values(parent_session_id=None)
    )
    db.execute(delete(tables.sessions).where(tables.sessions.c.session_id == session_id))
    db.execute(delete(tables.keys).where(tables.keys.c.scope == session_id))
    db.execute(update(tables.trees).where(tables.trees.c.tree_id == tree_id).values(epoch=tables.trees.c.epoch + 1))


_END_SESSION = (
    update(tables.sessions)
    .where(tables.sessions.c.session_id == bindparam("b_session_id"))
    .values(over_at=bindparam("b_over_at"))
)
