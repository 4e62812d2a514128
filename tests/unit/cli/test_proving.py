"""`holdfast prove isolation`: what it says, and which status it ends with, for each verdict."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from api.admin import types
from api.admin.client import AdminClient
from api.proving.isolation import Check, verdict_of
from api.proving.judgement import Verdict
from appliance.cli import EXIT_CHECK_FAILED, holdfast

PASS, FAIL, UNKNOWN, NOT_CONFIGURED = Verdict.PASS, Verdict.FAIL, Verdict.UNKNOWN, Verdict.NOT_CONFIGURED
PROVED = "Proved: sessions share what their tenant chose, and nothing else."


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ((PASS, PASS), PASS),
        ((PASS, NOT_CONFIGURED), PASS),
        ((PASS, FAIL, UNKNOWN), FAIL),
        ((PASS, UNKNOWN, PASS), UNKNOWN),
        ((UNKNOWN, NOT_CONFIGURED), UNKNOWN),
        ((NOT_CONFIGURED,), UNKNOWN),
        ((), UNKNOWN),
    ],
)
def test_the_whole_is_as_good_as_its_worst_check_and_no_check_at_all_is_no_pass(
    found: tuple[Verdict, ...], verdict: Verdict
) -> None:
    assert verdict_of(checks(found)) is verdict


def checks(found: tuple[Verdict, ...]) -> list[Check]:
    return [Check(f"check {number}", each, "none", "none", "session", "disk") for number, each in enumerate(found)]


def proving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *found: Verdict, json_too: bool = False) -> Result:
    """What the command does when an appliance answers with checks of these verdicts."""

    def answer(client: AdminClient, *, rounds: int) -> types.IsolationProof:
        assert rounds == 9
        shown = [
            types.ProofCheck(
                name=each.name,
                mode=each.mode,
                tier=each.tier,
                verdict=each.verdict.value,
                expected=each.expected,
                found=each.found,
            )
            for each in checks(found)
        ]
        return types.IsolationProof(verdict=verdict_of(checks(found)).value, checks=shown, took_s=61.0)

    monkeypatch.setattr(AdminClient, "prove_isolation", answer)
    words = ["--state-dir", str(tmp_path), *(["--json"] if json_too else []), "prove", "isolation", "--rounds", "9"]
    return CliRunner().invoke(holdfast, words)


def test_what_was_proved_is_said_and_the_status_is_0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = proving(monkeypatch, tmp_path, PASS, PASS)
    assert done.exit_code == 0
    assert f"{PROVED} Took 1 min 1 s." in done.stdout


def test_a_tier_that_is_not_configured_is_named_as_not_proved_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = proving(monkeypatch, tmp_path, PASS, NOT_CONFIGURED)
    assert done.exit_code == 0
    assert f"{PROVED} Not configured, so not proved: disk." in done.stdout


@pytest.mark.parametrize(
    ("worst", "said"),
    [(FAIL, "NOT proved: see the checks that failed."), (UNKNOWN, "NOT proved: some of it could not be told.")],
)
def test_what_was_not_proved_ends_with_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, worst: Verdict, said: str
) -> None:
    done = proving(monkeypatch, tmp_path, PASS, worst)
    assert done.exit_code == EXIT_CHECK_FAILED == 10
    assert said in done.stdout
    assert PROVED not in done.stdout


@pytest.mark.parametrize(("found", "status"), [(PASS, 0), (FAIL, 10), (UNKNOWN, 10)])
def test_a_program_reads_the_verdict_and_gets_the_same_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: Verdict, status: int
) -> None:
    done = proving(monkeypatch, tmp_path, found, json_too=True)
    assert done.exit_code == status
    assert json.loads(done.stdout)["verdict"] == found.value
