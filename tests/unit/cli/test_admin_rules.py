"""Who may do what on the admin API: every route for every role, from every side."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest

from api.admin import routes
from api.admin.routes import MAX_BODY_BYTES, RULES, admin_app
from appliance.audit import AuditUnavailable, Event, Outcome
from appliance.errors import Fault, HoldfastError
from appliance.identity import ApiKey, Caller, Isolation, NotAnAdministrator, Principal, Role, Scopes, Tenant
from tests.path_tricks import tricks

OWN_UID = 1000
PID = 4711
TENANT = Tenant(tenant_id="ten_1", name="treasury", idle_timeout_s=None, isolation=Isolation.SESSION, created_at=0.0)


class Reached(HoldfastError):
    """The request passed every rule and reached what does the work."""

    code = "test_reached"
    fault = Fault.LIMIT


class KeyRefused(HoldfastError):
    """What identity says of a key that does not hold."""

    code = "test_key_refused"
    fault = Fault.UNAUTHENTICATED


def caller(role: Role, tenant: Tenant | None, *, key_id: str | None = None) -> Caller:
    principal = Principal(
        principal_id="prn_1",
        tenant_id=None if tenant is None else tenant.tenant_id,
        name="somebody",
        role=role,
        permissions=frozenset(),
    )
    key = key_id and ApiKey(key_id, principal.tenant_id, "prn_1", None, Scopes(), 0.0, None, None)
    return Caller(principal=principal, tenant=tenant, key=key or None)


class FakeIdentity:
    """Knows keys named for a role and a side, `admin@tenant`, and one uid."""

    async def authenticate(self, secret: str) -> Caller:
        role, _, side = secret.partition("@")
        if role not in set(Role):
            raise KeyRefused("no", cause="", remedy="")
        return caller(Role(role), TENANT if side == "tenant" else None, key_id="ak_brought")

    async def caller_of_uid(self, uid: int) -> Caller:
        if uid != OWN_UID:
            raise NotAnAdministrator("no", cause="", remedy="")
        return caller(Role.ADMIN, None)


class FakeAudit:
    """An audit log in a list; or one that cannot be written."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.counted: list[Event] = []
        self.unwritable = False

    async def record(self, *events: Event, privileged: bool = False) -> int:
        assert privileged, "an administrator's doing is recorded from the reserve, too"
        if self.unwritable:
            raise AuditUnavailable("no", cause="", remedy="")
        self.events += events
        return len(self.events)

    def count(self, event: Event) -> None:
        self.counted.append(event)


def gateway(*, sealed: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        identity=FakeIdentity(),
        vault=SimpleNamespace(sealed=sealed),
        engine_process=None,
        audit=FakeAudit(),
        new_id=lambda: "req_1",
    )


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A gateway whose every endpoint answers that it was reached."""

    async def reached() -> None:
        raise Reached("reached", cause="", remedy="")

    endpoints = dict.fromkeys(routes._ENDPOINTS, (reached, None))
    monkeypatch.setattr(routes, "_ENDPOINTS", endpoints)
    monkeypatch.setattr(os, "geteuid", lambda: OWN_UID)
    return gateway()


async def ask(
    services: Any,
    route: tuple[str, str],
    *,
    key: str | None = None,
    uid: int | None = None,
    authorization: str | None = None,
    body: Sequence[bytes] = (b"",),
) -> tuple[int, str]:
    """The status and the error's code that a request is answered with."""
    status, answer = await call(admin_app(services), route, key=key, uid=uid, authorization=authorization, body=body)
    return status, json.loads(answer)["error"]["code"]


def filled(path: str) -> str:
    """A route's path with an id for each of its names."""
    names = {"key_id": "ak_1", "session_id": "ses_1", "tenant_id": "ten_1", "sequence": "1", "destination": "soc"}
    for name, given in names.items():
        path = path.replace(f"{{{name}}}", given)
    return path


async def call(
    app: Any,
    route: tuple[str, str],
    *,
    key: str | None = None,
    uid: int | None = None,
    authorization: str | None = None,
    body: Sequence[bytes] = (b"",),
) -> tuple[int, bytes]:
    """The status and the body of an answer; a body goes up in the pieces given."""
    method, path = route
    path, _, query = filled(path).partition("?")
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    offered = authorization if key is None else f"Bearer {key}"
    if offered is not None:
        headers.append((b"authorization", offered.encode()))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": headers,
        "client": (f"uid={uid}" if uid is not None else "127.0.0.1", PID),
        "server": ("localhost", None),
    }
    pieces = list(body)
    sent: list[Any] = []

    async def receive() -> dict[str, object]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize("side", ["appliance", "tenant"])
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("route", RULES)
async def test_a_route_is_open_to_the_roles_that_the_table_names_and_to_no_other(
    route: tuple[str, str], role: Role, side: str, services: Any
) -> None:
    rule = RULES[route]
    may = role in rule.roles and not (rule.appliance_wide and side == "tenant")
    _, code = await ask(services, route, key=f"{role.value}@{side}")
    assert code == ("test_reached" if may else "admin_denied")


@pytest.mark.parametrize("route", RULES)
async def test_a_client_may_do_nothing_but_with_sessions(route: tuple[str, str], services: Any) -> None:
    _, code = await ask(services, route, key="client@tenant")
    assert (code == "test_reached") == route[1].startswith("/v1/sessions")


@pytest.mark.parametrize("role", [Role.AUDITOR, Role.OPERATOR, Role.CLIENT])
async def test_only_an_administrator_makes_tenants_keys_and_backups(role: Role, services: Any) -> None:
    for route in (
        ("POST", "/v1/tenants"),
        ("POST", "/v1/tenants/{tenant_id}"),
        ("POST", "/v1/tenants/{tenant_id}/shred"),
        ("POST", "/v1/keys"),
        ("POST", "/v1/backup"),
        ("POST", "/v1/vault/rotate"),
    ):
        assert (await ask(services, route, key=f"{role.value}@appliance"))[1] == "admin_denied"


async def test_the_kernel_vouches_for_the_local_administrator(services: Any) -> None:
    assert (await ask(services, ("GET", "/v1/status"), uid=OWN_UID))[1] == "test_reached"
    assert (await ask(services, ("GET", "/v1/status"), uid=OWN_UID + 1))[1] == "not_an_administrator"


@pytest.mark.parametrize("key", [None, "admin@appliance"])
@pytest.mark.parametrize("sealed", [False, True])
async def test_the_engine_is_nobody_though_it_has_our_uid(services: Any, sealed: bool, key: str | None) -> None:
    services.vault.sealed = sealed
    services.engine_process = SimpleNamespace(owns=lambda pid: pid == PID)
    assert await ask(services, ("GET", "/v1/status"), uid=OWN_UID, key=key) == (401, "admin_peer_unknown")
    services.engine_process = SimpleNamespace(owns=lambda pid: pid != PID)
    assert (await ask(services, ("GET", "/v1/status"), uid=OWN_UID, key=key))[1] == "test_reached"


@pytest.mark.parametrize("route", [route for route, rule in RULES.items() if rule.nameless])
async def test_the_gateways_own_user_sees_how_it_is_though_the_store_knows_nobody(
    route: tuple[str, str], services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(_: int) -> Caller:
        raise AssertionError("the store is asked")

    monkeypatch.setattr(services.identity, "caller_of_uid", silent)
    assert (await ask(services, route, uid=OWN_UID))[1] == "test_reached"
    monkeypatch.undo()
    assert (await ask(services, route, uid=OWN_UID + 1))[1] == "not_an_administrator"
    assert await ask(services, route, uid=OWN_UID, key="nobody@nowhere") == (401, "test_key_refused")
    services.engine_process = SimpleNamespace(owns=lambda pid: pid == PID)
    assert await ask(services, route, uid=OWN_UID) == (401, "admin_peer_unknown")


@pytest.mark.parametrize("route", RULES)
async def test_nobody_is_nobody(route: tuple[str, str], services: Any) -> None:
    assert await ask(services, route) == (401, "admin_peer_unknown")


@pytest.mark.parametrize("header", ["Bearer", "Bearer nonsense", "Basic YWRtaW46", "admin@appliance", ""])
async def test_a_key_that_does_not_hold_is_refused_whatever_the_uid(header: str, services: Any) -> None:
    assert (await ask(services, ("GET", "/v1/status"), uid=OWN_UID))[1] == "test_reached"
    refused = await ask(services, ("GET", "/v1/status"), uid=OWN_UID, authorization=header)
    assert refused == (401, "test_key_refused")


@pytest.mark.parametrize("route", RULES)
async def test_while_sealed_only_what_the_table_opens_is_open_and_to_our_own_user_only(
    route: tuple[str, str], services: Any
) -> None:
    services.vault.sealed = True
    expected = "test_reached" if RULES[route].while_sealed else "vault_sealed"
    assert (await ask(services, route, uid=OWN_UID))[1] == expected
    assert (await ask(services, route, uid=OWN_UID + 1))[1] == "admin_denied"
    assert (await ask(services, route, uid=0))[1] == "admin_denied"


def test_what_is_open_while_sealed_shows_and_changes_nothing_that_is_stored() -> None:
    assert {path for (_, path), rule in RULES.items() if rule.while_sealed} == {
        "/readyz",
        "/metrics",
        "/v1/status",
        "/v1/audit",
        "/v1/audit/exports",
        "/v1/vault/unseal",
        "/v1/vault/seal",
    }


def test_a_route_without_a_rule_stops_the_gateway_from_being_made(
    services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "RULES", {route: rule for route, rule in RULES.items() if route[0] == "GET"})
    with pytest.raises(RuntimeError, match="/v1/backup"):
        admin_app(services)


async def test_a_rule_is_read_at_each_request_and_its_absence_refuses(
    services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = admin_app(services)
    monkeypatch.setattr(routes, "RULES", {})
    assert b"admin_denied" in (await call(app, ("GET", "/v1/status"), uid=OWN_UID))[1]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/v1/status/"), ("PUT", "/v1/status"), ("GET", "/docs"), ("GET", "/openapi.json")],
)
async def test_what_is_no_route_is_missing(method: str, path: str, services: Any) -> None:
    status, code = await ask(services, (method, path), uid=OWN_UID)
    assert (status, code) == (404, "admin_route_unknown")


@pytest.mark.parametrize("key", [None, "client@tenant", "admin@tenant", "admin@appliance"])
@pytest.mark.parametrize("route", RULES)
async def test_another_way_to_write_a_path_opens_nothing_that_its_rule_does_not(
    route: tuple[str, str], key: str | None, services: Any
) -> None:
    app = admin_app(services)

    async def code(path: str) -> str:
        _, answer = await call(app, (route[0], path), key=key)
        told: str = json.loads(answer)["error"]["code"]
        return told

    path = filled(route[1])
    as_it_is = await code(path)
    for name, trick in tricks(path).items():
        assert await code(trick) in ("admin_route_unknown", as_it_is), name


async def test_a_body_that_is_too_long_is_refused_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    services = gateway(sealed=True)
    monkeypatch.setattr(os, "geteuid", lambda: OWN_UID)
    pieces = [b"x" * 1024] * (MAX_BODY_BYTES // 1024 + 1)
    answered = await ask(services, ("POST", "/v1/vault/unseal"), uid=OWN_UID, body=pieces)
    assert answered == (400, "admin_request_invalid")


async def test_an_answer_repeats_nothing_of_a_request_that_cannot_be_used() -> None:
    services: Any = gateway()
    body = b'{"name": "tre\\u001basury", "secret": "hf_x"}'
    status, answer = await call(admin_app(services), ("POST", "/v1/tenants"), uid=OWN_UID, body=[body])
    assert status == 400
    assert b"asury" not in answer
    assert b"hf_x" not in answer


@pytest.mark.parametrize("route", [route for route, rule in RULES.items() if rule.recorded])
async def test_what_is_asked_for_is_recorded_before_it_is_done(route: tuple[str, str], services: Any) -> None:
    assert await ask(services, route, key="admin@appliance") == (429, "test_reached")
    asked, failed = services.audit.events
    assert (asked.kind.action, asked.actor.id, asked.outcome) == ("admin.acted", "prn_1", Outcome.SUCCESS)
    assert (failed.kind, failed.outcome, failed.reason) == (asked.kind, Outcome.REFUSED, "test_reached")
    for event in (asked, failed):
        assert event.details == {"route": " ".join(route), "key_id": "ak_brought"}
        assert event.target[1] in ("", "ak_1", "ses_1", "ten_1", "soc")
        assert event.session_id == ("ses_1" if "{session_id}" in route[1] else "")
        assert event.request_id == "req_1"


@pytest.mark.parametrize("route", [route for route, rule in RULES.items() if rule.looks])
async def test_a_key_that_is_brought_for_a_look_is_counted(route: tuple[str, str], services: Any) -> None:
    await ask(services, route, key="operator@appliance")
    (counted,) = services.audit.counted
    assert (counted.kind.action, counted.actor.id, counted.source) == ("key.authenticated", "prn_1", "127.0.0.1")
    assert (counted.target, counted.outcome) == (("key", "ak_brought"), Outcome.SUCCESS)
    await ask(services, route, uid=OWN_UID)
    assert len(services.audit.counted) == 1, "who the kernel vouches for brings none"
    await ask(services, route, key="operator@tenant")
    assert len(services.audit.counted) == 1
    refused = services.audit.events[-1]
    assert (refused.kind.action, refused.details["key_id"]) == ("admin.refused", "ak_brought")


async def test_what_a_tenants_principal_asks_for_is_its_tenants(services: Any) -> None:
    await ask(services, ("GET", "/v1/sessions/{session_id}"), key="admin@tenant")
    await ask(services, ("POST", "/v1/backup"), key="admin@tenant")
    assert [event.tenant_id for event in services.audit.events] == ["ten_1"] * 3
    assert services.audit.events[-1].reason == "admin_denied"


@pytest.mark.parametrize("route", [route for route, rule in RULES.items() if rule.recorded])
async def test_what_cannot_be_recorded_is_not_done(route: tuple[str, str], services: Any) -> None:
    services.audit.unwritable = True
    assert await ask(services, route, key="admin@appliance") == (503, "audit_unavailable")


async def test_what_is_denied_is_recorded_and_a_key_that_does_not_hold_is_counted(services: Any) -> None:
    await ask(services, ("POST", "/v1/tenants"), key="client@tenant")
    (event,) = services.audit.events
    assert (event.kind.action, event.outcome, event.reason) == ("admin.refused", Outcome.REFUSED, "admin_denied")
    await ask(services, ("POST", "/v1/tenants"), key="nobody@nowhere")
    (counted,) = services.audit.counted
    assert (counted.kind.action, counted.reason) == ("key.refused", "test_key_refused")


async def test_a_user_who_is_no_administrator_is_counted(services: Any) -> None:
    await ask(services, ("GET", "/v1/sessions"), uid=OWN_UID + 1)
    (counted,) = services.audit.counted
    assert (counted.kind.action, counted.outcome, counted.reason) == (
        "admin.refused",
        Outcome.REFUSED,
        "not_an_administrator",
    )
    assert (counted.actor.kind, counted.actor.id) == ("user", f"uid={OWN_UID + 1}")
    assert not services.audit.events


async def test_nobody_and_the_engine_are_counted(services: Any) -> None:
    await ask(services, ("GET", "/v1/sessions"))
    services.engine_process = SimpleNamespace(owns=lambda pid: pid == PID)
    await ask(services, ("GET", "/v1/sessions"), uid=OWN_UID)
    assert [(each.kind.action, each.reason, each.actor.kind) for each in services.audit.counted] == [
        ("admin.refused", "admin_peer_unknown", "anyone"),
        ("admin.refused", "admin_peer_unknown", "user"),
    ]


async def test_what_is_refused_while_sealed_leaves_a_record(services: Any) -> None:
    services.vault.sealed = True
    await ask(services, ("GET", "/v1/status"), uid=OWN_UID + 1)
    (counted,) = services.audit.counted
    assert (counted.kind.action, counted.reason) == ("admin.refused", "admin_denied")
    await ask(services, ("GET", "/v1/tenants"), uid=OWN_UID)
    (event,) = services.audit.events
    assert (event.kind.action, event.outcome, event.reason) == ("admin.refused", Outcome.REFUSED, "vault_sealed")
    assert event.actor.id == f"uid={OWN_UID}"


async def test_what_is_no_request_of_the_api_is_counted() -> None:
    services: Any = gateway()
    await ask(services, ("GET", "/nothing"), uid=OWN_UID)
    await ask(services, ("DELETE", "/v1/tenants"), uid=OWN_UID)
    await ask(services, ("POST", "/v1/tenants"), uid=OWN_UID, body=[b"{"])
    await ask(services, ("POST", "/v1/tenants"), uid=OWN_UID, body=[b"x" * (MAX_BODY_BYTES + 1)])
    assert {(each.kind.action, each.outcome) for each in services.audit.counted} == {
        ("request.malformed", Outcome.REFUSED)
    }
    assert [each.reason for each in services.audit.counted] == [
        "admin_route_unknown",
        "admin_route_unknown",
        "admin_request_invalid",
        "admin_request_invalid",
    ]
    assert not services.audit.events


@pytest.mark.parametrize("route", [("POST", "/v1/tenants"), ("GET", "/v1/sessions?limit=0")])
async def test_a_request_that_its_schema_refuses_is_recorded_as_refused_only(route: tuple[str, str]) -> None:
    services: Any = gateway()
    assert await ask(services, route, uid=OWN_UID, body=[b"{}"]) == (400, "admin_request_invalid")
    (event,) = services.audit.events
    assert (event.kind.action, event.outcome) == ("admin.acted", Outcome.REFUSED)
    assert event.reason == "admin_request_invalid"


async def test_a_failure_that_its_route_recorded_is_recorded_once() -> None:
    services: Any = gateway(sealed=True)
    services.settings = SimpleNamespace(state_dir=Path("/nonexistent"))
    await ask(services, ("POST", "/v1/vault/unseal"), uid=os.geteuid(), body=[b"wrong"])
    assert [each.kind.action for each in services.audit.events] == ["admin.acted", "vault.refused"]


async def test_a_defect_is_recorded_as_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(routes, "_ENDPOINTS", dict.fromkeys(routes._ENDPOINTS, (broken, None)))
    services: Any = gateway()
    with pytest.raises(ZeroDivisionError):
        await call(admin_app(services), ("POST", "/v1/tenants"), uid=OWN_UID)
    assert [(each.kind.action, each.outcome, each.reason) for each in services.audit.events] == [
        ("admin.acted", Outcome.SUCCESS, ""),
        ("admin.acted", Outcome.FAILURE, "internal_error"),
    ]


async def test_one_proof_runs_at_a_time() -> None:
    services: Any = gateway()
    app = admin_app(services)
    async with app.state.proving:
        status, answer = await call(app, ("POST", "/v1/prove/isolation"), key="admin@appliance", body=[b"{}"])
    assert (status, json.loads(answer)["error"]["code"]) == (409, "proof_running")


def test_everything_but_a_look_at_the_status_leaves_a_record() -> None:
    """What is not recorded when it is asked for is recorded by its own route; of the six statuses, keys are counted."""
    assert {route[1] for route, rule in RULES.items() if rule.looks} == {
        "/readyz",
        "/metrics",
        "/v1/status",
        "/v1/kv",
        "/v1/audit",
        "/v1/audit/exports",
    }
    assert not [route for route, rule in RULES.items() if rule.looks and rule.recorded]
    assert {route[1] for route, rule in RULES.items() if not rule.recorded} == {
        "/readyz",
        "/metrics",
        "/v1/status",
        "/v1/kv",
        "/v1/audit",
        "/v1/audit/entries",
        "/v1/audit/entries/{sequence}",
        "/v1/audit/digest",
        "/v1/audit/excerpt",
        "/v1/audit/exports",
        "/v1/sessions",
        "/v1/sessions/{session_id}/transcript",
    }
