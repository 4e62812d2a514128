"""What the gateway tells the audit log: a request's way, as events.

Rules:

- Pure: an event is made here and recorded by whoever knows what waits for it.
- An event names who, what and how it ended; never what was said, nor a key, nor a name that a person gave.
"""

from collections.abc import Iterable, Mapping

from api.answers import Request
from appliance.audit.events import (
    ANYONE,
    AUTHENTICATED,
    MALFORMED,
    MODELS_READ,
    NOT_AUTHENTICATED,
    REQUEST_REFUSED,
    SESSION_ENDED,
    TURN_ADMITTED,
    TURN_COMPLETED,
    TURN_INTERRUPTED,
    TURN_NOT_KEPT,
    Actor,
    Event,
    EventClass,
    Outcome,
)
from appliance.errors import Fault, HoldfastError
from appliance.identity import ApiKey, Caller, Principal, Tenant


def actor_of(caller: Caller) -> Actor:
    """A principal as an actor."""
    return Actor("principal", caller.principal.principal_id, caller.principal.role.value)


def authenticated(request: Request) -> Event:
    """A request brought a valid key."""
    key = request.known_caller().key
    return _of_caller(request, AUTHENTICATED, target=("key", "" if key is None else key.key_id))


def looked(caller: Caller, source: str) -> Event:
    """A valid key was brought to look at how the appliance does, which is no event of its own."""
    key_id = "" if caller.key is None else caller.key.key_id
    return Event(
        AUTHENTICATED,
        actor_of(caller),
        tenant_id=caller.principal.tenant_id or "",
        source=source,
        target=("key", key_id),
    )


def admitted(request: Request, *, session_id: str, model: str, prompt_bytes: int, prompt_digest: str = "") -> Event:
    """A valid key was brought, and its turn may go to the engine: one entry for both, for they are one moment.

    Args:
        prompt_digest: the keyed digest of what is asked, where the tenant chose to have it.
    """
    key = request.known_caller().key
    return _of_caller(
        request,
        TURN_ADMITTED,
        session_id=session_id,
        target=("model", model),
        counts={"prompt_bytes": prompt_bytes},
        details={
            "key_id": "" if key is None else key.key_id,
            **({"prompt_digest": prompt_digest} if prompt_digest else {}),
        },
    )


def ended(
    request: Request,
    *,
    session_id: str,
    model: str,
    complete: bool,
    reason: str,
    counts: Mapping[str, int | float],
    answer_digest: str = "",
) -> Event:
    """A turn is over: whole, or broken off for `reason`. `answer_digest`: as in `admitted`, of what was answered."""
    return _of_caller(
        request,
        TURN_COMPLETED if complete else TURN_INTERRUPTED,
        outcome=Outcome.SUCCESS if complete else Outcome.FAILURE,
        session_id=session_id,
        target=("model", model),
        reason=reason,
        counts=counts,
        details={"answer_digest": answer_digest} if answer_digest else {},
    )


def not_kept(request: Request, *, session_id: str, error: HoldfastError) -> Event:
    """A turn could not be stored."""
    return _of_caller(request, TURN_NOT_KEPT, outcome=Outcome.FAILURE, session_id=session_id, reason=error.code)


def session_ended(request: Request, *, session_id: str) -> Event:
    """A client said that a session is over."""
    return _of_caller(request, SESSION_ENDED, session_id=session_id, target=("session", session_id))


def models_read(request: Request) -> Event:
    """A caller asked what is served."""
    return _of_caller(request, MODELS_READ)


def refused(request: Request, route: str, error: HoldfastError) -> Event:
    """A request was refused, or failed of a defect; by whom it was sent is known, or not."""
    outcome = outcome_of(error)
    if (caller := request.caller) is not None:
        details = {} if caller.key is None else {"key_id": caller.key.key_id}
        return _of_caller(
            request, REQUEST_REFUSED, outcome=outcome, target=("route", route), reason=error.code, details=details
        )
    kind = NOT_AUTHENTICATED if error.fault is Fault.UNAUTHENTICATED else MALFORMED
    return Event(kind, ANYONE, outcome, source=request.source, target=("route", route), reason=error.code)


def unreadable(source: str, error: HoldfastError) -> Event:
    """What came over a connection was refused before it was a request."""
    return Event(MALFORMED, ANYONE, Outcome.REFUSED, source=source, reason=error.code)


def details_of_tenant(tenant: Tenant) -> dict[str, str]:
    """What a new tenant chose."""
    return {"isolation": tenant.isolation.value}


def details_of_principal(principal: Principal) -> dict[str, str]:
    """A new principal's role and permissions."""
    return {"role": principal.role.value, "permissions": _listed(principal.permissions)}


def details_of_key(key: ApiKey, principal: Principal) -> dict[str, str]:
    """Whose a new key is, and what it may do: a bound that is not named is none."""
    scopes = key.scopes
    bounds = {
        "models": None if scopes.models is None else _listed(scopes.models),
        "requests_per_minute": scopes.requests_per_minute,
        "concurrent_requests": scopes.concurrent_requests,
        "tokens_per_day": scopes.tokens_per_day,
        "expires_at": key.expires_at,
    }
    return {
        "principal_id": principal.principal_id,
        "role": principal.role.value,
        "permissions": _listed(scopes.permissions),
        **{name: str(bound) for name, bound in bounds.items() if bound is not None},
    }


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def outcome_of(error: HoldfastError) -> Outcome:
    """How something ended that ended with an error."""
    return Outcome.FAILURE if error.fault is Fault.INTERNAL else Outcome.REFUSED


def is_counted(request: Request, error: HoldfastError) -> bool:
    """Whether a refusal is told with others like it: what anybody can cause, and what only says `too often`."""
    return request.caller is None or error.fault is Fault.LIMIT


def _of_caller(
    request: Request,
    kind: EventClass,
    *,
    outcome: Outcome = Outcome.SUCCESS,
    target: tuple[str, str] = ("", ""),
    reason: str = "",
    session_id: str = "",
    counts: Mapping[str, int | float] | None = None,
    details: Mapping[str, str] | None = None,
) -> Event:
    caller = request.known_caller()
    return Event(
        kind,
        actor_of(caller),
        outcome,
        tenant_id=caller.principal.tenant_id or "",
        source=request.source,
        target=target,
        reason=reason,
        request_id=request.request_id,
        session_id=session_id,
        counts={"duration_ms": request.took_ms(), **(counts or {})},
        details=details or {},
    )
