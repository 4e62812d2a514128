"""What the log says of marks is found however much follows them; where nothing can be found, that is told."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from appliance.audit import marks
from appliance.audit.entry import Draft, seal
from appliance.audit.events import BACKUP_RESTORED, OLDER_COPY_ACKNOWLEDGED, STORE_MARKED, SYSTEM, Event, EventClass
from appliance.audit.marks import DESTINATIONS, UNKNOWN, Marks, Remembered, found, is_explained, last_said
from appliance.audit.marks import remembered_by_log as remembered
from appliance.audit.reading import LogReader
from appliance.audit.restores import Told
from appliance.audit.siem.destinations import Destination
from appliance.audit.siem.exports import DestinationsGone, DestinationsUnreadable, Exports
from appliance.audit.siem.saved import save
from tests.unit.audit.making import Keys, draft, drafts, open_log, sign


def event(kind: EventClass, counts: Mapping[str, int] | None = None, plain: bool = False, /, **details: str) -> Draft:
    told = Event(kind, SYSTEM, counts=counts or {}, details=details).record({"holdfast": "0"})
    return seal(
        kind.number, told, keys=None if plain else Keys(), scope="system", actor="", session="", random=bytes(32)
    )


def mark(number: int, *, destinations: int | None = None, **details: str) -> Draft:
    versions = {} if destinations is None else {DESTINATIONS: destinations}
    return event(STORE_MARKED, {"mark": number, **versions}, **details)


def test_a_mark_is_found_behind_as_many_entries_as_a_minute_can_have(tmp_path: Path) -> None:
    """A hundred bundles and more, in files, in the journal, and in a bundle that both have."""
    log, one = open_log(tmp_path), draft()
    log.append([one] * 300)
    log.append([mark(7, destinations=3, older_copy="log")])
    for _ in range(32):
        log.append([one] * 4000)
        log.publish(sign)
    log.append([one] * 100)
    log.close()
    reader = LogReader(tmp_path)
    assert reader.bundled > 301
    assert remembered(reader, Keys()) == Remembered(7, "log")
    assert last_said(reader, Keys(), DESTINATIONS) == 3
    assert (found(Marks(8, 8), 7), found(Marks(8, 7), 7), found(Marks(6, 6), 7)) == ("log", "", "database")


@pytest.mark.parametrize("size", [3, 255, 256, 257, 5000, 5131])
def test_entries_of_a_class_are_found_as_reading_all_of_them_does(tmp_path: Path, size: int) -> None:
    log = open_log(tmp_path)
    for first in range(0, size, 100):
        log.append(drafts(range(first, min(size, first + 100) - 1)))
        log.append([mark(first)] if first % 300 else [event(OLDER_COPY_ACKNOWLEDGED)])
        log.publish(sign)
    log.close()
    reader, kinds = LogReader(tmp_path), {STORE_MARKED.number, OLDER_COPY_ACKNOWLEDGED.number}
    every = [each for each in reader.backwards(reader.size) if each[0].event_class in kinds]
    assert every
    assert list(reader.newest(kinds, most=10**9)) == every
    for most in (1, 100, 257, size):
        within = [each for each in every if each[0].sequence >= reader.size - most]
        assert list(reader.newest(kinds, most=most)) == within


def test_where_no_mark_is_within_reach_it_cannot_be_told_which_is_older_and_no_restore_explains_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path)
    log.append([mark(7, destinations=3)])
    log.append(drafts(range(50)))
    log.close()
    monkeypatch.setattr(marks, "MOST_LOOKED_AT", 50)
    seen = remembered(LogReader(tmp_path), Keys())
    assert (seen, last_said(LogReader(tmp_path), Keys(), DESTINATIONS)) == (Remembered(None), None)
    restore = Told(3, "0", "2026-11-24T10:00:00Z", 7, carried_over=False)
    for known in (Marks(0, 0), Marks(7, 7), Marks(8, 7), Marks(9, 9)):
        assert found(known, seen.mark) == UNKNOWN
        assert not is_explained(UNKNOWN, known, Remembered(None, "", restore))
    monkeypatch.setattr(marks, "MOST_LOOKED_AT", 51)
    assert remembered(LogReader(tmp_path), Keys()).mark == 7


def test_a_log_without_a_mark_that_is_read_to_its_beginning_has_none(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(drafts(range(50)))
    log.close()
    assert remembered(LogReader(tmp_path), Keys()) == Remembered(0)
    assert last_said(LogReader(tmp_path), Keys(), DESTINATIONS) == 0


@pytest.mark.parametrize("is_saved", [True, False])
async def test_destinations_of_which_the_log_says_nothing_within_reach_are_not_believed_until_one_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_saved: bool
) -> None:
    directory = tmp_path / "audit"
    log = open_log(directory)
    log.append([mark(7, destinations=3)])
    log.append([draft(int(hashlib.sha256(b"%d" % number).hexdigest()[:6], 16)) for number in range(50)])
    log.close()
    (tmp_path / "siem").mkdir()
    if is_saved:
        older = Destination(name="soc", url="file:///somewhere?seconds=1", private_key=Path("/etc/key"))
        save(tmp_path / "siem" / "destinations.json", [older], 2, Keys())

    async def size() -> int:
        return 51

    exports = Exports(tmp_path, directory, size=size, keys=Keys())
    monkeypatch.setattr(marks, "MOST_LOOKED_AT", 50)
    for _ in range(2):
        with pytest.raises(DestinationsGone, match="cannot be told which destinations"):
            exports._read()
        assert exports.version is None, "no mark says that an older version is the newest"
    with pytest.raises(DestinationsUnreadable):
        exports.needed_from()
    monkeypatch.setattr(marks, "MOST_LOOKED_AT", 51)
    known = Exports(tmp_path, directory, size=size, keys=Keys())
    with pytest.raises(DestinationsUnreadable, match="an older copy" if is_saved else "are gone"):
        known._read()


def test_what_whoever_writes_the_folder_can_append_counts_for_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([mark(7, destinations=3, older_copy="log")])
    log.append([event(STORE_MARKED, {"mark": 9, DESTINATIONS: 2}, True)])
    for content in (b"no JSON", b"\xff", b"[]"):
        log.append([seal(BACKUP_RESTORED.number, content, keys=None, scope="", actor="", session="", random=bytes(32))])
    log.append([event(STORE_MARKED, None, True), event(OLDER_COPY_ACKNOWLEDGED, None, True)])
    log.close()
    reader = LogReader(tmp_path)
    assert remembered(reader, Keys()) == Remembered(7, "log")
    assert last_said(reader, Keys(), DESTINATIONS) == 3
