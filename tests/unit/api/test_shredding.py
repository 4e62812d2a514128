"""A tenant is shredded while it serves: its turns end, its keys open nothing, and that it was shredded is recorded."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import Connection, Select, func, select

from api import shredding
from api.app import create_app
from api.shredding import finish, keep_finishing, shred_tenant
from appliance.audit import Actor, AuditUnavailable, Event, NodeAudit
from appliance.audit.events import Scope
from appliance.identity import Role, Scopes, Tenant
from appliance.store import tables
from appliance.vault import SYSTEM_SCOPE, KeyMissing, Vault, VaultSealed
from tests.unit.api.test_failed_turns import HELLO, Answer, Gateway, serving, stub, until

pytestmark = pytest.mark.anyio

ADMINISTRATOR = Actor("principal", "prn_1", "admin")
ENDLESS = '{"chunks": 10000, "pause_s": 0.01}'


@dataclass(slots=True)
class Log:
    """An audit log in a list, with the vault's keys; or one that cannot be written."""

    vault: Vault
    events: list[Event] = field(default_factory=list)
    counted: list[Event] = field(default_factory=list)
    is_full: bool = False
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    error: object = None

    def begin(self, *events: Event) -> "asyncio.Future[int]":
        recorded: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        try:
            for event in events:
                self.vault.audit_key_id(event.scope(SYSTEM_SCOPE))
            if self.is_full:
                raise AuditUnavailable("the log cannot be written", cause="a test", remedy="")
        except (KeyMissing, AuditUnavailable) as error:
            recorded.set_exception(error)
        else:
            self.events += events
            recorded.set_result(len(self.events))
        return recorded

    async def record(self, *events: Event, privileged: bool = False) -> int:
        assert privileged == all(event.kind.scope is Scope.SYSTEM for event in events)
        return await self.begin(*events)

    def count(self, event: Event) -> None:
        self.counted.append(event)

    def told(self, action: str) -> list[Event]:
        return [event for event in self.events if event.kind.action == action]


@dataclass(slots=True)
class World:
    """A gateway that serves, its log, its first tenant, and the API key of another one."""

    gateway: Gateway
    log: Log
    tenant: Tenant
    stranger: Gateway

    async def shred(self) -> shredding.Shredded:
        return await shred_tenant(self.gateway.services, self.tenant.tenant_id, ADMINISTRATOR, "uid=1000")


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.chdir(tmp_path)  # the engine's socket has a short name
    async with serving(tmp_path) as made:
        log = Log(made.services.vault)
        services = replace(made.services, audit=cast("NodeAudit", log))
        (tenant,) = await services.identity.tenants()
        other = await services.identity.create_tenant("other")
        principal = await services.identity.create_principal(other, "agent", Role.CLIENT)
        _, secret = await services.identity.create_key(principal, Scopes())
        app = create_app(services)
        gateway = replace(made, app=app, services=services)
        yield World(gateway, log, tenant, replace(gateway, api_key=secret))


async def _stored(world: World) -> dict[str, int]:
    """How many rows there are of the tenant's."""
    found = {}
    for table in (tables.sessions, tables.turns, tables.trees, tables.chain, tables.api_keys, tables.principals):
        query = select(func.count()).select_from(table).where(table.c.tenant_id == world.tenant.tenant_id)
        found[table.name] = await world.gateway.services.store.read(partial(_number, query))
    return found


def _number(query: Select[int], db: Connection) -> int:
    return db.execute(query).scalar_one()


def _code(answer: Answer) -> str:
    return str(json.loads(answer.body.removeprefix(b"data: ").partition(b"\n\n")[0])["error"]["code"])


async def test_what_is_there_of_it_goes_and_the_record_says_who_shredded_what(world: World) -> None:
    assert (await world.gateway.ask(HELLO)).status == 200
    assert (await world.gateway.ask(stub("{}"))).status == 200
    shredded = await world.shred()
    assert (shredded.tenant.sessions, shredded.tenant.turns) == (2, 2)
    assert shredded.erased
    assert shredded.released
    assert set((await _stored(world)).values()) == {0}
    (event,) = world.log.told("tenant.shredded")
    assert event.kind.scope is Scope.SYSTEM
    assert event.target == ("tenant", world.tenant.tenant_id)
    assert (event.actor, event.source, event.details) == (ADMINISTRATOR, "uid=1000", {"erased": "true"})
    assert event.counts == {"sessions": 2, "turns": 2}
    assert await world.gateway.services.shredding.unfinished() == []
    refused = await world.gateway.ask(HELLO)
    assert (refused.status, _code(refused)) == (401, "invalid_api_key")
    assert (await world.stranger.ask(HELLO)).status == 200
    assert world.gateway.services.ledger.sums_of.keys() == {
        each.tenant_id for each in await world.gateway.services.identity.tenants()
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_turns_that_run_are_broken_off_and_recorded_before_and_nobody_elses_are(
    world: World, stream: bool
) -> None:
    services, answer, other, leave = world.gateway.services, Answer(), Answer(), asyncio.Event()
    asking = asyncio.create_task(world.gateway.ask(stub(ENDLESS), stream=stream, answer=answer))
    others = asyncio.create_task(world.stranger.ask(stub(ENDLESS), stream=True, answer=other, leave=leave))
    await until(lambda: len(services.lifecycle.turns) == 2 and other.status == 200)
    if stream:
        await until(lambda: answer.status == 200)
    await world.shred()
    await asking
    assert (answer.status, b"tenant_shredded" in answer.body) == (200 if stream else 401, True)
    (interrupted,) = world.log.told("turn.interrupted")
    assert (interrupted.tenant_id, interrupted.reason) == (world.tenant.tenant_id, "tenant_shredded")
    assert set((await _stored(world)).values()) == {0}
    assert not others.done()
    leave.set()
    await others


async def test_a_request_that_was_let_in_before_begins_no_turn_after(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = world.gateway.services
    resolve, is_there, may_go_on = services.sessions.resolve, asyncio.Event(), asyncio.Event()

    async def at_the_gate(*given: Any) -> Any:
        is_there.set()
        await may_go_on.wait()
        return await resolve(*given)

    monkeypatch.setattr(services.sessions, "resolve", at_the_gate)
    asking = asyncio.create_task(world.gateway.ask(HELLO))
    await is_there.wait()
    shredded = await world.shred()
    may_go_on.set()
    answer = await asking
    assert answer.status == 404
    assert _code(answer) == "key_missing"
    assert shredded.tenant.turns == 0
    assert set((await _stored(world)).values()) == {0}
    (refused,) = world.log.counted
    assert refused.reason == "key_missing", "its tenant's key seals nothing any more: it is counted"


async def test_a_turn_that_does_not_end_is_waited_for_no_longer_than_a_moment_and_not_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = world.gateway.services
    record, is_recording, may_go_on = services.sessions.record, asyncio.Event(), asyncio.Event()

    async def at_the_gate(*given: Any, **named: Any) -> Any:
        is_recording.set()
        await may_go_on.wait()
        return await record(*given, **named)

    monkeypatch.setattr(services.sessions, "record", at_the_gate)
    monkeypatch.setattr(shredding, "_TURNS_END_S", 0.0)
    asking = asyncio.create_task(world.gateway.ask(HELLO))
    await is_recording.wait()
    await world.shred()
    may_go_on.set()
    answer = await asking
    assert (answer.status, _code(answer)) == (409, "session_forgotten")
    assert set((await _stored(world)).values()) == {0}


async def test_what_could_not_be_recorded_is_recorded_as_soon_as_it_can_be(world: World) -> None:
    services = world.gateway.services
    world.log.is_full = True
    with pytest.raises(AuditUnavailable):
        await world.shred()
    assert set((await _stored(world)).values()) == {0}
    assert (await world.gateway.ask(HELLO)).status == 401
    (left,) = await services.shredding.unfinished()
    assert services.shredding.left.is_set()
    pauses: list[float] = []

    async def a_moment(seconds: float) -> None:
        pauses.append(seconds)
        world.log.is_full = False

    finishing = asyncio.create_task(keep_finishing(services, a_moment))
    await asyncio.sleep(0)
    assert world.log.told("tenant.shredded") == [], "nobody has opened the vault"
    world.log.is_full = True
    world.log.opened.set()
    await until(lambda: bool(world.log.told("tenant.shredded")))
    finishing.cancel()
    await asyncio.wait([finishing])
    (event,) = world.log.told("tenant.shredded")
    assert event.target == ("tenant", left.tenant_id)
    assert pauses == [shredding._AGAIN_S]


async def test_a_record_of_it_is_never_in_plaintext(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    services = world.gateway.services
    world.log.is_full = True
    with pytest.raises(AuditUnavailable):
        await world.shred()
    world.log.is_full = False
    erase = services.store.erasures.erase

    async def while_somebody_seals() -> bool:
        services.vault.seal()
        return await erase()

    monkeypatch.setattr(services.store.erasures, "erase", while_somebody_seals)
    with pytest.raises(VaultSealed):
        await finish(services)
    assert world.log.told("tenant.shredded") == []


async def test_an_engine_that_cannot_be_reached_is_told_later(world: World) -> None:
    services = world.gateway.services
    assert (await world.gateway.ask(HELLO)).status == 200
    await services.engine.close()
    os.unlink("engine.sock")  # noqa: PTH108  (a path's is for a thread)
    shredded = await world.shred()
    assert not shredded.released
    assert len(services.lifecycle.unreleased) == 1
    assert services.lifecycle.release_again.is_set()
    assert len(world.log.told("tenant.shredded")) == 1
