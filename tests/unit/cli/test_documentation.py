"""docs/cli.md says what the command does: every command, every option, every exit status."""

from pathlib import Path

import click

from appliance import cli

DOCUMENT = Path(__file__).parents[3] / "docs" / "cli.md"
EVERYWHERE = {"--help", "--json", "--state-dir"}


def leaves(command: click.Command, path: str) -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return [(path, command)]
    context = click.Context(command)
    found: list[tuple[str, click.Command]] = []
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        found += leaves(child, f"{path} {name}".strip())
    return found


def test_every_command_and_option_is_documented() -> None:
    commands = DOCUMENT.read_text().partition("## Commands")[2].partition("\n## ")[0]
    rows = [line for line in commands.splitlines() if line.startswith("| `")]
    for path, command in leaves(cli.holdfast, ""):
        row = next((line for line in rows if f"`{path}`" in line or f"`{path} " in line), None)
        assert row is not None, path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not EVERYWHERE & set(parameter.opts):
                assert parameter.opts[0] in row, (path, parameter.opts)


def test_every_exit_status_is_documented() -> None:
    table = DOCUMENT.read_text().partition("## Exit status")[2].partition("\n## ")[0]
    documented = {
        int(line.split("|")[1]): line for line in table.splitlines() if line.startswith("| ") and line[2].isdigit()
    }
    assert documented.keys() == {0, cli.EXIT_CHECK_FAILED, cli.EXIT_INTERRUPTED, *cli.EXIT_STATUS.values()}
    for fault, status in cli.EXIT_STATUS.items():
        assert fault.value in documented[status]
