"""`holdfast audit` as an administrator, an auditor and a witness meet it."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.api.conftest import Served, serving
from tests.e2e.cli.conftest import HOLDFAST
from tests.unit.audit.making import KEY, make_log


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("audited")) as it:
        for number in range(5):
            assert it.ask(f"question {number}", session="audited").status == 200
        yield it


def run_holdfast(served: Served, *words: str, secret: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HOLDFAST, "--state-dir", str(served.state_dir), *words],
        input=secret,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _json(served: Served, *words: str) -> Any:
    done = run_holdfast(served, "--json", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_person_sees_how_the_log_is_and_what_is_in_it(served: Served) -> None:
    assert "turn.completed" in run_holdfast(served, "audit", "tail").stdout
    found = _json(served, "audit", "search", "--action", "turn.*", "--since", "1h", "--limit", "100")
    assert len(found["entries"]) == 10
    first = found["entries"][-1]
    shown = _json(served, "audit", "show", str(first["sequence"]))
    assert shown["record"]["action"] == "turn.admitted"
    status = run_holdfast(served, "audit", "status").stdout
    assert "public key" in status
    assert "holdfast." in status
    assert re.search(r"^last checkpoint +\d+ .*s ago, of [1-9]\d* entries$", status, re.MULTILINE), status
    whole = r"^whole +(not known: it was not checked since the start; |yes, checked .* ago: [1-9]\d* entries)"
    assert re.search(whole, status, re.MULTILINE), status
    assert re.search(r"^SIEM +none; ", status, re.MULTILINE), status


def test_an_auditor_checks_a_copy_with_the_public_key(served: Served, tmp_path: Path) -> None:
    size = _json(served, "audit", "status")["size"]
    key = _json(served, "audit", "status")["public_key"]
    _json(served, "audit", "witness", "export", str(tmp_path / "request"))  # has a checkpoint made
    copy = tmp_path / "copy"
    shutil.copytree(served.state_dir / "audit", copy)
    found = _json(served, "audit", "verify", "--log", str(copy), "--key", key, "--at-least", str(size))
    assert found["size"] >= size
    content = bytearray((copy / "journal").read_bytes())
    content[500] ^= 1
    (copy / "journal").write_bytes(content)
    wrong = run_holdfast(served, "--json", "audit", "verify", "--log", str(copy), "--key", key)
    assert wrong.returncode == 6
    assert json.loads(wrong.stdout)["code"] == "audit_log_tampered"


def test_on_a_terminal_verify_says_how_far_it_is_and_takes_that_away_at_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    make_log(log, 600)
    words = [str(HOLDFAST), "audit", "verify", "--log", str(log), "--key", str(KEY.verifier())]
    terminal, its_end = pty.openpty()
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=its_end, timeout=60, check=False)
    os.close(its_end)
    shown = bytearray()
    with contextlib.suppress(OSError), os.fdopen(terminal, "rb", buffering=0) as screen:  # EIO: nobody writes any more
        while part := screen.read(4096):
            shown += part
    assert done.returncode == 0
    assert shown.startswith(b"\r256 of 600 entries")
    assert shown.endswith(b"\r\x1b[K"), "the line is free again"
    assert b"600 entries hold" in done.stdout
    quiet = subprocess.run(words, capture_output=True, timeout=60, check=False)
    assert quiet.stderr == b"", "a file is told nothing of that"


def test_one_entry_is_proved_with_and_without_its_record(served: Served, tmp_path: Path) -> None:
    _json(served, "audit", "witness", "export", str(tmp_path / "request"))
    key = _json(served, "audit", "status")["public_key"]
    (entry, *_) = _json(served, "audit", "search", "--action", "turn.completed", "--limit", "1")["entries"]
    for words, disclosed in ((), None), (("--disclose",), entry["record"]):
        proof = tmp_path / "proof"
        _json(served, "audit", "prove", str(entry["sequence"]), "--output", str(proof), *words)
        found = _json(served, "audit", "verify-proof", str(proof), "--key", key)
        assert (found["sequence"], found["record"]) == (entry["sequence"], disclosed)
        assert "turn.completed" in proof.read_text() or not words or "extra" in proof.read_text()


def test_a_witness_sees_the_log_grow_and_the_log_is_held_to_it(served: Served, tmp_path: Path) -> None:
    request, reply, state = tmp_path / "request", tmp_path / "reply", tmp_path / "witness"
    key = _json(served, "audit", "status")["public_key"]
    witness, seen = "", 0
    for _ in range(2):
        words = ("--witness", witness) if witness else ()
        _json(served, "audit", "witness", "export", str(request), *words)
        said = _json(
            served, "audit", "witness", "cosign", str(request), str(reply), "--state", str(state), "--key", key
        )
        witness = said["witness"]
        taken = _json(served, "audit", "witness", "import", str(request), str(reply), "--witness", witness)
        assert taken["size"] > seen
        seen = taken["size"]
        assert served.ask("more").status == 200
    status = _json(served, "audit", "status")
    assert (status["witnessed_size"], status["witnessed_by"]) == (seen, "holdfast-witness")
    assert 0 <= status["witnessed_age_s"] < 60
    parts = _json(served, "status")["parts"]
    detail = next(part["detail"] for part in parts if part["name"] == "audit")
    assert re.search(rf"; co-signed by holdfast-witness \d+ s ago, {seen} entries", detail), detail
    found = _json(served, "audit", "verify", "--key", key, "--witness", witness)
    assert found["witnessed"]["holdfast-witness"]["size"] == seen
    told = _json(served, "audit", "search", "--action", "audit.witnessed")["entries"][0]["record"]
    assert (told["target"]["id"], told["details"]["size"]) == (witness, str(seen))
    assert told["counts"]["witnesses"] == 3


def test_a_witness_that_is_not_named_is_told_and_counted_where_it_may_pass(served: Served, tmp_path: Path) -> None:
    request, reply = tmp_path / "request", tmp_path / "reply"
    key = _json(served, "audit", "status")["public_key"]
    words = ("--state", str(tmp_path / "witness"), "--key", key, "--name", "named.example")
    _json(served, "audit", "witness", "export", str(request))
    witness = _json(served, "audit", "witness", "cosign", str(request), str(reply), *words)["witness"]
    _json(served, "audit", "witness", "import", str(request), str(reply), "--witness", witness)
    copy = tmp_path / "copy"
    shutil.copytree(served.state_dir / "audit", copy)
    refused = run_holdfast(served, "audit", "verify", "--log", str(copy), "--key", key)
    assert (refused.returncode, "--allow-unknown-witnesses" in refused.stderr) == (6, True)
    passed = run_holdfast(served, "audit", "verify", "--log", str(copy), "--key", key, "--allow-unknown-witnesses")
    assert passed.returncode == 0
    told = r"co-signatures of named\.example \(key [0-9a-f]{8}\) were NOT CHECKED$"
    assert re.search(told, passed.stdout, re.MULTILINE)


def test_who_may_not_read_the_log_is_told_so(served: Served) -> None:
    client = served.new_key(principal="reader").secret
    done = run_holdfast(served, "--json", "audit", "tail", "--api-key-fd", "0", secret=client)
    assert done.returncode == 4
    assert json.loads(done.stdout)["code"] == "admin_denied"
