"""A log or a database that was put back to an older copy is found at the next start, and told."""

import shutil
from pathlib import Path

import pytest

from benchmarks.running import Running, make_appliance, running_gateway, running_stub
from tests.e2e.api.conftest import Served, until


def _run(state_dir: Path, engine: Path, api_key: str) -> tuple[str, list[str]]:
    """One run with a turn in it, ended in good order: the state of the part `audit`, and what was found."""
    with running_gateway(state_dir, engine) as gateway:
        served = Served(state_dir, engine, gateway, api_key)
        assert served.ask("hello").status == 200
        return _ended(gateway, served)


def _ended(gateway: Running, served: Served) -> tuple[str, list[str]]:
    def marked() -> bool:
        newest = served.admin.audit_entries(action="store.marked", limit=1).entries
        starts = served.admin.audit_entries(action="gateway.started", limit=1).entries
        return bool(newest) and newest[0].sequence > starts[0].sequence

    until(marked)
    part = next(part for part in served.admin.status().parts if part.name == "audit")
    found = served.admin.audit_entries(action="older_copy.found").entries
    targets = [str((entry.record or {})["target"]["id"]) for entry in found]
    gateway.end()
    return part.state, targets


@pytest.fixture
def appliance(tmp_path: Path) -> tuple[Path, Path, str]:
    state_dir = tmp_path / "state"
    return state_dir, tmp_path / "engine.sock", make_appliance(state_dir)


def test_runs_that_follow_each_other_are_not_alarmed(appliance: tuple[Path, Path, str]) -> None:
    state_dir, engine, api_key = appliance
    with running_stub(engine):
        for _ in range(3):
            assert _run(state_dir, engine, api_key) == ("ready", [])


@pytest.mark.parametrize("which", ["log", "database"])
def test_an_older_copy_is_found(appliance: tuple[Path, Path, str], tmp_path: Path, which: str) -> None:
    state_dir, engine, api_key = appliance
    names = ["audit"] if which == "log" else ["holdfast.db"]
    with running_stub(engine):
        _run(state_dir, engine, api_key)
        kept = tmp_path / "kept"
        kept.mkdir()
        for name in names:
            source = state_dir / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, kept / name)
        _run(state_dir, engine, api_key)
        for name in names:
            target = state_dir / name
            if target.is_dir():
                shutil.rmtree(target)
                shutil.copytree(kept / name, target)
            else:
                for path in state_dir.glob(f"{name}*"):
                    path.unlink()
                shutil.copy2(kept / name, target)
        for _ in range(2):  # told once, and an alarm until it is acknowledged
            assert _run(state_dir, engine, api_key) == ("degraded", [which])


def test_a_log_whose_whole_folder_was_taken_away_is_found_by_the_databases_mark(
    appliance: tuple[Path, Path, str], tmp_path: Path
) -> None:
    state_dir, engine, api_key = appliance
    with running_stub(engine):
        assert _run(state_dir, engine, api_key) == ("ready", [])
        (state_dir / "audit").rename(tmp_path / "taken away")
        for _ in range(2):  # the log that begins then has nothing of it, and says that there was another one
            assert _run(state_dir, engine, api_key) == ("degraded", ["log"])


def test_a_gateway_killed_between_the_marks_is_not_alarmed(appliance: tuple[Path, Path, str]) -> None:
    state_dir, engine, api_key = appliance
    with running_stub(engine):
        for _ in range(4):
            with running_gateway(state_dir, engine) as gateway:
                gateway.process.kill()
                gateway.process.wait()
        assert _run(state_dir, engine, api_key) == ("ready", [])
