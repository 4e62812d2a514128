"""What crosses between the gateway and the engine is read as it was written, or refused without a word of it."""

import json
import math
from typing import Any

import pytest

from appliance.engine.protocol import (
    LEASE_FIELD,
    MAX_AWAITED,
    MAX_DEMOTED,
    MAX_RELEASES,
    MAX_TURN_ENDS,
    DemoteRequest,
    Lease,
    LeaseReport,
    LeasesRequest,
    LeaseState,
    SharedPrefix,
    TurnAccount,
    TurnEnd,
    connector_arguments,
    connector_config,
    demote_answer,
    demote_request,
    lease_params,
    leases_request,
    read_demote_answer,
    read_demote_request,
    read_leases_request,
    read_turn_accounts_answer,
    read_turn_ends_request,
    token_digest,
    turn_accounts_answer,
    turn_ends_request,
)
from appliance.engine.wire import MalformedMessage

LEASE: dict[str, Any] = {
    "session": "s-1",
    "tenant": "t_1",
    "idle_timeout_s": 15.0,
    "turn": "u-1",
    "strict": False,
    "parent": "",
    "tenant_share": 0.0,
    "tenant_cap": 1.0,
    "session_cap": 1.0,
    "shared": None,
}
END = TurnEnd("s-1", "t_1", "u-1", "tool_use", output_tokens=7, idle_timeout_s=15.0, returns_soon=True)
ACCOUNT = TurnAccount("u-1", device_tokens=64, dram_tokens=32, disk_tokens=96, reason="evicted")
REPORT = LeaseReport(
    leases=(LeaseState("s", "t", blocks=3, tokens=96, expires_in_s=-0.25),),
    leased_blocks=3,
    free_blocks=10,
    total_blocks=40,
    block_size=32,
    next_expiry_in_s=-0.25,
    reclaimed_blocks_total=1,
    expired_total=2,
    ignored_total=4,
)


def test_a_lease_survives_the_wire() -> None:
    lease = Lease("s-1", "t_1", 15.0, turn="u-1")
    assert lease_params(lease) == {LEASE_FIELD: LEASE}
    sharing = Lease("s-1", "t_1", 15.0, shared=SharedPrefix("5a17", 64, token_digest([1, 2, 3])))
    assert Lease.from_wire(json.loads(json.dumps(sharing.to_wire()))) == sharing
    assert Lease.from_wire(json.loads(json.dumps(lease.to_wire()))) == lease


@pytest.mark.parametrize(
    "change",
    [
        {"session": ""},
        {"session": "a" * 65},
        {"session": "a b"},
        {"session": "a\n"},
        {"session": None},
        {"tenant": 7},
        {"idle_timeout_s": -0.1},
        {"idle_timeout_s": 86_401},
        {"idle_timeout_s": True},
        {"idle_timeout_s": "15"},
        {"idle_timeout_s": math.nan},
        {"idle_timeout_s": math.inf},
        {"idle_timeout_s": 10**400},
        {"turn": "a b"},
        {"turn": None},
        {"strict": 1},
        {"parent": "a b"},
        {"tenant_share": 1.1},
        {"tenant_cap": -0.1},
        {"session_cap": None},
        {"more": 1},
    ],
    ids=repr,
)
def test_a_lease_that_is_not_exactly_one_is_refused_and_not_repeated(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage) as refused:
        Lease.from_wire({**LEASE, **change})
    assert "a b" not in str(refused.value)


@pytest.mark.parametrize("missing", sorted(LEASE))
def test_a_lease_needs_every_field(missing: str) -> None:
    with pytest.raises(MalformedMessage):
        Lease.from_wire({name: value for name, value in LEASE.items() if name != missing})


@pytest.mark.parametrize("value", [None, [], "text", 7, True])
def test_a_lease_is_an_object(value: object) -> None:
    with pytest.raises(MalformedMessage):
        Lease.from_wire(value)


def test_a_report_survives_the_wire() -> None:
    assert LeaseReport.from_wire(json.loads(json.dumps(REPORT.to_wire()))) == REPORT


def test_a_report_without_leases_survives_the_wire() -> None:
    report = LeaseReport((), 0, 40, 40, 32, None, 0, 0)
    assert LeaseReport.from_wire(json.loads(json.dumps(report.to_wire()))) == report


@pytest.mark.parametrize(
    "change",
    [
        {"leases": "text"},
        {"leases": [{"session": "s"}]},
        {"leased_blocks": -1},
        {"leased_blocks": 1.5},
        {"leased_blocks": True},
        {"next_expiry_in_s": "soon"},
        {"more": 1},
    ],
    ids=repr,
)
def test_a_report_that_is_not_exactly_one_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage):
        LeaseReport.from_wire({**REPORT.to_wire(), **change})


def test_a_release_survives_the_wire() -> None:
    assert read_leases_request(leases_request(["a", "b"])) == LeasesRequest(("a", "b"))
    assert read_leases_request(leases_request()) == LeasesRequest()
    assert read_leases_request(b"{}") == LeasesRequest()
    assert read_leases_request(b"") == LeasesRequest()


def test_who_is_awaited_survives_the_wire() -> None:
    said = LeasesRequest((), (("t-1", "s-1"), ("t-2", "s-2")))
    assert read_leases_request(leases_request(awaited=said.awaited)) == said


def test_that_every_lease_is_asked_for_survives_the_wire() -> None:
    assert read_leases_request(leases_request(every=True)) == LeasesRequest(every=True)


@pytest.mark.parametrize(
    "body",
    [
        b"\xff",
        b"{",
        b"[]",
        b"null",
        b'{"release": "a"}',
        b'{"release": [1]}',
        b'{"release": ["a b"]}',
        b'{"expire": []}',
        b'{"awaited": ["ab"]}',
        b'{"awaited": [["a"]]}',
        b'{"awaited": [["a", "b c"]]}',
        b'{"awaited": [["a", 1]]}',
        b'{"every": 1}',
        json.dumps({"awaited": [["a", "b"]] * (MAX_AWAITED + 1)}).encode(),
        b"[" * 100_000,
        json.dumps({"release": ["a"] * (MAX_RELEASES + 1)}).encode(),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_release_that_is_not_exactly_one_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        read_leases_request(body)


@pytest.mark.parametrize("fraction", [-0.1, 0.96, math.nan])
def test_a_bound_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="lease_fraction"):
        connector_config(fraction)


def test_the_command_line_carries_the_configuration() -> None:
    flag, value = connector_arguments(0.25)
    assert flag == "--kv-transfer-config"
    assert json.loads(value) == connector_config(0.25)


def test_ends_of_turns_and_their_accounts_survive_the_wire() -> None:
    assert read_turn_ends_request(turn_ends_request([END, END])) == (END, END)
    answer = json.dumps(turn_accounts_answer([ACCOUNT, None])).encode()
    assert read_turn_accounts_answer(answer) == (ACCOUNT, None)


@pytest.mark.parametrize(
    "change",
    [
        {"turn": ""},
        {"session": "a b"},
        {"tenant": 7},
        {"stop": "length"},
        {"stop": None},
        {"output_tokens": -1},
        {"output_tokens": 1.5},
        {"returns_soon": 1},
        {"idle_timeout_s": math.nan},
        {"more": 1},
    ],
)
def test_a_malformed_end_of_a_turn_is_refused_and_no_other(change: dict[str, Any]) -> None:
    ends = [END.to_wire(), END.to_wire() | change, END.to_wire()]
    assert read_turn_ends_request(json.dumps({"ends": ends}).encode()) == (END, None, END)


@pytest.mark.parametrize(
    "change", [{"turn": ""}, {"device_tokens": -1}, {"dram_tokens": True}, {"reason": "bad luck"}, {"more": 1}]
)
def test_a_malformed_account_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage):
        read_turn_accounts_answer(json.dumps({"accounts": [ACCOUNT.to_wire() | change]}).encode())


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"ends": 1}', b'{"ends": [], "more": 1}', b"[" * 100_000])
def test_what_is_no_message_about_turns_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        read_turn_ends_request(body)


def test_a_message_holds_a_bounded_number_of_turns() -> None:
    with pytest.raises(MalformedMessage):
        read_turn_ends_request(turn_ends_request([END] * (MAX_TURN_ENDS + 1)))


def test_what_is_to_go_down_survives_the_wire() -> None:
    assert read_demote_request(demote_request("disk", ["s-1", "s-2"])) == DemoteRequest("disk", ("s-1", "s-2"))
    assert read_demote_answer(json.dumps(demote_answer(["s-1"])).encode()) == {"s-1"}


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        {"tier": "disk"},
        {"tier": "device", "sessions": []},
        {"tier": 7, "sessions": []},
        {"tier": "disk", "sessions": "s-1"},
        {"tier": "disk", "sessions": ["a b"]},
        {"tier": "disk", "sessions": [7]},
        {"tier": "disk", "sessions": ["s"] * (MAX_DEMOTED + 1)},
        {"tier": "disk", "sessions": [], "more": 1},
    ],
    ids=lambda message: repr(message)[:50],
)
def test_what_is_to_go_down_is_exactly_that_or_refused(message: object) -> None:
    with pytest.raises(MalformedMessage):
        read_demote_request(json.dumps(message).encode())


@pytest.mark.parametrize(
    "answer", [{}, [], 3, {"demoted": "s-1"}, {"demoted": [7]}, {"demoted": ["a b"]}, {"demoted": [], "more": 1}]
)
def test_an_answer_to_it_is_a_list_of_labels_or_refused(answer: object) -> None:
    with pytest.raises(MalformedMessage):
        read_demote_answer(json.dumps(answer).encode())
