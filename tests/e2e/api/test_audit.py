"""What happens on a gateway is in the audit log first, and what cannot be is not done."""

import contextlib
import json
import os
import queue
import resource
import signal
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from api.admin import types
from api.admin.client import AdminClient, Refused
from appliance.audit.events import TURN_COMPLETED
from appliance.audit.notes import VerifierKey
from appliance.audit.reading import LogReader
from appliance.audit.verify import verify_log
from benchmarks.running import make_appliance, running_gateway, running_stub
from tests.e2e.api.conftest import Served, read_answer, serving, until
from tests.e2e.api.test_faults import begin, read_until


def _entries(served: Served, **wanted: Any) -> list[types.AuditEntry]:
    """What is found, in the order in which it happened."""
    return served.admin.audit_entries(**{"limit": 1000, **wanted}).entries[::-1]


def _actions(served: Served, **wanted: Any) -> list[str]:
    return [entry.action for entry in _entries(served, **wanted)]


def _record(entry: types.AuditEntry) -> dict[str, Any]:
    assert entry.record is not None
    return entry.record


def _appender(served: Served) -> int:
    """The one process whose parent is the gateway and that has the log's lock."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            parent = int(status.read_text().partition("PPid:")[2].split()[0])
            command = (status.parent / "cmdline").read_bytes().split(b"\0")
            if parent == served.gateway.process.pid and b"appliance.audit.appender" in command:
                return int(status.parent.name)
    raise AssertionError("there is no appender")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Served]:
    """A gateway that a test may do harm to."""
    with serving(tmp_path) as it:
        yield it


def test_the_way_of_a_turn_is_recorded(served: Served) -> None:
    answer = served.ask("hello", session="audited", stream=True)
    session_id = served.newest_session().session_id
    entries = _entries(served, session=session_id)
    assert [entry.action for entry in entries] == ["turn.admitted", "turn.completed"]
    admitted, completed = map(_record, entries)
    assert admitted["request_id"] == completed["request_id"] == answer.headers["x-request-id"]
    assert admitted["counts"]["prompt_bytes"] >= len("hello")
    counts = completed["counts"]
    assert counts.keys() == TURN_COMPLETED.counts.keys()
    assert counts["completion_tokens"] == 15
    said = [event["choices"][0]["delta"].get("content", "") for event in answer.events[:-1] if event["choices"]]
    assert counts["answer_bytes"] == len("".join(said))
    assert all(number > 0 for name, number in counts.items() if name != "cached_tokens")
    assert completed["source"] == "127.0.0.1"
    assert completed["versions"].keys() >= {"holdfast", "python"}
    assert completed["actor"]["role"] == "client"
    assert admitted["details"]["key_id"].startswith("ak_")
    listed = served.send("GET", "/v1/models").headers["x-request-id"]
    actions = [entry.action for entry in _entries(served) if _record(entry).get("request_id") == listed]
    assert actions == ["key.authenticated", "models.read"]


def test_nothing_that_was_said_is_in_the_log_nor_a_key(served: Served) -> None:
    served.ask("a word like xylophone")
    folder = served.admin.audit_status().directory
    written = b"".join(path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())
    records = json.dumps([entry.record for entry in _entries(served)]).encode()
    for word in (b"xylophone", served.api_key.encode(), served.api_key[3:30].encode()):
        assert word not in written
        assert word not in records
    assert b"turn.completed" not in written


def test_administrative_acts_are_recorded_by_name_and_before_what_follows(served: Served) -> None:
    created = served.new_key(tenant="audited", principal="agent")
    served.admin.revoke_key(created.key.key_id)
    with pytest.raises(Exception, match="key"):
        served.admin.revoke_key("ak_none")
    said = _entries(served, tenant="system")
    acted = [(entry.action, _record(entry).get("target", {}).get("id")) for entry in said]
    assert ("tenant.created", created.key.tenant_id) in acted
    assert ("key.created", created.key.key_id) in acted
    assert acted.index(("admin.acted", created.key.key_id)) < acted.index(("key.revoked", created.key.key_id))
    assert ("admin.acted", "ak_none") in acted
    assert ("key.revoked", "ak_none") not in acted


def test_reading_a_transcript_and_the_log_itself_is_recorded(served: Served) -> None:
    assert served.ask("hello", session="to-be-read").status == 200
    session_id = served.newest_session().session_id
    served.transcript(session_id)
    read = _record(_entries(served, action="transcript.read")[-1])
    assert read["target"] == {"kind": "session", "id": session_id}
    served.admin.audit_entries(action="nothing.such", limit=1)
    read = _record(_entries(served, action="audit.read")[-1])
    assert (read["details"]["action"], read["counts"]) == (
        "nothing.such",
        {"entries": 0, "records": 0, "duration_ms": ANY},
    )


def test_how_much_of_the_log_was_read_is_recorded_before_it_is_shown(served: Served) -> None:
    gone = served.new_key(tenant="to-be-shredded")
    assert [served.ask("hello", api_key=key).status for key in (gone.secret, None)] == [200, 200]
    assert gone.key.tenant_id is not None
    served.admin.shred_tenant(gone.key.tenant_id)
    shown = served.admin.audit_entries(action="turn.*", limit=1000).entries
    opened = [entry for entry in shown if entry.record is not None]
    read = _record(_entries(served, action="audit.read", limit=1)[0])
    assert read["counts"] == {"entries": len(shown), "records": len(opened), "duration_ms": ANY}
    assert 0 < len(opened) < len(shown)
    closed = next(entry for entry in shown if entry.record is None)
    for sequence, records in ((opened[0].sequence, 1), (closed.sequence, 0)):
        served.admin.audit_entry(sequence)
        read = _record(_entries(served, action="audit.read", limit=1)[0])
        assert (read["target"]["id"], read["counts"]) == (
            str(sequence),
            {"entries": 1, "records": records, "duration_ms": ANY},
        )
    with pytest.raises(Refused):
        served.admin.audit_entry(1 << 40)
    read = _record(_entries(served, action="audit.read", limit=1)[0])
    assert (read["target"]["id"], read["outcome"]) == (str(1 << 40), "refused")
    assert read["counts"].keys() == {"duration_ms"}
    assert read["reason"] == "audit_no_such_entry"


def test_forgetting_is_recorded_and_the_log_still_verifies(served: Served) -> None:
    assert served.ask("hello", session="to-be-forgotten").status == 200
    session_id = served.newest_session().session_id
    served.admin.forget(session_id)
    assert _record(_entries(served, action="session.shredded")[-1])["target"]["id"] == session_id
    assert _actions(served, session=session_id) == [
        "turn.admitted",
        "turn.completed",
        "admin.acted",
        "session.shredded",
    ]


def test_a_search_by_session_finds_who_read_and_who_shredded_it(own: Served) -> None:
    assert own.ask("hello", session="watched").status == 200
    session = own.newest_session()
    session_id = session.session_id
    reader = own.admin.create_appliance_key(principal="dpo", role="auditor", permissions=["transcript:read"])
    curious = own.admin.create_appliance_key(principal="curious", role="auditor")
    shredder = own.admin.create_appliance_key(principal="shredder", role="operator")
    AdminClient(own.state_dir, api_key=reader.secret).transcript(session_id)
    with pytest.raises(Refused, match="may not be read"):
        AdminClient(own.state_dir, api_key=curious.secret).transcript(session_id)
    AdminClient(own.state_dir, api_key=reader.secret).why(session_id)
    AdminClient(own.state_dir, api_key=shredder.secret).forget(session_id)
    found = [_record(entry) for entry in _entries(own, session=session_id)]
    assert [(each["action"], each.get("details", {}).get("key_id")) for each in found[2:]] == [
        ("transcript.read", reader.key.key_id),
        ("transcript.read", curious.key.key_id),
        ("admin.acted", reader.key.key_id),
        ("admin.acted", shredder.key.key_id),
        ("session.shredded", shredder.key.key_id),
    ]
    read, refused, _, acted, shredded = found[2:]
    assert {each["tenant_id"] for each in (read, refused, shredded)} == {session.tenant_id}
    assert (read["counts"], shredded["counts"]) == ({"turns": 1, "duration_ms": ANY}, {"turns": 1, "duration_ms": ANY})
    assert (refused["outcome"], refused["reason"]) == ("refused", "transcript_forbidden")
    assert acted["request_id"] == shredded["request_id"] != read["request_id"]


def test_an_answer_of_the_admin_api_names_the_request_of_its_events(served: Served) -> None:
    for given, kept in (("X-Request-ID: mine\r\n", True), ("X-Request-ID: a b\r\n", False), ("", False)):
        with served.connect_admin() as connection:
            connection.sendall(f"GET /v1/tenants HTTP/1.1\r\nHost: localhost\r\n{given}\r\n".encode())
            request_id = read_answer(connection).headers["x-request-id"]
        assert (request_id == "mine") is kept
        assert _record(_entries(served, action="admin.acted")[-1])["request_id"] == request_id


def test_a_key_that_only_looks_is_told_with_how_often_it_did(own: Served) -> None:
    scraper = own.admin.create_appliance_key(principal="scraper", role="operator")
    looking = AdminClient(own.state_dir, api_key=scraper.secret)
    until(lambda: {"config.recorded", "key.created"} <= set(_actions(own)))  # a first start's own are there
    before = own.admin.audit_status().size
    for _ in range(20):
        looking.audit_status()
    assert own.admin.audit_status().size <= before + 2
    until(lambda: bool(_entries(own, action="key.authenticated")))
    told = [_record(entry) for entry in _entries(own, action="key.authenticated")]
    assert {each["target"]["id"] for each in told} == {scraper.key.key_id}


def test_a_backup_is_recorded_with_its_size(own: Served) -> None:
    with own.admin.backup() as pieces:
        size = sum(map(len, pieces))
    assert _record(_entries(own, action="backup.made")[-1])["counts"] == {"bytes": size, "duration_ms": ANY}


def test_a_backup_that_is_cut_off_is_recorded_as_failed_and_a_whole_export_once(own: Served) -> None:
    with contextlib.closing(sqlite3.connect(own.state_dir / "holdfast.db", isolation_level=None)) as db:
        db.execute("CREATE TABLE more AS SELECT randomblob(8 << 20)")  # than waits between a connection's two ends
    with own.admin.backup() as pieces:
        next(iter(pieces))
    with own.admin.audit_excerpt(first=0, end=None) as pieces:
        whole = sum(map(len, pieces))
    until(lambda: len(_entries(own, action="backup.made")) == 2)
    began, failed = map(_record, _entries(own, action="backup.made"))
    assert (began["outcome"], failed["outcome"], failed["reason"]) == ("success", "failure", "asker_gone")
    assert failed["counts"]["bytes"] < began["counts"]["bytes"]
    assert failed["request_id"] == began["request_id"]
    assert whole
    assert [_record(entry)["outcome"] for entry in _entries(own, action="audit.exported")] == ["success"]


def test_a_refusal_of_a_known_caller_is_recorded_with_its_reason(served: Served) -> None:
    answer = served.ask("hello", temperature="hot")
    assert answer.status == 400
    refused = _record(_entries(served, action="request.refused")[-1])
    assert (refused["reason"], refused["request_id"]) == (answer.code, answer.headers["x-request-id"])
    assert 0 <= refused["counts"]["duration_ms"] < 60_000
    assert served.ask("hello").status == 200
    admitted = _record(_entries(served, action="turn.admitted")[-1])
    assert refused["details"]["key_id"] == admitted["details"]["key_id"]


def test_refusals_of_a_limit_are_told_by_the_key_that_ran_into_it(own: Served) -> None:
    keys = [own.new_key(principal="same", requests_per_minute=1) for _ in range(2)]
    for key in keys:
        assert [own.ask("hello", api_key=key.secret).status for _ in range(3)] == [200, 429, 429]
    until(lambda: bool(_entries(own, action="request.refused")))
    own.gateway.end()
    with running_gateway(own.state_dir, own.engine):
        told = [_record(entry) for entry in _entries(own, action="request.refused")]
    assert {each["details"]["key_id"]: each["counts"]["count"] for each in told} == {key.key.key_id: 2 for key in keys}


def test_a_key_cannot_be_tried_without_a_trace_by_hanging_up(own: Served) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n"
    with own.connect() as connection:
        connection.sendall(f"{head}Authorization: Bearer {own.api_key}\r\n\r\n".encode())
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    until(lambda: bool(_entries(own, action="key.authenticated")))
    (tried,) = _entries(own, action="key.authenticated")
    assert _record(tried)["target"]["id"].startswith("ak_")
    assert _record(tried)["source"] == "127.0.0.1"


def test_what_is_no_request_is_counted_on_both_listeners(own: Served) -> None:
    for _ in range(20):
        assert own.send_raw(b"\x00garbage\r\n\r\n").status == 400
    assert own.send_raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n").status == 431
    for request in (b"\x00garbage\r\n\r\n", b"GET /v1/nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with own.connect_admin() as connection:
            connection.sendall(request)
            assert read_answer(connection).status in (400, 404)
    until(lambda: bool(_entries(own, action="request.malformed")))
    told = [_record(entry) for entry in _entries(own, action="request.malformed")]
    uid = f"uid={os.geteuid()}"
    assert {(each["source"], each["reason"], each["counts"]["count"]) for each in told} == {
        ("127.0.0.1", "not_http", 20),
        ("127.0.0.1", "headers_too_large", 1),
        (uid, "not_http", 1),
        (uid, "admin_route_unknown", 1),
    }


def test_a_request_that_the_admin_api_cannot_use_is_recorded_as_refused(own: Served) -> None:
    before = own.admin.audit_status().size
    with pytest.raises(Refused) as refused:
        own.admin.create_tenant("")
    (entry,) = [each for each in _entries(own, action="admin.*") if each.sequence >= before]
    assert (entry.action, _record(entry)["outcome"]) == ("admin.acted", "refused")
    assert _record(entry)["reason"] == refused.value.code


def test_what_a_new_key_may_do_is_recorded(own: Served) -> None:
    until(lambda: bool(_entries(own, action="key.created")))  # the one that there was before the log
    own.new_key(tenant="plain", principal="agent")
    own.new_key(tenant="plain", principal="reader", permissions=["transcript:read"], models=["stub"], tokens_per_day=9)
    plain, reader = [_record(entry)["details"] for entry in _entries(own, action="key.created")][-2:]
    assert (plain["permissions"], "models" in plain) == ("none", False)
    assert (reader["permissions"], reader["models"], reader["tokens_per_day"]) == ("transcript:read", "stub", "9")
    made = [_record(entry) for entry in _entries(own, action="principal.created")][-2:]
    assert [each["target"]["id"] for each in made] == [plain["principal_id"], reader["principal_id"]]


def test_a_flood_of_unauthenticated_requests_leaves_a_few_entries(own: Served) -> None:
    until(lambda: {"config.recorded", "key.created"} <= set(_actions(own)))  # a first start's own are there
    before = own.admin.audit_status().size
    for number in range(300):
        assert own.send("GET", "/v1/models", api_key=f"hf_{number}").status == 401
    assert own.admin.audit_status().size <= before + 2
    own.gateway.end()
    key = VerifierKey.parse((own.state_dir / "audit/log.vkey").read_text().strip())
    assert verify_log(own.state_dir / "audit", key).size <= before + 5


@pytest.mark.timeout(300)  # the 4 MiB that the journal takes ahead fill up first: 2,500 turns
def test_a_log_that_cannot_be_written_stops_admission_and_says_why(own: Served) -> None:
    assert own.ask("hello").status == 200
    limit = os.path.getsize(own.state_dir / "audit/journal")  # noqa: PTH202
    resource.prlimit(_appender(own), resource.RLIMIT_FSIZE, (limit, limit))
    refused = own.ask("hello")
    while refused.status == 200:
        refused = own.ask("hello")
    assert (refused.status, refused.code) == (503, "audit_unavailable")
    assert str(own.state_dir / "audit/journal") in refused.json["error"]["message"] + refused.json["error"]["cause"]
    ready = own.send("GET", "/readyz")
    assert ready.status == 503
    assert ready.json["parts"]["audit"] == {"ready": False, "why": "its log cannot be written or signed"}
    seen = own.engine_seen()["requests"]
    assert own.ask("hello").status == 503
    assert own.engine_seen()["requests"] == seen, "nothing reaches the engine that is not recorded"
    # An administrator's reserve: what is looked at and done now is recorded still.
    state = next(part for part in own.admin.status().parts if part.name == "audit")
    assert state.state == "failed"
    assert str(own.state_dir / "audit/journal") in state.detail
    own.admin.create_tenant("made on a full disk")
    assert "tenant.created" in _actions(own, tenant="system")


def test_the_engine_may_begin_but_nothing_is_answered_before_the_admission_is_on_the_disk(own: Served) -> None:
    assert own.ask("hello").status == 200
    seen, answers = own.engine_seen()["requests"], queue.SimpleQueue[int]()
    os.kill(_appender(own), signal.SIGSTOP)
    asking = threading.Thread(target=lambda: answers.put(own.ask("hello").status))
    asking.start()
    until(lambda: own.engine_seen()["requests"] > seen)
    with pytest.raises(queue.Empty):
        answers.get(timeout=0.2)
    os.kill(_appender(own), signal.SIGCONT)
    asking.join()
    assert answers.get() == 200


def test_a_completion_that_cannot_be_recorded_withholds_the_end_and_says_why(own: Served) -> None:
    appender = _appender(own)
    with begin(own, '@stub {"chunks": 3, "pause_s": 0.5}', session="unrecorded") as connection:
        read_until(connection, b"word0")
        os.kill(appender, signal.SIGSTOP)
        try:
            said = read_until(connection, b"0\r\n\r\n")
        finally:
            os.kill(appender, signal.SIGCONT)
    assert b'"code":"audit_unavailable"' in said
    assert b"[DONE]" not in said
    assert b'"finish_reason":"stop"' not in said
    assert own.ask("hello").status == 200


def test_an_appender_that_is_killed_costs_no_turn_and_no_record(own: Served) -> None:
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(own.ask("hello").status)

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    for kill in range(5):
        until(lambda count=20 * (kill + 1): len(statuses) > count)  # type: ignore[misc]
        os.kill(_appender(own), signal.SIGKILL)
        until(lambda: _has_appender(own))
    stop.set()
    for thread in asking:
        thread.join()
    assert set(statuses) == {200}
    completed = [entry for entry in _all(own) if entry.action == "turn.completed"]
    assert len(completed) == len(statuses)
    assert len({_record(entry)["request_id"] for entry in completed}) == len(statuses)
    own.gateway.end()
    key = VerifierKey.parse((own.state_dir / "audit/log.vkey").read_text().strip())
    found = verify_log(own.state_dir / "audit", key)
    assert found.unsigned == 0
    assert found.size == LogReader(own.state_dir / "audit").size


def _has_appender(served: Served) -> bool:
    try:
        return _appender(served) > 0
    except AssertionError:
        return False


def _all(served: Served) -> list[types.AuditEntry]:
    entries: list[types.AuditEntry] = []
    before = None
    while True:
        page = served.admin.audit_entries(limit=1000, before=before)
        entries += page.entries
        if page.go_on_before is None:
            return entries
        before = page.go_on_before


def test_a_first_start_tells_once_who_was_there_before_the_log_and_every_start_who_opened_the_vault(
    tmp_path: Path,
) -> None:
    state_dir, engine = tmp_path / "state", tmp_path / "engine.sock"
    api_key = make_appliance(state_dir, permissions=("transcript:read",))
    made = ["tenant.created", "principal.created", "principal.created", "key.created"]
    with running_stub(engine), running_gateway(state_dir, engine) as gateway:
        own = Served(state_dir, engine, gateway, api_key)
        until(lambda: "key.created" in _actions(own))
        assert _actions(own)[:2] == ["gateway.started", "vault.opened"]
        told = [_record(entry) for entry in _entries(own, action="*.created")]
        assert [each["action"] for each in told] == made
        assert {each["details"]["made"] for each in told} == {"before the first start"}
        _, administrator, client, key = told
        assert administrator["details"]["uid"] == str(os.geteuid())
        assert administrator["details"]["permissions"] == "transcript:read"
        assert key["details"]["principal_id"] == client["target"]["id"]
        assert key["target"]["id"] == own.admin.keys().keys[0].key_id
        kept, before = state_dir / "audit/last-start", b""
        until(lambda: kept.exists() and kept.read_bytes() != before)
        before = kept.read_bytes()
    with running_stub(engine), running_gateway(state_dir, engine) as gateway:
        own = Served(state_dir, engine, gateway, api_key)
        until(lambda: kept.read_bytes() != before)
        assert [entry.action for entry in _entries(own, action="*.created")] == made
        assert len(_entries(own, action="vault.opened")) == 2


def test_starts_and_stops_are_recorded_and_an_old_log_goes_on(own: Served) -> None:
    until(lambda: own.admin.audit_status().public_key is not None)  # whoever is ended before that signs nothing
    size = own.admin.audit_status().size
    assert _actions(own)[0] == "gateway.started"
    own.gateway.end()
    key = VerifierKey.parse((own.state_dir / "audit/log.vkey").read_text().strip())
    found = verify_log(own.state_dir / "audit", key)
    assert found.size > size
    assert found.unsigned == 0
    assert not (own.state_dir / "run/audit.sock").exists()
