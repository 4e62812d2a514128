"""The plugin in a real `vllm serve` on a Unix socket: the endpoint, and the timer that needs nobody."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from appliance.engine.protocol import (
    DEMOTE_PATH,
    LEASE_FIELD,
    LEASES_PATH,
    PLUGIN_ENVIRONMENT,
    TURNS_PATH,
    Lease,
    LeaseReport,
    TurnAccount,
    TurnEnd,
    connector_arguments,
    demote_request,
    lease_params,
    leases_request,
    read_turn_accounts_answer,
    turn_ends_request,
)
from tests.engine.in_process import BLOCK, words

# The appliance's own bound is 0.1 s; a machine that runs other tests beside this one gets some more.
LATENESS_S = 0.4


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("engine", timeout=60)
        self._path = path

    def connect(self) -> None:
        """Reach the socket through its directory: a path may be longer than an address."""
        directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(f"/proc/self/fd/{directory}/{self._path.name}")
        finally:
            os.close(directory)


class Server:
    """A server, and the log that it writes."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._socket = folder / "engine.sock"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
                *("--uds", self._socket.name, "--served-model-name", "tiny", "--enforce-eager"),
                *("--block-size", str(BLOCK), "--num-gpu-blocks-override", "41", "--max-model-len", "1024"),
                *connector_arguments(0.5),
            ],
            cwd=folder,
            env=os.environ
            | PLUGIN_ENVIRONMENT
            | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "DEBUG", "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._log: IO[str] = self._process.stdout
        self.wait_for_line("Application startup complete")
        self._wait_until_it_listens()

    def wait_for_line(self, pattern: str) -> float:
        """Read the log until a line matches; when that line came. The test's own deadline is this one's."""
        lines = []
        for line in self._log:
            lines.append(line)
            if re.search(pattern, line):
                return time.monotonic()
        raise AssertionError(f"the server ended without saying {pattern!r}:\n{''.join(lines[-60:])}")

    def _wait_until_it_listens(self) -> None:
        # It listens a moment after that line, and says nothing when it does.
        deadline = time.monotonic() + 30
        while True:
            with contextlib.closing(_Connection(self._socket)) as connection:
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                else:
                    return

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        """One request and its JSON."""
        status, answer = self.ask(path, body)
        return status, json.loads(answer)

    def ask(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        """One request and what comes of it."""
        with contextlib.closing(_Connection(self._socket)) as connection:
            # A server that refuses a body may close before it has read all of it; its answer is there nevertheless.
            with contextlib.suppress(BrokenPipeError):
                connection.request("POST", path, body, {"content-type": "application/json", **headers})
            with contextlib.closing(connection.getresponse()) as response:
                return response.status, response.read()

    def report(self, release: tuple[str, ...] = ()) -> LeaseReport:
        """POST to the endpoint."""
        status, answer = self.post(LEASES_PATH, leases_request(release, every=True))
        assert status == 200
        return LeaseReport.from_wire(answer)

    def turn(self, seed: int, session: str, idle_timeout_s: float, **lease: Any) -> None:
        """A completion whose session leases its blocks."""
        body = {
            "model": "tiny",
            "prompt": words(seed, 10 * BLOCK),
            "max_tokens": 4,
            "cache_salt": "ab" * 32,
            "kv_transfer_params": lease_params(Lease(session, "tenant", idle_timeout_s, **lease)),
        }
        status, answer = self.post("/v1/completions", json.dumps(body).encode())
        assert status == 200, answer

    def hang_up_mid_stream(self, seed: int, session: str, idle_timeout_s: float) -> None:
        """Begin a long streamed completion and close the connection after its first bytes."""
        body = {
            "model": "tiny",
            "prompt": words(seed, 10 * BLOCK),
            "max_tokens": 600,
            "ignore_eos": True,
            "stream": True,
            "kv_transfer_params": lease_params(Lease(session, "tenant", idle_timeout_s)),
        }
        with contextlib.closing(_Connection(self._socket)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            with contextlib.closing(connection.getresponse()) as response:
                assert response.read(1)

    def close(self) -> None:
        """Ask the server to end, and see that its whole session did."""
        self._process.send_signal(signal.SIGTERM)
        self._log.read()
        self._process.wait(30)
        self._log.close()


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests of this module."""
    server = Server(tiny_model, tmp_path_factory.mktemp("served"))
    yield server
    server.close()


def test_a_lease_ends_on_time_though_nobody_asks(server: Server) -> None:
    server.turn(1, "alone", idle_timeout_s=1.5)
    granted = time.monotonic()
    late_s = server.wait_for_line("Leases ended") - granted - 1.5
    assert late_s < LATENESS_S
    report = server.report(release=("alone",))
    assert report.expired_total > 0


def test_a_strict_lease_leaves_nothing_though_nobody_asks(server: Server) -> None:
    server.turn(5, "strict", idle_timeout_s=1.0, strict=True)
    server.wait_for_line("Leases ended")
    assert "strict" not in {lease.session for lease in server.report().leases}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "prefix", "asked"),
    [
        ("/v1/chat/completions", "chatcmpl-", {"messages": [{"role": "user", "content": "t5"}]}),
        ("/v1/completions", "cmpl-", {"prompt": "t5 t6"}),
    ],
)
def test_an_answer_carries_the_id_of_its_request(
    server: Server, path: str, prefix: str, asked: dict[str, Any], stream: bool
) -> None:
    streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    body = {"model": "tiny", "max_tokens": 3, "n": 2, "temperature": 0.7, "return_token_ids": True, **asked, **streamed}
    status, answer = server.ask(path, json.dumps(body).encode(), **{"X-Request-Id": "0123abcd"})
    assert status == 200, answer
    payloads = [event.removeprefix(b"data: ") for event in answer.split(b"\n\n")] if stream else [answer]
    ids = [json.loads(payload)["id"] for payload in payloads if payload.startswith(b"{")]
    assert len(ids) >= (3 if stream else 1)
    assert set(ids) == {f"{prefix}0123abcd"}


def test_an_end_of_a_turn_is_answered_with_its_account_and_moves_the_deadline(server: Server) -> None:
    server.turn(6, "told", idle_timeout_s=60.0, turn="first")
    server.turn(6, "told", idle_timeout_s=60.0, turn="second")
    ends = [TurnEnd("told", "tenant", turn, "tool_use", 4, 600.0) for turn in ("first", "second", "unknown")]
    status, answer = server.post(TURNS_PATH, turn_ends_request(ends))
    assert status == 200
    accounts = read_turn_accounts_answer(json.dumps(answer).encode())
    assert accounts == (TurnAccount("first", 0), TurnAccount("second", 9 * BLOCK), None)
    (lease,) = server.report().leases
    assert lease.expires_in_s > 60.0
    server.report(release=("told",))


def test_a_strict_lease_whose_deadline_a_turns_end_moved_forward_ends_on_time(server: Server) -> None:
    server.turn(5, "shorter", idle_timeout_s=3600.0, strict=True, turn="shorter")
    server.turn(5, "first", idle_timeout_s=1.5, strict=True)
    server.wait_for_line("Leases ended")  # of the first: after that the timer sleeps for an hour
    end = TurnEnd("shorter", "tenant", "shorter", "tool_use", 4, 0.5)
    assert server.post(TURNS_PATH, turn_ends_request([end]))[0] == 200
    server.wait_for_line("Leases ended")
    assert server.report().leases == ()


def test_a_malformed_end_of_a_turn_costs_no_other_its_account(server: Server) -> None:
    server.turn(6, "well-told", idle_timeout_s=60.0, turn="told")
    ends = [TurnEnd("well-told", "tenant", turn, "tool_use", 4, 60.0) for turn in ("no turn", "told")]
    status, answer = server.post(TURNS_PATH, turn_ends_request(ends))
    assert status == 200
    malformed, told = answer["accounts"]
    assert malformed is None
    assert told["turn"] == "told"
    server.report(release=("well-told",))


def test_what_is_no_list_of_ends_is_refused(server: Server) -> None:
    status, answer = server.post(TURNS_PATH, b'{"ends": {}}')
    assert status == 400
    assert answer["error"]["code"] == "engine_message_malformed"


def test_the_lease_of_a_client_that_hung_up_ends_on_time_too(server: Server) -> None:
    server.hang_up_mid_stream(2, "hung-up", idle_timeout_s=2.0)
    hung_up = time.monotonic()
    late_s = server.wait_for_line("Leases ended") - hung_up - 2.0
    assert late_s < LATENESS_S + 1.0  # the engine learns of the hang-up a little later
    server.report(release=("hung-up",))


def test_the_endpoint_reports_and_releases(server: Server) -> None:
    server.turn(3, "kept", idle_timeout_s=60.0)
    server.turn(4, "released", idle_timeout_s=60.0)
    report = server.report(release=("released", "unknown"))
    (lease,) = report.leases
    assert (lease.session, lease.tenant, lease.tokens) == ("kept", "tenant", 10 * BLOCK)
    assert 0 < lease.expires_in_s <= 60.0
    assert (report.total_blocks, report.block_size) == (40, BLOCK)
    assert server.report(release=("kept",)).leased_blocks == 0


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"release": "kept"}', b'{"release": [7]}', b'{"expire": []}', b"\xff"])
def test_the_endpoint_refuses_what_the_protocol_does_not_write(server: Server, body: bytes) -> None:
    status, answer = server.post(LEASES_PATH, body)
    assert status == 400
    assert answer["error"]["code"] == "engine_message_malformed"


def test_without_a_tier_to_go_down_to_a_session_stays(server: Server) -> None:
    server.turn(3, "stays", idle_timeout_s=60.0)
    status, answer = server.post(DEMOTE_PATH, demote_request("dram", ["stays", "unknown"]))
    assert (status, answer) == (200, {"demoted": []})
    (lease,) = server.report().leases
    assert lease.session == "stays"
    status, _ = server.post(DEMOTE_PATH, b'{"tier": "dram"}')
    assert status == 400
    server.report(release=("stays",))


def test_the_endpoint_bounds_its_body(server: Server) -> None:
    status, _ = server.post(LEASES_PATH, b" " * ((1 << 20) + 1))
    assert status == 413


@pytest.mark.parametrize("fault", [{"temperature": -1}, {"prompt": words(9, 3000)}, {"max_tokens": 5000}])
def test_a_rejected_request_that_carries_control_fields_ends_nobody_s_lease(
    server: Server, fault: dict[str, Any]
) -> None:
    server.turn(70, "victim", 600.0)
    (before,) = (lease for lease in server.report().leases if lease.session == "victim")
    control = {"release": ["victim"], "session": "victim", "sessions": ["victim"], "idle_timeout_s": 0.0}
    body = {
        "model": "tiny",
        "prompt": words(71, 40),
        "max_tokens": 1,
        # Of a request that names a remote prefill, vLLM tells the connector when it rejects it.
        "kv_transfer_params": {"do_remote_prefill": True, LEASE_FIELD: control, **control},
        "vllm_xargs": {"session_id": "victim", "release": "victim"},
        "session_id": "victim",
    }
    status, _ = server.post("/v1/completions", json.dumps(body | fault).encode())
    assert 400 <= status < 500
    (after,) = (lease for lease in server.report().leases if lease.session == "victim")
    assert after.blocks == before.blocks
    assert before.expires_in_s - 60.0 < after.expires_in_s <= before.expires_in_s
    server.report(release=("victim",))


def test_a_connector_hears_of_a_rejected_request_and_takes_nothing_from_it(server: Server) -> None:
    ignored = server.report().ignored_total
    body = {
        "model": "tiny",
        "prompt": words(9, 3000),  # longer than the model takes
        "kv_transfer_params": {"do_remote_prefill": True, LEASE_FIELD: {"release": ["victim"]}},
    }
    status, _ = server.post("/v1/completions", json.dumps(body).encode())
    assert status == 400
    assert server.report().ignored_total == ignored + 1
