"""`holdfast prove`: shows on the running system that it keeps a promise.

Rule: the exit status is 0 only when everything that is configured was proved.
"""

from typing import TYPE_CHECKING

import click

from appliance.cli import EXIT_CHECK_FAILED, Console, Group, api_key_option, in_words, pass_console, table

if TYPE_CHECKING:
    from api.admin import types

_DEADLINE_S = 1800.0


@click.group(cls=Group)
def prove() -> None:
    """Prove on the running system that it keeps its promises."""


@prove.command("isolation")
@click.option(
    "--rounds",
    type=click.IntRange(8, 500),
    default=24,
    show_default=True,
    help="How often each of the times that are compared is taken; more see smaller differences.",
)
@api_key_option
@click.pass_context
@pass_console
def prove_isolation(console: Console, context: click.Context, rounds: int) -> None:
    """Show what crosses from one session to another, and that nothing else does.

    Made-up tenants ask the engine for made-up prompts, in each isolation mode and tier and from each side, and what it
    found is compared with what it had to find, and with what it must not. Ends with status 10 when something is shared
    that must not be, when something is not that should be, and when it could not be told. Takes a minute or more; asks
    about a hundred and fifty short answers of the model, and where there are more tiers than the device several
    hundred. The made-up tenants are removed again.
    """
    console.say("Asking as made-up tenants; this takes a minute or more.")
    proof = console.admin(deadline_s=_DEADLINE_S).prove_isolation(rounds=rounds)
    console.result(proof, _told(proof))
    if proof.verdict != "PASS":
        context.exit(EXIT_CHECK_FAILED)


def _told(proof: "types.IsolationProof") -> str:
    rows = [
        (each.verdict, each.mode or "-", each.tier or "-", each.name, each.expected or "-", each.found)
        for each in proof.checks
    ]
    lines = [table(("verdict", "isolation", "tier", "check", "expected", "found"), rows, empty="Nothing was checked.")]
    missing = sorted({each.tier for each in proof.checks if each.verdict == "NOT CONFIGURED"})
    ended = {
        "PASS": "Proved: sessions share what their tenant chose, and nothing else.",
        "FAIL": "NOT proved: see the checks that failed.",
        "UNKNOWN": "NOT proved: some of it could not be told.",
    }.get(proof.verdict, proof.verdict)
    if missing:
        ended += f" Not configured, so not proved: {', '.join(missing)}."
    return "\n".join([*lines, "", f"{ended} Took {in_words(proof.took_s)}."])
