"""Every transport and format in a whole appliance: the exporter's own process, added by an administrator's command."""

import asyncio
import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.audit.notes import VerifierKey
from appliance.audit.siem.batches import verify_batches
from appliance.audit.siem.verify_export import verify_export
from tests.e2e.api.conftest import Served, serving, until
from tests.e2e.cli.conftest import HOLDFAST
from tests.e2e.siem.receivers import API_KEY, TOKEN, Elastic, Hec, secret_file
from tests.e2e.siem.receivers import serving as receiving
from tests.e2e.siem.test_diode import key_file
from tests.e2e.siem.test_relp import running as running_relp
from tests.rsyslog import Pki


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("node")) as it:
        yield it


@contextlib.contextmanager
def _in_a_thread(server: Hec | Elastic, pki: Pki) -> Iterator[int]:
    """A receiver with a loop of its own; its port."""
    ready, ports = threading.Event(), [0]
    loop = asyncio.new_event_loop()
    ends = asyncio.Event()

    async def serve() -> None:
        async with receiving(server, pki) as port:
            ports[0] = port
            ready.set()
            await ends.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(ends.set)
        thread.join(10)
        loop.close()


def _holdfast(state_dir: Path, *words: str) -> Any:
    command = [str(HOLDFAST), "--state-dir", str(state_dir), "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_the_log_goes_every_way_at_once_and_each_is_proved(served: Served, tmp_path: Path) -> None:
    state_dir, pki = served.state_dir, Pki(tmp_path / "pki")
    (tmp_path / "out").mkdir()
    for name in ("splunk", "elastic"):
        (tmp_path / name).mkdir()
    ours = ["--ca", str(pki.folder / "ca.pem")]
    token, key = secret_file(tmp_path / "splunk", TOKEN), secret_file(tmp_path / "elastic", API_KEY)
    mutual = ["--certificate", str(pki.folder / "client.pem"), "--private-key", str(pki.folder / "client.key")]
    hec, elastic = Hec(), Elastic()
    with (
        _in_a_thread(hec, pki) as hec_port,
        _in_a_thread(elastic, pki) as elastic_port,
        running_relp(tmp_path, pki) as relp,
    ):
        index = f"elasticsearch+https://127.0.0.1:{elastic_port}/{elastic.index}"
        for name, url, form, options in (
            ("splunk", f"splunk+https://127.0.0.1:{hec_port}", "cef", [*ours, "--token-file", str(token)]),
            ("elastic", index, "ecs", [*ours, "--token-file", str(key)]),
            ("relp", f"relp+tls://127.0.0.1:{relp.port}", "leef", [*ours, *mutual]),
            ("diode", f"file://{tmp_path / 'out'}?seconds=1", "ocsf", ["--private-key", str(key_file(tmp_path))]),
        ):
            _holdfast(state_dir, "audit", "export", "add", name, url, "--format", form, *options)
        size = _holdfast(state_dir, "audit", "status")["size"]
        note = (state_dir / "audit" / "checkpoint").read_text()
        until(lambda: all(each["delivered"] >= size for each in _listed(state_dir)))
        public = VerifierKey.parse((state_dir / "audit" / "log.vkey").read_text().strip())
        until(lambda: f"logSequence={size - 1}^" in "".join(relp.received))
        diode = VerifierKey.parse((tmp_path / "out" / "batches.vkey").read_text().strip())
        for lines in (hec.lines, elastic.lines, relp.received, list(verify_batches(tmp_path / "out", diode).lines())):
            found = verify_export(lines, public, checkpoint=note)
            assert (found.first, found.tests, found.end >= size, found.withheld) == (0, 1, True, 0)
        for name in ("splunk", "elastic", "relp", "diode"):
            _holdfast(state_dir, "audit", "export", "remove", name)


def _listed(state_dir: Path) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = _holdfast(state_dir, "audit", "export", "list")["destinations"]
    return listed
