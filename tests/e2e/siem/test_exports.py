"""The exporter and whatever may hang it: it delays export, and neither the gateway's end nor other destinations."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from appliance.audit.entry import seal
from appliance.audit.events import STORE_MARKED, SYSTEM, Event
from appliance.audit.siem import link
from appliance.audit.siem.cursor import Cursor, Position
from appliance.audit.siem.destinations import Destination
from appliance.audit.siem.exports import DestinationsUnreadable, Exports
from appliance.audit.siem.files import read_in_time
from appliance.audit.siem.saved import save
from appliance.audit.siem.shipper import LogShorter
from appliance.audit.siem.transport import ExportUnusable
from appliance.errors import HoldfastError
from appliance.store.errors import StoreUnavailable
from appliance.vault import VaultSealed
from tests.e2e.siem.shipping import until
from tests.unit.audit.making import KEY, Keys, make_log, open_log, sign

pytestmark = pytest.mark.anyio
ENTRIES = 300
STOPPED_WITHIN_S = 20.0
REPLACED_WITHIN_S = 60.0


async def _size() -> int:
    return ENTRIES


class Node:
    """A log, and its exports to folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.state.mkdir()
        make_log(self.state / "audit", ENTRIES)
        (self.state / "audit" / "log.vkey").write_text(f"{KEY.verifier()}\n")
        self.key = folder / "diode.key"
        made = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.key.touch(0o600)
        self.key.write_bytes(made)
        self.token = folder / "token"
        self.token.touch(0o600)
        self.token.write_text("word")

    def exports(self, *, longest_silence_s: float = 30.0) -> Exports:
        return Exports(self.state, self.state / "audit", size=_size, keys=Keys(), longest_silence_s=longest_silence_s)

    def mark(self, version: int) -> None:
        """What the gateway notes in the log when the destinations have changed."""
        marked = Event(STORE_MARKED, SYSTEM, counts={"mark": 1, "destinations": version}).record({})
        log = open_log(self.state / "audit")
        log.append(
            [seal(STORE_MARKED.number, marked, keys=Keys(), scope="system", actor="", session="", random=bytes(32))]
        )
        log.publish(sign)
        log.close()

    def diode(self, name: str) -> Destination:
        (self.folder / name).mkdir(exist_ok=True)
        return Destination(name, f"file://{self.folder / name}?seconds=1", private_key=self.key)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


async def test_an_exporter_that_hangs_does_not_keep_the_gateway_from_its_end(node: Node) -> None:
    exports = node.exports()
    exports.start()
    await exports.add(node.diode("soc"))
    hangs = exports.pid
    assert hangs is not None
    os.kill(hangs, signal.SIGSTOP)
    try:
        async with asyncio.timeout(STOPPED_WITHIN_S):
            await exports.stop(ENTRIES)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(hangs, signal.SIGCONT)
    assert exports.pid is None


async def test_an_exporter_that_says_nothing_is_an_error_and_replaced(node: Node) -> None:
    exports = node.exports(longest_silence_s=5.0)
    exports.start()
    try:
        await exports.add(node.diode("soc"))
        await until(lambda: exports.view("soc").delivered == ENTRIES, REPLACED_WITHIN_S)
        hangs = exports.pid
        assert hangs is not None
        os.kill(hangs, signal.SIGSTOP)
        await until(
            lambda: "it said nothing for 5 s" in (exports.view("soc").error or {"cause": ""})["cause"],
            REPLACED_WITHIN_S,
        )
        assert not exports.view("soc").connected
        await until(lambda: exports.pid not in (hangs, None), REPLACED_WITHIN_S)
        await until(lambda: exports.view("soc").error is None and exports.view("soc").connected, REPLACED_WITHIN_S)
        with pytest.raises(ProcessLookupError):
            os.kill(hangs, 0)
    finally:
        await exports.stop(ENTRIES)


def _fifo(node: Node) -> Path:
    path = node.folder / "fifo"
    os.mkfifo(path, 0o600)
    return path


async def test_a_fifo_in_place_of_a_file_is_refused_and_holds_up_nobody(node: Node) -> None:
    exports = node.exports()
    exports.start()
    fifo = _fifo(node)
    bad = Destination("bad", "", ca=fifo, certificate=node.key, private_key=node.key, token_file=node.token)
    try:
        async with asyncio.timeout(STOPPED_WITHIN_S):
            for url in ("syslog+tls://127.0.0.1:9", "relp+tls://127.0.0.1:9", "splunk+https://127.0.0.1:9"):
                with pytest.raises(ExportUnusable) as refused:
                    await exports.add(bad._replace(url=url))
                assert refused.value.cause == f"{fifo}: it is no file"
            with pytest.raises(ExportUnusable) as refused:
                await exports.add(node.diode("bad")._replace(private_key=fifo))
            assert refused.value.cause == f"{fifo}: it is no file"
            await exports.add(node.diode("soc"))
    finally:
        await exports.stop(ENTRIES)


async def test_what_a_dead_mount_holds_up_is_given_up_and_is_read_once() -> None:
    mounted, reads = threading.Event(), []

    def read(path: Path) -> bytes:
        reads.append(path)
        mounted.wait()
        return b"content"

    for _ in range(3):
        with pytest.raises(ExportUnusable, match="cannot be read") as given_up:
            await read_in_time(0.01, read, Path("/mnt/ca.pem"))
        assert "/mnt/ca.pem: not read within 0.01 s" in given_up.value.cause
    waiting = asyncio.create_task(read_in_time(20.0, read, Path("/mnt/ca.pem")))
    asyncio.get_running_loop().call_soon(mounted.set)
    assert await waiting == b"content"
    assert len(reads) == 1
    assert await read_in_time(20.0, read, Path("/mnt/ca.pem")) == b"content"
    assert len(reads) == 2


@pytest.mark.parametrize("content", ["{", '{"destinations": [{"name": "soc"}]}', "unsealed", "own"])
async def test_where_the_destinations_cannot_be_read_nothing_is_changed_until_they_can(
    node: Node, content: str
) -> None:
    saved = node.state / "siem" / "destinations.json"
    saved.parent.mkdir(mode=0o700)
    own = node.diode("soc")._replace(private_key=node.state / "audit" / "key")
    if content == "own":
        save(saved, [own], 1, Keys())
    elif content == "unsealed":
        saved.write_text(json.dumps({"destinations": [node.diode("soc").record()]}))
    else:
        saved.write_text(content)
    content = saved.read_text()
    exports = node.exports()
    exports.start()
    try:
        assert exports.unreadable is not None
        assert (exports.unreadable["code"], exports.views()) == ("audit_exports_unreadable", [])
        for asked in (exports.needed_from, lambda: exports.names, lambda: exports.destination("soc")):
            with pytest.raises(DestinationsUnreadable):
                asked()
        for change in (exports.add(node.diode("new")), exports.remove("soc"), exports.try_out(node.diode("new"))):
            with pytest.raises(DestinationsUnreadable):
                await change
        assert saved.read_text() == content
        save(saved, [node.diode("soc")], 1, Keys())
        await until(lambda: exports.unreadable is None)
        assert (exports.names, exports.needed_from()) == (["soc"], 0)
        await until(lambda: exports.view("soc").delivered == ENTRIES)
        assert exports.needed_from() == ENTRIES
    finally:
        await exports.stop(ENTRIES)


async def test_nothing_of_a_log_that_was_put_back_counts_as_delivered(node: Node) -> None:
    exports = node.exports()
    exports.start()
    await exports.add(node.diode("soc"))
    try:
        await until(lambda: exports.view("soc").delivered == ENTRIES)
    finally:
        await exports.stop(ENTRIES)
    verifier = (node.state / "audit" / "log.vkey").read_text()
    shutil.rmtree(node.state / "audit")
    make_log(node.state / "audit", ENTRIES - 1)
    (node.state / "audit" / "log.vkey").write_text(verifier)
    node.mark(1)
    exports = node.exports()
    exports.start()
    try:
        await until(lambda: (exports.view("soc").error or {"code": ""})["code"] == LogShorter.code)
        assert exports.view("soc").delivered == ENTRIES
        assert exports.needed_from() == 0
    finally:
        await exports.stop(ENTRIES)
    assert exports.needed_from() == 0


async def test_a_database_that_does_not_answer_when_the_vault_was_opened_delays_the_export_and_nothing_else(
    node: Node,
) -> None:
    class Failing(Keys):
        refusals: ClassVar[list[HoldfastError]] = [
            VaultSealed(),
            StoreUnavailable("the database cannot be used", cause="connection reset", remedy="It is tried again"),
        ]

        def audit_secret(self, key_id: bytes, label: str, *parts: bytes) -> bytes:
            if self.refusals:
                raise self.refusals.pop(0)
            return super().audit_secret(key_id, label, *parts)

    first = node.exports()
    first.start()
    await first.add(node.diode("soc"))
    await first.stop(ENTRIES)
    exports = Exports(node.state, node.state / "audit", size=_size, keys=Failing())
    exports.start()
    try:
        assert "sealed" in (exports.unreadable or {"cause": ""})["cause"]
        await until(lambda: exports.unreadable is None)
        assert exports.names == ["soc"]
        await until(lambda: exports.view("soc").delivered == ENTRIES)
    finally:
        await exports.stop(ENTRIES)


async def test_a_database_that_does_not_answer_at_the_start_does_not_end_it(node: Node) -> None:
    class Failing(Keys):
        fails = True

        def audit_secret(self, key_id: bytes, label: str, *parts: bytes) -> bytes:
            if self.fails:
                raise StoreUnavailable("the database cannot be used", cause="connection reset", remedy="Wait")
            return super().audit_secret(key_id, label, *parts)

    saved = node.state / "siem" / "destinations.json"
    saved.parent.mkdir(mode=0o700)
    save(saved, [node.diode("soc")], 1, Keys())
    keys = Failing()
    exports = Exports(node.state, node.state / "audit", size=_size, keys=keys)
    exports.start()
    try:
        assert "connection reset" in (exports.unreadable or {"cause": ""})["cause"]
        keys.fails = False
        await until(lambda: exports.unreadable is None)
        assert exports.names == ["soc"]
    finally:
        await exports.stop(ENTRIES)


async def test_a_file_that_has_become_a_link_to_the_appliances_own_is_not_read(node: Node) -> None:
    first = node.exports()
    first.start()
    await first.add(node.diode("soc"))
    await first.stop(ENTRIES)
    own = node.state / "audit" / "own.pem"
    key = node.diode("soc").private_key
    assert key is not None
    own.write_bytes(key.read_bytes())
    own.chmod(0o600)
    key.unlink()
    key.symlink_to(own)
    exports = node.exports()
    exports.start()
    try:
        await until(lambda: exports.view("soc").error is not None)
        error = exports.view("soc").error
        assert error is not None
        assert (error["code"], exports.view("soc").connected) == ("audit_export_invalid", False)
    finally:
        await exports.stop(ENTRIES)


class Told:
    """What exporters are told to ship to. The next that is told anything waits for `go_on` before it is told more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[list[str]] = []
        self.go_on = asyncio.Event()
        ask = link.Link.ask

        async def told(exporter: link.Link, kind: int, body: bytes = b"") -> bytes:
            answer = await ask(exporter, kind, body)
            if kind == link.DESTINATIONS:
                self.names.append([each["name"] for each in json.loads(body)])
                await self.go_on.wait()
            return answer

        monkeypatch.setattr(link.Link, "ask", told)


async def test_what_is_removed_while_an_exporter_starts_is_shipped_to_no_more(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = node.exports()
    first.start()
    await first.add(node.diode("soc"))
    await first.stop(ENTRIES)
    told, exports = Told(monkeypatch), node.exports()
    exports.start()
    try:
        await until(lambda: told.names == [["soc"]])
        removing = asyncio.create_task(exports.remove("soc"))
        await until(lambda: exports.names == [])
        told.go_on.set()
        await removing
        assert told.names[-1] == []
    finally:
        await exports.stop(ENTRIES)
    assert not list((node.state / "siem").glob("*.cursor"))


async def test_what_is_added_while_an_exporter_starts_is_shipped_to(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter that it was tried with ends before it is saved."""
    exports = node.exports()
    exports.start()
    try:
        await exports.add(node.diode("soc"))
        told = Told(monkeypatch)

        async def another_starts() -> None:
            assert exports.pid is not None
            os.kill(exports.pid, signal.SIGKILL)
            await until(lambda: told.names == [["soc"]], REPLACED_WITHIN_S)

        adding = asyncio.create_task(exports.add(node.diode("new"), admitted=another_starts))
        await until(lambda: exports.names == ["soc", "new"], REPLACED_WITHIN_S)
        told.go_on.set()
        await adding
        await until(lambda: exports.view("new").delivered == ENTRIES)
    finally:
        await exports.stop(ENTRIES)


async def test_a_link_that_leads_nowhere_stops_no_other_destination(node: Node) -> None:
    bad = node.diode("bad")._replace(private_key=node.folder / "other.key")
    assert bad.private_key is not None
    shutil.copy(node.key, bad.private_key)
    first = node.exports()
    first.start()
    await first.add(node.diode("soc"), first=ENTRIES)
    await first.add(bad)
    await first.stop(ENTRIES)
    for name in ("soc", "bad"):
        Cursor(node.state / "siem" / f"{name}.cursor", KEY.name).save(Position())
    bad.private_key.rename(node.folder / "kept")
    bad.private_key.symlink_to(bad.private_key)
    exports = node.exports()
    exports.start()
    try:
        await until(lambda: exports.view("soc").delivered == ENTRIES)
        await until(lambda: exports.view("bad").error is not None)
        assert "other.key" in (exports.view("bad").error or {"cause": ""})["cause"]
        with pytest.raises(ExportUnusable, match=r"other\.key cannot be used"):
            await exports.try_out(bad)
        await exports.remove("soc")
        bad.private_key.unlink()
        (node.folder / "kept").rename(bad.private_key)
        await until(lambda: exports.view("bad").delivered == ENTRIES)
    finally:
        await exports.stop(ENTRIES)


async def _changed_three_times(node: Node) -> Path:
    """The folder with what is saved: soc and other were added, soc removed; a copy of it from before that is beside."""
    exports = node.exports()
    exports.start()
    await exports.add(node.diode("soc"))
    await exports.add(node.diode("other"))
    # A cursor that is being written is no part of a copy, and gone when it is looked for.
    shutil.copytree(node.state / "siem", node.state / "before", ignore=shutil.ignore_patterns("*.new"))
    assert exports.changed.is_set()
    await exports.remove("soc")
    assert exports.version == 3
    await exports.stop(ENTRIES)
    node.mark(3)
    return node.state / "siem"


async def test_an_older_copy_of_the_destinations_is_refused(node: Node) -> None:
    folder = await _changed_three_times(node)
    shutil.move(folder, node.state / "newest")
    shutil.copytree(node.state / "before", folder)
    exports = node.exports()
    exports.start()
    try:
        assert exports.unreadable is not None
        assert "of version 2, and 3 was saved here" in exports.unreadable["cause"]
        for change in (exports.add(node.diode("new")), exports.remove("soc")):
            with pytest.raises(DestinationsUnreadable):
                await change
        assert exports.version == 3  # what the log is told must not go back
        shutil.rmtree(folder)
        shutil.move(node.state / "newest", folder)
        await until(lambda: exports.unreadable is None)
        assert (exports.names, exports.version) == (["other"], 3)
        await until(lambda: exports.view("other").delivered > 0)
    finally:
        await exports.stop(ENTRIES)


async def test_destinations_that_are_gone_are_missed_until_one_is_added(node: Node) -> None:
    shutil.rmtree(await _changed_three_times(node))
    exports = node.exports()
    exports.start()
    try:
        assert exports.unreadable is not None
        assert exports.unreadable["code"] == "audit_exports_gone"
        with pytest.raises(DestinationsUnreadable, match="are gone"):
            exports.needed_from()
        await exports.add(node.diode("new"))
        assert (exports.names, exports.version, exports.needed_from()) == (["new"], 4, 0)
        await until(lambda: exports.view("new").delivered == ENTRIES)
    finally:
        await exports.stop(ENTRIES)


async def test_where_nothing_is_saved_the_log_is_asked_once_it_can_be_read(node: Node) -> None:
    """Before that nothing is in the way, but nothing may be removed from the log either."""
    shutil.move(node.state / "audit", node.state / "log")
    exports = node.exports()
    exports.start()
    try:
        assert (exports.unreadable, exports.views()) == (None, [])
        assert exports.version is None
        with pytest.raises(DestinationsUnreadable, match="not known yet"):
            exports.needed_from()
        shutil.move(node.state / "log", node.state / "audit")
        await until(lambda: exports.version == 0)
        assert exports.needed_from() is None
    finally:
        await exports.stop(ENTRIES)
