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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.running import running_gateway, running_stub
from benchmarks.stub import MODEL
from tests.e2e.api.conftest import DEADLINE_S, Served, read_answer, serving

SLOW = '@stub {"chunks": 400, "pause_s": 0.05}'


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process is about to do; fails at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
    assert [name for name, part in parts.items() if not part["ready"]] == ["engine"]
    assert fragile.ask().code in ("engine_starting", "engine_unavailable")
    assert fragile.send("GET", "/v1/models").code == "engine_starting"


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        ('{"drop_after": 2}', "engine_lost"),
        ('{"garbage_after": 2}', "engine_answer_broken"),
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


def test_no_more_turns_run_than_allowed(tmp_path: Path) -> None:
    with serving(tmp_path, environment={"HOLDFAST_GATEWAY__MAX_STREAMS": "1"}) as served:
        with begin(served, SLOW) as connection:
            read_until(connection, b"word1")
            refused = served.ask()
            assert (refused.status, refused.code) == (503, "too_many_turns")
        until(lambda: served.ask().status == 200)


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
    assert fragile.send("GET", "/healthz").status == 200
    ready = fragile.send("GET", "/readyz")
    assert (ready.status, ready.json["parts"]["vault"]["ready"]) == (503, False)
    fragile.admin.unseal(b"")
    assert fragile.ask(session="kept").status == 200
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
    for secret in (salt, "a-name-of-mine", "a word of mine", served.api_key, "ten_", "ses_", "prn_"):
        assert secret not in text


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
    with serving(tmp_path) as served:
        port, state_dir, engine = served.gateway.port, served.state_dir, served.engine
        stop = threading.Event()
        environment = {"HOLDFAST_GATEWAY__PORT": str(port)}
        clients = [
            threading.Thread(target=_write_turns, args=(port, served.api_key, f"c{number}", acknowledged, stop))
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


def _write_turns(port: int, api_key: str, client: str, acknowledged: set[str], stop: threading.Event) -> None:
    headers = {"Authorization": f"Bearer {api_key}", "X-Session-ID": client}
    number = 0
    while not stop.is_set():
        number += 1
        text = f"{client} turn {number}"
        body = json.dumps({"model": MODEL, "stream": True, "messages": [{"role": "user", "content": text}]})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("POST", "/v1/chat/completions", body, headers)
            response, received = connection.getresponse(), b""
            while part := response.read1():
                received += part
                if b'finish_reason":"stop' in received:  # who sees this may take it for the end
                    acknowledged.add(text)
        except (OSError, http.client.HTTPException):
            stop.wait(0.01)
        finally:
            connection.close()


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
