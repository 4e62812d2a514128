"""Entries are found by what their header and their tags say, and only what is found is opened."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from appliance.audit import search as searching
from appliance.audit.entry import Draft, seal
from appliance.audit.events import (
    SESSION_SHREDDED,
    SYSTEM,
    TRANSCRIPT_READ,
    VAULT_OPENED,
    VAULT_REFUSED,
    Actor,
    Event,
    Outcome,
)
from appliance.audit.reading import LogReader, LogUnreadable
from appliance.audit.search import Findings, Query, search
from appliance.errors import HoldfastError
from appliance.vault import KeyMissing
from tests.unit.audit.making import Clock, Keys, draft, drafts, open_log, sign

YEAR_NS = 365 * 86_400 * 1_000_000_000


class CountingKeys(Keys):
    """Keys that count the records that were opened, and lose those that were shredded as the vault does."""

    opened = 0

    def audit_secret(self, key_id: bytes, label: str, *parts: bytes) -> bytes:
        if key_id in self.shredded:
            raise KeyMissing("key_" + key_id.hex())
        self.opened += label == "entry"
        return super().audit_secret(key_id, label, *parts)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("searched") / "audit"
    log = open_log(directory)
    for first in range(0, 600, 20):
        log.append(drafts(range(first, first + 20)))
        if first == 300:
            record = Event(VAULT_OPENED, SYSTEM).record({})
            opened = seal(20, record, keys=Keys(), scope="system", actor="", session="", random=b"o" * 32)
            log.append([opened])
    log.publish(sign)
    log.close()
    return directory


def _search(directory: Path, keys: Keys | None = None, **wanted: Any) -> Findings:
    return search(LogReader(directory), keys or Keys(), Query(**wanted))


def _requests(findings: Findings) -> list[str]:
    return [found.record["request_id"] if found.record else "" for found in findings.found]


def test_the_newest_come_first_and_the_rest_can_be_asked_for(directory: Path) -> None:
    first = _search(directory, limit=3)
    assert _requests(first) == ["req_599", "req_598", "req_597"]
    assert _requests(_search(directory, limit=2, before=first.go_on_before)) == ["req_596", "req_595"]


def test_what_is_not_meant_is_not_opened(directory: Path) -> None:
    keys = CountingKeys()
    findings = _search(directory, keys, scope="ten_1", actor="pri_2", session="ses_4", limit=1000)
    expected = [f"req_{number}" for number in reversed(range(600)) if (number % 2, number % 3, number % 5) == (1, 2, 4)]
    assert _requests(findings) == expected
    assert keys.opened == len(expected)
    assert findings.go_on_before is None


def test_an_action_is_found_by_its_name_or_a_pattern(directory: Path) -> None:
    (opened,) = _search(directory, action="vault.*").found
    assert opened.record is not None
    assert opened.record["action"] == "vault.opened"
    assert len(_search(directory, action="turn.admitted", limit=1000).found) == 600
    assert not _search(directory, action="nothing.such").found


def test_a_time_is_looked_up_and_not_looked_for(directory: Path) -> None:
    log = LogReader(directory)
    since, until = log.entry(100).wall_ns, log.entry(140).wall_ns
    keys = CountingKeys()
    found = _search(directory, keys, since_ns=since, until_ns=until, limit=1000).found
    assert [each.entry.sequence for each in found] == list(range(139, 99, -1))
    assert keys.opened == 40


class Stepped(NamedTuple):
    """A log whose clock was set, and what it said at each entry."""

    directory: Path
    clocks: list[int]


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Stepped:
    """Most is in bundles alone, some in the journal; the clock was set in both, and forth and back within a bundle."""
    directory = tmp_path_factory.mktemp("stepped") / "audit"
    clock = Clock()
    log = open_log(directory, clock=clock)
    stretches = [(2000, -2), (900, 2), (30, 2), (40, -2), (1300, 2), (600, -2), (300, 0)]
    drafted = [draft()] * 10
    for count, years in stretches:
        for _ in range(0, count, 10):
            log.append(drafted)
        clock.wall_ns += years * YEAR_NS
    log.publish(sign)
    for years in (-2, 2, 0):
        log.append(drafted)
        clock.wall_ns += years * YEAR_NS
    log.close()
    reader = LogReader(directory)
    assert 4096 <= reader.bundled < reader.size, "what is in bundles alone is read otherwise"
    return Stepped(directory, [reader.entry(sequence).wall_ns for sequence in range(reader.size)])


@pytest.mark.parametrize("years", [-2, 0, 2, 4])
@pytest.mark.parametrize("bounds", ["since", "until", "both"])
def test_a_time_finds_what_is_of_it_and_nothing_else_however_the_clock_was_set(
    stepped: Stepped, years: int, bounds: str
) -> None:
    began_ns = stepped.clocks[0] + years * YEAR_NS
    since_ns = None if bounds == "until" else began_ns + 100_000_000
    until_ns = None if bounds == "since" else began_ns + 300_000_000
    meant = [
        sequence
        for sequence, clock_ns in enumerate(stepped.clocks)
        if (since_ns is None or clock_ns >= since_ns) and (until_ns is None or clock_ns < until_ns)
    ]
    found = _search(stepped.directory, since_ns=since_ns, until_ns=until_ns, limit=10**6)
    assert [each.entry.sequence for each in found.found] == meant[::-1]
    assert found.go_on_before is None


def test_a_search_by_time_looks_at_so_many_bundles_and_goes_on_before_them(
    stepped: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "MOST_LOOKED_AT", 3)
    wanted: dict[str, Any] = {"since_ns": stepped.clocks[100], "until_ns": stepped.clocks[110]}
    found: list[int] = []
    before, searches = len(stepped.clocks), 0
    while True:
        findings = _search(stepped.directory, **wanted, before=before)
        found += [each.entry.sequence for each in findings.found]
        searches += 1
        if findings.go_on_before is None:
            break
        assert before - 3 * 256 <= findings.go_on_before < before
        before = findings.go_on_before
    assert (found, searches > 3) == (list(range(109, 99, -1)), True)


def test_a_bundle_that_is_cut_off_is_told_of_by_a_search_by_time(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([draft()] * 4400)
    log.publish(sign)
    log.close()
    (tmp_path / "tile/entries/003").write_bytes(bytes(190 * 255))
    with pytest.raises(LogUnreadable, match="from entry 768 on is damaged"):
        _search(tmp_path, since_ns=1 << 62)


def test_an_outcome_is_found(directory: Path) -> None:
    assert not _search(directory, outcome="failure").found
    assert len(_search(directory, outcome="success", limit=5).found) == 5


def test_a_shredded_tenants_entries_are_shown_without_their_content(directory: Path) -> None:
    keys = CountingKeys()
    keys.shredded.add(keys.audit_key_id("ten_1"))
    found = _search(directory, keys, limit=2).found
    assert [each.record is None for each in found] == [True, False]
    assert "is not there" in found[0].why_not


def test_a_search_looks_at_so_much_and_says_where_it_stopped(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "MOST_LOOKED_AT", 100)
    findings = _search(directory, session="ses_none")
    assert (findings.found, findings.go_on_before) == ([], 501)


def test_what_was_recorded_in_plaintext_is_found_by_what_it_says(tmp_path: Path) -> None:
    def drafted(event: Event, keys: Keys | None) -> Draft:
        record = event.record({})
        return seal(
            event.kind.number, record, keys=keys, scope="system", actor=event.actor.id, session="", random=b"p" * 32
        )

    somebody = Actor("user", "uid=1000")
    log = open_log(tmp_path)
    while_sealed = drafted(Event(VAULT_REFUSED, somebody, Outcome.REFUSED), None)
    log.append([while_sealed, drafted(Event(VAULT_OPENED, somebody), Keys()), *drafts([1])])
    log.close()

    def found(**wanted: Any) -> list[int]:
        return [each.entry.sequence for each in _search(tmp_path, **wanted).found]

    assert found(actor="uid=1000") == [1, 0]
    assert found(scope="system") == [1, 0]
    assert found(actor="uid=1000", outcome="refused") == [0]
    assert found(actor="uid=1001") == found(session="ses_0") == found(scope="ten_0") == []
    assert found(scope="ten_1") == [2]


def test_a_session_is_found_in_what_administrators_did_though_its_tenants_key_is_gone(tmp_path: Path) -> None:
    keys = CountingKeys()
    log = open_log(tmp_path)
    log.append(drafts(range(10)))
    for kind in (TRANSCRIPT_READ, SESSION_SHREDDED):
        did = Event(
            kind, Actor("principal", "prn_9"), tenant_id="ten_1", session_id="ses_3", target=("session", "ses_3")
        )
        scope = did.scope("system")
        sealed = seal(
            kind.number, did.record({}), keys=keys, scope=scope, actor="prn_9", session="ses_3", random=bytes(32)
        )
        log.append([sealed])
    log.close()

    def found() -> list[tuple[str, str]]:
        records = [each.record for each in _search(tmp_path, keys, session="ses_3").found]
        return [(record["action"], record["actor"]["id"]) for record in records if record is not None]

    administrators = [("session.shredded", "prn_9"), ("transcript.read", "prn_9")]
    assert found() == [*administrators, ("turn.admitted", "pri_2"), ("turn.admitted", "pri_0")]
    keys.shredded.add(keys.audit_key_id("ten_1"))
    assert found() == [*administrators, ("turn.admitted", "pri_2")]


def test_a_record_that_was_changed_is_not_shown(directory: Path, tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(drafts([1]))
    log.close()
    journal = tmp_path / "journal"
    reader = LogReader(tmp_path)
    frame = reader.frame(0)
    reader._tail = [frame._replace(sealed=frame.sealed[:-1] + b"x")]
    with pytest.raises(HoldfastError, match="not what it says"):
        search(reader, Keys(), Query())
    assert journal.exists()
