"""What stands before every route: paths, hosts, keys, sizes. Spoken in bytes: an SDK would mend what is wrong here."""

import contextlib
import itertools
import json
import re
import socket
from collections.abc import Callable

import pytest

from api.admin.client import AdminClient, Refused
from appliance.errors import Fault
from benchmarks.stub import MODEL
from tests.e2e.api.conftest import Served, read_answer
from tests.path_tricks import tricks

ROUTES = {
    "/v1/models": "GET",
    f"/v1/models/{MODEL}": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/sessions/ses_0": "DELETE",  # of a session that there is not
}
_UNKNOWN = {"/v1/sessions/ses_0": 404}
OPEN_ROUTES = {"/healthz": "GET", "/readyz": "GET"}
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "prompt": "hello"}).encode()


TRICKS = [
    pytest.param(method, trick, id=f"{path}: {name}")
    for path, method in {**ROUTES, **OPEN_ROUTES}.items()
    for name, trick in tricks(path).items()
    if trick not in ROUTES and trick not in OPEN_ROUTES
]


@pytest.mark.parametrize(("method", "target"), TRICKS)
def test_a_path_that_is_not_exactly_a_route_is_none_and_needs_a_key_all_the_same(
    served: Served, method: str, target: str
) -> None:
    body = BODY if method == "POST" else b""
    without = served.send(method, target, body, api_key="", headers={"Authorization": ""})
    assert without.status in (400, 401)
    with_key = served.send(method, target, body)
    assert with_key.status in (400, 404)
    nothing = {"/v1/models/": "model_not_found", "/v1/sessions/": "session_not_found"}
    named = [code for prefix, code in nothing.items() if target.startswith(prefix)]
    assert with_key.status == 400 or with_key.code in (*named, "route_not_found")


@pytest.mark.parametrize("target", ["http://evil.example/v1/models", "//evil.example/v1/models", "*", "v1/models"])
def test_a_target_that_names_a_server_reaches_nothing_without_a_key(served: Served, target: str) -> None:
    assert served.send("GET", target, headers={"Authorization": ""}).status in (400, 401)


def test_a_query_changes_no_route(served: Served) -> None:
    assert served.send("GET", "/v1/models?key=1&/healthz").status == 200
    assert served.send("GET", "/v1/models?key=1&/healthz", headers={"Authorization": ""}).status == 401
    assert served.send("GET", "/nowhere?/healthz", headers={"Authorization": ""}).status == 401


@pytest.mark.parametrize("path", [*ROUTES, "/", "/docs", "/openapi.json", "/metrics", "/v1/status", "/v1"])
@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic aGY6aGY=",
        "hf_key",
        "Bearer hf_wrong",
        f"Bearer hf_{'x' * 43}",
        "Bearer " + "x" * 999,
    ],
)
def test_without_a_key_nothing_is_told_apart(served: Served, path: str, authorization: str) -> None:
    method = ROUTES.get(path, "GET")
    answer = served.send(method, path, BODY if method == "POST" else b"", headers={"Authorization": authorization})
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.code in ("missing_api_key", "invalid_api_key")


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/metrics", "/v1/status", "/v1", "/v1/models/x/y"])
def test_with_a_key_there_is_nothing_but_the_routes(served: Served, path: str) -> None:
    assert served.send("GET", path).status == 404


def test_a_model_that_is_not_served_and_one_that_the_key_may_not_use_are_the_same(served: Served) -> None:
    narrow = served.new_key(principal="narrow", models=["another"]).secret
    same = {"X-Request-ID": "the-same"}
    unserved = served.send("GET", "/v1/models/nothing", headers=same)
    forbidden = served.send("GET", f"/v1/models/{MODEL}", api_key=narrow, headers=same)
    assert (unserved.status, unserved.code) == (404, "model_not_found")
    assert (forbidden.status, forbidden.body) == (404, unserved.body)
    assert served.send("GET", f"/v1/models/{MODEL}").status == 200


@pytest.mark.parametrize(("path", "method"), [*ROUTES.items(), *OPEN_ROUTES.items()])
def test_another_method_is_refused(served: Served, path: str, method: str) -> None:
    for other in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - {method}:
        answer = served.send(other, path)
        assert (answer.status, answer.code) == (405, "method_not_allowed")


ALL_ROUTES = [*ROUTES.items(), *OPEN_ROUTES.items()]
GOOD_HOSTS = ["127.0.0.1", "localhost", "LOCALHOST", "[::1]", "[::1]:8321", "localhost:65535", "127.0.0.1:80"]
BAD_HOSTS = [
    "",
    "evil.example",
    "localhost.evil.example",
    "evil.example:80",
    "localhost.",
    "localhost:",
    "localhost:80:80",
    "localhost:8o",
    "localhost@evil.example",
    "evil.example@localhost",
    "localhost,evil.example",
    "localhost evil.example",
    "127.0.0.1.nip.io",
    "0x7f.1",
    "127.1",
    "::1",
    "[::1",
    "[::1]evil.example",
    "http://localhost",
    "localhost/",
    "l\u00f6calhost",
]


@pytest.mark.parametrize(("path", "method"), ALL_ROUTES)
def test_a_host_that_is_not_ours_is_refused_on_every_route(served: Served, path: str, method: str) -> None:
    for host in BAD_HOSTS:
        answer = served.send(method, path, BODY if method == "POST" else b"", headers={"Host": host})
        assert answer.status == 400, host
        assert answer.code in ("host_refused", "not_http"), host


@pytest.mark.parametrize(("path", "method"), ALL_ROUTES)
def test_a_host_that_is_ours_passes_on_every_route(served: Served, path: str, method: str) -> None:
    for host in GOOD_HOSTS:
        answer = served.send(method, path, BODY if method == "POST" else b"", headers={"Host": host})
        assert answer.status == _UNKNOWN.get(path, 200), (host, answer)


@pytest.mark.parametrize(("path", "method"), ALL_ROUTES)
def test_a_host_that_comes_twice_is_refused_on_every_route(served: Served, path: str, method: str) -> None:
    for one, two in itertools.product(("localhost", "evil.example"), repeat=2):
        request = f"{method} {path} HTTP/1.1\r\nHost: {one}\r\nhost: {two}\r\nConnection: close\r\n\r\n"
        assert served.send_raw(request.encode()).status == 400


def test_http_1_0_without_a_host_is_refused(served: Served) -> None:
    assert served.send_raw(b"GET /healthz HTTP/1.0\r\n\r\n").status == 400


@pytest.mark.parametrize("name", ["Authorization", "X-Session-ID", "X-Request-ID"])
def test_a_header_that_decides_something_comes_once(served: Served, name: str) -> None:
    key = f"Authorization: Bearer {served.api_key}\r\n" if name != "Authorization" else ""
    twice = f"{name}: Bearer {served.api_key}\r\n" * 2
    answer = served.send_raw(f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{key}{twice}\r\n".encode())
    assert (answer.status, answer.code) == (400, "invalid_request")


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: -1",
        "Content-Length: 5x",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: xchunked",
    ],
)
def test_a_body_whose_length_is_in_doubt_is_refused(served: Served, framing: str) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {served.api_key}\r\n{framing}"
    answer = served.send_raw(f"{head}\r\nConnection: close\r\n\r\n0\r\n\r\n".encode())
    assert answer.status == 400
    assert answer.headers["connection"] == "close"


def test_what_is_no_http_is_told_so_with_a_request_id(served: Served) -> None:
    answer = served.send_raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    assert (answer.status, answer.code) == (400, "not_http")
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize(
    "headers",
    [
        b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(70)),
        b"X: " + b"x" * 70_000 + b"\r\n",
        b"x" * 70_000 + b": x\r\n",
    ],
    ids=["many", "a long value", "a long name"],
)
def test_headers_have_a_bound(served: Served, headers: bytes) -> None:
    answer = served.send_raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n")
    assert (answer.status, answer.code) == (431, "headers_too_large")


def test_a_request_line_has_a_bound(served: Served) -> None:
    answer = served.send_raw(b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.status == 431


def test_headers_that_never_end_have_a_bound(served: Served) -> None:
    answer = served.send_raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 80_000)
    assert answer.status == 431


TRAILERS = {
    "many": b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(64)),
    "one that never ends": b"x" * (64 << 10),
}


LISTENERS = {
    "data": ("/v1/completions", Served.connect),
    "admin": ("/v1/tenants", Served.connect_admin),
}


@pytest.mark.parametrize(("route", "connect"), LISTENERS.values(), ids=LISTENERS)
@pytest.mark.parametrize("trailers", TRAILERS.values(), ids=TRAILERS)
def test_trailers_of_a_request_that_is_still_read_have_a_bound(
    served: Served, trailers: bytes, route: str, connect: Callable[[Served], socket.socket]
) -> None:
    head = (
        f"POST {route} HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {served.api_key}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    sent, highest = 0, served.gateway.rss_bytes
    before = highest
    with connect(served) as connection:
        connection.sendall(head.encode() + b"1\r\n{\r\n0\r\nX: ")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 64 << 20:
                connection.sendall(trailers)
                sent += len(trailers)
                highest = max(highest, served.gateway.rss_bytes)
    assert sent < 64 << 20, "the connection was closed before all of it was taken"
    assert highest - before < 16 << 20


def test_trailers_that_are_too_long_are_told_so(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            b"Expect: 100-continue\r\nAuthorization: Bearer %s\r\n\r\n" % served.api_key.encode()
        )
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"0\r\nX: " + b"x" * 66_000)
        answer = read_answer(connection)
    assert (answer.status, answer.code) == (431, "headers_too_large")


def test_headers_of_the_admin_socket_have_a_bound_and_its_client_is_told_so(served: Served) -> None:
    admin = AdminClient(served.state_dir, api_key="x" * 70_000)
    with pytest.raises(Refused) as refused:
        admin.tenants()
    assert (refused.value.code, refused.value.fault) == ("headers_too_large", Fault.CALLER)
    assert "gateway.max_header_bytes" in refused.value.cause


def test_trailers_within_the_bound_are_dropped(served: Served) -> None:
    body = b'{"model": "stub", "messages": [{"role": "user", "content": "hello"}]}'
    request = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Authorization: Bearer {served.api_key}\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()
    chunks = b"%x\r\n%s\r\n0\r\nX-Session-ID: another\r\n\r\n" % (len(body), body)
    answer = served.send_raw(request + chunks)
    assert answer.status == 200
    assert answer.headers["x-session-id"] != "another"


@pytest.mark.parametrize("path", ["/healthz", "/v1/models"])
def test_an_answer_that_is_over_before_its_request_ends_the_connection(served: Served, path: str) -> None:
    with served.connect() as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {served.api_key}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        assert read_answer(connection).status == 200
        connection.settimeout(10)  # less than an idle connection is kept
        assert connection.recv(1) == b""


def test_a_request_that_was_read_leaves_the_connection_open(served: Served) -> None:
    with served.connect() as connection:
        for _ in range(2):
            connection.sendall(
                b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: x\r\n\r\n"
            )
            assert read_answer(connection).status == 200


def test_every_answer_carries_a_request_id_and_a_harmless_one_of_the_client_s_is_kept(served: Served) -> None:
    for path in ("/healthz", "/readyz", "/v1/models", "/nowhere"):
        kept = served.send("GET", path, headers={"X-Request-ID": "trace-1.2:3_4"})
        assert kept.headers["x-request-id"] == "trace-1.2:3_4"
        for odd in ("", "a b", "x" * 200, "<script>", "a;b"):
            made = served.send("GET", path, headers={"X-Request-ID": odd} if odd else {}).headers["x-request-id"]
            assert re.fullmatch(r"[0-9a-f]{32}", made), odd
    refused = served.send("GET", "/v1/models", headers={"Authorization": "", "X-Request-ID": "trace-5"})
    assert refused.json["error"]["request_id"] == refused.headers["x-request-id"] == "trace-5"


def test_an_upgrade_is_not_followed(served: Served) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Authorization": ""}
    assert served.send("GET", "/v1/models", headers=headers).status == 401


def test_requests_one_behind_the_other_are_each_decided_on(served: Served) -> None:
    with served.connect() as connection:
        known = f"Host: localhost\r\nAuthorization: Bearer {served.api_key}\r\n"
        connection.sendall(
            f"GET /v1/models HTTP/1.1\r\n{known}\r\nGET /healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n".encode()
        )
        received = b""
        while part := connection.recv(1 << 16):
            received += part
    assert re.findall(rb"^HTTP/1.1 (\d+)", received.replace(b"}HTTP", b"}\nHTTP"), re.MULTILINE) == [b"200", b"400"]


def test_health_is_open_and_names_no_path(served: Served) -> None:
    alive = served.send("GET", "/healthz", headers={"Authorization": ""})
    assert (alive.status, alive.json) == (200, {"status": "alive"})
    ready = served.send("GET", "/readyz", headers={"Authorization": ""})
    assert ready.json["ready"] is True
    assert str(served.state_dir).encode() not in ready.body


def test_a_revoked_key_is_refused_at_its_very_next_request(served: Served) -> None:
    key = served.new_key(principal="short-lived")
    assert served.ask(api_key=key.secret).status == 200
    served.admin.revoke_key(key.key.key_id)
    refused = served.ask(api_key=key.secret)
    assert (refused.status, refused.code) == (401, "invalid_api_key")


@pytest.mark.parametrize(("path", "method"), [*ROUTES.items(), ("/v1/sessions/ses_1", "DELETE"), ("/nothing", "GET")])
def test_a_key_of_the_appliance_asks_for_nothing_here(path: str, method: str, served: Served) -> None:
    key = served.admin.create_appliance_key(principal="soc", role="auditor").secret
    refused = served.send(method, path, BODY if method == "POST" else b"", api_key=key)
    assert (refused.status, refused.code) == (403, "not_a_tenants_key")
    (entry, *_) = served.admin.audit_entries(action="request.refused", limit=1).entries
    assert entry.record is not None
    assert (entry.record["reason"], entry.record["actor"]["role"]) == ("not_a_tenants_key", "auditor")


def test_an_expired_key_is_refused(served: Served) -> None:
    key = served.admin.create_key(tenant="tenant", principal="brief", expires_in_s=0.001).secret
    refused = served.ask(api_key=key)
    assert (refused.status, refused.code) == (401, "invalid_api_key")
