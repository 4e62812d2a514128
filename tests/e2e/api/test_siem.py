"""The audit log on its way to a SIEM, as an administrator of a whole appliance meets it."""

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from api.admin.client import AdminClient
from benchmarks.running import make_appliance, running_gateway, running_stub
from tests.e2e.api.conftest import DEADLINE_S, Served, serving, until
from tests.e2e.cli.conftest import HOLDFAST
from tests.e2e.siem.receivers import Turning
from tests.rsyslog import Pki, Rsyslog, running_rsyslog

MOST_GROWTH_BYTES = 24 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("siem")


@pytest.fixture(scope="module")
def pki(place: Path) -> Pki:
    return Pki(place / "pki")


@pytest.fixture(scope="module")
def receiver(place: Path, pki: Pki) -> Iterator[Rsyslog]:
    with running_rsyslog(place / "receiver", pki) as it:
        yield it


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[Served]:
    (place / "node").mkdir()
    with serving(place / "node") as it:
        yield it


def _holdfast(state_dir: Path, *words: str) -> tuple[int, Any]:
    done = subprocess.run(
        [HOLDFAST, "--state-dir", str(state_dir), "--json", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


def _add(
    state_dir: Path, name: str, receiver: Rsyslog | Turning, pki: Pki, *more: str, client: str = "client"
) -> tuple[int, Any]:
    files = {"--ca": "ca.pem", "--certificate": f"{client}.pem", "--private-key": f"{client}.key"}
    options = [word for option, file in files.items() for word in (option, str(pki.folder / file))]
    return _holdfast(
        state_dir, "audit", "export", "add", name, f"syslog+tls://127.0.0.1:{receiver.port}", *options, *more
    )


def _actions(receiver: Rsyslog) -> list[str]:
    return [json.loads(line)["metadata"]["event_code"] for line in receiver.received]


def _metrics(state_dir: Path) -> str:
    with AdminClient(state_dir)._answer("GET", "/metrics") as answer:
        return answer.read().decode()


def test_a_destination_is_tried_added_listed_and_removed(served: Served, receiver: Rsyslog, pki: Pki) -> None:
    state_dir = served.state_dir
    assert _holdfast(state_dir, "audit", "export", "list") == (0, {"destinations": [], "exporter_pid": None})
    status, refused = _add(state_dir, "stranger", receiver, pki, client="stranger")
    assert (status != 0, refused["code"]) == (True, "audit_export_unreachable")
    status, refused = _holdfast(state_dir, "audit", "export", "add", "own", "syslog+tls://127.0.0.1:1")
    assert refused["code"] == "audit_export_invalid"
    assert _holdfast(state_dir, "audit", "export", "list")[1]["destinations"] == []
    assert not (state_dir / "siem" / "destinations.json").exists()

    status, added = _add(state_dir, "soc", receiver, pki)
    assert (status, added["name"], added["format"]) == (0, "soc", "ocsf")
    assert _add(state_dir, "soc", receiver, pki)[1]["code"] == "audit_export_exists"
    assert served.ask("what is the vault's combination?").status == 200
    until(lambda: {"turn.admitted", "turn.completed", "export.added"} <= set(_actions(receiver)))
    until(lambda: served.admin.audit_exports().destinations[0].lag_entries == 0)
    assert "combination" not in (receiver.folder / "received").read_text()
    assert 'holdfast_audit_export_failing{destination="soc"} 0.0' in _metrics(state_dir)
    assert _holdfast(state_dir, "audit", "export", "test", "soc")[0] == 0
    until(lambda: _actions(receiver).count("audit.export.test") == 2)

    asked = served.admin.audit_entries(action="export.*", limit=20).entries
    told = [((each.record or {})["action"], (each.record or {})["outcome"]) for each in reversed(asked)]
    assert told == [
        ("export.added", "failure"),
        ("export.added", "failure"),
        ("export.added", "success"),
        ("export.added", "failure"),
        ("export.tested", "success"),
    ]
    status, removed = _holdfast(state_dir, "audit", "export", "remove", "soc")
    assert (status, removed["name"]) == (0, "soc")
    assert not list((state_dir / "siem").glob("soc*"))
    assert _holdfast(state_dir, "audit", "export", "remove", "soc")[1]["code"] == "audit_export_unknown"
    assert _holdfast(state_dir, "audit", "export", "list")[1]["destinations"] == []


def test_no_destination_names_a_file_of_the_appliances_own(served: Served, receiver: Rsyslog) -> None:
    own = [str(served.state_dir / "audit" / "log.vkey")] * 3
    options = [word for pair in zip(("--ca", "--certificate", "--private-key"), own, strict=True) for word in pair]
    url = f"syslog+tls://127.0.0.1:{receiver.port}"
    _, refused = _holdfast(served.state_dir, "audit", "export", "add", "own", url, *options)
    assert refused["code"] == "audit_export_invalid"
    assert "state directory" in refused["cause"]


def test_a_receiver_that_stands_still_delays_export_and_nothing_else(
    served: Served, receiver: Rsyslog, pki: Pki
) -> None:
    assert _add(served.state_dir, "still", receiver, pki)[0] == 0
    until(lambda: served.admin.audit_exports().destinations[0].connected)
    os.kill(receiver.pid, signal.SIGSTOP)
    try:
        for number in range(30):
            assert served.ask(f"question {number}").status == 200
        with urllib.request.urlopen(f"http://127.0.0.1:{served.gateway.port}/readyz", timeout=DEADLINE_S) as ready:
            assert ready.status == 200
    finally:
        os.kill(receiver.pid, signal.SIGCONT)
    until(lambda: served.admin.audit_exports().destinations[0].lag_entries == 0)
    assert _holdfast(served.state_dir, "audit", "export", "remove", "still")[0] == 0


@pytest.mark.timeout(300)
def test_receivers_that_are_wrong_in_every_way_at_once_delay_their_own_export_and_nothing_else(
    tmp_path: Path, pki: Pki
) -> None:
    wrong = {name: Turning(pki) for name in ("slow", "silent", "blackholed", "stranger", "other-name")}
    try:
        with serving(tmp_path) as served, running_rsyslog(tmp_path / "receiver", pki) as good:
            assert _add(served.state_dir, "good", good, pki)[0] == 0
            for name, receiver in wrong.items():
                more = ("--server-name", "server") if name == "other-name" else ()
                assert _add(served.state_dir, name, receiver, pki, *more)[0] == 0
            views = {each.name: each for each in served.admin.audit_exports().destinations}
            assert all(each.error is None for each in views.values())
            exporter = served.admin.audit_exports().exporter_pid
            assert exporter is not None
            before = _resident_bytes(exporter)
            wrong["slow"].read_only(7)
            wrong["silent"].read_only(7)
            wrong["blackholed"].drop_packets()
            wrong["stranger"].show("stranger")  # of a CA that nobody here believes
            wrong["other-name"].show("client")  # of the right one, for another name
            asked = 0
            while not _are_behind(served, set(wrong), entries=50):
                assert served.ask(f"question {asked}").status == 200
                wrong["slow"].leave_to_read()
                asked += 1
            with urllib.request.urlopen(f"http://127.0.0.1:{served.gateway.port}/readyz", timeout=DEADLINE_S) as ready:
                assert ready.status == 200
            until(lambda: _actions(good).count("turn.completed") == asked)
            told = {
                "silent": "it took nothing for 20 s",
                "blackholed": "nobody answered within 20 s",
                "stranger": "its certificate does not hold: ",
                "other-name": "its certificate does not hold: Hostname mismatch",
            }
            # Each is given 20 s to take something, or to answer, once its turn comes.
            until(lambda: all(said in _cause(served, name) for name, said in told.items()), within_s=3 * DEADLINE_S)
            assert served.ask("and one more").status == 200
            until(lambda: _actions(good).count("turn.completed") == asked + 1)
            views = {each.name: each for each in served.admin.audit_exports().destinations}
            assert (views["good"].error, views["good"].connected) == (None, True)
            assert all(views[name].lag_s > 0 for name in wrong)
            detail = next(part.detail for part in served.admin.status().parts if part.name == "audit")
            assert all(name in detail for name in told)
            assert _resident_bytes(exporter) < before + MOST_GROWTH_BYTES
            served.gateway.end()
    finally:
        for receiver in wrong.values():
            receiver.close()


def _are_behind(served: Served, names: set[str], *, entries: int) -> bool:
    views = served.admin.audit_exports().destinations
    return all(each.lag_entries >= entries for each in views if each.name in names)


def _cause(served: Served, name: str) -> str:
    error = next(each.error for each in served.admin.audit_exports().destinations if each.name == name)
    return "" if error is None else error.cause


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_destination_that_fails_degrades_the_audit_part_which_names_it_and_stays_ready(
    served: Served, tmp_path: Path
) -> None:
    folder, key = tmp_path / "batches", tmp_path / "key.pem"
    folder.mkdir()
    private = Ed25519PrivateKey.generate()
    key.touch(mode=0o600)
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    words = ("add", "diode", f"file://{folder}", "--private-key", str(key))
    assert _holdfast(served.state_dir, "audit", "export", *words)[0] == 0
    folder.rename(tmp_path / "carried-away")
    folder.write_text("no folder")
    until(lambda: served.admin.audit_exports().destinations[0].error is not None)
    status, seen = _holdfast(served.state_dir, "status")
    audit = next(part for part in seen["parts"] if part["name"] == "audit")
    assert (status, seen["ready"], audit["state"]) == (0, True, "degraded")
    (trouble,) = audit["troubles"]
    assert trouble["what"].startswith("the export to diode fails: ")
    assert trouble["remedy"]
    shown = subprocess.run([HOLDFAST, "--state-dir", served.state_dir, "status"], capture_output=True, text=True)
    assert re.search(r"^audit: the export to diode fails: .+\n  Next: .+$", shown.stdout, re.MULTILINE), shown.stdout
    assert 'holdfast_audit_export_error{code="audit_export_' in _metrics(served.state_dir)
    assert served.ask("while it fails").status == 200
    assert _holdfast(served.state_dir, "audit", "export", "remove", "diode")[0] == 0
    assert next(part for part in served.admin.status().parts if part.name == "audit").state == "ready"


def test_a_part_of_the_log_is_written_to_a_file_that_proves_itself(served: Served, tmp_path: Path) -> None:
    until(lambda: served.admin.audit_status().public_key is not None)
    key = served.admin.audit_status().public_key
    for part, name in ((("--from", "3", "--to", "9"), "part"), ((), "all")):
        path = tmp_path / name
        status, written = _holdfast(served.state_dir, "audit", "export", "file", str(path), *part)
        assert status == 0
        status, found = _holdfast(tmp_path, "audit", "verify-export", str(path), "--key", str(key))
        assert (status, found["end"] - found["first"]) == (0, written["events"])
        exported = served.admin.audit_entries(action="audit.exported", limit=1).entries[0].record or {}
        assert exported["counts"] == {"entries": written["events"], "duration_ms": ANY}
        assert (found["proved_from"], found["proved_to"]) == (found["first"], found["end"])
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[:2], *lines[3:]]))
        status, refused = _holdfast(tmp_path, "audit", "verify-export", str(path), "--key", str(key))
        assert (status, refused["code"]) == (6, "audit_export_differs")


def test_a_destination_and_its_place_in_the_log_outlive_the_gateway(tmp_path: Path, pki: Pki) -> None:
    state_dir, engine = tmp_path / "state", tmp_path / "engine.sock"
    api_key = make_appliance(state_dir)
    with running_stub(engine), running_rsyslog(tmp_path / "receiver", pki) as receiver:
        with running_gateway(state_dir, engine) as gateway:
            assert _add(state_dir, "soc", receiver, pki)[0] == 0
            assert Served(state_dir, engine, gateway, api_key).ask("hello").status == 200
            gateway.end()
        until(lambda: "gateway.stopped" in _actions(receiver))
        with running_gateway(state_dir, engine) as gateway:
            until(lambda: _actions(receiver).count("gateway.started") >= 2)
            exporter = AdminClient(state_dir).audit_exports().exporter_pid
            assert exporter is not None
            os.kill(exporter, signal.SIGKILL)
            until(lambda: AdminClient(state_dir).audit_exports().exporter_pid not in (exporter, None))
            successor = AdminClient(state_dir).audit_exports().exporter_pid
            gateway.process.kill()
            gateway.process.wait()
            until(lambda: not Path(f"/proc/{successor}").exists())


def test_destinations_that_cannot_be_read_are_told_wherever_one_looks(tmp_path: Path) -> None:
    state_dir, engine = tmp_path / "state", tmp_path / "engine.sock"
    make_appliance(state_dir)
    saved = state_dir / "siem" / "destinations.json"
    saved.parent.mkdir(mode=0o700, exist_ok=True)
    saved.write_text("{")
    with running_stub(engine), running_gateway(state_dir, engine):
        admin = AdminClient(state_dir)
        audit = next(part for part in admin.status().parts if part.name == "audit")
        assert (audit.state, f"nothing is exported: {saved}" in audit.detail) == ("degraded", True)
        with admin._answer("GET", "/readyz") as answer:
            told = json.loads(answer.read())["parts"]["audit"]["degraded"]
        assert f"nothing is exported: {saved}" in told
        assert _holdfast(state_dir, "audit", "export", "list")[1]["code"] == "audit_exports_unreadable"
        assert saved.read_text() == "{"
        saved.unlink()
        until(lambda: _holdfast(state_dir, "audit", "export", "list")[0] == 0)


def test_destinations_that_were_put_back_to_an_older_copy_are_refused(tmp_path: Path, pki: Pki) -> None:
    state_dir, engine = tmp_path / "state", tmp_path / "engine.sock"
    make_appliance(state_dir)
    folder, copy = state_dir / "siem", tmp_path / "copy"
    with running_stub(engine), running_rsyslog(tmp_path / "receiver", pki) as receiver:
        with running_gateway(state_dir, engine) as gateway:
            assert _add(state_dir, "soc", receiver, pki)[0] == 0
            shutil.copytree(folder, copy)
            assert _holdfast(state_dir, "audit", "export", "remove", "soc")[0] == 0
            until(lambda: _marked_version(AdminClient(state_dir)) == 2)
            gateway.end()
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        came = len(receiver.received)
        with running_gateway(state_dir, engine):
            admin = AdminClient(state_dir)
            audit = next(part for part in admin.status().parts if part.name == "audit")
            assert (audit.state, "is of version 1, and 2 was saved here" in audit.detail) == ("degraded", True)
            shutil.rmtree(folder)
            until(lambda: "nothing is there" in _holdfast(state_dir, "audit", "export", "list")[1].get("cause", ""))
            assert len(receiver.received) == came
            assert _add(state_dir, "again", receiver, pki)[0] == 0
            assert _holdfast(state_dir, "audit", "export", "list")[1]["destinations"][0]["name"] == "again"


def _marked_version(admin: AdminClient) -> int:
    (newest,) = admin.audit_entries(action="store.marked", limit=1).entries
    return int((newest.record or {})["counts"]["destinations"])
