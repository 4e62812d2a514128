"""By which names the engine knows tenants and sessions, and whom it means by them.

Rules:

- A label says nothing about whom it names: it is an HMAC under the tenant's key.
- What is remembered is bounded. After a start, and beyond the bound, the sessions are looked through: seldom, for all
  that ask together, and not for long. Whom a look that was broken off has not found is not known, never gone; nor is
  anybody where the key of some tenant is missing or damaged: it may be that tenant's.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from sqlalchemy import Select, select

from appliance.errors import Fault, HoldfastError
from appliance.store import Store, tables
from appliance.vault import KeyMissing, KeyPurpose, TamperedValue, Vault

_KNOWN_LABELS = 65_536  # of sessions
_AGAIN_S = 10.0  # for a label that is not known the sessions are looked through at most so often
_DEADLINE_S = 120.0  # for one look
_ASKED_TOGETHER_S = 0.05  # who asks within that of the first is answered by the same look
_LOG = logging.getLogger("holdfast.sessions")


class LabelNotKnown(HoldfastError):
    """Which session the engine means cannot be said now: it may well be there."""

    code: ClassVar[str] = "session_label_not_known"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class Label(NamedTuple):
    """What the engine calls a session: 32 hexadecimal digits for its tenant, and as many for itself."""

    tenant: str
    lease: str


class Named(NamedTuple):
    """Whom a label means."""

    tenant_id: str
    session_id: str


class Labels:
    """The labels of one appliance's sessions."""

    def __init__(self, store: Store, vault: Vault) -> None:
        self._store = store
        self._vault = vault
        self._known: OrderedDict[Label, Named] = OrderedDict()
        self._asked: set[Label] = set()
        self._read_at: float | None = None
        self._all_read_at: float | None = None  # the last time that no session was left out
        self._reading = asyncio.Lock()

    def of(self, named: Named) -> Label:
        """A session's label."""
        return Label(tenant_label(self._vault, named.tenant_id), lease_label(self._vault, *named))

    def note(self, label: Label, named: Named) -> None:
        """Remember whose a label is."""
        self._known[label] = named
        self._known.move_to_end(label)
        if len(self._known) > _KNOWN_LABELS:
            self._known.popitem(last=False)

    async def find(self, label: Label) -> Named | None:
        """Whose a label is; None: no stored session's.

        Raises:
            LabelNotKnown: it is not among those that are remembered, and not all were looked through now.
            VaultSealed: the vault is sealed.
        """
        asked_at = time.monotonic()
        were_all_read = False
        if label not in self._known:
            self._asked.add(label)
            try:
                async with self._reading:  # who asks meanwhile finds what was read
                    were_all_read = await self._read(asked_at)
            finally:
                self._asked.discard(label)
        named = self._known.get(label)
        if named is None and not were_all_read:
            raise LabelNotKnown(
                "no session of that label is remembered",
                cause="the sessions were looked through a moment ago, or there are more than can be looked through",
                remedy="Ask again later; the session's next turn makes it known",
            )
        return named

    async def _read(self, asked_at: float) -> bool:
        """After a start: the labels of the sessions that were used last, and of those that are asked for.

        Returns:
            Whether whoever was stored by `asked_at` and is not known now is not there.
        """
        if self._all_read_at is not None and asked_at <= self._all_read_at:
            return True
        if self._read_at is not None and asked_at - self._read_at < _AGAIN_S:
            return False
        await asyncio.sleep(_ASKED_TOGETHER_S)
        read_at = self._read_at = time.monotonic()
        sessions = tables.sessions
        page = _KNOWN_LABELS // 2
        query = select(sessions.c.tenant_id, sessions.c.session_id)
        found = await self._labelled(query.order_by(sessions.c.last_used_at.desc()).limit(page))
        is_whole = True
        for label, named in reversed(found):  # what was used last is forgotten last
            is_whole = is_whole and label is not None
            if label is not None and label not in self._known:
                self.note(label, named)
        after = ""
        while len(found) == page:
            if time.monotonic() - read_at > _DEADLINE_S:
                return False
            found = await self._labelled(
                query.where(sessions.c.session_id > after).order_by(sessions.c.session_id).limit(page)
            )
            for label, named in found:
                is_whole = is_whole and label is not None
                if label is not None and label in self._asked:
                    self.note(label, named)
                after = named.session_id
        if is_whole:
            self._all_read_at = read_at
        return is_whole

    async def _labelled(self, query: Select[str, str]) -> list[tuple[Label | None, Named]]:
        """Sessions with their labels; None: its tenant's key is missing or damaged."""
        rows = await self._store.read(lambda db: db.execute(query).all())

        def labelled() -> list[tuple[Label | None, Named]]:
            tenants = known_labels(self._vault, {tenant_id for tenant_id, _ in rows})
            return [
                (
                    Label(tenants[tenant_id], lease_label(self._vault, tenant_id, session_id))
                    if tenant_id in tenants
                    else None,
                    Named(tenant_id, session_id),
                )
                for tenant_id, session_id in rows
            ]

        return await asyncio.to_thread(labelled)


def known_labels(vault: Vault, tenant_ids: Iterable[str]) -> dict[str, str]:
    """The labels of those of some tenants whose keys are there and whole.

    Raises:
        VaultSealed: the vault is sealed.
    """
    labels = {}
    for tenant_id in tenant_ids:
        try:
            labels[tenant_id] = tenant_label(vault, tenant_id)
        except (KeyMissing, TamperedValue) as error:
            _LOG.warning("the engine's labels of %s cannot be told: %s", tenant_id, error.cause)
    return labels


def tenant_label(vault: Vault, tenant_id: str) -> str:
    """What the engine calls a tenant; 32 hexadecimal digits."""
    return vault.mac(tenant_id, KeyPurpose.SALT, "tenant-label").hex()[:32]


def lease_label(vault: Vault, tenant_id: str, session_id: str) -> str:
    """What the engine calls a session among those of its tenant; 32 hexadecimal digits."""
    return vault.mac(tenant_id, KeyPurpose.SALT, "lease-label", session_id.encode()).hex()[:32]
