"""Reading logs, and finding a model by name or being told that there is none: what needs no appliance that runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from api.commands import ModelNotFound, _Tail, find_model
from api.initialise import initialise
from appliance.cli import holdfast
from appliance.errors import HoldfastError
from appliance.settings import load_settings

Started = Callable[..., str]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    path = tmp_path / "log" / "gateway.log"
    path.write_text("".join(f"line {number}\n" for number in range(10)))
    return path


def run(state_dir: Path, *words: str) -> tuple[int, str, str]:
    outcome = CliRunner().invoke(holdfast, ["--state-dir", str(state_dir), *words])
    return outcome.exit_code, outcome.stdout, outcome.stderr


def test_the_last_lines_are_shown_and_it_is_said_that_there_are_more(log: Path) -> None:
    status, out, err = run(log.parent.parent, "logs", "gateway", "--lines", "2")
    assert (status, out) == (0, "line 8\nline 9\n")
    assert "--lines" in err


def test_a_log_is_shown_whole_without_a_word_when_it_is_short(log: Path) -> None:
    assert run(log.parent.parent, "logs", "gateway")[2] == ""


def test_both_logs_are_told_apart(log: Path) -> None:
    (log.parent / "engine.log").write_text("loaded\x1b[0m\n")
    _, out, _ = run(log.parent.parent, "logs", "--lines", "1")
    assert out == "gateway line 9\nengine  loaded\\x1b[0m\n"


def test_programs_get_an_object_a_line(log: Path) -> None:
    _, out, _ = run(log.parent.parent, "logs", "gateway", "--lines", "1", "--json")
    assert json.loads(out) == {"log": "gateway", "line": "line 9"}


def test_no_log_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    status, _, err = run(tmp_path, "logs")
    assert status == 5
    assert "holdfast --state-dir" in err


def test_a_line_is_shown_when_it_is_whole_and_a_new_file_is_noticed(log: Path) -> None:
    tail = _Tail(log)
    assert tail.last(1) == (["line 9"], True)
    with log.open("a") as writing:
        writing.write("half")
    assert list(tail.new()) == []
    with log.open("a") as writing:
        writing.write(" and half\n")
    assert list(tail.new()) == ["half and half"]
    log.replace(log.with_suffix(".log.1"))
    assert list(tail.new()) == []
    log.write_text("new\n")
    assert list(tail.new()) == ["new"]


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    for name in ("alpha", "beta"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    return tmp_path


def test_a_model_is_found_by_path_or_by_name(shelf: Path) -> None:
    assert find_model("beta", shelf) == shelf / "models" / "beta"
    assert find_model(str(shelf / "models" / "alpha"), shelf / "elsewhere") == shelf / "models" / "alpha"


@pytest.mark.parametrize("named", ["gamma", "../models/alpha/..", "/nowhere"])
def test_a_model_that_is_not_there_is_answered_with_those_that_are(named: str, shelf: Path) -> None:
    with pytest.raises(ModelNotFound, match="alpha, beta"):
        find_model(named, shelf)


class NotToday(HoldfastError):
    """The gateway is not started in these tests."""


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """What `up` says before it starts the gateway of an appliance that `init` made."""
    settings = load_settings({"vault": {"seal": "key-file"}}, environment={}, state_dir=tmp_path / "state")
    initialise(settings, passphrase=None, tenant_name="tenant")

    def no_gateway(*_: object, **__: object) -> None:
        raise NotToday("no", cause="", remedy="")

    monkeypatch.setattr("api.launch.Gateway", no_gateway)

    def up(*words: str, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return run(tmp_path / "state", "up", *words)[2]

    return up


def test_an_appliance_without_a_model_warns_that_it_serves_the_demonstration_s(started_with: Started) -> None:
    said = started_with()
    assert "Warning: no model was chosen" in said
    assert "--model PATH" in said


def test_one_with_a_model_does_not(started_with: Started, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    model = str(tmp_path / "model")
    assert "Starting" in started_with("--model", model)
    assert "Warning" not in started_with("--model", model)
    assert "Warning" not in started_with(HOLDFAST_ENGINE__MODEL=model)


def test_one_whose_engine_somebody_else_runs_does_not(started_with: Started, tmp_path: Path) -> None:
    assert "Warning" not in started_with(HOLDFAST_ENGINE__SOCKET=str(tmp_path / "engine.sock"))
