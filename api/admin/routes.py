"""The admin API's application: who may do what to the appliance, and the doing.

Rules:

- Who may is said in one table, `RULES`. A route that is not in it is refused, and the application is not made when the
  table and the routes differ.
- Who asks is told by the kernel (the peer's uid) or by an API key. A key that is offered and does not hold is refused,
  whatever the uid.
- The engine is nobody, though its uid is the gateway's own and whatever key it may have found.
- While the vault is sealed nobody's name can be read: only what `RULES` opens then is open, and only to the user whose
  process this is. Unsealing needs the passphrase besides.
- Whose session is it, and may it be read: `appliance.sessions` decides, not the routes.
- Everything but a look at how the appliance does is in the audit log: that it was asked for, once the request is known
  to be one and before it is done; what came of it after; ids, never names or secrets. What cannot be recorded is not
  done, and not shown. Every refusal and every failure is there, of whatever route, with its code; those of who has no
  name here are counted. So are the keys that were brought for a look.
- Every answer carries `X-Request-ID`, which the request's events have; the client's own is kept if it is harmless.
- No answer repeats what a request contained.
"""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, ClassVar

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import trail
from api.admin import audit_routes, prove_routes, status, types, views
from api.admin.asking import Asker, AskerOf, Endpoints, ServicesOf, chosen_tenant, unknown, while_there, with_first
from api.admin.kv import kept_of_session, kv_status
from api.admin.peers import pid_of, uid_of
from api.answers import request_id_of
from api.backups import stream_backup
from api.engine_leases import release
from api.forgetting import forget_session
from api.health import Health
from api.kv_metrics import exposition
from api.metrics import CONTENT_TYPE
from api.openai.errors import status_of
from api.roots import open_root
from api.services import Services
from api.shredding import shred_tenant
from appliance.audit import Actor, AuditUnavailable, Event, Outcome
from appliance.audit.events import (
    ADMIN_ACTED,
    ADMIN_REFUSED,
    ANYONE,
    BACKUP_MADE,
    KEY_CREATED,
    KEY_REVOKED,
    KEYS_ROTATED,
    MALFORMED,
    NOT_AUTHENTICATED,
    PRINCIPAL_CREATED,
    SESSION_SHREDDED,
    SESSIONS_LISTED,
    TENANT_CHANGED,
    TENANT_CREATED,
    TRANSCRIPT_READ,
    VAULT_OPENED,
    VAULT_REFUSED,
    VAULT_SEALED,
    EventClass,
)
from appliance.errors import Fault, HoldfastError
from appliance.identity import DAMAGE, Isolation, Principal, Role, Tenant, UnknownIdentity
from appliance.sessions import EXPLAINED_TURNS, NO_TURN, TRANSCRIPT_TURNS
from appliance.vault import SYSTEM_SCOPE, VaultSealed

MAX_BODY_BYTES = 64 << 10
_REQUEST_ID = "holdfast.request_id"  # in an ASGI scope
_LOG = logging.getLogger("holdfast.admin")

_PEOPLE = frozenset({Role.ADMIN, Role.OPERATOR, Role.AUDITOR})
_EVERYBODY = frozenset(Role)
_MASTERS = frozenset({Role.ADMIN, Role.OPERATOR})
_ADMINS = frozenset({Role.ADMIN})
_AUDITORS = frozenset({Role.ADMIN, Role.AUDITOR})


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """Who may call a route.

    Attributes:
        appliance_wide: only principals of the appliance, not those of one tenant.
        while_sealed: open to the gateway's own user while the vault is sealed.
        nameless: open to that user at any time without asking the store who that is, so that it tells of a store that
            fails. Open while sealed, too.
        recorded: that it is asked for is an event; else its route records what was shown, or it `looks`.
        looks: it only looks at how the appliance does: a key that is brought is counted, and nothing else is recorded.
    """

    roles: frozenset[Role]
    appliance_wide: bool = False
    while_sealed: bool = False
    nameless: bool = False
    recorded: bool = True
    looks: bool = False


_WATCHED = Rule(_PEOPLE, appliance_wide=True, while_sealed=True, nameless=True, recorded=False, looks=True)

RULES: Mapping[tuple[str, str], Rule] = {
    ("GET", "/readyz"): _WATCHED,
    ("GET", "/metrics"): _WATCHED,
    ("GET", "/v1/status"): Rule(_PEOPLE, appliance_wide=True, while_sealed=True, recorded=False, looks=True),
    ("POST", "/v1/vault/unseal"): Rule(_MASTERS, appliance_wide=True, while_sealed=True),
    ("POST", "/v1/vault/seal"): Rule(_MASTERS, appliance_wide=True, while_sealed=True),
    ("POST", "/v1/vault/rotate"): Rule(_ADMINS, appliance_wide=True),
    ("GET", "/v1/tenants"): Rule(_PEOPLE),
    ("POST", "/v1/tenants"): Rule(_ADMINS, appliance_wide=True),
    ("GET", "/v1/tenants/{tenant_id}"): Rule(_PEOPLE),
    ("POST", "/v1/tenants/{tenant_id}"): Rule(_ADMINS),
    ("POST", "/v1/tenants/{tenant_id}/shred"): Rule(_ADMINS, appliance_wide=True),
    ("GET", "/v1/keys"): Rule(_PEOPLE),
    ("POST", "/v1/keys"): Rule(_ADMINS),
    ("POST", "/v1/appliance/keys"): Rule(_ADMINS, appliance_wide=True),
    ("POST", "/v1/keys/{key_id}/revoke"): Rule(_MASTERS),
    ("GET", "/v1/sessions"): Rule(_EVERYBODY, recorded=False),
    ("GET", "/v1/sessions/{session_id}"): Rule(_EVERYBODY),
    ("GET", "/v1/sessions/{session_id}/transcript"): Rule(_EVERYBODY, recorded=False),
    ("GET", "/v1/sessions/{session_id}/why"): Rule(_EVERYBODY),
    ("POST", "/v1/sessions/{session_id}/forget"): Rule(frozenset({Role.ADMIN, Role.OPERATOR, Role.CLIENT})),
    ("GET", "/v1/kv"): Rule(_PEOPLE, appliance_wide=True, recorded=False, looks=True),
    ("POST", "/v1/backup"): Rule(_ADMINS, appliance_wide=True),
    ("POST", "/v1/prove/isolation"): Rule(_ADMINS, appliance_wide=True),
    ("GET", "/v1/audit"): Rule(_PEOPLE, appliance_wide=True, while_sealed=True, recorded=False, looks=True),
    ("POST", "/v1/audit/acknowledge"): Rule(_ADMINS, appliance_wide=True),
    ("GET", "/v1/audit/entries"): Rule(_AUDITORS, appliance_wide=True, recorded=False),
    ("GET", "/v1/audit/entries/{sequence}"): Rule(_AUDITORS, appliance_wide=True, recorded=False),
    ("POST", "/v1/audit/digest"): Rule(_AUDITORS, recorded=False),
    ("GET", "/v1/audit/exports"): Rule(_PEOPLE, appliance_wide=True, while_sealed=True, recorded=False, looks=True),
    ("POST", "/v1/audit/exports"): Rule(_ADMINS, appliance_wide=True),
    ("POST", "/v1/audit/exports/{destination}/test"): Rule(_MASTERS, appliance_wide=True),
    ("POST", "/v1/audit/exports/{destination}/remove"): Rule(_ADMINS, appliance_wide=True),
    ("GET", "/v1/audit/excerpt"): Rule(_AUDITORS, appliance_wide=True, recorded=False),
    ("GET", "/v1/audit/witness"): Rule(_PEOPLE, appliance_wide=True),
    ("POST", "/v1/audit/witness"): Rule(_PEOPLE, appliance_wide=True),
}


class AdminDenied(HoldfastError, PermissionError):
    """Who asks is known and may not do this."""

    code: ClassVar[str] = "admin_denied"
    fault: ClassVar[Fault] = Fault.DENIED


class PeerUnknown(HoldfastError, PermissionError):
    """Nobody vouches for who asks."""

    code: ClassVar[str] = "admin_peer_unknown"
    fault: ClassVar[Fault] = Fault.UNAUTHENTICATED


class AdminRequestInvalid(HoldfastError, ValueError):
    """A request that does not fit the admin API's schema."""

    code: ClassVar[str] = "admin_request_invalid"
    fault: ClassVar[Fault] = Fault.CALLER


class NoSuchAdminRoute(HoldfastError, LookupError):
    """A path or a method that the admin API does not have."""

    code: ClassVar[str] = "admin_route_unknown"
    fault: ClassVar[Fault] = Fault.MISSING


def admin_app(services: Services) -> FastAPI:
    """The application of the admin listener.

    Raises:
        RuntimeError: a route is not in `RULES`, or the other way round.
    """
    app = FastAPI(
        title="Holdfast admin API",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        dependencies=[Depends(_authorise)],
    )
    app.state.services = services
    app.state.health = Health(services, in_full=True)
    app.state.unsealing = asyncio.Lock()
    app.state.proving = asyncio.Lock()
    for (method, path), (endpoint, answer) in _ENDPOINTS.items():
        rule = RULES.get((method, path))
        told = endpoint if rule is None or not rule.recorded else _recorded(endpoint)
        app.add_api_route(path, told, methods=[method], response_model=answer)
    routes = {
        (method, route.path) for route in app.routes if isinstance(route, APIRoute) for method in route.methods or ()
    }
    if routes != RULES.keys():
        raise RuntimeError(f"routes without a rule, or rules without a route: {sorted(routes ^ RULES.keys())}")
    app.add_exception_handler(HoldfastError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    app.add_middleware(_BoundedBodies)
    app.add_middleware(_NamedRequests, services=services)
    return app


# Who asks, and may they


async def _authorise(request: Request) -> None:
    services: Services = request.app.state.services
    route = _route(request)
    rule = RULES.get((request.method, route))
    request.state.asker = asker = await _asker(services, request, nameless=rule is not None and rule.nameless)
    asker.request_id = request.scope[_REQUEST_ID]
    _check(asker, rule)
    if rule is not None and rule.looks:
        asker.looks()
    if request.method != "GET":
        _LOG.info("%s %s for %s", request.method, route, asker)


def _check(asker: Asker, rule: Rule | None) -> None:
    if rule is None:
        raise _denied("no rule names this route")
    if asker.caller is None:
        if not rule.while_sealed:
            raise VaultSealed
    else:
        principal = asker.caller.principal
        if principal.role not in rule.roles:
            raise _denied(f"it is not open to the role {principal.role.value}")
        if rule.appliance_wide and principal.tenant_id is not None:
            raise _denied(
                "it is open to principals of the appliance only, not to those of one tenant",
                remedy="Ask an administrator of the appliance for a key of `holdfast key create --appliance`",
            )


async def _asker(services: Services, request: Request, *, nameless: bool) -> Asker:
    client = None if request.client is None else (request.client.host, request.client.port)
    source = "" if client is None else client[0]
    pid = pid_of(client)
    if pid is not None and services.engine_process is not None and services.engine_process.owns(pid):
        _LOG.warning("refused process %d: it is the engine's, or has ended", pid)
        raise PeerUnknown(
            "this process may ask for nothing",
            cause="it is one of the engine's, or cannot be told from them because it has ended or is out of sight",
            remedy="Use `holdfast` on this machine, outside the engine and in the gateway's own process namespace",
        )
    offered = request.headers.get("authorization")
    if offered is not None:
        scheme, _, secret = offered.partition(" ")
        try:
            caller = await services.identity.authenticate(secret.strip() if scheme.lower() == "bearer" else "")
        except VaultSealed:
            raise VaultSealed(remedy="The gateway's own user runs `holdfast unseal`, without an API key") from None
        return Asker(caller, source, services.audit)
    uid = uid_of(client)
    if uid is None:
        raise PeerUnknown(
            "who asks is not known",
            cause="the connection did not come over the admin socket, and offers no API key",
            remedy="Use the admin socket in the state directory, or an API key",
        )
    own = uid == os.geteuid()
    if services.vault.sealed and not own:
        raise _denied("while the vault is sealed it is open to the gateway's own user only")
    if services.vault.sealed or (nameless and own):
        return Asker(None, source, services.audit)
    return Asker(await services.identity.caller_of_uid(uid), source, services.audit)


# What is recorded whatever the route


def _route(request: Request) -> str:
    """The path as `RULES` has it; empty: it is no route."""
    return getattr(request.scope.get("route"), "path", "")


def _target(request: Request) -> tuple[str, str]:
    return next(((name.removesuffix("_id"), str(given)) for name, given in request.path_params.items()), ("", ""))


async def _acted(request: Request) -> None:
    asker: Asker = request.state.asker
    await asker.did(ADMIN_ACTED, _target(request), details={"route": f"{request.method} {_route(request)}"})


def _recorded(endpoint: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`endpoint`, called once that it was asked for is recorded: what its parameters refuse never gets there."""

    async def told(*, recording: Callable[[], Awaitable[None]], **given: object) -> object:
        await recording()
        return await endpoint(**given)

    def recording(request: Request) -> Callable[[], Awaitable[None]]:
        return functools.partial(_acted, request)

    signature = inspect.signature(endpoint)
    also = inspect.Parameter("recording", inspect.Parameter.KEYWORD_ONLY, default=Depends(recording))
    told.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), also]
    )
    return told


async def _tell_failed(request: Request, error: HoldfastError) -> None:
    services: Services = request.app.state.services
    asker: Asker | None = getattr(request.state, "asker", None)
    outcome, route = trail.outcome_of(error), _route(request)
    details = {"route": f"{request.method} {route}"} if route else {}
    if asker is None:
        # Nobody's name is known: it may be anybody, again and again.
        client = None if request.client is None else (request.client.host, request.client.port)
        source = "" if client is None else client[0]
        actor = ANYONE if uid_of(client) is None else Actor("user", source)
        services.audit.count(Event(_kind_of_nobodys(error), actor, outcome, source=source, reason=error.code))
    elif not asker.failure_told and not isinstance(error, AuditUnavailable):
        denied = isinstance(error, AdminDenied | VaultSealed)
        if denied:
            _LOG.warning("refused %s %s to %s: %s", request.method, route, asker, error.cause)
        kind = ADMIN_REFUSED if denied else ADMIN_ACTED
        with contextlib.suppress(AuditUnavailable):  # it has failed all the same
            await asker.did(kind, _target(request), outcome=outcome, reason=error.code, details=details)


def _kind_of_nobodys(error: HoldfastError) -> EventClass:
    if isinstance(error, PeerUnknown):
        return ADMIN_REFUSED
    if error.fault is Fault.UNAUTHENTICATED:
        return NOT_AUTHENTICATED
    return MALFORMED if error.fault in (Fault.CALLER, Fault.MISSING) else ADMIN_REFUSED


# How it is


async def _readiness(request: Request) -> JSONResponse:
    status_code, told = await request.app.state.health.readiness()
    return JSONResponse(told, status_code=status_code)


async def _metrics(services: ServicesOf) -> Response:
    return Response(await exposition(services), media_type=CONTENT_TYPE)


async def _status(services: ServicesOf) -> types.Status:
    return await status.observe(services)


# The vault


async def _unseal(request: Request, services: ServicesOf, asker: AskerOf) -> types.VaultState:
    passphrase = bytearray(await request.body())
    try:
        async with request.app.state.unsealing:
            changed = services.vault.sealed
            if changed:
                await _open(services, asker, passphrase)
            if changed or not services.audit.opened.is_set():
                await services.audit.sign()
    finally:
        passphrase[:] = bytes(len(passphrase))
    return types.VaultState(sealed=False, changed=changed)


async def _open(services: Services, asker: Asker, passphrase: bytearray) -> None:
    """Open the vault; where that cannot be recorded it is sealed again."""
    try:
        root = await asyncio.to_thread(open_root, services.settings.state_dir, passphrase)
        services.vault.open(root)
    except HoldfastError as error:
        await asker.did(VAULT_REFUSED, ("vault", ""), outcome=Outcome.REFUSED, reason=error.code)
        raise
    try:
        await asker.did(VAULT_OPENED, ("vault", services.vault.root_id))
    except BaseException:
        _close(services)
        raise


async def _seal(services: ServicesOf, asker: AskerOf) -> types.VaultState:
    changed = not services.vault.sealed
    if changed:
        await asker.did(VAULT_SEALED, ("vault", services.vault.root_id))
    _close(services)
    return types.VaultState(sealed=True, changed=changed)


def _close(services: Services) -> None:
    services.vault.seal()
    services.sessions.forget_texts()
    if services.engine_process is not None:
        services.engine_process.forget_keys()


async def _rotate(wanted: types.KeysToRotate, services: ServicesOf, asker: AskerOf) -> types.RotatedKeys:
    tenant = None if wanted.tenant is None else await chosen_tenant(services, asker.named, wanted.tenant)
    scope = SYSTEM_SCOPE if tenant is None else tenant.tenant_id
    tenant_id = None if tenant is None else tenant.tenant_id
    try:
        rotated = await services.identity.rotate_keys(tenant)
    except HoldfastError as error:
        await asker.did(KEYS_ROTATED, ("keys", scope), outcome=Outcome.FAILURE, reason=error.code, tenant_id=tenant_id)
        raise
    details = {"keys": str(rotated.keys), "erased": str(rotated.erased).lower()}
    await asker.did(KEYS_ROTATED, ("keys", scope), tenant_id=tenant_id, details=details)
    return types.RotatedKeys(tenant_id=tenant_id, keys=rotated.keys, erased=rotated.erased)


# Tenants and keys


async def _tenants(services: ServicesOf, asker: AskerOf) -> types.Tenants:
    own = asker.named.tenant
    tenants, damaged = ([own], {}) if own is not None else await services.identity.survey()
    return types.Tenants(
        tenants=[views.tenant_view(services, tenant) for tenant in tenants],
        damaged=[
            types.DamagedTenant(tenant_id=each, why=f"{why.message}: {why.cause}") for each, why in damaged.items()
        ],
    )


async def _tenant(tenant_id: str, services: ServicesOf, asker: AskerOf) -> types.Tenant:
    tenant = await chosen_tenant(services, asker.named, tenant_id)
    if tenant is None:
        raise unknown("tenant", tenant_id, "tenant list")
    return views.tenant_view(services, tenant)


async def _create_tenant(new: types.NewTenant, services: ServicesOf, asker: AskerOf) -> types.Tenant:
    tenant = await services.identity.create_tenant(
        new.name, idle_timeout_s=new.idle_timeout_s, isolation=Isolation(new.isolation)
    )
    details = trail.details_of_tenant(tenant)
    await asker.did(TENANT_CREATED, ("tenant", tenant.tenant_id), tenant_id=tenant.tenant_id, details=details)
    return views.tenant_view(services, tenant)


async def _change_tenant(
    tenant_id: str, chosen: types.TenantChoices, services: ServicesOf, asker: AskerOf
) -> types.Tenant:
    tenant = await chosen_tenant(services, asker.named, tenant_id)
    if tenant is None or tenant.tenant_id != tenant_id:
        raise unknown("tenant", tenant_id, "tenant list")
    changed = tenant
    if chosen.audit_digests is not None:
        changed = await services.identity.choose_digests(tenant, on=chosen.audit_digests)
        old, new = _on_off(tenant.audit_digests), _on_off(changed.audit_digests)
        details = {"setting": "audit_digests", "old": old, "new": new}
        await asker.did(TENANT_CHANGED, ("tenant", tenant_id), tenant_id=tenant_id, details=details)
    if chosen.take_out_harness_lines is not None:
        changed = await services.identity.choose_harness_lines(tenant, taken_out=chosen.take_out_harness_lines)
        old, new = _on_off(tenant.takes_out_harness_lines), _on_off(changed.takes_out_harness_lines)
        details = {"setting": "take_out_harness_lines", "old": old, "new": new}
        await asker.did(TENANT_CHANGED, ("tenant", tenant_id), tenant_id=tenant_id, details=details)
    if chosen.isolation is not None:
        changed = await services.identity.choose_isolation(tenant, Isolation(chosen.isolation))
        details = {"setting": "isolation", "old": tenant.isolation.value, "new": changed.isolation.value}
        await asker.did(TENANT_CHANGED, ("tenant", tenant_id), tenant_id=tenant_id, details=details)
    return views.tenant_view(services, changed)


async def _shred_tenant(tenant_id: str, services: ServicesOf, asker: AskerOf) -> types.ShreddedTenant:
    damage = ""
    try:
        tenant = await chosen_tenant(services, asker.named, tenant_id)
    except DAMAGE as error:  # who it is cannot be read: its id says which rows and keys are its own
        if not await services.identity.has_tenant(tenant_id):
            raise
        damage = error.code
    else:
        if tenant is None or tenant.tenant_id != tenant_id:
            raise unknown("tenant", tenant_id, "tenant list")
    try:
        shredded = await shred_tenant(services, tenant_id, trail.actor_of(asker.named), asker.source, damage=damage)
    except UnknownIdentity:
        raise unknown("tenant", tenant_id, "tenant list") from None
    return types.ShreddedTenant(
        tenant_id=tenant_id,
        sessions=shredded.tenant.sessions,
        turns=shredded.tenant.turns,
        erased=shredded.erased,
        leases_released=shredded.released,
    )


def _on_off(chosen: bool) -> str:
    return "on" if chosen else "off"


async def _keys(services: ServicesOf, asker: AskerOf, tenant: str | None = None) -> types.Keys:
    chosen = await chosen_tenant(services, asker.named, tenant)
    keys = await services.identity.keys(chosen)
    return types.Keys(keys=await views.key_views(services, keys))


async def _create_key(new: types.NewKey, services: ServicesOf, asker: AskerOf) -> types.CreatedKey:
    tenant = await chosen_tenant(services, asker.named, new.tenant) or await _only_tenant(services)
    principal = await _principal(tenant, new.principal, Role(new.role), services, asker)
    return await _key_for(principal, new, new.limits, services, asker)


async def _create_appliance_key(new: types.NewApplianceKey, services: ServicesOf, asker: AskerOf) -> types.CreatedKey:
    principal = await _principal(None, new.principal, Role(new.role), services, asker)
    return await _key_for(principal, new, types.Limits(permissions=new.permissions), services, asker)


async def _principal(tenant: Tenant | None, name: str, role: Role, services: Services, asker: Asker) -> Principal:
    """The principal of a name and a role; one that is made is an event."""
    known = {each.principal_id for each in await services.identity.principals(tenant)}
    principal = await services.identity.principal(tenant, name, role)
    if principal.principal_id not in known:
        made = ("principal", principal.principal_id)
        details = trail.details_of_principal(principal)
        await asker.did(PRINCIPAL_CREATED, made, tenant_id=principal.tenant_id, details=details)
    return principal


async def _key_for(
    principal: Principal,
    new: types.NewKey | types.NewApplianceKey,
    limits: types.Limits,
    services: Services,
    asker: Asker,
) -> types.CreatedKey:
    expires_at = None if new.expires_in_s is None else services.now() + new.expires_in_s
    key, secret = await services.identity.create_key(
        principal, views.scopes(limits), label=new.label, expires_at=expires_at
    )
    details = trail.details_of_key(key, principal)
    await asker.did(KEY_CREATED, ("key", key.key_id), tenant_id=key.tenant_id, details=details)
    (view,) = await views.key_views(services, [key])
    return types.CreatedKey(key=view, secret=secret)


async def _revoke_key(key_id: str, services: ServicesOf, asker: AskerOf) -> types.Key:
    try:
        revoked = await services.identity.revoke_key(key_id, tenant_id=asker.named.principal.tenant_id)
    except UnknownIdentity:
        raise unknown("key", key_id, "key list") from None
    await asker.did(KEY_REVOKED, ("key", key_id), tenant_id=revoked.tenant_id)
    shown = await views.key_views(services, [revoked])
    if not shown:
        raise unknown("key", key_id, "key list")  # a proof's, and the proof is over
    return shown[0]


# Sessions


async def _sessions(
    services: ServicesOf,
    asker: AskerOf,
    tenant: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> types.SessionPage:
    chosen = await chosen_tenant(services, asker.named, tenant)
    found = await services.sessions.summaries(
        asker.named, tenant_id=None if chosen is None else chosen.tenant_id, limit=limit + 1
    )
    scope, shown = ("sessions", "" if chosen is None else chosen.tenant_id), found[:limit]
    await asker.did(SESSIONS_LISTED, scope, tenant_id=scope[1], counts={"sessions": len(shown)})
    return types.SessionPage(sessions=[views.session_view(each) for each in shown], truncated=len(found) > limit)


async def _session(session_id: str, services: ServicesOf, asker: AskerOf) -> types.Session:
    return views.session_view(await services.sessions.summary(asker.named, session_id))


async def _transcript(
    session_id: str,
    services: ServicesOf,
    asker: AskerOf,
    request: Request,
    before: Annotated[int | None, Query(ge=1, le=NO_TURN)] = None,
    limit: Annotated[int, Query(ge=1, le=TRANSCRIPT_TURNS)] = TRANSCRIPT_TURNS,
) -> types.Transcript:
    try:
        reading = services.sessions.transcript(asker.named, session_id, before=before, limit=limit)
        transcript = await while_there(request, reading)
    except HoldfastError as error:
        tenant_id = await _tenant_of(services, asker, session_id)
        await asker.did(
            TRANSCRIPT_READ, ("session", session_id), outcome=Outcome.REFUSED, reason=error.code, tenant_id=tenant_id
        )
        raise
    counts = {"turns": len(transcript.turns)}
    await asker.did(TRANSCRIPT_READ, ("session", session_id), tenant_id=transcript.session.tenant_id, counts=counts)
    return views.transcript_view(transcript)


async def _tenant_of(services: Services, asker: Asker, session_id: str) -> str | None:
    """Whose a session is that could not be read, as far as the asker may know of it."""
    with contextlib.suppress(HoldfastError):
        return (await services.sessions.summary(asker.named, session_id)).tenant_id
    return None


async def _why(
    session_id: str,
    services: ServicesOf,
    asker: AskerOf,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=EXPLAINED_TURNS)] = EXPLAINED_TURNS,
) -> types.Explanation:
    explaining = services.sessions.explanation(asker.named, session_id, limit=limit)
    explanation = await while_there(request, explaining)
    return views.explanation_view(explanation, await kept_of_session(services, explanation.session))


async def _forget(session_id: str, services: ServicesOf, asker: AskerOf) -> types.Forgotten:
    forgotten = await forget_session(services, asker.named, session_id)
    services.ledger.forget(session_id)
    # First, and whatever becomes of the record: the session is gone, and nobody could ask for this again.
    released = await release(services, [forgotten.session.lease_label])
    await asker.did(
        SESSION_SHREDDED,
        ("session", session_id),
        tenant_id=forgotten.session.tenant_id,
        counts={"turns": forgotten.session.turns},
        details={"erased": str(forgotten.erased).lower()},
    )
    return types.Forgotten(
        session_id=session_id,
        turns=forgotten.session.turns,
        erased=forgotten.erased,
        lease_released=released,
    )


# What is kept


async def _kv(services: ServicesOf, sessions: Annotated[int, Query(ge=0, le=1000)] = 50) -> types.KvStatus:
    return await kv_status(services, sessions)


# Backups


async def _backup(services: ServicesOf, asker: AskerOf) -> StreamingResponse:
    async def admitted(size: int) -> None:
        await asker.did(BACKUP_MADE, ("database", ""), counts={"bytes": size})

    pieces = stream_backup(services.store, services.settings, now=services.now, admitted=admitted)
    # The first piece is made before the answer begins, so that what fails is an error and not half a file.
    first = await anext(pieces)
    cut_off = functools.partial(asker.was_cut_off, BACKUP_MADE, ("database", ""))
    return StreamingResponse(with_first(first, pieces, cut_off=cut_off), media_type="application/x-tar")


_ENDPOINTS: Endpoints = {
    ("GET", "/readyz"): (_readiness, None),
    ("GET", "/metrics"): (_metrics, None),
    ("GET", "/v1/status"): (_status, types.Status),
    ("POST", "/v1/vault/unseal"): (_unseal, types.VaultState),
    ("POST", "/v1/vault/seal"): (_seal, types.VaultState),
    ("POST", "/v1/vault/rotate"): (_rotate, types.RotatedKeys),
    ("GET", "/v1/tenants"): (_tenants, types.Tenants),
    ("POST", "/v1/tenants"): (_create_tenant, types.Tenant),
    ("GET", "/v1/tenants/{tenant_id}"): (_tenant, types.Tenant),
    ("POST", "/v1/tenants/{tenant_id}"): (_change_tenant, types.Tenant),
    ("POST", "/v1/tenants/{tenant_id}/shred"): (_shred_tenant, types.ShreddedTenant),
    ("GET", "/v1/keys"): (_keys, types.Keys),
    ("POST", "/v1/keys"): (_create_key, types.CreatedKey),
    ("POST", "/v1/appliance/keys"): (_create_appliance_key, types.CreatedKey),
    ("POST", "/v1/keys/{key_id}/revoke"): (_revoke_key, types.Key),
    ("GET", "/v1/sessions"): (_sessions, types.SessionPage),
    ("GET", "/v1/sessions/{session_id}"): (_session, types.Session),
    ("GET", "/v1/sessions/{session_id}/transcript"): (_transcript, types.Transcript),
    ("GET", "/v1/sessions/{session_id}/why"): (_why, types.Explanation),
    ("POST", "/v1/sessions/{session_id}/forget"): (_forget, types.Forgotten),
    ("GET", "/v1/kv"): (_kv, types.KvStatus),
    ("POST", "/v1/backup"): (_backup, None),
    **prove_routes.ENDPOINTS,
    **audit_routes.ENDPOINTS,
}


async def _only_tenant(services: Services) -> Tenant:
    tenants = await services.identity.tenants()
    if len(tenants) != 1:
        raise AdminRequestInvalid(
            "it is not said whose key it is",
            cause=f"there are {len(tenants)} tenants",
            remedy="Name one with --tenant; `holdfast tenant list` names them",
        )
    return tenants[0]


# Answers that are errors


def _denied(cause: str, *, remedy: str = "Ask an administrator of the appliance") -> AdminDenied:
    return AdminDenied("this may not be done", cause=cause, remedy=remedy)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    told = _as_holdfast_error(error)
    await _tell_failed(request, told)
    return JSONResponse({"error": types.ErrorBody.of(told).model_dump()}, status_code=status_of(told))


def _as_holdfast_error(error: Exception) -> HoldfastError:
    if isinstance(error, HoldfastError):
        return error
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if part != "body")
        return AdminRequestInvalid(
            f"{name or 'the request'} cannot be used", cause=str(first["msg"]), remedy="Correct it and ask again"
        )
    if isinstance(error.__cause__, HoldfastError):
        return error.__cause__  # what our own reading of the body raised, wrapped by the framework
    if isinstance(error, HTTPException):
        return NoSuchAdminRoute(
            "the admin API has no such route",
            cause=f"HTTP {error.status_code}",
            remedy="docs/cli.md lists the commands",
        )
    return HoldfastError(
        "the gateway failed", cause=type(error).__name__, remedy="`holdfast logs gateway` has the trace"
    )


class _NamedRequests:
    """Gives each request its id, and its answer a header with it."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = request_id_of(given, self._services.new_id)
        scope[_REQUEST_ID] = request_id.decode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        await self._app(scope, receive, named)


class _BoundedBodies:
    """Refuses a body longer than `MAX_BODY_BYTES`, counted as it comes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY_BYTES:
                raise AdminRequestInvalid(
                    "the request is too long",
                    cause=f"its body has more than {MAX_BODY_BYTES} bytes",
                    remedy="Send less at once",
                )
            return message

        await self._app(scope, bounded, send)
