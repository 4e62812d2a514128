"""What a log was given since a proof began: all of it, over its being turned over, or it is said what is missing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from api.proving import added
from api.proving.added import Added, GrowingLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "engine.log"
    path.write_text("before\n")
    return path


@pytest.fixture
def log(path: Path) -> Iterator[GrowingLog]:
    log = GrowingLog(path)
    yield log
    log.close()


def turn_over(path: Path, text: str) -> None:
    path.replace(path.with_name(f"{path.name}.1"))
    path.write_text(text)


def write(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_what_was_there_before_is_left_out_and_nothing_else(path: Path, log: GrowingLog) -> None:
    assert log.added() == Added(b"")
    write(path, "since\n" * 1_000_000)
    assert log.added() == Added(b"since\n" * 1_000_000)


def test_a_log_that_was_turned_over_is_read_in_both_files(path: Path, log: GrowingLog) -> None:
    write(path, "since\n")
    turn_over(path, "and on\n")
    assert log.added() == Added(b"since\nand on\n")


def test_a_log_that_was_turned_over_twice_is_not_whole(path: Path, log: GrowingLog) -> None:
    write(path, "since\n")
    turn_over(path, "gone\n")
    write(path, "gone\n")
    turn_over(path, "and on\n")
    turn_over(path, "the newest\n")
    assert log.added() == Added(b"since\nand on\nthe newest\n", "the log was turned over more than once")


def test_a_log_that_began_since_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    log = GrowingLog(path)
    assert log.added() == Added(b"", "there is no log that can be read")
    path.write_text("since\n")
    assert log.added() == Added(b"since\n")
    turn_over(path, "and on\n")
    assert log.added() == Added(b"since\nand on\n", "the log was turned over more than once")


def test_a_log_that_was_taken_away_or_cut_is_not_whole(path: Path, log: GrowingLog) -> None:
    path.write_text("cut\n")
    assert log.added() == Added(b"cut\n", "the log was cut")
    path.unlink()
    assert log.added().missing == "there is no log that can be read"


def test_a_log_that_was_given_too_much_is_not_whole(
    path: Path, log: GrowingLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(added, "_MOST_BYTES", 8)
    write(path, "12345678")
    assert log.added() == Added(b"12345678")
    turn_over(path, "9")
    assert log.added() == Added(b"123456789", "the log was given more than 8 bytes")
