"""The appender's loop by a clock that is set by hand: when it signs, and when it stays awake."""

import errno
import os
import queue
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.audit import appender as module
from appliance.audit import protocol
from appliance.audit.appender import Appender
from appliance.audit.log import CHECKPOINT, AuditLog, Publication, unwritable
from appliance.audit.protocol import Message
from appliance.audit.reading import LogReader
from tests.unit.audit.making import KEY, Clock, drafts, open_log

LOOK_S = 1e-6  # what a look at the clock takes
AT_ONCE_S = 400e-6


class Poll:
    """In place of `epoll`: nothing ever comes. `waits_s`: how long each look waited for it."""

    def __init__(self) -> None:
        self.waits_s: list[float] = []

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self.waits_s.append(timeout)
        return []

    def close(self) -> None:
        pass


class Loop:
    """An appender whose loop is turned by hand. `clock`: the log's."""

    def __init__(self, directory: Path, clock: Clock | None = None) -> None:
        self.directory = directory
        self.now_s = 1000.0
        self.log = open_log(directory, clock=clock)
        self.poll = Poll()
        self._sockets = socket.socketpair()
        self.appender = Appender(self.log, self._sockets[0], starter=0, monotonic=self._look)
        self.appender._poll.close()
        self.appender._poll = self.poll  # type: ignore[assignment]
        self._producer = module._Producer(self._sockets[1])
        self._producer.gone = True  # its answers are for nobody
        self._numbers = iter(range(10**6))

    def _look(self) -> float:
        self.now_s += LOOK_S
        return self.now_s

    def ask(self, kind: int, body: bytes) -> None:
        self.appender._answer([(self._producer, Message(kind, 1, body))])

    def append(self, count: int) -> None:
        self.ask(protocol.APPEND, protocol.pack_drafts(drafts([next(self._numbers) for _ in range(count)])))

    def signed(self) -> int:
        """How many entries the newest checkpoint names, when what is due was done."""
        self.appender._publish_when_due()
        if self.appender._writing is not None:
            self.appender._writing.exception()  # waits for its end, whichever that is
            self.appender._conclude_publication()
        return LogReader(self.directory).published

    def looks_s(self) -> list[float]:
        """How long each look waited until the loop slept once."""
        self.poll.waits_s.clear()
        self.appender._next_events()
        return self.poll.waits_s

    def close(self) -> None:
        self.appender._writers.shutdown()
        self.log.close()
        os.close(self.appender._wake)
        for each in self._sockets:
            each.close()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(tmp_path / "audit")
    yield made
    made.close()


def test_a_checkpoint_is_signed_every_thousand_entries_and_every_minute(loop: Loop) -> None:
    loop.append(1500)
    assert loop.signed() == 0, "there is no key yet"
    loop.ask(protocol.SIGNING_KEY, KEY.to_bytes())
    assert loop.signed() == 1500
    loop.append(999)
    assert loop.signed() == 1500
    loop.append(1)
    assert loop.signed() == 2500
    loop.append(1)
    loop.now_s += 59.9
    assert (loop.signed(), loop.appender._wait_s() <= 0.1) == (2500, True)
    loop.now_s += 0.1
    assert loop.signed() == 2501
    loop.now_s += 1e6
    assert loop.signed() == 2501, "where nothing is new nothing is signed"


def _checkpoint_told(loop: Loop) -> tuple[object, object]:
    """The size and the age of the newest checkpoint, as the status has them."""
    told = loop.appender._status()
    age_s = told["checkpoint_age_s"]
    return told["checkpoint_size"], round(age_s, 1) if isinstance(age_s, float) else age_s


def test_a_checkpoint_that_is_there_has_its_age_before_this_run_signs_one(tmp_path: Path) -> None:
    first = Loop(tmp_path / "audit")
    first.append(300)
    assert _checkpoint_told(first) == (0, None)
    first.ask(protocol.SIGNING_KEY, KEY.to_bytes())
    assert first.signed() == 300
    first.now_s += 5.0
    assert _checkpoint_told(first) == (300, 5.0)
    first.append(20)
    first.close()
    # Started an hour later, and sealed: nothing signs.
    clock = Clock()
    written_ns = clock.wall_ns - 3600 * 10**9
    os.utime(tmp_path / "audit" / CHECKPOINT, ns=(written_ns, written_ns))
    again = Loop(tmp_path / "audit", clock)
    assert _checkpoint_told(again) == (300, 3600.0)
    again.now_s += 60.0
    assert _checkpoint_told(again) == (300, 3660.0)
    again.ask(protocol.SIGNING_KEY, KEY.to_bytes())
    assert (again.signed(), _checkpoint_told(again)) == (320, (320, 0.0))
    again.close()
    # The clock was set back since: it is no younger than new.
    os.utime(tmp_path / "audit" / CHECKPOINT, ns=(clock.wall_ns + 10**18,) * 2)
    behind = Loop(tmp_path / "audit", clock)
    assert _checkpoint_told(behind) == (320, 0.0)
    behind.close()


@pytest.mark.parametrize("kind", [protocol.APPEND_AGAIN, protocol.APPEND_AGAIN_PRIVILEGED])
def test_what_is_in_bundles_alone_is_not_repeated_either(tmp_path: Path, kind: int) -> None:
    first = Loop(tmp_path / "audit")
    first.ask(protocol.SIGNING_KEY, KEY.to_bytes())
    for _ in range(5):
        first.append(1000)
    assert first.signed() == 5000
    base = first.log._journal.base
    assert base > 4096, "it has let go of them"
    first.close()
    again = Loop(tmp_path / "audit")
    for number in (5000 - protocol.MOST_UNANSWERED, base - 1, base, 4999):
        again.ask(kind, protocol.pack_drafts(drafts([number])))
        assert again.log.size == 5000
    again.ask(kind, protocol.pack_drafts(drafts([4999, 5000])))
    assert again.log.size == 5001
    again.close()
    # What retention removed, and what somebody damaged, stops no start.
    (tmp_path / "audit/tile/entries/017").unlink()
    (tmp_path / "audit/tile/entries/018").write_bytes(b"something else")
    again = Loop(tmp_path / "audit")
    again.ask(kind, protocol.pack_drafts(drafts([4000])))
    assert again.log.size == 5001
    again.close()


def test_while_a_checkpoint_is_written_the_loop_waits_for_it_however_old_the_next_one_is(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = threading.Event(), AuditLog.write

    def slowly(log: AuditLog, publication: Publication, note: str) -> None:
        assert written.wait(60.0)
        write(log, publication, note)

    monkeypatch.setattr(AuditLog, "write", slowly)
    loop.append(1)
    loop.ask(protocol.SIGNING_KEY, KEY.to_bytes())
    assert loop.appender._writing is not None
    loop.append(1)
    loop.now_s += 61.0
    assert loop.appender._wait_s() == 1.0
    written.set()
    assert [loop.signed(), loop.signed()] == [1, 2]


def test_a_checkpoint_that_cannot_be_written_is_told_and_tried_again_while_what_comes_is_taken(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, tries = AuditLog.write, 0

    def refused(log: AuditLog, publication: Publication, note: str) -> None:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise unwritable(log._directory / "tile", errno.ENOSPC)
        write(log, publication, note)

    monkeypatch.setattr(AuditLog, "write", refused)
    loop.ask(protocol.SIGNING_KEY, KEY.to_bytes())
    loop.append(1000)
    assert loop.signed() == 0
    for number in (1, 2):
        error = loop.appender._status()["error"]
        assert isinstance(error, dict)
        assert "tile: No space left on device" in error["cause"]
        loop.append(1)
        assert loop.appender._status()["error"] == error, "that it is taken does not say that it is signed"
        assert (loop.signed(), tries) == (0, number), "it is not tried again at once"
        loop.now_s += 4.9
        assert (loop.signed(), tries) == (0, number)
        assert loop.appender._wait_s() <= 0.1
        loop.now_s += 0.1
        loop.signed()
    assert (LogReader(loop.directory).published, tries) == (1002, 3)
    told = loop.appender._status()
    assert (told["error"], told["checkpoint_size"], loop.log.size) == (None, 1002, 1002)


def test_under_load_the_next_checkpoint_is_begun_when_the_one_before_is_written_and_names_all_that_came_meanwhile(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no checkpoint names is bounded by what came while one was written, and what came while this one is."""
    gates: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()
    write = AuditLog.write

    def slowly(log: AuditLog, publication: Publication, note: str) -> None:
        assert gates.get(timeout=60.0).wait(60.0)
        write(log, publication, note)

    monkeypatch.setattr(AuditLog, "write", slowly)
    loop.ask(protocol.SIGNING_KEY, KEY.to_bytes())
    loop.append(1000)
    loop.appender._publish_when_due()
    before = 0
    for came in (4000, 1000, 2500):
        assert loop.appender._publication is not None
        named = loop.appender._publication.head.size
        gate = threading.Event()
        gates.put(gate)
        for _ in range(came // 500):
            loop.append(500)
            loop.appender._conclude_publication()
            loop.appender._publish_when_due()
        assert (loop.log.published.size, loop.appender._publication.head.size) == (before, named), "one at a time"
        gate.set()
        assert loop.appender._writing is not None
        loop.appender._writing.result()
        loop.appender._conclude_publication()  # as one turn of the loop does it
        loop.appender._publish_when_due()
        assert loop.log.published.size == named
        assert loop.appender._publication is not None, "no append, and no time, has to come first"
        assert loop.appender._publication.head.size == loop.log.size == named + came
        before = named
    gate = threading.Event()
    gate.set()
    gates.put(gate)
    loop.append(999)
    assert loop.signed() == loop.log.size - 999
    assert loop.appender._writing is None, "fewer than a thousand wait for a minute"


def test_it_looks_about_only_for_who_asks_at_once_again_and_sleeps_then(loop: Loop) -> None:
    assert loop.looks_s() == [1.0]
    loop.append(1)
    assert loop.looks_s() == [1.0], "the first is no repetition"
    loop.append(1)
    looks = loop.looks_s()
    assert (set(looks[:-1]), looks[-1]) == ({0}, 1.0)
    assert 10 < len(looks) <= AT_ONCE_S / LOOK_S + 2
    assert loop.looks_s() == [1.0], "it looked about once, and in vain"
    loop.now_s += AT_ONCE_S
    loop.append(1)
    assert loop.looks_s() == [1.0], "who came later is not waited for"


def test_it_does_not_look_about_where_somebody_else_wants_the_core(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    def yielded_to_somebody() -> None:
        loop.now_s += 50e-6

    monkeypatch.setattr(os, "sched_yield", yielded_to_somebody)
    loop.append(1)
    loop.append(1)
    assert loop.looks_s() == [0, 1.0]
