"""The frame of the `holdfast` command: finding commands, printing results and errors, asking for secrets."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import click
import pytest
from click.testing import CliRunner, Result

from appliance import cli
from appliance.cli import Command, Console, pass_console
from appliance.errors import Fault, HoldfastError


class Broken(HoldfastError):
    """A test's own error, of a fault that the test chooses."""

    code: ClassVar[str] = "test_broken"


@pytest.fixture
def tried() -> Callable[..., Result]:
    """Run the whole command with one more sub-command, `try`, that does what the test says."""
    runner = CliRunner()

    def invoke(action: Callable[[Console], None], *words: str, prefix: tuple[str, ...] = ()) -> Result:
        @click.command("try", cls=Command)
        @pass_console
        def command(console: Console) -> None:
            action(console)

        class Entry:
            name = "try"

            def load(self) -> click.Command:
                return command

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "_entry_points", lambda: {"try": Entry()})
            return runner.invoke(cli.holdfast, [*prefix, "try", *words])

    return invoke


def failing(fault: Fault) -> Callable[[Console], None]:
    def action(console: Console) -> None:
        error = Broken("it broke", cause="the test said so", remedy="Do nothing")
        vars(error)["fault"] = fault
        raise error

    return action


def test_help_loads_no_room() -> None:
    script = (
        "import sys\n"
        "from appliance.cli import holdfast\n"
        "try:\n"
        "    holdfast.main(['--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "heavy = {'pydantic', 'fastapi', 'sqlalchemy', 'cryptography', 'uvicorn', 'asyncio', 'http', 'api'}\n"
        "assert not heavy & sys.modules.keys(), sorted(heavy & sys.modules.keys())\n"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 0, outcome.stderr
    for name in cli.SUMMARIES:
        assert f"\n  {name} " in outcome.stdout


def test_the_summaries_are_what_the_rooms_say() -> None:
    context = click.Context(cli.holdfast)
    for name in cli.holdfast.list_commands(context):
        command = cli.holdfast.get_command(context, name)
        assert command is not None
        assert command.help is not None
        assert cli.SUMMARIES[name] == " ".join(command.help.partition("\n\n")[0].split())


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_has_an_exit_status_of_its_own(fault: Fault, tried: Callable[..., Result]) -> None:
    assert tried(failing(fault)).exit_code == cli.EXIT_STATUS[fault]
    assert len(set(cli.EXIT_STATUS.values()) | {0, cli.EXIT_CHECK_FAILED, cli.EXIT_INTERRUPTED}) == len(Fault) + 3


@pytest.mark.parametrize(("prefix", "words"), [(("--json",), ()), ((), ("--json",))])
def test_an_error_is_json_on_stdout_wherever_the_flag_stands(
    prefix: tuple[str, ...], words: tuple[str, ...], tried: Callable[..., Result]
) -> None:
    outcome = tried(failing(Fault.LIMIT), *words, prefix=prefix)
    assert json.loads(outcome.stdout) == {
        "code": "test_broken",
        "message": "it broke",
        "cause": "the test said so",
        "remedy": "Do nothing",
    }
    assert outcome.stderr == ""


def test_an_error_for_people_says_what_why_and_what_next_on_stderr(tried: Callable[..., Result]) -> None:
    outcome = tried(failing(Fault.MISSING))
    assert outcome.stdout == ""
    assert outcome.stderr == "Error: it broke\n  Why:  the test said so\n  Next: Do nothing\n  Code: test_broken\n"


def test_a_result_is_json_for_programs_and_text_for_people(tried: Callable[..., Result]) -> None:
    def action(console: Console) -> None:
        console.say("working")
        console.result({"path": Path("/x")}, "It is /x.")

    assert json.loads(tried(action, "--json").stdout) == {"path": "/x"}
    outcome = tried(action)
    assert (outcome.stdout, outcome.stderr) == ("It is /x.\n", "working\n")


def test_a_command_line_that_is_not_understood_is_an_error_like_any_other(tried: Callable[..., Result]) -> None:
    outcome = tried(lambda _: None, "--json", "--colour")
    assert outcome.exit_code == 2
    assert json.loads(outcome.stdout)["code"] == "usage"


def test_an_unknown_command_is_named_with_those_that_are_near() -> None:
    outcome = CliRunner().invoke(cli.holdfast, ["stauts"])
    assert outcome.exit_code == 2
    assert "'stauts'" in outcome.stderr
    assert "status" in outcome.stderr


def test_what_nobody_thought_of_is_internal_and_still_json(tried: Callable[..., Result]) -> None:
    def action(console: Console) -> None:
        raise ZeroDivisionError("by zero")

    outcome = tried(action, "--json")
    assert outcome.exit_code == 1
    assert json.loads(outcome.stdout)["code"] == "internal_error"
    assert "Traceback" in outcome.stderr


def test_ctrl_c_leaves_with_130(tried: Callable[..., Result]) -> None:
    def action(console: Console) -> None:
        raise KeyboardInterrupt

    assert tried(action).exit_code == 130


def test_a_room_that_cannot_be_loaded_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def load(self) -> click.Command:
            raise ModuleNotFoundError("No module named 'sqlalchemy'")

    monkeypatch.setattr(cli, "_entry_points", lambda: {"status": Entry()})
    outcome = CliRunner().invoke(cli.holdfast, ["status"])
    assert outcome.exit_code == cli.EXIT_STATUS[Fault.ENVIRONMENT]
    assert "sqlalchemy" in outcome.stderr


# Which appliance


def test_the_state_directory_comes_from_the_flag_then_the_environment(
    tried: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setenv("HOLDFAST_STATE_DIR", "/from/environment")
    tried(lambda console: seen.append(console.state_dir))
    tried(lambda console: seen.append(console.state_dir), "--state-dir", "/from/flag")
    tried(lambda console: seen.append(console.state_dir), prefix=("--state-dir", "/before"))
    assert seen == [Path("/from/environment"), Path("/from/flag"), Path("/before")]


def test_what_is_suggested_speaks_of_the_same_appliance(tried: Callable[..., Result]) -> None:
    outcome = tried(lambda console: console.say(console.suggest("unseal")), "--state-dir", "/my state")
    assert outcome.stderr == "holdfast --state-dir '/my state' unseal\n"


def test_what_an_error_suggests_speaks_of_the_same_appliance(tried: Callable[..., Result]) -> None:
    def fail(console: Console) -> None:
        remedy = f"`holdfast status` tells, `{console.suggest('down')}` stops it; `make run` begins again"
        raise Broken("it broke", cause="", remedy=remedy)

    outcome = tried(fail, "--state-dir", "/my")
    assert "`holdfast --state-dir /my status` tells, `holdfast --state-dir /my down` stops it; `make" in outcome.stderr
    assert "`holdfast status` tells, `holdfast down` stops it; `make" in tried(fail).stderr


@pytest.mark.parametrize(("there", "told"), [("holdfast-demo", True), ("holdfast", False)])
def test_who_speaks_of_no_appliance_is_told_of_the_demonstration(
    tried: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, told: bool
) -> None:
    monkeypatch.delenv("HOLDFAST_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "holdfast-demo").mkdir()
    (tmp_path / there).mkdir(exist_ok=True)
    outcome = tried(lambda console: console.say(str(console.admin().status())))
    assert outcome.exit_code == 8
    assert (f"There is a demonstration: holdfast --state-dir {tmp_path}/holdfast-demo …" in outcome.stderr) == told


def test_what_is_suggested_runs_this_program_also_where_no_shell_finds_it(
    tried: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "a clone" / "holdfast"
    program.parent.mkdir()
    program.touch(mode=0o700)
    monkeypatch.setattr(sys, "argv", [str(program), "try"])

    def suggested() -> str:
        return tried(lambda console: console.say(console.suggest("unseal"))).stderr

    monkeypatch.setenv("PATH", str(tmp_path))
    assert suggested() == f"'{program}' unseal\n"
    monkeypatch.setenv("PATH", str(program.parent))
    assert suggested() == "holdfast unseal\n"


# Secrets


def secret_on_a_descriptor(content: bytes) -> int:
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    return reading


def test_a_secret_comes_from_a_descriptor_less_one_newline() -> None:
    descriptor = secret_on_a_descriptor(b"correct horse \n")
    assert Console().secret("Passphrase", descriptor, option="--passphrase-fd") == b"correct horse "
    os.close(descriptor)


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 5000])
def test_no_secret_or_too_much_of_one_is_refused(content: bytes) -> None:
    descriptor = secret_on_a_descriptor(content)
    with pytest.raises(cli.SecretUnusable):
        Console().secret("Passphrase", descriptor, option="--passphrase-fd")
    os.close(descriptor)


def test_a_descriptor_that_is_not_open_is_named() -> None:
    with pytest.raises(cli.SecretUnusable, match="file descriptor 997"):
        Console().secret("Passphrase", 997, option="--passphrase-fd")


def test_without_a_terminal_a_secret_is_not_waited_for() -> None:
    script = (
        "import os\n"
        "os.setsid()\n"
        "from appliance.cli import Console\n"
        "Console().secret('Passphrase', None, option='--passphrase-fd')\n"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert "NoTerminal" in outcome.stderr
    assert "--passphrase-fd N" in outcome.stderr


def test_a_destructive_command_wants_the_name_of_what_it_destroys() -> None:
    Console().confirm_name("", "ses_1", "ses_1")
    with pytest.raises(cli.NotConfirmed):
        Console().confirm_name("", "ses_1", "ses_2")


# What people see


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "250 ms"), (1, "1 s"), (59.9, "59 s"), (192, "3 min 12 s"), (3600, "1 h"), (90_000, "1 d 1 h")],
)
def test_durations_have_their_units(seconds: float, words: str) -> None:
    assert cli.in_words(seconds) == words


def test_what_a_terminal_would_obey_is_shown_instead() -> None:
    assert cli.printable("a\x1b[2Jb\u202e\r\n\tc\x9bq") == "a\\x1b[2Jb\\u202e\\r\n\tc\\x9bq"


def test_columns_are_as_wide_as_what_is_in_them() -> None:
    assert cli.table(("id", "name"), [("1", "long\nname"), ("22", "b")], empty="none") == (
        "ID  NAME\n1   long name\n22  b"
    )
    assert cli.table(("id",), [], empty="none") == "none"
