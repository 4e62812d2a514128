"""An engine that dies, stalls or babbles; clients that leave; a gateway that is told to stop, sealed, or killed."""

import contextlib
import http.client
import json
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.running import make_appliance, running_gateway, running_stub
from benchmarks.stub import MAX_MODEL_LEN, MODEL
from tests.e2e.api.conftest import DEADLINE_S, Served, read_answer, serving, until

UNHURRIED = '@stub {"pause_s": 0.002}'
SLOW = '@stub {"chunks": 400, "pause_s": 0.05}'


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[Served]:
    """One for a test that breaks it."""
    with serving(tmp_path, environment={"HOLDFAST_GATEWAY__DRAIN_TIMEOUT_S": "1"}) as it:
        yield it


def begin(served: Served, text: str, *, session: str = "", stream: bool = True) -> socket.socket:
    """Ask for an answer; return the connection with nothing of it read."""
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": stream}).encode()
    named = f"X-Session-ID: {session}\r\n" if session else ""
    connection = served.connect()
    connection.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {served.api_key}\r\n{named}"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return connection


def read_until(connection: socket.socket, words: bytes) -> bytes:
    received = b""
    while words not in received:
        part = connection.recv(1 << 16)
        assert part, received
        received += part
    return received


# The engine


def test_an_engine_killed_in_a_stream_is_an_error_event_and_the_session_goes_on(fragile: Served) -> None:
    first = fragile.ask("remember me", session="survivor")
    assert first.status == 200
    broken = fragile.ask('@stub {"die_after": 3}', session="survivor", stream=True)
    assert broken.status == 200
    *chunks, last = broken.events
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == " word0 word1 word2"
    assert last["error"]["code"] == "engine_lost"
    assert last["error"]["request_id"] == broken.headers["x-request-id"]
    while_down = fragile.ask("anybody there?", session="survivor")
    assert while_down.status == 503
    assert int(while_down.headers["retry-after"]) >= 1
    with running_stub(fragile.engine):
        until(lambda: fragile.send("GET", "/readyz").status == 200)
        assert fragile.ask("back again", session="survivor").status == 200
        turns = fragile.transcript(fragile.newest_session().session_id).turns
    assert [turn.state for turn in turns] == ["complete", "interrupted", "complete"]
    assert turns[1].answer["content"] == " word0 word1 word2"
    assert turns[1].completion_token_ids == [0, 1, 2]


def test_an_engine_killed_before_it_answers_is_a_503(fragile: Served) -> None:
    answer = fragile.ask('@stub {"die_after": 0}')
    assert (answer.status, answer.code) == (503, "engine_lost")
    assert fragile.send("GET", "/healthz").status == 200
    until(lambda: fragile.send("GET", "/readyz").status == 503)
    parts = fragile.send("GET", "/readyz").json["parts"]
    assert parts.keys() == {"gateway", "vault", "audit", "store", "engine"}
    assert [name for name, part in parts.items() if not part["ready"]] == ["engine"]
    assert parts["engine"]["why"] == "it does not answer; it is started elsewhere"
    assert fragile.ask().code in ("engine_starting", "engine_unavailable")
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/v1/models/nothing"):
        down = fragile.send("GET", path)
        assert (down.status, down.code) == (503, "engine_starting")
        assert down.json["error"]["cause"] == parts["engine"]["why"]


def test_an_engine_that_failed_for_good_is_told_as_one(tmp_path: Path) -> None:
    """No engine can be started with this interpreter, and it would not help to try again."""
    state_dir = tmp_path / "state"
    api_key = make_appliance(state_dir)
    environment = {"HOLDFAST_ENGINE__PYTHON": str(tmp_path / "no-python")}
    with running_gateway(state_dir, None, environment=environment, ready=False) as gateway:
        served = Served(state_dir, tmp_path, gateway, api_key)
        until(lambda: "for good" in served.send("GET", "/readyz").json["parts"]["engine"].get("why", ""))
        ready = served.send("GET", "/readyz", headers={"Authorization": ""})
        assert ready.json["parts"]["engine"]["why"] == "it failed for good, and is not started again"
        assert str(tmp_path).encode() not in ready.body
        for answer in (served.ask(), served.send("GET", f"/v1/models/{MODEL}")):
            assert (answer.status, answer.code) == (503, "engine_starting")
            assert "for good" in answer.json["error"]["cause"]
            assert "administrator" in answer.json["error"]["remedy"]
            assert "retry-after" not in answer.headers


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        ('{"drop_after": 2}', "engine_lost"),
        ('{"garbage_after": 2}', "engine_answer_broken"),
        ('{"other_after": 2}', "engine_answer_broken"),
        ('{"error_after": 2}', "engine_lost"),
    ],
)
def test_a_stream_that_breaks_ends_with_an_error_event_and_without_done(served: Served, plan: str, code: str) -> None:
    broken = served.ask(f"@stub {plan}", session=f"broken-{plan[2:6]}", stream=True)
    *chunks, last = broken.events
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == " word0 word1"
    assert last["error"]["code"] == code
    (turn,) = served.transcript(served.newest_session().session_id).turns
    assert (turn.state, turn.answer["content"]) == ("interrupted", " word0 word1")
    assert served.ask().status == 200


def test_an_answer_to_another_request_is_told_and_kept_by_nobody(served: Served) -> None:
    answer = served.ask('@stub {"other_after": 0, "text": "for somebody else"}', session="not-mine")
    assert (answer.status, answer.code) == (500, "engine_answer_broken")
    assert b"for somebody else" not in answer.body
    assert served.ask(session="not-mine").status == 200
    assert len(served.transcript(served.newest_session().session_id).turns) == 1


@pytest.mark.parametrize("status", [400, 404, 422])
def test_what_the_engine_refuses_is_the_client_s_error(served: Served, status: int) -> None:
    answer = served.ask(f'@stub {{"status": {status}}}')
    assert (answer.status, answer.code) == (400, "engine_refused")
    assert served.ask(f'@stub {{"status": {status}}}', stream=True).status == 400


@pytest.mark.parametrize("status", [500, 502])
def test_an_engine_that_fails_is_not_the_client_s_error(served: Served, status: int) -> None:
    assert served.ask(f'@stub {{"status": {status}}}').status == 503


def test_an_answer_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with serving(tmp_path, environment={"HOLDFAST_GATEWAY__REQUEST_TIMEOUT_S": "1"}) as served:
        streamed = served.ask(SLOW, stream=True)
        assert streamed.events[-1]["error"]["code"] == "turn_timed_out"
        assert len(streamed.events) > 2
        silent = served.ask('@stub {"first_pause_s": 60}', stream=True)
        assert (silent.status, silent.code) == (503, "turn_timed_out")
        assert served.ask(SLOW).status == 503
        until(lambda: served.engine_seen()["abandoned"] == 3)


# Clients


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_engine_s_work_at_once(served: Served, stream: bool) -> None:
    before = served.engine_seen()
    with begin(served, SLOW, session=f"leaver-{stream}", stream=stream) as connection:
        if stream:
            read_until(connection, b"word2")
        else:
            until(lambda: served.engine_seen()["requests"] > before["requests"])
    until(lambda: served.engine_seen()["abandoned"] > before["abandoned"])
    until(lambda: served.admin.status().running_turns == 0)
    if stream:
        (turn,) = served.transcript(served.newest_session().session_id).turns
        assert turn.state == "interrupted"
        assert turn.answer["content"].startswith(" word0 word1 word2")
    assert served.ask("back", session=f"leaver-{stream}").status == 200


def test_a_client_that_left_gives_its_place_back(served: Served) -> None:
    key = served.new_key(principal="one-at-a-time", concurrent_requests=1).secret
    mine = Served(served.state_dir, served.engine, served.gateway, key)
    with begin(mine, SLOW) as connection:
        read_until(connection, b"word1")
        refused = mine.ask()
        assert (refused.status, refused.code) == (429, "too_many_concurrent_requests")
    until(lambda: mine.ask().status == 200)


def test_a_client_that_does_not_read_loses_its_place(tmp_path: Path) -> None:
    environment = {"HOLDFAST_GATEWAY__MAX_STREAMS": "1", "HOLDFAST_GATEWAY__UNREAD_TIMEOUT_S": "0.5"}
    more_than_buffers = '@stub {"chunks": 60000}'
    with serving(tmp_path, environment=environment) as served, begin(served, more_than_buffers) as connection:
        until(lambda: served.admin.status().running_turns == 1)
        until(lambda: served.ask().status == 200)
        # And its connection is gone: what is left in the buffers ends without an end.
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 20):
                received += part
        assert b"[DONE]" not in received
        assert served.send("GET", "/healthz").status == 200


def test_an_answer_in_one_piece_that_its_client_did_not_wait_for_costs_what_it_may_have_cost(served: Served) -> None:
    mine = Served(
        served.state_dir,
        served.engine,
        served.gateway,
        served.new_key(principal="impatient", tokens_per_day=MAX_MODEL_LEN + 100).secret,
    )
    before = served.engine_seen()
    with begin(mine, SLOW, stream=False):
        until(lambda: served.engine_seen()["requests"] > before["requests"])
    until(lambda: served.engine_seen()["abandoned"] > before["abandoned"])
    until(lambda: served.admin.status().running_turns == 0)
    refused = mine.ask(max_tokens=100)
    assert (refused.status, refused.code) == (429, "daily_tokens_spent")


def test_without_a_bound_of_its_own_each_choice_reserves_what_the_model_can_say(served: Served) -> None:
    key = served.new_key(principal="many-choices", tokens_per_day=2 * MAX_MODEL_LEN).secret
    assert served.ask(api_key=key, n=2).status == 200
    assert served.ask(api_key=key, n=2).code == "daily_tokens_spent"


def test_no_more_turns_run_than_allowed(tmp_path: Path) -> None:
    with serving(tmp_path, environment={"HOLDFAST_GATEWAY__MAX_STREAMS": "1"}) as served:
        with begin(served, SLOW) as connection:
            read_until(connection, b"word1")
            refused = served.ask()
            assert (refused.status, refused.code) == (503, "too_many_turns")
        until(lambda: served.ask().status == 200)


def test_a_body_that_only_arrives_takes_no_turn_s_place(tmp_path: Path) -> None:
    with serving(tmp_path, environment={"HOLDFAST_GATEWAY__MAX_STREAMS": "1"}) as served, served.connect() as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {served.api_key}\r\n"
        slow.sendall(f"{head}Expect: 100-continue\r\nContent-Length: 9\r\n\r\n".encode())
        read_until(slow, b"100 Continue")  # it waits for the body now
        assert served.ask().status == 200


# Stopping


def test_told_to_stop_it_lets_streams_finish_and_admits_nothing(tmp_path: Path) -> None:
    with serving(tmp_path) as served, served.connect() as early:
        early.settimeout(DEADLINE_S)
        with begin(served, '@stub {"chunks": 40, "pause_s": 0.05}', session="last") as connection:
            read_until(connection, b"word0")
            served.gateway.process.send_signal(signal.SIGTERM)
            until(lambda: served.admin.status().draining)
            refused = served.ask()
            assert (refused.status, refused.code) == (503, "draining")
            assert refused.headers["connection"] == "close"
            assert served.send("GET", "/readyz").json["parts"]["gateway"]["ready"] is False
            rest = read_until(connection, b"[DONE]")
        assert b"word39" in rest
        assert served.gateway.process.wait(DEADLINE_S) == 0
        with running_gateway(served.state_dir, served.engine) as again:
            served.gateway = again
            (turn,) = served.transcript(served.newest_session().session_id).turns
        assert (turn.state, turn.completion_tokens) == ("complete", 41)


@pytest.mark.parametrize("urgent", [False, True], ids=["at its deadline", "at a second signal"])
def test_what_does_not_finish_is_ended_with_an_error_event_and_kept(fragile: Served, urgent: bool) -> None:
    with begin(fragile, SLOW, session="cut") as connection:
        read_until(connection, b"word0")
        fragile.gateway.process.send_signal(signal.SIGTERM)
        until(lambda: fragile.admin.status().draining)
        if urgent:
            fragile.gateway.process.send_signal(signal.SIGINT)
        rest = read_until(connection, b"0\r\n\r\n")
    assert b'"code":"draining"' in rest
    assert b"[DONE]" not in rest
    assert fragile.gateway.process.wait(DEADLINE_S) == 0
    with running_gateway(fragile.state_dir, fragile.engine) as again:
        fragile.gateway = again
        (turn,) = fragile.transcript(fragile.newest_session().session_id).turns
    assert turn.state == "interrupted"
    assert turn.answer["content"].startswith(" word0")


def test_sealed_it_answers_503_by_name_and_unsealed_it_goes_on(fragile: Served) -> None:
    assert fragile.ask(session="kept").status == 200
    fragile.admin.seal()
    for answer in (fragile.ask(), fragile.send("GET", "/v1/models"), fragile.send("GET", "/nowhere", api_key="")):
        assert (answer.status, answer.code) == (503, "vault_sealed")
    assert fragile.ask(session="kept").headers["x-session-id"] == "kept"
    assert fragile.send("GET", "/healthz").status == 200
    ready = fragile.send("GET", "/readyz")
    assert (ready.status, ready.json["parts"]["vault"]["ready"]) == (503, False)
    fragile.admin.unseal(b"")
    again = fragile.ask(session="kept")
    assert again.status == 200
    computed = again.json["usage"]["prompt_tokens_details"]["computed_tokens"]
    assert computed.keys() == {"unknown"}, "what was said before was forgotten"
    assert fragile.newest_session().turns == 2


def test_metrics_are_for_the_admin_listener_alone_and_name_nobody(served: Served) -> None:
    served.ask("a word of mine", session="a-name-of-mine")
    salt = served.engine_seen()["bodies"][-1]["cache_salt"]
    assert served.send("GET", "/metrics").status == 404
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(str(served.state_dir / "run" / "admin.sock"))
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = read_answer(connection)
    text = answer.body.decode()
    assert 'holdfast_turns_total{state="complete"}' in text
    assert 'holdfast_requests_total{route="/v1/chat/completions",status="2xx"}' in text
    session = served.newest_session()
    for secret in (salt, "a-name-of-mine", "a word of mine", served.api_key, session.session_id, session.principal_id):
        assert secret not in text
    assert f'tenant="{session.tenant_id}"' in text
    assert 'tenant="tenant"' not in text, "a tenant's label is its id, never its name"


def test_metrics_and_readiness_in_full_are_for_principals_of_the_appliance(served: Served) -> None:
    def asked(path: str, key: str | None = None) -> tuple[int, bytes]:
        offered = "" if key is None else f"Authorization: Bearer {key}\r\n"
        with served.connect_admin() as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{offered}Connection: close\r\n\r\n".encode())
            answer = read_answer(connection)
        return answer.status, answer.body

    made = served.admin
    auditor = made.create_appliance_key(principal="prometheus", role="auditor").secret
    of_tenant = [made.create_key(principal=role, role=role, tenant="tenant").secret for role in ("client", "admin")]
    for path, seen in (("/metrics", b"holdfast_turns_running"), ("/readyz", b'"engine"')):
        for key in (None, auditor):
            status, body = asked(path, key)
            assert (status, seen in body) == (200, True)
        for key, status in ((of_tenant[0], 403), (of_tenant[1], 403), ("hf_" + "x" * 43, 401)):
            assert asked(path, key)[0] == status
            assert seen not in asked(path, key)[1]
    assert asked("/healthz", of_tenant[0]) == (200, b'{"status":"alive"}')


def test_a_second_gateway_does_not_start(served: Served) -> None:
    with pytest.raises(RuntimeError, match="ended with 1"), running_gateway(served.state_dir, served.engine):
        pass
    assert "state_in_use" in (served.state_dir / "log" / "gateway.log").read_text()
    assert served.ask().status == 200


def test_a_home_so_deep_that_a_socket_s_path_is_too_long_serves_all_the_same(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    stub_place = tmp_path / "s"
    stub_place.mkdir()
    with serving(stub_place) as plain:
        state = deep / "state"
        subprocess.run(["cp", "-a", str(plain.state_dir), str(state)], check=True)
        assert len(str(state / "run" / "admin.sock")) > 108
        with running_gateway(state, plain.engine) as gateway:
            it = Served(state, plain.engine, gateway, plain.api_key)
            assert it.ask().status == 200
            assert it.admin.status().ready
            assert (state / "run" / "admin.sock").stat().st_mode & 0o777 == 0o600


# The end of a turn


def test_neither_the_finish_nor_done_is_told_before_the_turn_is_durable(served: Served) -> None:
    with contextlib.closing(sqlite3.connect(served.state_dir / "holdfast.db", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")  # nobody else can commit now
        with begin(served, "hello", session="held-back") as connection:
            said = read_until(connection, b"word13")
            connection.settimeout(0.5)
            with pytest.raises(TimeoutError):
                said += connection.recv(1 << 16)
            assert b"[DONE]" not in said
            assert b'"finish_reason":"stop"' not in said
            database.execute("ROLLBACK")
            connection.settimeout(DEADLINE_S)
            assert b'"finish_reason":"stop"' in read_until(connection, b"[DONE]")


def test_a_turn_that_cannot_be_committed_in_time_is_an_error_event(served: Served) -> None:
    with contextlib.closing(sqlite3.connect(served.state_dir / "holdfast.db", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        streamed = served.ask("hello", session="refused", stream=True)
        whole = served.ask("hello", session="refused")
    assert streamed.events[-1]["error"]["code"].startswith("store_")
    assert "[DONE]" not in streamed.events
    assert (whole.status, whole.code[:6]) == (503, "store_")
    again = served.ask("hello", session="refused")
    assert again.status == 200
    assert [turn.number for turn in served.transcript(served.newest_session().session_id).turns] == [1]


# Killed


@pytest.mark.parametrize("kills", [range(start, start + 10) for start in range(0, 100, 10)], ids=str)
def test_killed_in_the_middle_of_turns_a_hundred_times_it_loses_no_transcript_that_was_acknowledged(
    tmp_path: Path, kills: range
) -> None:
    """Four clients write turns without end while the gateway is killed and started again, ten times in each test.

    What a client saw the end of is there, whole; what it did not may be there whole, or not at all.
    """
    acknowledged: set[str] = set()
    cut_short: set[str] = set()
    with serving(tmp_path) as served:
        port, state_dir, engine = served.gateway.port, served.state_dir, served.engine
        stop = threading.Event()
        environment = {"HOLDFAST_GATEWAY__PORT": str(port)}
        clients = [
            threading.Thread(
                target=_write_turns, args=(port, served.api_key, f"c{number}", acknowledged, cut_short, stop)
            )
            for number in range(4)
        ]
        served.gateway.end(signal.SIGKILL)
        for client in clients:
            client.start()
        try:
            for kill in kills:
                before = len(acknowledged)
                with running_gateway(state_dir, engine, environment=environment) as gateway:
                    until(lambda before=before: len(acknowledged) >= before + 3)  # type: ignore[misc]
                    time.sleep(0.002 * (kill % 10))
                    gateway.end(signal.SIGKILL)
        finally:
            stop.set()
            for client in clients:
                client.join()
        with running_gateway(state_dir, engine) as last:
            served.gateway = last
            kept = _read_every_turn(served)
    assert acknowledged <= kept
    assert len(acknowledged) >= 3 * len(kills)
    assert cut_short, "no kill came in the middle of a turn"


def _write_turns(
    port: int, api_key: str, client: str, acknowledged: set[str], cut_short: set[str], stop: threading.Event
) -> None:
    headers = {"Authorization": f"Bearer {api_key}", "X-Session-ID": client}
    number = 0
    while not stop.is_set():
        number += 1
        text = f"{client} turn {number} {UNHURRIED}"
        body = json.dumps({"model": MODEL, "stream": True, "messages": [{"role": "user", "content": text}]})
        connection, received = http.client.HTTPConnection("127.0.0.1", port, timeout=5), b""
        try:
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            while part := response.read1():
                received += part
                if b'finish_reason":"stop' in received:  # who sees this may take it for the end
                    acknowledged.add(text)
        except (OSError, http.client.HTTPException):
            stop.wait(0.01)
        finally:
            connection.close()
            if received and b"[DONE]" not in received:
                cut_short.add(text)


def _read_every_turn(served: Served) -> set[str]:
    """What was asked in every stored turn; each is read whole, and its answer is whole too."""
    kept = set()
    for session in served.admin.sessions(limit=1000).sessions:
        transcript = served.transcript(session.session_id)
        assert [turn.number for turn in transcript.turns] == list(range(1, session.turns + 1))
        for turn in transcript.turns:
            if turn.state == "complete":
                assert turn.answer["content"].endswith(" word13")
                assert len(turn.completion_token_ids) == 15
            kept.add(turn.new_messages[-1]["content"])
    return kept
