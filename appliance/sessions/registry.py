"""Whose turn is this, what is its salt, and where does it go when it is over. How a session ends: `endings`.

Rules:

- A session is found only within the tenant and the principal that own it. Anybody else's is as unknown as one that
  never was.
- An unknown session id makes a session; an unknown `previous_response_id` is an error. An id of our own form names the
  session that has it; one that names none is as if there were none, for a session must not be called by another's id.
- Without any id, the longest history that this principal was answered before is continued; a second continuation of one
  point is a branch: a session of its own in the same tree.
- The salt is an HMAC of principal, tree and epoch under the tenant's key. Forgetting raises the epoch, so that whatever
  is still resident cannot be reached again. What a tenant chose to share among its sessions has a salt of the tenant's.
- A session's key is made when its first turn is written down: what can be dropped from memory before it is stored would
  take the turn with it.
- The first session of a tree has the tree's name for its own: that outlives whatever else is forgotten.
- A turn is durable, whole and encrypted when `record` returns. Where it raises it is not there at all, unless the store
  could not say: what is in memory of its session is believed no more, and the store is asked before the next turn.
- What is remembered between turns is bounded, and can be lost without losing anything but speed.

One gateway owns a session at a time; the numbers of its turns are given out under the session's own lock.
"""

import asyncio
import os
import re
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

from sqlalchemy import Connection, func, select
from sqlalchemy.engine import RowMapping

from appliance.errors import Fault, HoldfastError
from appliance.identity import Caller, Isolation
from appliance.sessions.archive import Archive, TranscriptForbidden, text_or_none, unknown_session
from appliance.sessions.deltas import Tips
from appliance.sessions.history import answered_positions, history_links
from appliance.sessions.keeping import keeping
from appliance.sessions.labels import Label, Labels, lease_label
from appliance.sessions.live import Continuation, Live, Session, is_over, own_tree
from appliance.sessions.misses import Account, Circumstances, Served
from appliance.sessions.turn import Message, Origin, Outcome, SessionHints, Turn, TurnKind, TurnState
from appliance.sessions.writing import divergence_between, first_changes, next_changes, write_turn
from appliance.settings import SessionSettings
from appliance.store import Change, Store, tables
from appliance.vault import KeyMissing, KeyPurpose, Vault

_LIVE_SESSIONS = 4096
_TIP_BYTES = 32 << 20
_KNOWN_LINKS = 32_768
_OWN_ID = re.compile(r"ses_[0-9a-f]{32}")
_LOOKUP_LINKS = 512  # how far back from its end a history is searched for an answer of ours


class UnknownResponse(HoldfastError):
    """`previous_response_id` names no answer of this principal's."""

    code: ClassVar[str] = "previous_response_not_found"
    fault: ClassVar[Fault] = Fault.MISSING


class SessionForgotten(HoldfastError):
    """The session was forgotten while one of its turns ran."""

    code: ClassVar[str] = "session_forgotten"
    fault: ClassVar[Fault] = Fault.CONFLICT


class TenantShredded(HoldfastError):
    """The tenant is being shredded: none of its turns runs any more, and no other begins."""

    code: ClassVar[str] = "tenant_shredded"
    fault: ClassVar[Fault] = Fault.UNAUTHENTICATED

    def __init__(self) -> None:
        super().__init__(
            "nothing is answered for this tenant any more",
            cause="an administrator of the appliance is shredding it, with all of its keys",
            remedy="Ask an administrator of the appliance",
        )


class _Stored(NamedTuple):
    """A session in the store.

    Attributes:
        epoch: of its tree.
        answered: the number of its latest turn that the engine finished; 0: none.
    """

    epoch: int
    turns: int
    answered: int


class Registry(Archive):
    """An archive that also finds the sessions of turns, and writes turns down.

    Args:
        settings: idle timeouts.
        block_size: of the engine's cache, in tokens; None: not known.
        now: wall clock, epoch seconds.
        random_bytes: source of identifiers.
    """

    def __init__(
        self,
        store: Store,
        vault: Vault,
        settings: SessionSettings,
        *,
        block_size: int | None = None,
        now: Callable[[], float] = time.time,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        super().__init__(store, vault)
        self._settings = settings
        self._block_size = block_size
        self._now = now
        self._random_bytes = random_bytes
        self._live: weakref.WeakValueDictionary[str, Live] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[str, Live] = OrderedDict()
        # As long as the sessions themselves: one that nothing is stored of yet is found nowhere else.
        self._by_client_id: weakref.WeakValueDictionary[bytes, Live] = weakref.WeakValueDictionary()
        self._by_link: OrderedDict[bytes, tuple[str, int]] = OrderedDict()
        self._tips = Tips(_TIP_BYTES)
        self._labels = Labels(store, vault)
        self._forgotten = 0  # sessions, by this process
        self._closed_to: set[str] = set()  # tenants that are being shredded now

    # Finding the session of a turn

    async def resolve(self, caller: Caller, turn: Turn) -> Session:
        """The session that `turn` continues or begins.

        Raises:
            UnknownResponse: `previous_response_id` is not an answer of this principal's.
            TenantShredded: its tenant is being shredded.
            VaultSealed: the vault is sealed.
        """
        tenant_id, principal_id = _owner(caller)
        hints = turn.hints
        links: Sequence[bytes] = ()
        continuation = None
        if hints.previous_response_id is not None:
            live = await self._of_response(tenant_id, principal_id, hints.previous_response_id)
        elif hints.client_id is not None and not _OWN_ID.fullmatch(hints.client_id):
            live = await self._of_client_id(tenant_id, principal_id, hints.client_id, hints)
        else:
            named = hints.client_id and await self._of_session_id(tenant_id, principal_id, hints.client_id)
            if named:
                live = named
            else:
                live, links, continuation = await self._of_history(tenant_id, principal_id, turn.messages)
        self._remember(live)
        return self._session(caller, turn.model, live, links, continuation)

    async def _of_response(self, tenant_id: str, principal_id: str, response_id: str) -> Live:
        turns, sessions = tables.turns, tables.sessions
        row = await self._store.read(
            lambda db: (
                db.execute(
                    select(sessions)
                    .join(turns, turns.c.session_id == sessions.c.session_id)
                    .where(turns.c.response_id == response_id)
                    .where(sessions.c.tenant_id == tenant_id, sessions.c.principal_id == principal_id)
                )
                .mappings()
                .first()
            )
        )
        live = None if row is None else await self._load(row)
        if live is None:
            raise UnknownResponse(
                "previous_response_id names no response",
                cause="no response of this principal has that id, or its session was forgotten",
                remedy="Send the whole conversation without previous_response_id",
            )
        return live

    async def _of_client_id(self, tenant_id: str, principal_id: str, client_id: str, hints: SessionHints) -> Live:
        lookup = self._client_id_lookup(tenant_id, principal_id, client_id)
        found = await self._by_lookup(tenant_id, principal_id, lookup)
        if found is not None:
            return found
        parent: Live | None = None
        if hints.parent_client_id is not None:
            parent = await self._of_parent(tenant_id, principal_id, hints.parent_client_id)
        # Another turn may have made it while this one asked the store: no await between this look and the making.
        known = self._by_client_id.get(lookup)
        if known is not None and not known.forgotten:
            return known
        live = self._begin(tenant_id, principal_id, hints.origin, client_id=client_id, parent=parent)
        self._by_client_id[lookup] = live
        return live

    async def _of_parent(self, tenant_id: str, principal_id: str, parent_id: str) -> Live | None:
        if _OWN_ID.fullmatch(parent_id):
            return await self._of_session_id(tenant_id, principal_id, parent_id)
        return await self._by_lookup(
            tenant_id, principal_id, self._client_id_lookup(tenant_id, principal_id, parent_id)
        )

    async def _named(self, caller: Caller, visible_id: str) -> Live:
        """The session that its principal names, by its own id for it or by ours.

        Raises:
            UnknownSession: this principal has no session of that id.
        """
        tenant_id, principal_id = _owner(caller)
        if _OWN_ID.fullmatch(visible_id):
            live = await self._of_session_id(tenant_id, principal_id, visible_id)
        else:
            live = await self._by_lookup(
                tenant_id, principal_id, self._client_id_lookup(tenant_id, principal_id, visible_id)
            )
        if live is None:
            raise unknown_session(visible_id)
        self._remember(live)
        return live

    async def _of_session_id(self, tenant_id: str, principal_id: str, session_id: str) -> Live | None:
        known = self._live.get(session_id)
        if known is not None:
            ours = (known.tenant_id, known.principal_id) == (tenant_id, principal_id)
            return known if ours and not known.forgotten else None
        sessions = tables.sessions
        query = select(sessions).where(
            sessions.c.session_id == session_id,
            sessions.c.tenant_id == tenant_id,
            sessions.c.principal_id == principal_id,
        )
        row = await self._store.read(lambda db: db.execute(query).mappings().first())
        return None if row is None else await self._load(row)

    async def _by_lookup(self, tenant_id: str, principal_id: str, lookup: bytes) -> Live | None:
        known = self._by_client_id.get(lookup)
        if known is not None and not known.forgotten and not known.unsure:
            return known
        sessions = tables.sessions
        row = await self._store.read(
            lambda db: (
                db.execute(
                    select(sessions).where(
                        sessions.c.tenant_id == tenant_id,
                        sessions.c.principal_id == principal_id,
                        sessions.c.client_id_lookup == lookup,
                    )
                )
                .mappings()
                .first()
            )
        )
        live = known if row is None else await self._load(row)
        if live is None or live.forgotten:
            return None
        self._by_client_id[lookup] = live
        return live

    async def _of_history(
        self, tenant_id: str, principal_id: str, messages: Sequence[Message]
    ) -> tuple[Live, list[bytes], Continuation | None]:
        """The session, the links of `messages` if they had to be made, and what to hold where it goes on."""
        positions = answered_positions(messages)[:_LOOKUP_LINKS]
        links: list[bytes] = []
        if positions:
            links = self._links(tenant_id, principal_id, messages)
            candidates = [links[position - 1] for position in positions]
            known = await self._known_link(tenant_id, principal_id, candidates)
            if known is not None:
                live, at_turn = known
                continuation = live.continued_from(at_turn)
                if continuation is not None:
                    return live, links, continuation
                return self._begin(tenant_id, principal_id, Origin.INFERRED, parent=live), links, None
        return self._begin(tenant_id, principal_id, Origin.NEW), links, None

    async def _known_link(
        self, tenant_id: str, principal_id: str, candidates: Sequence[bytes]
    ) -> tuple[Live, int] | None:
        """The session and turn of the first candidate that was an answer of ours to this principal."""
        remembered, unknown = None, candidates
        for place, link in enumerate(candidates):
            session_id, at_turn = self._by_link.get(link, ("", 0))
            live = self._live.get(session_id)
            if live is not None and not live.forgotten:
                remembered, unknown = (live, at_turn), candidates[:place]
                break
        # A shorter history that is remembered may be another session's, and the store have a longer one.
        stored = await self._stored_link(tenant_id, principal_id, unknown) if unknown else None
        if stored is not None or remembered is None or remembered[0].forgotten:
            return stored
        return remembered

    async def _stored_link(
        self, tenant_id: str, principal_id: str, candidates: Sequence[bytes]
    ) -> tuple[Live, int] | None:
        chain, sessions = tables.chain, tables.sessions

        def query(db: Connection) -> RowMapping | None:
            rows = db.execute(
                select(sessions, chain.c.link.label("link"), chain.c.turn_number.label("turn_number"))
                .join(sessions, chain.c.session_id == sessions.c.session_id)
                .where(chain.c.tenant_id == tenant_id, chain.c.link.in_(candidates))
                # A link is nobody's but its principal's; but which session it leads to is bound to nothing.
                .where(sessions.c.tenant_id == tenant_id, sessions.c.principal_id == principal_id)
            ).mappings()
            by_link = {bytes(row["link"]): row for row in rows}
            return next((by_link[link] for link in candidates if link in by_link), None)

        row = await self._store.read(query)
        found = None if row is None else await self._load(row)
        return None if row is None or found is None else (found, row["turn_number"])

    async def _load(self, row: RowMapping) -> Live | None:
        """The session of a row that was read; None: it was forgotten since."""
        session_id = row["session_id"]
        # First of all: that the row is this caller's is so far only what the database says.
        try:
            opened = self._rows.open(tables.sessions, row)
        except KeyMissing:
            if await self._what_is_stored(row["tree_id"], session_id) is None:
                return None
            raise
        while True:
            known = self._live.get(session_id)
            if known is not None:
                return known
            forgotten = self._forgotten
            stored = await self._what_is_stored(row["tree_id"], session_id)
            if stored is None:
                return None
            if forgotten == self._forgotten and session_id not in self._live:
                break
        live = Live(
            session_id=session_id,
            tenant_id=row["tenant_id"],
            principal_id=row["principal_id"],
            tree_id=row["tree_id"],
            client_id=text_or_none(opened["client_id"]) or None,
            epoch=stored.epoch,
            turns=stored.turns,
            origin=Origin(row["origin"]),
            parent_session_id=row["parent_session_id"],
            answered=stored.answered,
            stored=True,
            is_over=is_over(row["last_used_at"], row["over_at"]),
        )
        self._live[session_id] = live
        return live

    async def _what_is_stored(self, tree_id: str, session_id: str) -> _Stored | None:
        """What the store has of a session now; None: there is no such session any more."""
        sessions, trees, turns = tables.sessions, tables.trees, tables.turns
        finished = turns.c.session_id == session_id, turns.c.state == TurnState.COMPLETE.value

        def query(db: Connection) -> _Stored | None:
            number = db.execute(select(sessions.c.turns).where(sessions.c.session_id == session_id)).scalar()
            if number is None:
                return None
            epoch = db.execute(select(trees.c.epoch).where(trees.c.tree_id == tree_id)).scalar_one()
            answered = db.execute(select(func.max(turns.c.number)).where(*finished)).scalar_one()
            return _Stored(epoch, number, answered or 0)

        return await self._store.read(query)

    def _begin(
        self,
        tenant_id: str,
        principal_id: str,
        origin: Origin,
        *,
        client_id: str | None = None,
        parent: Live | None = None,
    ) -> Live:
        session_id = self._new_id("ses")
        live = Live(
            session_id=session_id,
            tenant_id=tenant_id,
            principal_id=principal_id,
            tree_id=parent.tree_id if parent is not None else own_tree(session_id),
            client_id=client_id,
            epoch=parent.epoch if parent is not None else 0,
            turns=0,
            origin=origin,
            parent_session_id=parent.session_id if parent is not None else None,
        )
        self._live[session_id] = live
        return live

    def _session(
        self, caller: Caller, model: str, live: Live, links: Sequence[bytes], continuation: Continuation | None
    ) -> Session:
        tenant_id = live.tenant_id
        if tenant_id in self._closed_to:  # no await from here to where the turn has its session
            raise TenantShredded
        isolation, cache_epoch = Isolation.SESSION, 0
        if caller.tenant is not None:
            isolation, cache_epoch = caller.tenant.isolation, caller.tenant.cache_epoch
        shared_salt = None
        if isolation is not Isolation.SESSION:
            said = isolation.value.encode(), str(cache_epoch).encode()
            shared_salt = self._vault.mac(tenant_id, KeyPurpose.SALT, "shared-salt", *said).hex()
        if live.label is None:
            live.label = self._labels.of(live.named)
        label = live.label
        self._labels.note(label, live.named)
        return Session(
            session_id=live.session_id,
            tenant_id=tenant_id,
            principal_id=live.principal_id,
            visible_id=live.client_id or live.session_id,
            salt=shared_salt if shared_salt is not None and isolation is Isolation.TENANT else self._own_salt(live),
            shared_salt=shared_salt if isolation is Isolation.TENANT_PREFIX else None,
            lease_label=label.lease,
            tenant_label=label.tenant,
            keeping=keeping(self._settings, caller.tenant, model),
            parent_lease_label=(
                "" if live.parent_session_id is None else lease_label(self._vault, tenant_id, live.parent_session_id)
            ),
            origin=live.origin,
            _live=live,
            _epoch=live.epoch + cache_epoch,  # neither ever falls: where the sum is the same, both are
            _was_over=live.is_over,
            _ends=live.ends,
            _links=links,
            _continuation=continuation,
        )

    def _own_salt(self, live: Live) -> str:
        if live.salt is None or live.salt[0] != live.epoch:
            said = live.principal_id.encode(), live.tree_id.encode(), str(live.epoch).encode()
            live.salt = live.epoch, self._vault.mac(live.tenant_id, KeyPurpose.SALT, "cache-salt", *said).hex()
        return live.salt[1]

    async def tier_key(self, tenant_label: str, lease_label: str) -> bytes:
        """The key of what the engine's tiers hold of a session, by the names that the engine knows.

        Raises:
            UnknownSession, KeyMissing: there is no such session, or it was forgotten: what tiers hold of it may go.
            LabelNotKnown: it is not among the sessions that are remembered, and not all were looked through now.
            VaultSealed: the vault is sealed.
        """
        named = await self._labels.find(Label(tenant_label, lease_label))
        if named is None:
            raise unknown_session("of that label")
        tenant_id, session_id = named
        live = self._live.get(session_id)
        if live is not None and live.unsure:
            async with live.lock:
                await self._make_sure(live)
        if live is not None and live.forgotten:
            raise unknown_session(session_id)
        if live is not None and not live.stored:  # its first turn runs: its key is made before it is stored
            self._vault.pending_session_key(tenant_id, session_id)
        return await asyncio.to_thread(self._vault.tier_key, session_id)

    # Writing a turn down

    async def record(
        self,
        session: Session,
        turn: Turn,
        outcome: Outcome,
        also: Sequence[Change] = (),
        *,
        engine: str | None = None,
        replica: str | None = None,
        template: str | None = None,
        served: Served | None = None,
        last: bool = False,
    ) -> Account:
        """Commit a turn, and `also` with it, in one transaction; what became of its prompt's tokens.

        Args:
            last: its client says that the session is over with it.
            engine: tells the life of the engine that ran it from others; None: not known.
            replica: tells the replica whose engine that was from others; None: not known.
            template: tells the chat template that it was written with from others; None: not known.
            served: from where the engine had what it did not compute of the prompt; None: not known.

        Raises:
            SessionForgotten: the session was forgotten while the turn ran; `also` is not written either.
            VaultSealed: the vault was sealed meanwhile; nothing was written.
            StoreFull, StoreBusy: nothing of the turn was written.
            StoreUnavailable, StoreConflict: nothing was, or the store could not say; it is asked before the next turn.
        """
        live = session._live
        async with live.lock:
            await self._make_sure(live)
            if live.forgotten:
                raise SessionForgotten(
                    "the turn cannot be kept",
                    cause="its session was forgotten while it ran",
                    remedy="Begin a new session",
                )
            number = live.turns + 1
            tip = self._tips.get(live.session_id)
            if tip is not None and tip.number != live.turns:
                tip = None  # it is not the turn before this one: that was written, and nobody was told
            link = self._link_of(session, turn, outcome)
            circumstances = Circumstances(
                self._block_size,
                engine,
                session.keeping.idle_timeout_s,
                session._epoch,
                session._was_over,
                served_known=outcome.cached_tokens is not None,
                template=template,
                served=served,
                paused_s=_paused_s(live, outcome),
                replica=replica,
                first_token_s=outcome.first_token_s,
            )
            ends = live.ends
            if live.stored:
                await self._rows.prepare(scope=live.session_id, purpose=KeyPurpose.SESSION)
            try:
                changes = self._session_changes(live, turn, outcome, number, last=last)
                written = write_turn(
                    self._rows,
                    self._new_id("trn"),
                    live,
                    turn,
                    outcome,
                    number,
                    link=link,
                    tip=tip,
                    circumstances=circumstances,
                )
                await self._store.write([*changes, *written.changes, *also])
            except BaseException:
                live.unsure = True
                if not live.stored:
                    self._vault.forget(live.session_id)  # the next try makes a key of its own
                    live.ends += 1  # and what tiers have of it is under this one
                raise
            finally:
                live.give_up(session._continuation)
            live.turns, live.stored = number, True
            if outcome.state is TurnState.COMPLETE:
                live.answered = number
            live.ran_until_s = None if outcome.ran_s is None else outcome.ran_s[1]
            if live.ends == ends:  # else: what was said meanwhile stands
                live.is_over = last
            live.ends += last
            if not self._vault.sealed:  # what it was sealed for is over otherwise
                self._tips.put(live.session_id, written.tip)
            if link is not None:
                _keep(self._by_link, link, (live.session_id, number), _KNOWN_LINKS)
            account = written.account
            if tip is not None and tip.said and account.diverged_at is not None:
                parted = await asyncio.to_thread(divergence_between, tip, written.tip, account)
                account = replace(account, divergence=parted)
            return account

    async def _make_sure(self, live: Live) -> None:
        """Where it is not known what was written of a session, ask the store. Under the session's lock.

        Raises:
            StoreBusy, StoreUnavailable: it is still not known.
        """
        if live.forgotten or not live.unsure:
            return
        stored = await self._what_is_stored(live.tree_id, live.session_id)
        if stored is not None:
            live.turns, live.answered, live.stored = stored.turns, stored.answered, True
        elif live.stored:
            live.forgotten = True
        live.unsure = False

    def forget_texts(self) -> None:
        """Remember nothing of what was said: the vault is sealed. The next turn of each session is written whole."""
        self._tips.clear()

    def turn_over(self, session: Session) -> None:
        """A turn has ended. Where it was not written down its client may ask again, and goes on with the session."""
        session._live.give_up(session._continuation)

    def _link_of(self, session: Session, turn: Turn, outcome: Outcome) -> bytes | None:
        if turn.kind is not TurnKind.CHAT:
            return None
        said = [*turn.messages, outcome.answer]
        return self._links(session.tenant_id, session.principal_id, said, session._links)[-1]

    def _session_changes(self, live: Live, turn: Turn, outcome: Outcome, number: int, *, last: bool) -> list[Change]:
        if live.stored:
            return next_changes(live, outcome, number, last=last)
        lookup = None
        if live.client_id is not None:
            lookup = self._client_id_lookup(live.tenant_id, live.principal_id, live.client_id)
        key = self._vault.pending_session_key(live.tenant_id, live.session_id)
        return first_changes(self._rows, live, turn, outcome, key=key, client_id_lookup=lookup, last=last)

    # Small things

    def _links(
        self, tenant_id: str, principal_id: str, messages: Sequence[Message], known: Sequence[bytes] = ()
    ) -> list[bytes]:
        return history_links(
            partial(self._vault.mac_chain, tenant_id, KeyPurpose.LOOKUP, "history"),
            principal_id,
            messages,
            known,
        )

    def _client_id_lookup(self, tenant_id: str, principal_id: str, client_id: str) -> bytes:
        return self._vault.mac(
            tenant_id, KeyPurpose.LOOKUP, "client-session-id", principal_id.encode(), client_id.encode()
        )

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._random_bytes(16).hex()}"

    def _remember(self, live: Live) -> None:
        _keep(self._recent, live.session_id, live, _LIVE_SESSIONS)

    def _let_go(self, live: Live) -> None:
        """Remember nothing of a session that was forgotten."""
        self._drop(live)
        self._vault.forget(live.session_id)

    def _drop(self, live: Live) -> None:
        """Have a session be asked for in the store, if it is there."""
        self._forgotten += 1
        self._recent.pop(live.session_id, None)
        self._live.pop(live.session_id, None)
        self._tips.drop(live.session_id)


def _paused_s(live: Live, outcome: Outcome) -> float | None:
    """How long before a turn the session's last one was over; negative: it was not."""
    if live.ran_until_s is None or outcome.ran_s is None:
        return None
    return outcome.ran_s[0] - live.ran_until_s


def _owner(caller: Caller) -> tuple[str, str]:
    tenant_id = caller.principal.tenant_id
    if tenant_id is None:
        raise TranscriptForbidden(
            "an administrator of the appliance holds no sessions",
            cause="sessions belong to a tenant's principals",
            remedy="Use an API key of a tenant: `holdfast key create`",
        )
    return tenant_id, caller.principal.principal_id


def _keep(kept: "OrderedDict[Any, Any]", key: Any, value: Any, bound: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > bound:
        kept.popitem(last=False)
