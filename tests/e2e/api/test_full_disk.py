"""A disk that is full to its last byte stops admission, by name, and no administrator; with room, turns go on."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.running import REPOSITORY

NO_SPACE = "No space left on device"


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the clients of an appliance met whose file system was filled, and then was not full any more."""
    place = tmp_path_factory.mktemp("disk")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.e2e.api.on_a_small_disk", str(place)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(place.iterdir()), "the file system was the child's alone"
    told: dict[str, Any] = json.loads(done.stdout)
    told["journal"] = str(place / "state/audit/journal")
    told["database"] = str(place / "state/holdfast.db")
    return told


@pytest.mark.timeout(300)
def test_turns_are_refused_with_the_path_and_the_cause_and_health_is_red(met: dict[str, Any]) -> None:
    assert met["before"] == 200
    assert met["free_bytes"] == 0
    *not_kept, refused = met["first"]
    for answer in not_kept:
        assert (answer["status"], answer["code"]) == (503, "store_full")
        assert met["database"] in answer["told"]
        assert "no room left" in answer["told"]
    for answer in (refused, *met["refused"]):
        assert (answer["status"], answer["code"]) == (503, "audit_unavailable")
        assert f"{met['journal']}: {NO_SPACE}" in answer["told"]
    assert met["reached_engine"] == 0, "nothing reaches the engine that is not recorded"
    assert met["readyz"]["audit"] == {"ready": False, "why": "its log cannot be written or signed"}


@pytest.mark.timeout(300)
def test_an_administrator_looks_at_it_out_of_the_reserve_and_each_look_is_recorded(met: dict[str, Any]) -> None:
    assert "NOT READY" in met["status"]["stdout"]
    assert f"nothing is admitted: {met['journal']}: {NO_SPACE}" in met["status"]["stdout"]
    assert met["audit_status"]["returncode"] == 0
    assert f"{met['journal']}: {NO_SPACE}" in met["audit_status"]["stdout"]
    assert met["tail"]["returncode"] == 0
    assert "audit.read" in met["tail_again"]["stdout"], "that somebody looked is in the log"
    assert "turn.completed" in met["tail"]["stdout"]
    assert met["with_a_key"]["returncode"] == 0, "who has no account on the machine logs in with a key"
    assert set(met["looked_again"]) == {0}
    assert met["read_meanwhile"] >= len(met["looked_again"]) + 3


@pytest.mark.timeout(300)
def test_what_an_administrator_cannot_do_then_says_why_and_what_to_do(met: dict[str, Any]) -> None:
    assert met["made"]["returncode"] != 0
    for said in ("no room left", met["database"], "Free space on the file system", "store_full"):
        assert said in met["made"]["stderr"]


@pytest.mark.timeout(300)
def test_with_room_again_turns_are_admitted_by_the_same_gateway_and_the_log_holds(met: dict[str, Any]) -> None:
    assert set(met["after"]) == {200}
    assert met["same_gateway"]
    assert met["verified"]["returncode"] == 0
    assert "log.recovered" not in met["actions"]
