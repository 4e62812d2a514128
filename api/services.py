"""What a running gateway is made of: one value that every route is given.

Rules:

- `Services` is built once, by `api.server`, and never changes; what changes is in its parts.
- A sealed vault is a part like any other: whoever needs keys asks `services.vault.sealed` first, or lets it raise.
- The admin listener's application is `api.admin.routes.admin_app(services)`; `/healthz` is added to it by `api.server`.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from api.bodies import HeldBodies
from api.engine_watch import EngineWatch
from api.kv_watch import KvWatch
from api.metrics import Metrics
from api.turn_ends import TurnEnds
from api.waiting import WaitingRoom
from appliance.audit import NodeAudit
from appliance.audit.siem.exports import Exports
from appliance.audit.witnesses import Witnesses
from appliance.engine.client import EngineClient
from appliance.engine.launcher import EngineProcess
from appliance.errors import HoldfastError
from appliance.identity import Identity, Quotas
from appliance.randomness import RandomIds
from appliance.sessions import Ledger, Sessions, Shredding, Throwaways
from appliance.settings import Settings
from appliance.store import Store
from appliance.vault import Vault


class Interruptible(Protocol):
    """Something that runs for a tenant and can be broken off."""

    @property
    def tenant_id(self) -> str:
        """Whose it is."""

    def interrupt(self, why: HoldfastError | None) -> None:
        """End it soon; `why` is what its client is told, None when there is no client any more."""


@dataclass(slots=True)
class Lifecycle:
    """Where the gateway is between its start and its end.

    Attributes:
        started_at: epoch seconds.
        endpoint: the address that clients use, with the port that was really bound: `http://127.0.0.1:8321/v1`.
        draining: no new request is admitted; those that run are let finish.
        turns: those that run now.
        restores_told: what restores announced is in the audit log; none is announced while a gateway runs.
        engine_changes: what the engine serves, each time that has changed; nothing: it is lost.
        placing: how many turns have been read and are about to run.
        bodies: what requests that arrive hold in memory.
        unreleased: labels of sessions that the engine is still to let go of, each with the newest time that this was
            asked for, which is an object of its own.
        release_again: set when there are such.
    """

    started_at: float
    endpoint: str = ""
    draining: bool = False
    restores_told: bool = False
    turns: set[Interruptible] = field(default_factory=set)
    engine_changes: "asyncio.Queue[list[str]]" = field(default_factory=asyncio.Queue)
    placing: int = 0
    bodies: HeldBodies = field(default_factory=HeldBodies)
    unreleased: dict[str, object] = field(default_factory=dict)
    release_again: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of one gateway.

    Attributes:
        audit: where everything that happens is recorded before it counts.
        exports: what carries the audit log to SIEMs.
        witnesses: who co-signs its checkpoints over the network.
        engine: how the engine is spoken to; it may not be up.
        turn_ends: how the engine is told that turns ended.
        engine_process: the engine that this gateway started and watches; None when somebody else runs it.
        watch: whether the engine answers, and what it serves.
        kv: what the engine keeps.
        ledger: what the turns came to.
        template: tells the model's chat template from others; None: not known.
        replica: tells this gateway and its engine from others that share the database; None: not known.
        throwaways: tenants that a proof made for itself.
        shredding: tenants that are shredded, until that is in the audit log.
        waiting: where turns wait until it has room.
        now: wall clock, epoch seconds.
        monotonic: a clock that nobody sets, seconds.
        new_id: the next identifier of a request or a response.
    """

    settings: Settings
    vault: Vault
    store: Store
    audit: NodeAudit
    exports: Exports
    witnesses: Witnesses
    identity: Identity
    quotas: Quotas
    sessions: Sessions
    throwaways: Throwaways
    shredding: Shredding
    engine: EngineClient
    turn_ends: TurnEnds
    engine_process: EngineProcess | None
    watch: EngineWatch
    kv: KvWatch
    waiting: WaitingRoom
    metrics: Metrics
    lifecycle: Lifecycle
    template: str | None = None
    replica: str | None = None
    ledger: Ledger = field(default_factory=Ledger)
    now: Callable[[], float] = field(default=time.time)
    monotonic: Callable[[], float] = field(default=time.monotonic)
    new_id: Callable[[], str] = field(default_factory=RandomIds)

    @property
    def engine_life(self) -> str | None:
        """Tells one life of the engine from another; None: somebody else runs it."""
        process = self.engine_process
        return None if process is None else f"{self.lifecycle.started_at:.3f}/{process.restarts}"
