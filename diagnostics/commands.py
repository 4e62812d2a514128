"""`holdfast doctor`: the checks of this machine, printed one by one."""

from collections.abc import Mapping

import click

from appliance.cli import EXIT_CHECK_FAILED, Command, Console, api_key_option, pass_console, printable
from appliance.errors import HoldfastError
from appliance.settings import Settings
from diagnostics.checks import Finding, Subject, Verdict, examine

_DEADLINE_S = 5.0
_COLOURS: Mapping[Verdict, str] = {
    Verdict.PASS: "green",
    Verdict.WARN: "yellow",
    Verdict.FAIL: "red",
    Verdict.UNKNOWN: "magenta",
}


@click.command(cls=Command)
@api_key_option
@pass_console
@click.pass_context
def doctor(context: click.Context, console: Console) -> None:
    """Check this machine; works when nothing else does.

    Exit status 10 when a check has the verdict FAIL, else 0.
    """
    findings = []
    for finding in examine(_subject(console)):
        findings.append(finding)
        if not console.json:
            click.echo(_lines(finding))
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    told = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)
    console.result({"checks": findings, "failed": counts[Verdict.FAIL]}, f"\n{len(findings)} checks: {told}.")
    if counts[Verdict.FAIL]:
        context.exit(EXIT_CHECK_FAILED)


def _subject(console: Console) -> Subject:
    settings: Settings | None = None
    problem: HoldfastError | None = None
    try:
        settings = console.settings()
    except HoldfastError as error:
        problem = error
    return Subject(console.state_dir, settings, problem, _settings_of_nobody(console))


def _settings_of_nobody(console: Console) -> list[str] | None:
    client = console.admin(deadline_s=_DEADLINE_S)
    try:
        return client.status().settings_of_nobody
    except HoldfastError:
        return None


def _lines(finding: Finding) -> str:
    verdict = click.style(f"{finding.verdict.value:<8}", fg=_COLOURS[finding.verdict], bold=True)
    lines = [f"{verdict}{finding.check:<17}{printable(finding.found)}"]
    if finding.cause:
        lines.append(f"{'':<25}why:  {printable(finding.cause)}")
    if finding.remedy:
        lines.append(f"{'':<25}next: {printable(finding.remedy)}")
    return "\n".join(lines)
