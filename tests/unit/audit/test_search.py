"""Entries are found by what their header and their tags say, and only what is found is opened."""

from pathlib import Path
from typing import Any

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
from appliance.audit.reading import LogReader
from appliance.audit.search import Findings, Query, search
from appliance.errors import HoldfastError
from appliance.vault import KeyMissing
from tests.unit.audit.making import Keys, drafts, open_log, sign


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
