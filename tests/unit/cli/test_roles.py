"""What the keys that can really be made may do: each role, of the appliance and of a tenant, on a real database."""

import json
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from api.admin import routes
from api.admin.routes import RULES, admin_app
from appliance.identity import Identity, Role
from appliance.store import Store
from appliance.vault import Vault
from tests.unit.cli.test_admin_rules import OWN_UID, FakeAudit, Reached, call

KEYS, APPLIANCE_KEYS = ("POST", "/v1/keys"), ("POST", "/v1/appliance/keys")

OWN_SESSIONS = {
    "GET /v1/sessions",
    "GET /v1/sessions/{session_id}",
    "GET /v1/sessions/{session_id}/transcript",
    "GET /v1/sessions/{session_id}/why",
}
FORGETTING = {"POST /v1/sessions/{session_id}/forget"}
LOOKING = OWN_SESSIONS | {"GET /v1/tenants", "GET /v1/tenants/{tenant_id}", "GET /v1/keys"}
LOOKING_AT_THE_APPLIANCE = {
    "GET /readyz",
    "GET /metrics",
    "GET /v1/status",
    "GET /v1/kv",
    "GET /v1/audit",
    "GET /v1/audit/exports",
    "GET /v1/audit/witness",
    "POST /v1/audit/witness",
}
REVOKING = {"POST /v1/keys/{key_id}/revoke"}
RUNNING = {
    "POST /v1/vault/unseal",
    "POST /v1/vault/seal",
    "POST /v1/audit/exports/{destination}/test",
}
COMPARING = {"POST /v1/audit/digest"}
AUDITING = {"GET /v1/audit/entries", "GET /v1/audit/entries/{sequence}", "GET /v1/audit/excerpt"}
EVERYTHING = {" ".join(route) for route in RULES}

OF_THE_APPLIANCE = {
    "admin": EVERYTHING,
    "operator": LOOKING | LOOKING_AT_THE_APPLIANCE | FORGETTING | REVOKING | RUNNING,
    "auditor": LOOKING | LOOKING_AT_THE_APPLIANCE | COMPARING | AUDITING,
}
OF_A_TENANT = {
    "admin": LOOKING | FORGETTING | REVOKING | COMPARING | {"POST /v1/tenants/{tenant_id}", "POST /v1/keys"},
    "operator": LOOKING | FORGETTING | REVOKING,
    "auditor": LOOKING | COMPARING,
    "client": OWN_SESSIONS | FORGETTING,
}


@pytest.fixture
async def services(store: Store, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `init` leaves, and another tenant. Endpoints of keys work, every other one says that it was reached."""

    async def reached() -> None:
        raise Reached("reached", cause="", remedy="")

    about_keys = {route: made for route, made in routes._ENDPOINTS.items() if route[1].endswith("/keys")}
    monkeypatch.setattr(routes, "_ENDPOINTS", dict.fromkeys(routes._ENDPOINTS, (reached, None)) | about_keys)
    monkeypatch.setattr(os, "geteuid", lambda: OWN_UID)
    identity = Identity(store, vault)
    await identity.create_tenant("treasury")
    await identity.create_tenant("harbour")
    await identity.create_principal(None, "administrator", Role.ADMIN, uid=OWN_UID)
    made: Any = SimpleNamespace(
        identity=identity,
        vault=vault,
        engine_process=None,
        audit=FakeAudit(),
        now=time.time,
        new_id=lambda: "req_1",
    )
    made.app = admin_app(made)
    return made


async def ask(services: Any, route: tuple[str, str], *, key: str | None = None, **body: object) -> Any:
    """What is answered to the bearer of a key, or to the administrator whom the kernel vouches for."""
    uid = OWN_UID if key is None else None
    _, answer = await call(services.app, route, key=key, uid=uid, body=[json.dumps(body).encode()])
    return json.loads(answer)


async def key_for(services: Any, role: str, tenant: str | None) -> str:
    """A new key, made as a person makes one."""
    whose = {} if tenant is None else {"tenant": tenant}
    made = await ask(services, APPLIANCE_KEYS if tenant is None else KEYS, principal=f"the {role}", role=role, **whose)
    secret: str = made["secret"]
    return secret


@pytest.mark.parametrize(
    ("role", "tenant", "may"),
    [(role, None, may) for role, may in OF_THE_APPLIANCE.items()]
    + [(role, "treasury", may) for role, may in OF_A_TENANT.items()],
)
async def test_a_key_may_do_what_its_role_is_for_and_nothing_else(
    services: Any, role: str, tenant: str | None, may: set[str]
) -> None:
    key = await key_for(services, role, tenant)
    refused = {
        " ".join(route)
        for route in RULES
        if (await ask(services, route, key=key)).get("error", {}).get("code") == "admin_denied"
    }
    assert refused == EVERYTHING - may


async def test_a_second_administrator_makes_keys_of_the_appliance_and_of_every_tenant(services: Any) -> None:
    second = await key_for(services, "admin", None)
    for route, whose in ((APPLIANCE_KEYS, {}), (KEYS, {"tenant": "harbour"})):
        made = await ask(services, route, key=second, principal="somebody", role="auditor", **whose)
        assert (await services.identity.authenticate(made["secret"])).principal.role is Role.AUDITOR
    created = [event for event in services.audit.events if event.kind.action == "key.created"]
    assert [(event.tenant_id == "", event.details["role"]) for event in created] == [
        (True, "admin"),
        (True, "auditor"),
        (False, "auditor"),
    ]
    assert len({event.actor.id for event in created}) == 2


async def test_an_administrator_of_a_tenant_makes_nobody_of_the_appliance_and_that_is_recorded(services: Any) -> None:
    key = await key_for(services, "admin", "treasury")
    refused = await ask(services, APPLIANCE_KEYS, key=key, principal="somebody", role="auditor")
    assert refused["error"]["code"] == "admin_denied"
    assert "holdfast key create --appliance" in refused["error"]["remedy"]
    assert services.audit.events[-1].kind.action == "admin.refused"
    assert [each.name for each in await services.identity.principals(None)] == ["administrator"]


async def test_a_client_is_always_a_tenants(services: Any) -> None:
    refused = await ask(services, APPLIANCE_KEYS, principal="agents", role="client")
    assert refused["error"]["code"] == "admin_request_invalid"
    assert [each.name for each in await services.identity.principals(None)] == ["administrator"]


@pytest.mark.parametrize(("route", "was", "wanted"), [(KEYS, "client", "admin"), (APPLIANCE_KEYS, "auditor", "admin")])
async def test_a_key_of_another_role_than_the_principals_is_a_conflict(
    services: Any, route: tuple[str, str], was: str, wanted: str
) -> None:
    whose = {"tenant": "treasury"} if route is KEYS else {}
    await ask(services, route, principal="cl", role=was, **whose)
    refused = (await ask(services, route, principal="cl", role=wanted, **whose))["error"]
    assert (refused["code"], refused["fault"]) == ("role_differs", "conflict")
    assert "'cl'" in refused["message"]
    assert f"--role {was}" in refused["remedy"]
    assert len(await services.identity.keys()) == 1
    again = await ask(services, route, principal="cl", role=was, **whose)
    assert again["key"]["role"] == was


async def test_a_key_says_its_role_and_whether_it_is_the_appliances(services: Any) -> None:
    await key_for(services, "operator", None)
    await key_for(services, "client", "treasury")
    listed = (await ask(services, ("GET", "/v1/keys")))["keys"]
    assert [(each["role"], each["tenant"]) for each in listed] == [("operator", None), ("client", "treasury")]


async def test_a_key_of_the_appliance_reads_transcripts_only_with_the_grant(services: Any) -> None:
    made = await ask(services, APPLIANCE_KEYS, principal="dpo", role="auditor", permissions=["transcript:read"])
    assert made["key"]["limits"]["permissions"] == ["transcript:read"]
    plain = await ask(services, APPLIANCE_KEYS, principal="soc", role="auditor")
    assert plain["key"]["limits"]["permissions"] == []


async def test_while_sealed_who_brings_a_key_is_told_to_unseal_without_one(services: Any) -> None:
    key = await key_for(services, "admin", None)
    services.vault.seal()
    refused = (await ask(services, ("POST", "/v1/vault/unseal"), key=key))["error"]
    assert refused["code"] == "vault_sealed"
    assert "without an API key" in refused["remedy"]
