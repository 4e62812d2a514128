"""What was written down of sessions: who may know of one, who may read it, and how it reads.

Rules:

- A client sees its own sessions; whoever watches over a tenant sees the tenant's; one of the appliance sees all.
- To know of a session is not to read it: another principal's text needs the scope `transcript:read`.
- A session that may not be known of is as missing as one that never was.
- Whose a session is, is believed of a row that opens, and of no other.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from pydantic_core import from_json
from sqlalchemy import exists, literal, select
from sqlalchemy.engine import RowMapping

from appliance.errors import Fault, HoldfastError
from appliance.identity import Caller, Permission, Role
from appliance.sessions.deltas import Reader
from appliance.sessions.labels import lease_label
from appliance.sessions.misses import (
    ExplainedTurn,
    Finding,
    Ran,
    account_of,
    divergence_of,
    findings_of,
)
from appliance.sessions.removal import SHREDDED
from appliance.sessions.turn import Message, Origin, TurnState
from appliance.store import RowCipher, Store, tables
from appliance.vault import KeyMissing, Vault

EXPLAINED_TURNS = 1000  # at most, in one answer
TRANSCRIPT_TURNS = 1000  # at most, in one answer
TRANSCRIPT_TOKENS = 1_000_000  # prompts and answers together, at most, in one answer of more than one turn
NO_TURN = 1 << 31  # more than a turn's number can be
_TURNS_AT_A_TIME = 100  # are read before whoever waits for the interpreter, or wants it to stop, is looked after

T = TypeVar("T")


class UnknownSession(HoldfastError):
    """There is no such session, or it is not this caller's to see."""

    code: ClassVar[str] = "session_not_found"
    fault: ClassVar[Fault] = Fault.MISSING


class TranscriptForbidden(HoldfastError):
    """The caller may know of the session but not read its text."""

    code: ClassVar[str] = "transcript_forbidden"
    fault: ClassVar[Fault] = Fault.DENIED


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """What may be known of a session without reading it. Times in epoch seconds, counts in tokens."""

    session_id: str
    tenant_id: str
    principal_id: str
    tree_id: str
    parent_session_id: str | None
    model: str
    origin: Origin
    turns: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    created_at: float
    last_used_at: float
    lease_label: str


@dataclass(frozen=True, slots=True)
class TranscriptTurn:
    """One turn as it was said. `new_messages` are those that the turn before did not have."""

    number: int
    response_id: str
    model: str
    state: TurnState
    new_messages: list[Message]
    answer: Message
    parameters: dict[str, Any]
    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str | None
    started_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class Transcript:
    """A session and what was said in it.

    Attributes:
        turns: the newest ones of those asked for, in order.
        truncated: there were turns before them.
    """

    session: SessionSummary
    client_id: str | None
    turns: list[TranscriptTurn]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a session's prompts had to be computed. Holds no word of what was said.

    Attributes:
        turns: the newest ones, in order.
        findings: of those turns.
        truncated: there were turns before them.
    """

    session: SessionSummary
    turns: list[ExplainedTurn]
    findings: list[Finding]
    truncated: bool


@dataclass(slots=True)
class _Reading:
    """A transcript in the making, fed with the turns of a session in order.

    Attributes:
        limit: so many turns are wanted.
        first: the number of the first that may be one of them.
        number: of the turn that was read last.
        tokens: of the turns that are kept.
    """

    limit: int
    first: int
    number: int = 0
    tokens: int = 0
    reader: Reader = field(default_factory=Reader)
    turns: deque[TranscriptTurn] = field(default_factory=deque)


@dataclass(slots=True)
class _Explaining:
    """An explanation in the making, fed with the turns of a session in order.

    Attributes:
        first: the number of the first turn that is explained.
        number: of the turn that was read last.
    """

    first: int
    number: int = 0
    reader: Reader = field(default_factory=Reader)
    before: tuple[Ran, list[Message], dict[str, Any], int] | None = None
    turns: list[ExplainedTurn] = field(default_factory=list)


class Archive:
    """The sessions that the store holds, for whoever may see them."""

    def __init__(self, store: Store, vault: Vault) -> None:
        self._store = store
        self._vault = vault
        self._rows = RowCipher(vault)

    async def summaries(
        self, caller: Caller, *, tenant_id: str | None = None, limit: int = 200
    ) -> list[SessionSummary]:
        """The sessions that `caller` may know of, last used first, at most `limit`.

        A client sees its own; an operator, an auditor or an administrator of a tenant sees the tenant's; one of the
        appliance sees all.

        Raises:
            TamperedValue: a row was changed outside the appliance; it is named.
        """
        sessions = tables.sessions
        query = select(sessions).order_by(sessions.c.last_used_at.desc()).limit(limit)
        if caller.principal.tenant_id is not None:
            query = query.where(sessions.c.tenant_id == caller.principal.tenant_id)
        elif tenant_id is not None:
            query = query.where(sessions.c.tenant_id == tenant_id)
        if caller.principal.role is Role.CLIENT:
            query = query.where(sessions.c.principal_id == caller.principal.principal_id)
        rows = await self._store.read(lambda db: db.execute(query).mappings().all())
        return await self._made_of(rows, self._summary)

    async def summary(self, caller: Caller, session_id: str) -> SessionSummary:
        """What may be known of one session.

        Raises:
            UnknownSession: there is none, or it is not this caller's to know of.
        """
        return self._summary(await self.visible_row(caller, session_id))

    async def transcript(
        self, caller: Caller, session_id: str, *, before: int | None = None, limit: int = TRANSCRIPT_TURNS
    ) -> Transcript:
        """What was said in a session.

        Args:
            before: only turns of a smaller number.
            limit: so many turns at most, the newest; fewer where they have more than `TRANSCRIPT_TOKENS`.

        Raises:
            UnknownSession: there is none, or it is not this caller's to know of.
            TranscriptForbidden: it is another principal's, and the caller lacks `transcript:read`.
            TamperedValue: a row was changed outside the appliance; it is named.
        """
        row = await self.visible_row(caller, session_id)
        if row["principal_id"] != caller.principal.principal_id and not may_read_transcripts(caller):
            raise TranscriptForbidden(
                f"the transcript of {session_id} may not be read",
                cause="it belongs to another principal, and reading it needs the scope transcript:read",
                remedy="Ask an administrator for a key with that scope",
            )
        # Where none is named all that the store has is read: a turn that was moved here from elsewhere does not open.
        last = (NO_TURN if before is None else before) - 1
        reading = _Reading(limit, first=max(1, min(last, row["turns"]) - limit + 1))
        while rows := await self._turns_between(session_id, reading.number, last):
            await asyncio.to_thread(self._read_turns, reading, rows)
        client_id = self._rows.open(tables.sessions, row)["client_id"]
        turns = list(reading.turns)
        truncated = bool(turns) and turns[0].number > 1
        return Transcript(self._summary(row), text_or_none(client_id) or None, turns, truncated)

    async def explanation(self, caller: Caller, session_id: str, *, limit: int = EXPLAINED_TURNS) -> Explanation:
        """Why the session's prompts had to be computed, turn by turn, and what could be done about it.

        Args:
            limit: so many turns at most, the newest.

        Raises:
            UnknownSession: there is none, or it is not this caller's to know of.
            TamperedValue: a row was changed outside the appliance; it is named.
        """
        row = await self.visible_row(caller, session_id)
        explaining = _Explaining(first=max(1, row["turns"] - limit + 1))
        while rows := await self._turns_between(session_id, explaining.number, row["turns"]):
            await asyncio.to_thread(self._explain, explaining, rows)
        explained = explaining.turns
        return Explanation(self._summary(row), explained, findings_of(explained), truncated=explaining.first > 1)

    async def _turns_between(self, session_id: str, after: int, last: int) -> Sequence[RowMapping]:
        turns = tables.turns
        query = (
            select(turns)
            .where(turns.c.session_id == session_id, turns.c.number > after, turns.c.number <= last)
            .order_by(turns.c.number)
            .limit(_TURNS_AT_A_TIME)
        )
        return await self._store.read(lambda db: db.execute(query).mappings().all())

    async def visible_row(self, caller: Caller, session_id: str) -> RowMapping:
        sessions = tables.sessions
        query = select(sessions).where(sessions.c.session_id == session_id)
        principal = caller.principal
        if principal.tenant_id is not None:
            query = query.where(sessions.c.tenant_id == principal.tenant_id)
        if principal.role is Role.CLIENT and not may_read_transcripts(caller):
            query = query.where(sessions.c.principal_id == principal.principal_id)
        row = await self._store.read(lambda db: db.execute(query).mappings().first())
        verified = await self._made_of([row] if row is not None else [], lambda row: row)
        if not verified:
            raise unknown_session(session_id)
        return verified[0]

    async def _made_of(self, rows: Sequence[RowMapping], make: Callable[[RowMapping], T]) -> list[T]:
        """What `make` makes of each session's row that opens. One that went since it was read is left out.

        Raises:
            TamperedValue: one was changed outside the appliance; it is named.
            KeyMissing: the key of one that is still there is not.
        """
        made, without_key = await asyncio.to_thread(self._open_each, rows, make)
        if without_key:
            sessions = tables.sessions
            # A tenant's that was shredded is gone, though its rows may still be on their way.
            shredded = exists().where(tables.meta.c.name == literal(SHREDDED) + sessions.c.tenant_id)
            query = select(sessions.c.session_id).where(sessions.c.session_id.in_(without_key), ~shredded)
            still_there = set(await self._store.read(lambda db: db.execute(query).scalars().all()))
            made += [self._opened(row, make) for row in rows if row["session_id"] in still_there]
        return made

    def _open_each(self, rows: Sequence[RowMapping], make: Callable[[RowMapping], T]) -> tuple[list[T], list[str]]:
        """What `make` makes of each row that opens, and the sessions whose key is not there."""
        made: list[T] = []
        without_key: list[str] = []
        for row in rows:
            try:
                made.append(self._opened(row, make))
            except KeyMissing:
                without_key.append(row["session_id"])
        return made, without_key

    def _opened(self, row: RowMapping, make: Callable[[RowMapping], T]) -> T:
        self._rows.open(tables.sessions, row)
        return make(row)

    def _read_turns(self, reading: _Reading, rows: Sequence[RowMapping]) -> None:
        """Go on with `rows`."""
        for stored in rows:
            opened = self._rows.open(tables.turns, stored)
            reading.number = number = stored["number"]
            answer = from_json(_bytes(opened["response"]))
            request, token_ids = _bytes(opened["request"]), _bytes(opened["token_ids"])
            if number < reading.first:
                reading.reader.skip(number, request, answer, token_ids)
                continue
            read = reading.reader.add(number, request, answer, token_ids)
            reading.tokens += len(read.token_ids)
            while reading.turns and (reading.tokens > TRANSCRIPT_TOKENS or len(reading.turns) == reading.limit):
                dropped = reading.turns.popleft()
                reading.tokens -= len(dropped.prompt_token_ids) + len(dropped.completion_token_ids)
            reading.turns.append(
                TranscriptTurn(
                    number=number,
                    response_id=stored["response_id"],
                    model=stored["model"],
                    state=TurnState(stored["state"]),
                    new_messages=read.messages[read.shared :],
                    answer=answer,
                    parameters=read.parameters,
                    prompt_token_ids=read.prompt_token_ids.tolist(),
                    completion_token_ids=read.completion_token_ids.tolist(),
                    prompt_tokens=stored["prompt_tokens"],
                    cached_tokens=stored["cached_tokens"],
                    completion_tokens=stored["completion_tokens"],
                    finish_reason=stored["finish_reason"],
                    started_at=stored["started_at"],
                    ended_at=stored["ended_at"],
                )
            )

    def _explain(self, explaining: _Explaining, rows: Sequence[RowMapping]) -> None:
        """Go on with `rows`."""
        reader = explaining.reader
        for stored in rows:
            opened = self._rows.open(tables.turns, stored)
            explaining.number = number = stored["number"]
            answer = from_json(_bytes(opened["response"]))
            request, token_ids = _bytes(opened["request"]), _bytes(opened["token_ids"])
            if number < explaining.first - 1:
                reader.skip(number, request, answer, token_ids)
                continue
            read = reader.add(number, request, answer, token_ids)
            now = Ran(
                stored["model"],
                read.token_ids,
                stored["prompt_tokens"],
                stored["cached_tokens"] if read.circumstances.served_known else None,
                stored["started_at"],
                stored["ended_at"],
                read.circumstances,
            )
            before = explaining.before
            explaining.before = now, [*read.messages, answer], read.parameters, read.prompt_length
            if number < explaining.first:
                continue
            account = account_of(
                None if before is None else before[0],
                now,
                shared=read.shared_ids,
                first=number == 1,
                history_came_again=before is not None and read.shared == len(before[1]),
            )
            divergence = None
            if before is not None:
                divergence = divergence_of(
                    account,
                    before[1:],
                    (read.messages, read.parameters),
                    same_messages=read.shared,
                    token_ids=(before[0].token_ids, read.prompt_token_ids),
                )
            explaining.turns.append(
                ExplainedTurn(
                    number, stored["started_at"], account, divergence, first_token_s=read.circumstances.first_token_s
                )
            )

    def _summary(self, row: RowMapping) -> SessionSummary:
        return SessionSummary(
            session_id=row["session_id"],
            tenant_id=row["tenant_id"],
            principal_id=row["principal_id"],
            tree_id=row["tree_id"],
            parent_session_id=row["parent_session_id"],
            model=row["model"],
            origin=Origin(row["origin"]),
            turns=row["turns"],
            prompt_tokens=row["prompt_tokens"],
            cached_tokens=row["cached_tokens"],
            completion_tokens=row["completion_tokens"],
            created_at=row["created_at"],
            last_used_at=row["last_used_at"],
            lease_label=lease_label(self._vault, row["tenant_id"], row["session_id"]),
        )


def may_read_transcripts(caller: Caller) -> bool:
    granted = caller.principal.permissions | (caller.key.scopes.permissions if caller.key is not None else frozenset())
    return Permission.TRANSCRIPT_READ in granted


def unknown_session(session_id: str) -> UnknownSession:
    return UnknownSession(
        f"there is no session {session_id}",
        cause="no session has that id, or it was forgotten, or it is not yours to see",
        remedy="`holdfast session list` names the sessions that you may see",
    )


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"an encrypted column opened as {type(value).__name__}")
    return value


def text_or_none(value: object) -> str | None:
    return value.decode() if isinstance(value, bytes) else None
