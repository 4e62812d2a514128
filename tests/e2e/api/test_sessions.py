"""Whose turn it is, told by headers, bodies and histories; and that nobody learns of anybody else's."""

import concurrent.futures
import json
import uuid
from typing import Any

import pytest

from api.admin.client import AdminClient
from benchmarks.stub import MODEL
from tests.e2e.api.conftest import Answer, Served, until

SAID = "".join(f" word{number}" for number in range(14))


def name() -> str:
    return uuid.uuid4().hex


def salt(served: Served) -> str:
    """The salt of the last request that reached the engine."""
    said: str = served.engine_seen()["bodies"][-1]["cache_salt"]
    return said


def label(served: Served) -> str:
    said: str = served.engine_seen()["bodies"][-1]["kv_transfer_params"]["holdfast"]["session"]
    return said


def ask(served: Served, messages: list[dict[str, Any]], headers: dict[str, str] | None = None, **more: Any) -> Answer:
    body = json.dumps({"model": MODEL, "messages": messages, **more}).encode()
    return served.send("POST", "/v1/chat/completions", body, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_the_session_is_named_in_the_answer_and_goes_on_under_its_name(served: Served, stream: bool) -> None:
    mine = name()
    first = served.ask(session=mine, stream=stream)
    first_salt, first_label = salt(served), label(served)
    second = served.ask("and then?", session=mine, stream=stream)
    assert first.headers["x-session-id"] == second.headers["x-session-id"] == mine
    assert (salt(served), label(served)) == (first_salt, first_label)
    assert served.newest_session().turns == 2


def test_a_session_that_the_client_named_is_named_in_refusals_too(served: Served) -> None:
    mine = name()
    key = served.new_key(principal=f"once-{mine}", requests_per_minute=1).secret
    refusals = {
        200: served.ask(session=mine, api_key=key),
        429: served.ask(session=mine, api_key=key),
        400: ask(served, [], {"X-Session-ID": mine}),
        404: served.ask(session=mine, model="nothing"),
        413: served.send(
            "POST", "/v1/chat/completions", headers={"Content-Length": str(200 << 20), "X-Session-ID": mine}
        ),
    }
    for status, answer in refusals.items():
        expected = None if status == 413 else mine  # refused before anything else of it was looked at
        assert (answer.status, answer.headers.get("x-session-id")) == (status, expected)


def test_what_belongs_to_no_session_names_none(served: Served) -> None:
    headers = {"X-Session-ID": "mine"}
    for path in ("/healthz", "/readyz", "/v1/models", f"/v1/models/{MODEL}", "/nowhere"):
        assert "x-session-id" not in served.send("GET", path, headers=headers).headers
    assert "x-session-id" not in ask(served, [{"role": "user", "content": "x"}], {"X-Session-ID": "a b"}).headers
    assert "x-session-id" not in ask(served, []).headers


@pytest.mark.parametrize(
    "headers",
    [
        {"x-dynamo-session-id": "{}"},
        {"x-claude-code-session-id": "{}"},
        {"session-id": "{}"},
        {"x-session-id": "{}"},
        {"X-Session-ID": "{}", "session-id": "another"},
    ],
    ids=lambda headers: "+".join(headers),
)
def test_every_harness_s_header_names_a_session(served: Served, headers: dict[str, str]) -> None:
    mine = name()
    given = {key: value.format(mine) for key, value in headers.items()}
    for _ in range(2):
        assert ask(served, [{"role": "user", "content": "hi"}], given).headers["x-session-id"] == mine
    session = served.newest_session()
    assert (session.turns, session.origin) == (2, "header")


@pytest.mark.parametrize("field", ["prompt_cache_key", "conversation"])
def test_a_body_field_names_a_session(served: Served, field: str) -> None:
    mine = name()
    for value in (mine, {"id": mine} if field == "conversation" else mine):
        named: dict[str, Any] = {field: value}
        answer = ask(served, [{"role": "user", "content": "hi"}], **named)
        assert answer.headers["x-session-id"] == mine
        assert "x-holdfast-dropped" not in answer.headers
    session = served.newest_session()
    assert (session.turns, session.origin) == (2, "body")


def test_an_answer_s_id_names_the_session_that_it_was_given_in(served: Served) -> None:
    first = served.ask("hello", session=name())
    second = ask(served, [{"role": "user", "content": "more"}], previous_response_id=first.json["id"])
    assert second.headers["x-session-id"] == first.headers["x-session-id"]


def test_an_unknown_answer_s_id_is_a_404_and_another_s_is_the_same(served: Served) -> None:
    other = served.new_key(tenant="other", principal="agent").secret
    known = served.ask("hello").json["id"]
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}

    def refused(response_id: str) -> Answer:
        asked = json.dumps({**body, "previous_response_id": response_id}).encode()
        return served.send("POST", "/v1/chat/completions", asked, api_key=other, headers={"X-Request-ID": "same"})

    unknown, foreign = refused("chatcmpl-" + "0" * 32), refused(known)
    assert (unknown.status, unknown.code) == (404, "previous_response_not_found")
    assert (foreign.status, foreign.body) == (unknown.status, unknown.body)


def test_a_history_that_is_sent_back_goes_on_and_a_second_answer_to_it_is_a_branch(served: Served) -> None:
    start: list[dict[str, Any]] = [{"role": "system", "content": name()}, {"role": "user", "content": "first"}]
    first = ask(served, start)
    first_salt = salt(served)
    longer = [*start, {"role": "assistant", "content": SAID}, {"role": "user", "content": "second"}]
    second = ask(served, longer)
    assert second.headers["x-session-id"] == first.headers["x-session-id"]
    assert served.newest_session().turns == 2
    branch = ask(served, [*longer[:-1], {"role": "user", "content": "something else"}])
    assert branch.headers["x-session-id"] != first.headers["x-session-id"]
    assert salt(served) == first_salt
    assert ask(served, [{"role": "system", "content": name()}, *longer[1:]]).headers["x-session-id"] not in (
        first.headers["x-session-id"],
        branch.headers["x-session-id"],
    )
    assert salt(served) != first_salt


def test_agents_of_one_session_share_its_salt_and_nothing_else(served: Served) -> None:
    mine, hello = name(), [{"role": "user", "content": "hi"}]
    ask(served, hello, {"x-claude-code-session-id": mine})
    parent = salt(served), label(served)
    answer = ask(served, hello, {"x-claude-code-session-id": mine, "x-claude-code-agent-id": "a1"})
    assert answer.headers["x-session-id"] == f"{mine}/a1"
    assert salt(served) == parent[0]
    assert label(served) != parent[1]
    ask(
        served,
        hello,
        {"x-claude-code-session-id": mine, "x-claude-code-agent-id": "a2", "x-claude-code-parent-agent-id": "a1"},
    )
    assert salt(served) == parent[0]
    ask(served, hello, {"session-id": name(), "x-parent-session-id": mine})
    assert salt(served) == parent[0]


def test_another_tenant_s_session_id_is_as_unknown_as_any(served: Served) -> None:
    mine = name()
    served.ask("my secret", session=mine)
    my_salt, my_label = salt(served), label(served)
    other = served.new_key(tenant="other", principal="agent").secret
    foreign = served.ask("hello", session=mine, api_key=other)
    foreign_salt, foreign_label = salt(served), label(served)
    unknown = served.ask("hello", session=name(), api_key=other)
    assert foreign.status == unknown.status == 200
    assert set(foreign.headers) == set(unknown.headers)
    assert foreign.headers["x-session-id"] == mine
    assert (foreign_salt, foreign_label) != (my_salt, my_label)
    assert foreign_salt != my_salt
    assert foreign.json["usage"] == unknown.json["usage"]


def test_another_principal_of_the_tenant_has_sessions_of_its_own(served: Served) -> None:
    mine = name()
    served.ask("my secret", session=mine)
    my_salt = salt(served)
    served.ask("my secret", session=mine, api_key=served.new_key(principal="colleague").secret)
    assert salt(served) != my_salt


def test_a_new_key_of_the_same_principal_keeps_its_sessions(served: Served) -> None:
    mine = name()
    first, second = (served.new_key(principal="rotating").secret for _ in range(2))
    served.ask("hello", session=mine, api_key=first)
    my_salt = salt(served)
    served.ask("hello again", session=mine, api_key=second)
    assert salt(served) == my_salt


def test_the_transcript_holds_what_was_said_and_the_database_files_do_not(served: Served) -> None:
    words = f"marzipan{name()}"
    served.ask(words, session=name(), stream=True, temperature=0.25)
    session = served.newest_session()
    (turn,) = served.transcript(session.session_id).turns
    assert turn.new_messages == [{"role": "user", "content": words}]
    assert turn.answer == {"role": "assistant", "content": SAID}
    assert turn.parameters == {"temperature": 0.25}
    assert turn.completion_token_ids == list(range(15))
    assert len(turn.prompt_token_ids) == turn.prompt_tokens == len(words) // 4
    assert (turn.state, turn.finish_reason) == ("complete", "stop")
    for path in served.state_dir.rglob("*"):
        if path.is_file():
            held = path.read_bytes()
            assert words.encode() not in held, path
            assert b"word3 word4" not in held, path
            assert served.api_key.encode() not in held or path.name == "api-key", path


def test_what_was_found_on_the_engine_is_told(served: Served) -> None:
    answer = served.ask("x" * 400, session=name())
    assert answer.json["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 50,
        "computed_tokens": {"first_turn": 50},
    }
    session = served.newest_session()
    assert (session.prompt_tokens, session.cached_tokens, session.completion_tokens) == (100, 50, 15)


def test_what_a_turn_s_first_token_took_is_told_of_a_streamed_one(served: Served) -> None:
    mine = name()
    served.ask('@stub {"first_pause_s": 0.2}', session=mine, stream=True)
    served.ask("at once", session=mine)
    streamed, whole = served.admin.why(served.newest_session().session_id).turns
    assert streamed.first_token_s is not None
    assert streamed.first_token_s >= 0.2
    assert whole.first_token_s is None


def computed(served: Served, cause: str) -> float:
    """What is counted on the admin listener of prompt tokens that were computed for `cause`, for all tenants."""
    with AdminClient(served.state_dir)._answer("GET", "/metrics") as answer:
        text = answer.read().decode()
    begin = f'holdfast_computed_prompt_tokens_total{{cause="{cause}",'
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(begin))


def test_what_was_computed_is_counted_by_cause(served: Served) -> None:
    before = computed(served, "first_turn")
    served.ask("x" * 400, session=name())
    assert computed(served, "first_turn") == before + 50


def test_of_a_stream_that_broke_it_is_not_known_what_was_found(served: Served) -> None:
    before = computed(served, "unknown"), computed(served, "first_turn")
    served.ask('@stub {"drop_after": 2} ' + "x" * 376, session=name(), stream=True)
    session = served.newest_session()
    assert (session.prompt_tokens, session.cached_tokens) == (100, 0)
    (turn,) = served.admin.why(session.session_id).turns
    assert (turn.served_tokens, turn.computed_tokens) == (0, {"unknown": 100})
    assert (computed(served, "unknown"), computed(served, "first_turn")) == (before[0] + 100, before[1])


def test_why_is_told_of_so_many_turns_as_were_asked_for(served: Served) -> None:
    mine = name()
    for _ in range(3):
        served.ask(session=mine)
    session_id = served.newest_session().session_id
    told = [served.admin.why(session_id, limit=limit) for limit in (2, 3)]
    assert [([turn.number for turn in each.turns], each.truncated) for each in told] == [
        ([2, 3], True),
        ([1, 2, 3], False),
    ]


def lets_go_of(served: Served, lease_label: str) -> None:
    until(lambda: lease_label in served.engine_seen()["released"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("goodbye", ["X-Session-End", "X-Dynamo-Session-Final"])
def test_the_last_call_of_a_session_says_so_and_the_engine_lets_go(served: Served, goodbye: str, stream: bool) -> None:
    mine = name()
    served.ask("hello", session=mine)
    mine_label = label(served)
    assert mine_label not in served.engine_seen()["released"]
    body = [{"role": "user", "content": "goodbye"}]
    answer = ask(served, body, {"X-Session-ID": mine, goodbye: "true"}, stream=stream)
    assert answer.status == 200
    lets_go_of(served, mine_label)
    ended = served.admin.audit_entries(action="session.ended").entries[0]
    assert ended.record is not None
    assert ended.record["session_id"] == served.newest_session().session_id


def test_a_session_that_is_deleted_is_let_go_with_its_agents_and_keeps_its_transcript(served: Served) -> None:
    mine = name()
    served.ask("hello", session=mine)
    labels = [label(served)]
    own_id = served.newest_session().session_id
    ask(served, [{"role": "user", "content": "hi"}], {"X-Session-ID": f"{mine}-child", "X-Parent-Session-ID": mine})
    labels.append(label(served))
    answer = served.send("DELETE", f"/v1/sessions/{mine}")
    assert (answer.status, answer.json) == (200, {"id": mine, "object": "session", "ended": 2, "released": True})
    for each in labels:
        lets_go_of(served, each)
    assert len(served.transcript(own_id).turns) == 1
    assert served.send("DELETE", f"/v1/sessions/{own_id}").json["ended"] == 0
    assert served.ask("and on", session=mine).status == 200
    assert served.transcript(own_id).session.turns == 2
    ended = served.admin.audit_entries(action="session.ended").entries[:2]
    assert own_id in {each.record["session_id"] for each in ended if each.record is not None}
    assert served.send("DELETE", f"/v1/sessions/{own_id}").json["ended"] == 1


def test_a_session_that_ends_while_its_turn_runs_is_let_go_when_that_ends(served: Served) -> None:
    mine = name()
    served.ask("hello", session=mine)
    mine_label = label(served)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.ask, '@stub {"chunks": 20, "pause_s": 0.05}', session=mine)
        until(lambda: served.engine_seen()["bodies"][-1]["messages"][-1]["content"].startswith("@stub"))
        served.send("DELETE", f"/v1/sessions/{mine}")
        released = served.engine_seen()["released"].count(mine_label)
        assert not running.done()
        assert running.result().status == 200
    until(lambda: served.engine_seen()["released"].count(mine_label) > released)


def test_ending_sessions_has_a_quota_and_what_is_refused_is_recorded(served: Served) -> None:
    key = served.new_key(principal="ends", requests_per_minute=2).secret
    mine = name()
    served.ask("hello", session=mine, api_key=key)
    unknown = served.send("DELETE", f"/v1/sessions/{name()}", api_key=key)
    assert (unknown.status, unknown.code) == (404, "session_not_found")
    refused = served.admin.audit_entries(action="request.refused").entries[0]
    assert refused.record is not None
    assert refused.record["reason"] == "session_not_found"
    assert served.send("DELETE", f"/v1/sessions/{mine}", api_key=key).status == 429


def test_another_s_session_cannot_be_ended_and_is_as_unknown_as_any(served: Served) -> None:
    mine = name()
    served.ask("hello", session=mine)
    other = served.new_key(tenant="other", principal="agent").secret
    same = {"X-Request-ID": "same"}
    for target in (mine, served.newest_session().session_id):
        foreign = served.send("DELETE", f"/v1/sessions/{target}", api_key=other, headers=same)
        unknown = served.send("DELETE", f"/v1/sessions/{'0' * len(target)}", api_key=other, headers=same)
        assert (foreign.status, foreign.code) == (404, "session_not_found")
        assert foreign.body.replace(target.encode(), b"") == unknown.body.replace(b"0" * len(target), b"")


@pytest.mark.parametrize("said", ["yes", "1", "true, true", ""])
def test_an_end_that_cannot_be_understood_is_refused(served: Served, said: str) -> None:
    headers = {"X-Session-ID": name(), "X-Session-End": said or " "}
    answer = ask(served, [{"role": "user", "content": "x"}], headers)
    assert answer.status == 400
