"""What the tests of sessions are made with."""

import dataclasses
from pathlib import Path
from typing import Any

from appliance.identity import Caller, Isolation, Permission, Principal, Role, Scopes, Tenant
from appliance.identity.types import ApiKey
from appliance.sessions import (
    Account,
    Outcome,
    Session,
    SessionHints,
    Sessions,
    Turn,
    TurnKind,
    TurnState,
)
from appliance.settings import SessionSettings
from appliance.store import DatabaseKeys, Store, key_changes
from appliance.vault import KeyRecord, RootKey, Vault

SYSTEM = {"role": "system", "content": "You are terse."}
HELLO = {"role": "user", "content": "My name is Zanzibarra."}


class World:
    """A store, a vault and the sessions over them; two tenants with their keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store.open(f"sqlite:///{folder / 'holdfast.db'}")
        self.vault = Vault(DatabaseKeys(self.store))
        self.vault.open(RootKey(b"r" * 32))
        for tenant in ("ten_1", "ten_2"):
            self.add_keys(self.vault.new_tenant_keys(tenant))
        self.clock = 1_000.0
        self.sessions = self.reopened()

    def reopened(self) -> Sessions:
        """The sessions as another process would find them."""
        settings = SessionSettings(idle_timeout_s=15.0)
        return Sessions(self.store, self.vault, settings, block_size=4, now=lambda: self.clock)

    def add_keys(self, records: list[KeyRecord]) -> None:
        self.store.write_blocking(key_changes(records))

    def files(self) -> bytes:
        return b"".join(path.read_bytes() for path in sorted(self.folder.iterdir()))


def caller(
    principal_id: str = "prn_1", tenant_id: str = "ten_1", *, role: Role = Role.CLIENT, reads: bool = False
) -> Caller:
    permissions = frozenset({Permission.TRANSCRIPT_READ}) if reads else frozenset[Permission]()
    tenant = Tenant(
        tenant_id=tenant_id, name=tenant_id, idle_timeout_s=None, isolation=Isolation.SESSION, created_at=0.0
    )
    principal = Principal(
        principal_id=principal_id, tenant_id=tenant_id, name=principal_id, role=role, permissions=frozenset()
    )
    key = ApiKey(
        key_id="ak_1",
        tenant_id=tenant_id,
        principal_id=principal_id,
        label=None,
        scopes=Scopes(permissions=permissions),
        created_at=0.0,
        expires_at=None,
        revoked_at=None,
    )
    return Caller(principal=principal, tenant=tenant, key=key)


def chat(*messages: dict[str, Any], **hints: Any) -> Turn:
    return Turn(TurnKind.CHAT, "demo", messages, {"temperature": 0}, SessionHints(**hints))


def outcome(text: str, *, ids: tuple[list[int], list[int]] = ([1, 2, 3], [4]), response: str = "chatcmpl-1") -> Outcome:
    return Outcome(
        response_id=response,
        state=TurnState.COMPLETE,
        answer={"role": "assistant", "content": text},
        prompt_token_ids=ids[0],
        completion_token_ids=ids[1],
        prompt_tokens=len(ids[0]),
        cached_tokens=0,
        completion_tokens=len(ids[1]),
        finish_reason="stop",
        started_at=1.0,
        ended_at=2.0,
    )


async def say(sessions: Sessions, who: Caller, turn: Turn, answer: str, response: str = "chatcmpl-1") -> Session:
    session = await sessions.resolve(who, turn)
    await sessions.record(session, turn, outcome(answer, response=response))
    return session


async def end(sessions: Sessions, who: Caller, name: str) -> set[str]:
    ended = await sessions.ending(who, name)
    await sessions.end(ended)
    return set(ended.session_ids)


async def family(world: World) -> tuple[Session, Session, Session, Session]:
    """A session, two agents of its, and a session of the same principal's that is none of them."""
    parent = await say(world.sessions, caller(), chat(HELLO, client_id="job"), "Hello.")
    one, two = [
        await say(world.sessions, caller(), chat(HELLO, client_id=name, parent_client_id="job"), "Hello.")
        for name in ("agent-1", "agent-2")
    ]
    other = await say(world.sessions, caller(), chat(HELLO, client_id="other"), "Hello.")
    return parent, one, two, other


BLOCK = 4


def explaining(world: World) -> Sessions:
    """As `World.reopened`, with an engine whose blocks are known."""
    return Sessions(
        world.store,
        world.vault,
        SessionSettings(idle_timeout_s=15.0),
        block_size=BLOCK,
        now=lambda: world.clock,
    )


async def ask(
    sessions: Sessions,
    turn: Turn,
    *,
    tokens: int,
    cached: int | None = 0,
    at: float = 0.0,
    steady: float | None = None,
    engine: str = "one",
    replica: str | None = None,
) -> tuple[Session, Account]:
    """A turn of the principal `prn_1` with a prompt of so many tokens; each is the beginning of the next longer one.

    It takes a second, from `at` by the wall clock and from `steady` by one that nobody sets, where that is known.
    """
    session = await sessions.resolve(caller(), turn)
    said = dataclasses.replace(
        outcome("Hello.", ids=(list(range(tokens)), [tokens])),
        cached_tokens=cached,
        started_at=at,
        ended_at=at + 1,
        ran_s=None if steady is None else (steady, steady + 1),
    )
    return session, await sessions.record(session, turn, said, engine=engine, replica=replica)
