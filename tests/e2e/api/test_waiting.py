"""An engine that is full: who waits, in what order, how many, and who leaves."""

import contextlib
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.stub import MAX_MODEL_LEN
from tests.e2e.api.conftest import DEADLINE_S, Served, read_answer, serving, until
from tests.e2e.api.test_faults import SLOW, begin, read_until

LONG = "a word of it. " * 400


def serving_one_at_a_time(place: Path, **admission: str) -> "contextlib.AbstractContextManager[Served]":
    settings = {f"HOLDFAST_ADMISSION__{name.upper()}": value for name, value in admission.items()}
    return serving(
        place,
        environment={"HOLDFAST_ENGINE__MAX_NUM_SEQS": "1", "HOLDFAST_GATEWAY__DRAIN_TIMEOUT_S": "20", **settings},
    )


def waiting(served: Served) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(str(served.state_dir / "run" / "admin.sock"))
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = read_answer(connection).body.decode()
    return int(float(text.partition("\nholdfast_turns_waiting ")[2].split()[0]))


@contextlib.contextmanager
def full(served: Served) -> Iterator[socket.socket]:
    """The engine's only place is taken until this is left."""
    with begin(served, SLOW) as connection:
        read_until(connection, b"word1")
        yield connection


def last_words(served: Served) -> list[str]:
    return [str(body["messages"][-1]["content"])[-5:] for body in served.engine_seen()["bodies"]]


@pytest.mark.timeout(120)
def test_the_session_with_most_on_the_device_goes_first(tmp_path: Path) -> None:
    with serving_one_at_a_time(tmp_path) as served, ThreadPoolExecutor() as clients:
        assert served.ask(LONG, session="known").status == 200
        with full(served):
            new = clients.submit(served.ask, LONG + "first", session="new")
            until(lambda: waiting(served) == 1)
            known = clients.submit(served.ask, LONG + "later", session="known")
            until(lambda: waiting(served) == 2)
        assert (new.result().status, known.result().status) == (200, 200)
        assert last_words(served)[-2:] == ["later", "first"]


@pytest.mark.timeout(120)
def test_an_agent_s_priority_moves_its_turn_within_what_its_tenant_may_ask_for(tmp_path: Path) -> None:
    with serving_one_at_a_time(tmp_path, most_priority="3") as served, ThreadPoolExecutor() as clients:
        with full(served):
            plain = clients.submit(served.ask, "plain", session="plain")
            until(lambda: waiting(served) == 1)
            hints = {"priority": 50, "osl": 9, "speculative_prefill": True, "latency": 1}
            urgent = clients.submit(served.ask, "hurry", session="urgent", nvext={"agent_hints": hints})
            until(lambda: waiting(served) == 2)
            until(lambda: len({session for _, session in served.engine_seen()["awaited"]}) == 2)
        assert (plain.result().status, urgent.result().status) == (200, 200)
        assert last_words(served)[-2:] == ["hurry", "plain"]
        headers = urgent.result().headers
        assert headers["x-holdfast-hints"] == "priority=3, osl=9, speculative_prefill=recall"
        assert headers["x-holdfast-dropped"] == "nvext.agent_hints.latency"
        seen = served.engine_seen()
        assert "nvext" not in seen["bodies"][-2]
        labels = [body["kv_transfer_params"]["holdfast"]["session"] for body in seen["bodies"][-2:]]
        until(lambda: set(labels) <= {end["session"] for end in served.engine_seen()["ends"]})
        returns = {end["session"]: end["returns_soon"] for end in served.engine_seen()["ends"]}
        assert [returns[label] for label in labels] == [True, False]
        assert {session for _, session in seen["awaited"]} == set(labels)


@pytest.mark.timeout(120)
def test_the_line_is_bounded_and_who_leaves_it_makes_room(tmp_path: Path) -> None:
    with serving_one_at_a_time(tmp_path, most_waiting="1") as served:
        with full(served):
            with begin(served, "leaves before its turn"):
                until(lambda: waiting(served) == 1)
                refused = served.ask()
                assert (refused.status, refused.code) == (503, "queue_full")
                assert 1 <= int(refused.headers["retry-after"]) <= 30
            until(lambda: waiting(served) == 0)
        until(lambda: served.admin.status().running_turns == 0)
        assert "turn" not in last_words(served)
        assert served.ask().status == 200


@pytest.mark.timeout(120)
def test_told_to_stop_it_serves_those_who_wait(tmp_path: Path) -> None:
    with serving_one_at_a_time(tmp_path) as served, ThreadPoolExecutor() as clients:
        with begin(served, '@stub {"chunks": 40, "pause_s": 0.05}') as connection:
            read_until(connection, b"word1")
            waits = clients.submit(served.ask, "served at last")
            until(lambda: waiting(served) == 1)
            served.gateway.process.send_signal(signal.SIGTERM)
            until(lambda: served.admin.status().draining)
            read_until(connection, b"[DONE]")
        assert waits.result().status == 200
        assert served.gateway.process.wait(DEADLINE_S) == 0


@pytest.mark.timeout(120)
def test_a_client_that_reads_slowly_does_not_keep_others_from_the_engine(tmp_path: Path) -> None:
    more_than_buffers = '@stub {"chunks": 60000}'
    with serving_one_at_a_time(tmp_path) as served, begin(served, more_than_buffers):
        until(lambda: served.admin.status().running_turns == 1)
        assert served.ask("does not wait for whom does not read").status == 200
        assert served.admin.status().running_turns == 1


@pytest.mark.timeout(120)
def test_what_never_came_to_the_engine_costs_nothing(tmp_path: Path) -> None:
    with serving_one_at_a_time(tmp_path) as served:
        key = served.new_key(principal="impatient", tokens_per_day=MAX_MODEL_LEN + 100).secret
        impatient = Served(served.state_dir, served.engine, served.gateway, key)
        with full(served):
            for stream in (False, True):
                with begin(impatient, "leaves before its turn", stream=stream):
                    until(lambda: waiting(served) == 1)
                # It has left the line before its end is written down, and its tokens are given back.
                until(lambda: served.admin.status().running_turns == 1)
        until(lambda: served.admin.status().running_turns == 0)
        assert impatient.ask(max_tokens=100).status == 200
        assert impatient.ask(max_tokens=MAX_MODEL_LEN - 100).status == 200
