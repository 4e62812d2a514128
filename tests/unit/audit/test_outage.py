"""A SIEM that is down for longer than entries are kept: what it has not got stays, however old, and is sent to it."""

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from appliance.audit.events import ENTRIES_MISSING
from appliance.audit.reading import LogReader
from appliance.audit.retention import DAY_NS, Removal, remove_bundles
from appliance.audit.siem import link
from appliance.audit.siem.destinations import Destination
from appliance.audit.siem.exports import Exports
from appliance.audit.siem.ocsf import Ocsf
from appliance.audit.siem.opening import KeyOpener
from appliance.audit.siem.shipper import Shipper
from appliance.audit.siem.transport import ExportUnreachable
from appliance.audit.siem.verify_export import ExportDiffers, verify_export
from appliance.audit.tree import TILE_WIDTH
from appliance.audit.verify import verify_log
from tests.unit.audit.making import KEY, draft, sign
from tests.unit.audit.test_retention import Days, Node
from tests.unit.audit.test_siem import NoKeys, Sink, _Done

DAYS = 10  # that entries are kept
PER_DAY = 3 * TILE_WIDTH
BEFORE = 14  # days until the receiver goes
OUTAGE = 14


class Receiver(Sink):
    """It says of each message that it keeps it; while it is down nobody gets to it."""

    is_up = True

    async def connect(self) -> Sink:
        if not self.is_up:
            raise ExportUnreachable("soc takes nothing", cause="connection refused", remedy="Start it")
        return await super().connect()


class Appliance:
    """A node's log, with one destination, retention, and one clock for all of it, which the test moves."""

    def __init__(self, folder: Path) -> None:
        self.clock = Days()
        self.node = Node(folder / "audit", self.clock, days=DAYS)
        (self.node.directory / "log.vkey").write_text(f"{KEY.verifier()}\n")
        self.receiver = Receiver(8000)
        self.receiver.acknowledged = 0
        self.cursor = folder / "soc.cursor"
        self.exports = Exports(folder, self.node.directory, size=self._size, keys=NoKeys())
        self.exports._take_up(1, [Destination("soc", "relp+tls://siem.example:2514")])
        self.node.retention.needed_from = self.exports.needed_from
        self.shipper = self.start_exporter()

    def start_exporter(self) -> Shipper:
        """A new one, as after a restart: it knows what is in its file."""
        self.shipper = Shipper(
            "soc",
            Ocsf(),
            self.receiver,
            self.node.directory,
            self.cursor,
            size=self._size,
            opener=KeyOpener(NoKeys()),
            monotonic=lambda: self.clock.monotonic_ns / 1e9,
            wall_s=lambda: self.clock.wall_ns / 1e9,
            pause=self._pause,
        )
        return self.shipper

    def live(self, days: int) -> list[Removal]:
        """Days with entries, in each of which the exporter does what it can, and then retention."""
        removals = []
        for _ in range(days):
            for _ in range(4):
                self.clock.pass_ns(DAY_NS // 4)
                self.node.log.append([draft()] * (PER_DAY // 4))
            self.node.log.publish(sign)
            self.ship()
            removed = self.node.run()
            if removed is not None and removed not in removals:
                removals.append(removed)
        return removals

    def ship(self) -> None:
        with pytest.raises(_Done):
            asyncio.run(self.shipper.run())
        view = json.dumps([asdict(self.shipper.view(self.node.log.size))]).encode()
        asyncio.run(self.exports._serve(link.VIEWS, view))

    @property
    def oldest(self) -> int:
        return LogReader(self.node.directory).oldest

    @property
    def sequences(self) -> list[int]:
        """Of the entries that the receiver has."""
        told = [json.loads(line)["metadata"].get("sequence") for line in self.receiver.lines()]
        return [sequence for sequence in told if sequence is not None]

    async def _size(self) -> int:
        return self.node.log.size

    async def _pause(self, seconds: float) -> None:
        if not self.receiver.is_up:
            raise _Done


@pytest.fixture
def appliance(tmp_path: Path) -> Iterator[Appliance]:
    made = Appliance(tmp_path)
    yield made
    made.node.log.close()


def test_an_outage_that_is_longer_than_the_retention_costs_no_entry(appliance: Appliance) -> None:
    node, exports = appliance.node, appliance.exports
    assert appliance.live(BEFORE)
    assert node.retention.held == ""
    had = exports.view("soc").delivered
    assert 0 < appliance.oldest < had == len(appliance.sequences)

    appliance.receiver.is_up = False
    appliance.live(OUTAGE // 2)
    appliance.start_exporter()
    appliance.live(OUTAGE // 2)
    oldest = LogReader(node.directory).entry(appliance.oldest)
    assert oldest.sequence == had // TILE_WIDTH * TILE_WIDTH, "the bundle of the first entry that it has not got"
    assert oldest.monotonic_ns < node.clock.monotonic_ns - DAYS * DAY_NS
    assert node.retention.held == f"a destination does not have entry {had} yet"
    assert node.retention.alarm == "", "nothing is lost"
    view = exports.view("soc")
    assert (view.delivered, view.lag_entries) == (had, node.log.size - had)
    assert view.lag_s > DAYS * 86_400
    assert view.error is not None
    assert view.error["cause"] == "connection refused"
    verify_log(node.directory, KEY.verifier())

    appliance.receiver.is_up = True
    appliance.ship()
    assert appliance.sequences == list(range(node.log.size)), "all of them, each once, in their order"
    found = verify_export(appliance.receiver.lines(), KEY.verifier())
    assert (found.first, found.proved_from) == (0, 0)
    assert exports.view("soc").error is None

    assert appliance.live(4)
    assert node.retention.held == ""
    assert appliance.oldest > had, "retention has caught up"
    verify_log(node.directory, KEY.verifier())


def test_a_destination_that_does_not_come_back_is_removed_and_retention_goes_on(appliance: Appliance) -> None:
    appliance.live(BEFORE)
    appliance.receiver.is_up = False
    appliance.live(OUTAGE)
    held_at = appliance.oldest
    asyncio.run(appliance.exports.remove("soc"))
    (removed,) = appliance.live(1)
    assert appliance.oldest == removed.kept_from > held_at
    assert appliance.node.retention.held == ""


def test_what_somebody_took_meanwhile_is_told_in_the_log_and_the_rest_is_sent(
    appliance: Appliance, caplog: pytest.LogCaptureFixture
) -> None:
    node = appliance.node
    appliance.live(BEFORE)
    had = len(appliance.sequences)
    appliance.receiver.is_up = False
    appliance.live(OUTAGE)
    oldest = appliance.oldest
    first, end = oldest // TILE_WIDTH, oldest // TILE_WIDTH + 2
    remove_bundles(node.directory, first, end)

    with caplog.at_level(logging.WARNING):
        appliance.live(1)
        lost = f"the entries from {oldest} to {end * TILE_WIDTH - 1} of the audit log are gone"
        assert node.retention.alarm == f"{lost}, and retention did not remove them"
        (event,) = node.events(ENTRIES_MISSING.number)
        appliance.receiver.is_up = True
        appliance.ship()
    assert f"soc: entries {had} to {end * TILE_WIDTH - 1} are not in the log any more" in caplog.text
    assert appliance.sequences == [*range(had), *range(end * TILE_WIDTH, node.log.size)]
    assert event in appliance.sequences, "the receiver is told, too"
    with pytest.raises(ExportDiffers, match=str(had)):
        verify_export(appliance.receiver.lines(), KEY.verifier())
