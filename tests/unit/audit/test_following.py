"""Following a log that goes on being written."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.audit.following import LogFollower
from appliance.audit.journal import Frame
from appliance.audit.log import JOURNAL, AuditLog
from appliance.audit.reading import LogReader, LogUnreadable
from appliance.audit.retention import remove_bundles
from appliance.audit.tree import leaf_hash
from tests.unit.audit.making import drafts, make_log, open_log, sign

_MANY = 4_400  # entries: after so many more, published, a journal begins anew


def _frames(directory: Path) -> list[Frame]:
    log = LogReader(directory)
    return [log.frame(sequence) for sequence in range(log.size)]


def _go_on(log: AuditLog, count: int) -> None:
    for first in range(log.size, log.size + count, 100):
        log.append(drafts(range(first, first + 100)))
    log.publish(sign)


def test_a_journal_that_took_the_place_of_another_and_its_inode_is_read_from_its_beginning(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(drafts(range(300)))
    follower = LogFollower(tmp_path)
    assert follower.frames(0, 300, most=300) == _frames(tmp_path)
    journal, first_one = tmp_path / JOURNAL, tmp_path / "first"
    os.link(journal, first_one)
    _go_on(log, _MANY)
    log.append(drafts(range(log.size, log.size + 10)))
    bundled = LogReader(tmp_path).bundled
    assert bundled > 300
    # A file system gives the inode of a file that is gone to the next one that is made.
    first_one.write_bytes(journal.read_bytes())
    first_one.replace(journal)
    assert follower.frames(bundled, log.size, most=log.size) == _frames(tmp_path)[bundled:]
    log.close()


def test_a_follower_goes_on_where_it_was_while_the_journal_is_replaced_again_and_again(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    follower = LogFollower(tmp_path)
    read: list[Frame] = []
    for _ in range(3):
        _go_on(log, _MANY)
        while len(read) < log.size - 7:
            read += follower.frames(len(read), log.size, most=500)
    assert read == _frames(tmp_path)[: len(read)]
    log.close()


def test_an_entrys_hash_is_known_in_the_journal_in_a_bundle_and_when_it_was_removed(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(drafts(range(50)))
    follower = LogFollower(tmp_path)
    first, hashes = follower.leaf(49), [leaf_hash(frame.entry) for frame in _frames(tmp_path)]
    assert first == hashes[49]
    _go_on(log, _MANY)
    log.append(drafts(range(log.size, log.size + 10)))
    hashes = [leaf_hash(frame.entry) for frame in _frames(tmp_path)]
    assert LogReader(tmp_path).bundled > 300
    remove_bundles(tmp_path, 0, 1)
    assert [follower.leaf(sequence) for sequence in range(len(hashes))] == hashes
    log.close()


def test_entries_that_the_journal_lacks_are_named_with_what_to_do(tmp_path: Path) -> None:
    make_log(tmp_path, 20)
    with pytest.raises(LogUnreadable, match="cannot be read") as refused:
        LogFollower(tmp_path).frames(30, 40, most=10)
    assert "ends before entry 30, which its appender has written" in refused.value.cause
    assert "audit verify" in refused.value.remedy


@pytest.mark.parametrize("oldest", [lambda log: LogReader(log).oldest, lambda log: LogFollower(log).oldest(0)])
def test_a_bundle_that_cannot_be_looked_for_is_no_bundle_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Callable[[Path], int]
) -> None:
    make_log(tmp_path, _MANY, batch=200)
    assert LogReader(tmp_path).bundled > 0
    stat = os.stat

    def refused(path: Any, *args: Any, **named: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path / "record")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return stat(path, *args, **named)

    assert oldest(tmp_path) == 0
    monkeypatch.setattr(os, "stat", refused)
    with pytest.raises(LogUnreadable) as unreadable:
        oldest(tmp_path)
    assert unreadable.value.cause == f"{tmp_path / 'record' / '000'}: Permission denied"
