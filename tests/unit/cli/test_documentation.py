"""docs/cli.md says what the command does: every command, every option, every exit status."""

from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from appliance import cli
from appliance.settings import AdmissionSettings, SessionSettings, TenantRetention, TierSettings

DOCUMENT = Path(__file__).parents[3] / "docs" / "cli.md"
EVERYWHERE = {"--help", "--json", "--state-dir", "--api-key-fd"}
ASKS_NOBODY = {
    "init",
    "up",
    "down",
    "logs",
    "restore",
    "bench stateful",
    "kv dashboard",
    "audit verify",
    "audit verify-proof",
    "audit verify-export",
    "audit witness cosign",
    "audit witness serve",
}


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


def test_every_command_that_asks_the_admin_api_takes_an_api_key_and_the_page_names_the_others() -> None:
    without = {
        path
        for path, command in leaves(cli.holdfast, "")
        if all("--api-key-fd" not in parameter.opts for parameter in command.params)
    }
    assert without == ASKS_NOBODY
    (said,) = [text for text in DOCUMENT.read_text().split("\n\n") if text.startswith("`--api-key-fd N`")]
    assert {name for name in ASKS_NOBODY if f"`{name}`" not in said} == set()


def test_every_exit_status_is_documented() -> None:
    table = DOCUMENT.read_text().partition("## Exit status")[2].partition("\n## ")[0]
    documented = {
        int(line.split("|")[1]): line for line in table.splitlines() if line.startswith("| ") and line[2].isdigit()
    }
    assert documented.keys() == {0, cli.EXIT_CHECK_FAILED, cli.EXIT_INTERRUPTED, *cli.EXIT_STATUS.values()}
    for fault, status in cli.EXIT_STATUS.items():
        assert fault.value in documented[status]


@pytest.mark.parametrize(
    ("section", "page"),
    [
        (SessionSettings(), "kv.md"),
        (TenantRetention(), "kv.md"),
        (TierSettings.model_validate({}), "kv.md"),
        (AdmissionSettings.model_validate({}), "api.md"),
    ],
)
def test_every_setting_of_what_is_kept_and_who_waits_is_documented_with_its_default(
    section: BaseModel, page: str
) -> None:
    lines = (DOCUMENT.parent / page).read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| `")]
    for name, default in section.model_dump().items():
        documented = {cells[3] for cells in rows if f"`{name}`" in cells[1]}
        assert documented, name
        if isinstance(default, int | float | str):
            said = f"{default:.0f}" if isinstance(default, float) else str(default)
            assert said in {each.partition(":")[0] for each in documented}, (name, documented)
