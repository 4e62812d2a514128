"""What the guard records of requests that came to nothing."""

from types import SimpleNamespace
from typing import Any

import pytest

from api.answers import Receive, Scope, Send
from api.bodies import ClientGone
from api.guard import Guard
from api.openai.models import Models
from appliance.audit import Event, Outcome
from appliance.engine.client import ModelCard
from appliance.identity import Caller, Isolation, Principal, Role, Tenant

PRINCIPAL = Principal(principal_id="prn_1", tenant_id="ten_1", name="agent", role=Role.CLIENT, permissions=frozenset())
TENANT = Tenant(tenant_id="ten_1", name="tenant", idle_timeout_s=None, isolation=Isolation.SESSION, created_at=0.0)


class FakeAudit:
    """An audit log in a list."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    async def record(self, *events: Event) -> int:
        self.events += events
        return len(self.events)


class FakeIdentity:
    """Knows whoever brings a key."""

    async def authenticate(self, _: str) -> Caller:
        return Caller(principal=PRINCIPAL, tenant=TENANT, key=None)


def gateway(models: list[ModelCard] | None = None) -> Any:
    return SimpleNamespace(
        settings=SimpleNamespace(gateway=SimpleNamespace(allowed_hosts=["localhost"], max_body_bytes=1000)),
        metrics=SimpleNamespace(answered=lambda _route, _status: None),
        new_id=lambda: "req_1",
        lifecycle=SimpleNamespace(draining=False, started_at=0.0),
        vault=SimpleNamespace(sealed=False),
        identity=FakeIdentity(),
        audit=FakeAudit(),
        watch=SimpleNamespace(ready=models is not None, summary="it starts", failed=False, models=models or []),
    )


async def ask(services: Any, app: Any, path: bytes = b"/v1/turns", method: str = "POST") -> list[int]:
    """The status lines that a request with a key is answered with."""
    guard = Guard(app, app, services, turns={b"/v1/turns": app}, end_of_session=app, routes={b"/v1/models": ("GET",)})
    headers = [(b"host", b"localhost"), (b"authorization", b"Bearer hf_key")]
    scope = {"type": "http", "method": method, "raw_path": path, "headers": headers, "client": ("192.0.2.7", 4711)}
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await guard(scope, receive, send)
    return statuses


@pytest.mark.parametrize("read", [False, True])
async def test_a_valid_key_whose_request_never_became_whole_is_recorded(read: bool) -> None:
    async def gone(scope: Scope, receive: Receive, send: Send) -> None:
        scope["holdfast.request"].body_read = read  # read: it was admitted, and the turn records how it ended
        raise ClientGone

    services = gateway()
    assert await ask(services, gone) == []
    told = [(event.kind.action, event.actor.id, event.source) for event in services.audit.events]
    assert told == ([] if read else [("key.authenticated", "prn_1", "192.0.2.7")])


async def test_a_defect_is_answered_and_recorded() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    services = gateway()
    assert await ask(services, broken) == [500]
    (event,) = services.audit.events
    assert (event.kind.action, event.outcome, event.reason) == ("request.refused", Outcome.FAILURE, "internal_error")
    assert event.target == ("route", "/v1/turns")


async def test_a_refusal_of_the_models_is_recorded() -> None:
    services = gateway()
    assert await ask(services, Models(services), b"/v1/models", "GET") == [503]
    (event,) = services.audit.events
    assert (event.kind.action, event.reason) == ("request.refused", "engine_starting")
    services = gateway([])
    assert await ask(services, Models(services), b"/v1/models/none", "GET") == [404]
    assert [event.kind.action for event in services.audit.events] == [
        "key.authenticated",
        "models.read",
        "request.refused",
    ]
