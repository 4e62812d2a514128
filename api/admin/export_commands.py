"""`holdfast audit export`: where the log goes; and `verify-export`, which checks at the receiver what came.

Rule: `verify-export` is for who has what travelled and the log's public key, and no appliance.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from api.admin.audit_arguments import FILE, verifier_key
from api.carried_files import carried_file
from appliance.audit.notes import decode_note
from appliance.audit.siem.batches import PUBLIC_KEY as BATCHES_KEY
from appliance.audit.siem.batches import lines_of, verify_batches
from appliance.audit.siem.known import Known
from appliance.audit.siem.verify_export import ExportVerified, verify_export
from appliance.cli import EXIT_STATUS, Console, Group, api_key_option, in_words, pass_console, table
from appliance.errors import Fault

if TYPE_CHECKING:
    from api.admin import types

_EXCERPT_DEADLINE_S = 6 * 3600.0
_HEADINGS = ("name", "to", "format", "delivered", "behind by", "error", "last error")


@click.group("export", cls=Group)
def exporting() -> None:
    """Send the log to a SIEM: where to, how far behind it is, and what is in the way."""


@exporting.command("add")
@click.argument("name")
@click.argument("url")
@click.option("--format", "form", default="ocsf", show_default=True, help="What events are written in.")
@click.option("--ca", type=FILE, help="Certificates that the receiver's may be from, PEM.")
@click.option("--certificate", type=FILE, help="Ours, PEM.")
@click.option("--private-key", type=FILE, help="Of our certificate, PEM without a passphrase.")
@click.option("--server-name", default="", help="What the receiver's certificate is for, if not the host of the URL.")
@click.option("--token-file", type=FILE, help="A file with the token that the receiver wants to be shown.")
@click.option("--max-message-bytes", type=click.IntRange(4096, 1 << 20), help="What the receiver takes in one message.")
@click.option("--from", "first", metavar="NUMBER|now", default="0", show_default=True, help="The first entry to send.")
@api_key_option
@pass_console
def add_export(
    console: Console,
    /,
    name: str,
    url: str,
    form: str,
    max_message_bytes: int | None,
    first: str,
    server_name: str,
    **files: Path | None,
) -> None:
    """Try a destination with a test event, and add it when it took that.

    URL is syslog+tls://HOST[:PORT]; docs/siem.md has the others. The appliance reads the files whenever it connects.
    """
    if first != "now" and not (first.isascii() and first.isdigit()):
        raise click.BadParameter("a number, or the word now", param_hint="--from")
    added = console.admin(deadline_s=120).add_audit_export(
        name=name,
        url=url,
        format=form,
        server_name=server_name,
        max_message_bytes=max_message_bytes or 0,
        first=None if first == "now" else int(first),
        **{kind: None if path is None else str(path.expanduser().absolute()) for kind, path in files.items()},
    )
    console.result(
        added, f"{added.name}: {added.to} took a test event; from now on it is sent the log as {added.format}."
    )


@exporting.command("list")
@api_key_option
@pass_console
def list_exports(console: Console) -> None:
    """Show each destination: what it has, how far it is behind, what is in the way."""
    exports = console.admin().audit_exports()
    rows = [
        (
            each.name,
            each.url,
            each.format,
            f"{each.delivered}",
            f"{each.lag_entries} entries, {in_words(each.lag_s)}" if each.lag_entries else "nothing",
            each.error.cause if each.error is not None else each.waits_for or "none",
            _last_error_words(each),
        )
        for each in exports.destinations
    ]
    empty = "The log goes nowhere: `holdfast audit export add` sends it to a SIEM."
    console.result(exports, table(_HEADINGS, rows, empty=empty))


@exporting.command("test")
@click.argument("name")
@api_key_option
@pass_console
def try_export(console: Console, name: str) -> None:
    """Send an event that says it is a test."""
    tried = console.admin(deadline_s=120).try_audit_export(name)
    console.result(tried, f"{tried.name}: {tried.to} took a test event; look for audit.export.test there.")


@exporting.command("remove")
@click.argument("name")
@api_key_option
@pass_console
def remove_export(console: Console, name: str) -> None:
    """End a destination, and forget how far it was."""
    removed = console.admin(deadline_s=60).remove_audit_export(name)
    text = f"{removed.name} is sent nothing any more. {removed.delivered} entries were delivered to {removed.to}."
    console.result(removed, text)


@exporting.command("file")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--from", "first", type=click.IntRange(0), default=0, show_default=True, help="The first entry.")
@click.option("--to", "last", type=click.IntRange(0), help="The last entry; by default the newest.")
@api_key_option
@pass_console
def export_file(console: Console, path: Path, first: int, last: int | None) -> None:
    """Write events to a file, a line each, with what proves them: for `verify-export`."""
    if path.exists():
        raise click.BadParameter("it exists, and nothing is ever written over", param_hint="PATH")
    end = None if last is None else last + 1
    lines = 0
    with (
        console.admin(deadline_s=_EXCERPT_DEADLINE_S).audit_excerpt(first=first, end=end) as pieces,
        carried_file(path, mode=0o600) as into,
    ):
        for piece in pieces:
            lines += piece.count(b"\n")
            into.write(piece)
    console.result({"file": path, "events": lines - 1}, f"Wrote {path}: {lines - 1} events and their checkpoint.")


@click.command("verify-export")
@click.argument("file", type=click.Path(path_type=Path, exists=True))
@click.option("--key", "key_text", metavar="VKEY", required=True, help="The log's public key, or a file with it.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A signed checkpoint from elsewhere, which what arrived must reach: it shows a tail that was cut off.",
)
@click.option(
    "--batch-key",
    metavar="VKEY",
    help="For a folder of batches: the public key that signed them, or a file with it; by default the folder's own, "
    "which whoever changed the batches could have changed too.",
)
@click.option(
    "--from",
    "asked_from",
    type=click.IntRange(0),
    help="The first entry that must be there, and be proved; by default the first that is there.",
)
@click.option(
    "--known",
    "known_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Go on from what the check before wrote here, and write it anew where everything holds: for a receiver that "
    "moves away what it has checked. Made if it is not there.",
)
@click.option("--allow-withheld", is_flag=True, help="Entries that came without their record are no reason to fail.")
@pass_console
def check_export(
    console: Console,
    file: Path,
    key_text: str,
    checkpoint: Path | None,
    batch_key: str | None,
    asked_from: int | None,
    known_file: Path | None,
    allow_withheld: bool,
) -> int:
    """At the receiver of events: check that none was altered, dropped or added on the way.

    FILE holds an event a line; or it is a folder of batches that came over a data diode. Leaves with status 6 where
    something is wrong, is not proved, or came without its record. What is behind the last checkpoint is not proved
    yet, and no reason for that.
    """
    key = verifier_key(key_text)
    note = None if checkpoint is None else decode_note(checkpoint.read_bytes())
    known = None if known_file is None else Known.load(known_file, key.name)
    if known is not None and asked_from is not None:
        raise click.UsageError(f"--from is for the first check: {known_file} says where this one goes on")
    taken = {} if known is None else known.batches
    if file.is_dir():
        batches = verify_batches(file, verifier_key(batch_key or str(file / BATCHES_KEY)), known=taken)
        found = verify_export(batches.lines(), key, checkpoint=note, asked_from=asked_from, known=known)
        series = ", ".join(f"{name}: {first} to {last}" for name, (first, last) in batches.numbers.items())
        console.say(f"{len(batches.paths)} batches hold ({series}).")
        taken = batches.taken
    else:
        found = verify_export(lines_of(file), key, checkpoint=note, asked_from=asked_from, known=known)
    shortcomings = found.shortcomings(allow_withheld=allow_withheld)
    if known_file is not None and found.goes_on is None:
        shortcomings.append("these are parts of a log, and nothing from which another check could go on")
    console.result(found.record() | {"shortcomings": shortcomings}, _export_text(found, known=known is not None))
    for shortcoming in shortcomings:
        console.say(f"Not as it should be: {shortcoming}.")
    if shortcomings:
        return EXIT_STATUS[Fault.CONFLICT]
    if known_file is not None and found.goes_on is not None:
        replace(found.goes_on, batches=taken).save(known_file)
    return 0


def _last_error_words(export: "types.AuditExport") -> str:
    if export.last_error is None or export.last_error_s is None:
        return "none"
    return f"{in_words(max(0.0, time.time() - export.last_error_s))} ago: {export.last_error.cause}"


def _export_text(found: ExportVerified, *, known: bool) -> str:
    proved = " and ".join(f"{start} to {end - 1}" for start, end in found.proved)
    lines = [f"{found.origin}: entries {proved} are proved, by {found.checkpoints} checkpoints."]
    if not found.proved:
        lines = [f"{found.origin}: no more is proved than was known before."]
    for start, end in found.unproved():
        asked = "" if end > found.asked_from else ", and were not asked for"
        lines.append(f"  entries {start} to {end - 1} came and are NOT PROVED{asked}")
    lines += [f"  {told}" for told in found.unusable]
    if more := found.unusable_count - len(found.unusable):
        lines.append(f"  {more} checkpoints more could not be used")
    if found.first:
        lines.append(f"  what is before entry {found.first} is {'known' if known else 'not here'}")
    if behind := found.end - found.proved_to:
        lines.append(f"  the last {behind} that came are not proved yet: the next checkpoint will")
    if found.repeated:
        same = "and are the same"
        if found.stripped:
            same = f"and {found.stripped} entries both with their record, which counts, and without it"
        lines.append(f"  {found.repeated} events came more than once, {same}")
    if found.withheld:
        named = ", ".join(f"{sequence} ({why})" for sequence, why in found.withheld_named.items())
        lines.append(f"  {found.withheld} came without their record; why is only what the sender claims: {named}")
    if found.uncomparable:
        lines.append(f"  {found.uncomparable} came again from before what is known of them, and are NOT COMPARED")
    if found.tests:
        lines.append(f"  {found.tests} events say that they are a test")
    return "\n".join(lines)
