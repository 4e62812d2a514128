"""Who asks the admin API for something, as its routes have it.

Rules:

- What an asker did is in the audit log, under the asker's id, before the answer is given. The event names the request
  and the key that was brought; what is about a session can be searched for by the session.
- A tenant's principal acts on its own tenant: that is the event's where no other is named.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import Depends, Request

from api import trail
from api.admin import types
from api.services import Services
from appliance.audit import Actor, Event, NodeAudit, Outcome
from appliance.audit.events import EventClass
from appliance.errors import Fault, HoldfastError
from appliance.identity import Caller, Tenant, UnknownIdentity
from appliance.vault import VaultSealed

Endpoints = Mapping[tuple[str, str], tuple[Callable[..., Awaitable[Any]], type[types.Wire] | None]]
"""Method and path, to what answers and the schema of the answer."""
_LOG = logging.getLogger("holdfast.gateway")
_Answer = TypeVar("_Answer")


@dataclasses.dataclass(slots=True)
class Asker:
    """Who a request is made for.

    Attributes:
        caller: None: the gateway's own user, nameless: while the vault is sealed, and where the store is not asked.
        request_id: of what is asked for.
        came_s: when it was asked, by a clock that nobody sets.
        failure_told: that the request did not succeed, and why, was recorded by who knows more than its error says.
    """

    caller: Caller | None
    source: str
    audit: NodeAudit
    request_id: str = ""
    failure_told: bool = False
    came_s: float = dataclasses.field(default_factory=time.monotonic)

    async def did(
        self,
        kind: EventClass,
        target: tuple[str, str],
        *,
        outcome: Outcome = Outcome.SUCCESS,
        reason: str = "",
        tenant_id: str | None = None,
        counts: Mapping[str, int] | None = None,
        details: Mapping[str, str] | None = None,
    ) -> None:
        """Record what the asker did, or asked for.

        Args:
            target: what it was done to: kind and id. A session is what the event is found by, too.
            tenant_id: whose that is; None: the asker's own tenant's, if it has one.

        Raises:
            AuditUnavailable: it is not in the log.
        """
        event = self._doing(kind, target, outcome, reason, tenant_id, counts, details)
        await self.audit.record(event, privileged=True)
        self.failure_told |= outcome is not Outcome.SUCCESS

    def was_cut_off(self, kind: EventClass, target: tuple[str, str], sent_bytes: int, error: BaseException) -> None:
        """Note that what an answer had begun to give out did not come to its end.

        Waits for nothing: who is cut off is cancelled, too. What cannot be recorded is logged.
        """
        gone = isinstance(error, asyncio.CancelledError | GeneratorExit)
        reason = AskerGone.code if gone else getattr(error, "code", HoldfastError.code)
        event = self._doing(kind, target, Outcome.FAILURE, str(reason), None, {"bytes": sent_bytes}, None)
        self.audit.begin(event, privileged=True).add_done_callback(_logged)

    def _doing(
        self,
        kind: EventClass,
        target: tuple[str, str],
        outcome: Outcome,
        reason: str,
        tenant_id: str | None,
        counts: Mapping[str, int] | None,
        details: Mapping[str, str] | None,
    ) -> Event:
        caller = self.caller
        actor = Actor("user", self.source) if caller is None else trail.actor_of(caller)
        own_tenant_id = None if caller is None else caller.principal.tenant_id
        brought = {} if caller is None or caller.key is None else {"key_id": caller.key.key_id}
        return Event(
            kind,
            actor,
            outcome,
            tenant_id=tenant_id or own_tenant_id or "",
            source=self.source,
            target=target,
            reason=reason,
            request_id=self.request_id,
            session_id=target[1] if target[0] == "session" else "",
            counts={"duration_ms": round(1000 * (time.monotonic() - self.came_s)), **(counts or {})},
            details={**(details or {}), **brought},
        )

    def looks(self) -> None:
        """Have it counted that the asker brought a key, where what it asks for is no event of its own."""
        if self.caller is not None and self.caller.key is not None:
            self.audit.count(trail.looked(self.caller, self.source))

    def __str__(self) -> str:
        return "the gateway's own user" if self.caller is None else self.caller.principal.principal_id

    @property
    def named(self) -> Caller:
        """The caller.

        Raises:
            VaultSealed: nobody has a name now.
        """
        if self.caller is None:
            raise VaultSealed
        return self.caller


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def _who(request: Request) -> Asker:
    asker: Asker = request.state.asker
    return asker


ServicesOf = Annotated[Services, Depends(_services)]
AskerOf = Annotated[Asker, Depends(_who)]


class NoSuchThing(HoldfastError, LookupError):
    """A tenant or a key that does not exist, or that the caller may not know of."""

    code: ClassVar[str] = "admin_not_found"
    fault: ClassVar[Fault] = Fault.MISSING


class AskerGone(HoldfastError):
    """Who asked hung up before there was an answer. Nobody reads this."""

    code: ClassVar[str] = "asker_gone"
    fault: ClassVar[Fault] = Fault.CALLER


async def chosen_tenant(services: Services, caller: Caller, named: str | None) -> Tenant | None:
    """The tenant that a request speaks of; None: all of them, which only a principal of the appliance can mean.

    To a tenant's principal another tenant is as unknown as one that never was: its row is not even looked for.
    """
    own = caller.tenant
    if own is not None:
        if named in (None, own.tenant_id, own.name):
            return own
        raise unknown("tenant", str(named), "tenant list")
    if named is None:
        return None
    try:
        return await services.identity.tenant(named)
    except UnknownIdentity:
        raise unknown("tenant", named, "tenant list") from None


async def while_there(request: Request, answering: Coroutine[Any, Any, _Answer]) -> _Answer:
    """What `answering` returns; when who asked hangs up before, it is cancelled, and over when this raises.

    Raises:
        AskerGone: who asked hung up.
    """
    work = asyncio.create_task(answering)
    hanging_up = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait((work, hanging_up), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        work.cancel()
        await asyncio.wait((work,))
        if not work.cancelled() and (failure := work.exception()) is not None:
            _LOG.warning("what somebody asked for who hung up did not end well: %s", failure)
        raise AskerGone("who asked is gone", cause="the connection was closed", remedy="Ask again")
    finally:
        hanging_up.cancel()
        work.cancel()
        await asyncio.wait((work,))


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def with_first(
    first: bytes, rest: AsyncGenerator[bytes, None], *, cut_off: Callable[[int, BaseException], None]
) -> AsyncIterator[bytes]:
    """The first piece of an answer, made before it began so that what fails at once is an error, and the rest.

    Args:
        cut_off: called with how many bytes were given out, and with what ended that, where it did not come to its end.
    """
    sent = 0
    try:
        async with aclosing(rest):
            yield first
            sent += len(first)
            async for piece in rest:
                yield piece
                sent += len(piece)
    except BaseException as error:
        cut_off(sent, error)
        raise


def _logged(recorded: "asyncio.Future[int]") -> None:
    if not recorded.cancelled() and (error := recorded.exception()) is not None:
        _LOG.warning("that an answer was cut off is not in the audit log: %s", error)


def unknown(what: str, name: str, command: str) -> NoSuchThing:
    """What is answered where there is none, or none that the asker may know of."""
    return NoSuchThing(
        f"there is no {what} {name!r}",
        cause=f"no {what} has that name or id, or it is not yours to know of",
        remedy=f"`holdfast {command}` names those that there are",
    )
