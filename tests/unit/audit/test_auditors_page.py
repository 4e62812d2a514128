"""What docs/audit.md has an auditor type works with a copy of the log, its public key and this software alone."""

import json
import shlex
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from appliance.audit.log import PUBLIC_KEY
from appliance.audit.notes import Algorithm, SigningKey
from appliance.audit.witness import Witness
from appliance.audit.witnessing import make_request, take_reply
from appliance.cli import holdfast
from tests.unit.audit.making import KEY, draft, open_log, sign

PAGE = Path(__file__).parents[3] / "docs" / "audit.md"
WITNESS = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)
SEEN_S = 1_800_000_000
SEEN = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(SEEN_S))
KEYS = {"--key": str(KEY.verifier()), "--witness": str(WITNESS.verifier())}


def commands() -> list[list[str]]:
    """The lines of the auditor's part, in their order, with this log's keys in the place of the page's."""
    _, found, part = PAGE.read_text().partition("\n## For the auditor")
    assert found
    lines = [line.strip() for line in part.partition("\n## ")[0].splitlines() if line.startswith("    holdfast ")]
    typed = [shlex.split(line, comments=True)[1:] for line in lines]
    return [[KEYS.get(before, word) for before, word in zip(["", *words], words, strict=False)] for words in typed]


@pytest.fixture
def auditors_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory holds a copy of a log that a witness saw, and the state directory is empty."""
    directory = tmp_path / "auditor" / "copy"
    log = open_log(directory)
    log.append([draft()] * 5000)
    log.publish(sign)
    log.close()
    (directory / PUBLIC_KEY).write_text(f"{KEY.verifier()}\n")
    request = make_request(directory, old_size=0)
    reply = Witness(tmp_path / "witness", WITNESS).cosign(request, KEY.verifier(), SEEN_S)
    take_reply(directory, request, reply, KEY.verifier(), WITNESS.verifier())
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HOLDFAST_STATE_DIR", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path / "auditor")
    return tmp_path / "auditor"


def run(*words: str) -> Result:
    return CliRunner().invoke(holdfast, words)


def test_the_auditors_commands_work_on_a_copy_and_the_appliances_do_not(auditors_machine: Path) -> None:
    typed = commands()
    asks_the_appliance = [words for words in typed if "--disclose" in words]
    assert (len(typed), len(asks_the_appliance)) == (6, 1)
    for words in typed:
        done = run(*words)
        assert (done.exit_code != 0) == (words in asks_the_appliance), (words, done.output)
    assert list((auditors_machine.parent / "empty").iterdir()) == []


def test_a_proof_says_whose_word_its_time_is(auditors_machine: Path) -> None:
    told = [(words, run(*words).output) for words in commands() if "--disclose" not in words]
    (alone,) = [text for words, text in told if "verify-proof" in words and "--witness" not in words]
    assert "Entry 4711" in alone
    assert "by the log's own word: give --witness to check when it was there" in alone
    (seen,) = [text for words, text in told if "verify-proof" in words and "--witness" in words]
    assert f"by the log's own word. witness.example saw it there at {SEEN}." in seen
    check = ["--json", "audit", "verify-proof", "entry-4711.tlog-proof", "--key", KEYS["--key"]]
    assert json.loads(run(*check).stdout)["witnessed_time_s"] is None
    found = json.loads(run(*check, "--witness", KEYS["--witness"]).stdout)
    assert (found["witness"], found["witnessed_time_s"]) == ("witness.example", SEEN_S)


def test_a_proof_without_the_co_signature_that_was_asked_for_is_refused(auditors_machine: Path) -> None:
    prove = ["audit", "prove", "4711", "--log", "copy", "--output", "proof"]
    assert run(*prove).exit_code == 0
    done = run("audit", "verify-proof", "proof", "--key", KEYS["--key"], "--witness", KEYS["--witness"])
    assert (done.exit_code, "does not show when" in done.output) == (6, True)
    other = SigningKey("other.example", b"o" * 32, Algorithm.COSIGNATURE).verifier()
    done = run(*prove, "--witness", str(other))
    assert (done.exit_code, "that other.example co-signed" in done.output) == (5, True)
