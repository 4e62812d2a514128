"""`holdfast audit`: look at the log, check it, prove what is in it.

Rules:

- `verify` and `verify-proof` need the log's files or what travelled, and its public key: no appliance, no vault, no
  right but to read. They are the auditor's, on a machine of its own.
- The rest asks the running appliance, which decides who may, and records that it was asked.
"""

import hashlib
import json
import sys
import time
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from api.admin.audit_arguments import KEY_OPTION, LOG_OPTION, log_directory, log_key, verifier_key
from api.admin.export_commands import check_export, exporting
from api.admin.witness_commands import witness
from api.carried_files import write_carried
from appliance.audit.digests import prompt_hash
from appliance.audit.log import PUBLIC_KEY
from appliance.audit.proof import prove as make_proof
from appliance.audit.proof import verify_proof
from appliance.audit.reading import LogReader
from appliance.audit.verify import Removed, Verified, verify_log
from appliance.audit.witnessing import cosigned_note
from appliance.cli import Console, Group, api_key_option, in_words, moment, pass_console, printable, table

if TYPE_CHECKING:
    from api.admin import types

_PROGRESS_EVERY_S = 0.5


@click.group(cls=Group)
def audit() -> None:
    """Read, check, prove and witness the audit log."""


@audit.command()
@api_key_option
@pass_console
def status(console: Console) -> None:
    """Say whether the log is whole, how old its last checkpoint is, how far behind each SIEM, what is in the way."""
    state = console.admin().audit_status()
    rows = [
        ("whole", _whole_words(state)),
        ("last checkpoint", _checkpoint_words(state)),
        *zip_longest(("SIEM",), _siem_words(state), fillvalue=""),
        ("witnessed", _witnessed_words(state)),
        *[("", f"{each.name}: {_witness_words(each)}") for each in state.witnesses],
        ("entries", f"{state.size}"),
        ("retention", _retention_words(state)),
        ("oldest kept", _oldest_words(state)),
        ("public key", state.public_key or "none yet: the vault was never open"),
        ("folder", state.directory),
        ("alarm", state.alarm or "none"),
        *([] if state.restored is None else [("restored", state.restored)]),
        ("error", "none" if state.error is None else f"{state.error.message}: {state.error.cause}"),
    ]
    text = "\n".join(f"{name:<17}{printable(told)}" for name, told in rows)
    console.result(state, console.typable(text))


@audit.command()
@api_key_option
@pass_console
def acknowledge(console: Console) -> None:
    """End the alarm of an older copy that no restore announced; that you did is in the log."""
    told = console.admin().acknowledge_older_copy()
    which = told.acknowledged
    copy = f"an older copy of the {which}" if which != "unknown" else "that nobody can tell of an older copy"
    console.result(told, "There is no such alarm." if which is None else f"Acknowledged: {copy}.")


@audit.command()
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="So many, the newest last.")
@api_key_option
@pass_console
def tail(console: Console, limit: int) -> None:
    """Show the newest entries."""
    page = console.admin(deadline_s=60).audit_entries(limit=limit)
    console.result(page, _entries_text(page))


@audit.command()
@click.option("--since", metavar="TIME", help="Not older than this: 2026-11-24T10:00:00Z, or a duration ago: 90m.")
@click.option("--until", metavar="TIME", help="Older than this.")
@click.option("--tenant", help="Only this tenant's: an id; `system` for the appliance's own.")
@click.option("--action", help="Only these, with * for anything: turn.*")
@click.option("--actor", help="Only this principal's: an id.")
@click.option("--session", help="Only this session's: an id.")
@click.option("--outcome", type=click.Choice(["success", "failure", "refused"]), help="Only those that ended so.")
@click.option("--before", type=click.IntRange(0), help="Only below this number: where an earlier search stopped.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="At most so many.")
@api_key_option
@pass_console
def search(console: Console, /, since: str | None, until: str | None, **wanted: str | int | None) -> None:
    """Find entries by time, tenant, action, actor or session."""
    now = time.time()
    page = console.admin(deadline_s=120).audit_entries(
        since=None if since is None else _moment(since, now),
        until=None if until is None else _moment(until, now),
        **wanted,
    )
    console.result(page, _entries_text(page))


@audit.command()
@click.argument("sequence", type=click.IntRange(0))
@api_key_option
@pass_console
def show(console: Console, sequence: int) -> None:
    """Show one entry with everything that it holds."""
    entry = console.admin().audit_entry(sequence)
    console.result(entry, _entry_text(entry))


@audit.command()
@LOG_OPTION
@KEY_OPTION
@click.option(
    "--witness",
    "witnesses",
    multiple=True,
    metavar="VKEY",
    help="A witness that must have co-signed it; once for each. A co-signature of another one is an error.",
)
@click.option(
    "--allow-unknown-witnesses",
    is_flag=True,
    help="Co-signatures of witnesses that were not named, which cannot be checked, are counted and no error.",
)
@click.option("--at-least", type=click.IntRange(0), default=0, help="A size that the log is known to have had.")
@pass_console
def verify(
    console: Console,
    log_dir: Path | None,
    key_text: str | None,
    witnesses: tuple[str, ...],
    allow_unknown_witnesses: bool,
    at_least: int,
) -> None:
    """Check every entry, tile, signature and clock of the log, and name the first that is wrong."""
    directory = log_directory(console, log_dir)
    told_at = 0.0
    began_at = time.monotonic()

    def progress(done: int, of: int) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now > told_at + _PROGRESS_EVERY_S and sys.stderr.isatty():
            told_at = now
            click.echo(f"\r{done} of {of} entries", err=True, nl=False)

    found = verify_log(
        directory,
        log_key(directory, key_text),
        witnesses=[verifier_key(text) for text in witnesses],
        allow_unknown=allow_unknown_witnesses,
        at_least=at_least,
        progress=progress,
    )
    if told_at:
        click.echo("\r\x1b[K", err=True, nl=False)
    console.result(found.record(), _verified_text(found, time.monotonic() - began_at))
    if key_text is None:
        console.say(f"Checked with the folder's own key; give --key, from elsewhere, to check who signed: {PUBLIC_KEY}")


@audit.command()
@click.argument("sequence", type=click.IntRange(0))
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="The file to write; stdout by default.")
@click.option(
    "--disclose",
    is_flag=True,
    help="Put the record into the proof, so that who has it can read it; asks the running appliance.",
)
@click.option(
    "--witness",
    "witness_key",
    metavar="VKEY",
    help="Under the first checkpoint with the entry that this one co-signed.",
)
@LOG_OPTION
@api_key_option
@pass_console
def prove(
    console: Console,
    sequence: int,
    output: Path | None,
    disclose: bool,
    witness_key: str | None,
    log_dir: Path | None,
) -> None:
    """Write a proof that stands by itself: this entry was in the log when the checkpoint was signed."""
    directory = log_directory(console, log_dir)
    log = LogReader(directory)
    note = "" if witness_key is None else cosigned_note(directory, sequence, verifier_key(witness_key))
    if disclose:
        entry = console.admin().audit_entry(sequence)
        proof = make_proof(log, sequence, note=note, salt=bytes.fromhex(entry.salt or ""), record=entry.record)
    else:
        proof = make_proof(log, sequence, note=note)
    if output is None:
        click.echo(proof, nl=False)
        return
    write_carried(output, proof.encode())
    console.result({"sequence": sequence, "file": str(output)}, f"{output} proves entry {sequence}.")


@audit.command("verify-proof")
@click.argument("file", type=click.File("r", encoding="utf-8"))
@LOG_OPTION
@KEY_OPTION
@click.option(
    "--witness", "witness_key", metavar="VKEY", help="Who must have co-signed it, and says when the entry was there."
)
@pass_console
def check_proof(
    console: Console, file: Any, log_dir: Path | None, key_text: str | None, witness_key: str | None
) -> None:
    """Check a proof with the log's public key and nothing else; its time with the public key of a witness."""
    key = verifier_key(key_text) if key_text is not None else log_key(log_directory(console, log_dir), None)
    witness = None if witness_key is None else verifier_key(witness_key)
    found = verify_proof(file.read(), key, witness)
    value = {
        "origin": found.checkpoint.origin,
        "size": found.checkpoint.size,
        "sequence": found.entry.sequence,
        "wall_ns": found.entry.wall_ns,
        "record": found.record,
        "witness": None if witness is None else witness.name,
        "witnessed_time_s": found.seen_s,
    }
    text = f"Entry {found.entry.sequence} of {found.checkpoint.origin} is from {moment(found.entry.wall_ns / 1e9)}"
    if witness is None or found.seen_s is None:
        text += ", by the log's own word: give --witness to check when it was there."
    else:
        text += f", by the log's own word. {witness.name} saw it there at {moment(found.seen_s)}."
    if found.record is not None:
        text += "\n" + _record_text(found.record)
    console.result(value, text)


@audit.command()
@click.argument("tenant")
@click.option(
    "--of",
    "of",
    type=click.Choice(["answer", "messages", "prompt"]),
    required=True,
    help="What the text is: an answer's text, the `messages` of a chat completion (as JSON), a completion's prompt.",
)
@api_key_option
@pass_console
def digest(console: Console, tenant: str, of: str) -> None:
    """Say which keyed digest the text on standard input has in TENANT's turns. The text itself goes nowhere.

    Every byte of it counts, a newline at the end too.
    """
    given = sys.stdin.buffer.read()
    try:
        hashed = prompt_hash(json.loads(given)) if of == "messages" else hashlib.sha256(given).digest()
    except ValueError as error:
        raise click.UsageError(f"what came on standard input is no JSON: {error}") from None
    text = "answer" if of == "answer" else "prompt"
    found = console.admin().audit_digest(tenant=tenant, text=text, sha256=hashed.hex())
    console.result(found, found.digest)


for _each in (exporting, check_export, witness):
    audit.add_command(_each)


def _moment(text: str, now: float) -> float:
    """Epoch seconds of a moment, or of a duration ago."""
    from datetime import UTC, datetime

    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
    if text[:-1].isdigit() and text[-1:] in units:
        return now - int(text[:-1]) * units[text[-1]]
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text} is no time: 2026-11-24T10:00:00Z, or a duration such as 90m") from None
    return (parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)).timestamp()


# What is shown to people


def _checkpoint_words(state: "types.AuditStatus") -> str:
    if state.checkpoint_age_s is None:
        return "none yet"
    return f"{in_words(state.checkpoint_age_s)} ago, of {state.checkpoint_size} entries"


def _whole_words(state: "types.AuditStatus") -> str:
    """What the last check found, when, and how far it came."""
    if state.whole is False:
        when = "" if state.checked_age_s is None else f"; last checked {in_words(state.checked_age_s)} ago"
        return f"NO, see alarm{when}"
    if state.checked_age_s is None:
        return "not known: it was not checked since the start; `holdfast audit verify`, with its witnesses, does it now"
    when = f"checked {in_words(state.checked_age_s)} ago"
    if state.whole is None:
        return f"not known, see alarm; {when}"
    since = state.size - state.checked_size
    return f"yes, {when}: {state.checked_size} entries" + (f"; {since} came since" if since > 0 else "")


def _siem_words(state: "types.AuditStatus") -> list[str]:
    """A line for each destination: how far behind it is, and what is in its way."""
    if state.exports_error is not None:
        return [f"nothing is exported: {state.exports_error.cause}", f"  Next: {state.exports_error.remedy}"]
    lines = []
    for each in state.exports:
        behind = f"{each.lag_entries} entries, {in_words(each.lag_s)} behind" if each.lag_entries else "has everything"
        lines.append(f"{each.name}: {behind}" + (f"; {each.waits_for}" if each.waits_for else ""))
        if each.error is not None:
            lines[-1] += f"; FAILS: {each.error.message}: {each.error.cause}"
            lines.append(f"  Next: {each.error.remedy}")
    return lines or ["none; `holdfast audit export add` sends the log to one"]


def _witnessed_words(state: "types.AuditStatus") -> str:
    if state.witnessed_size is None:
        return "not known: the vault is sealed, or see alarm"
    if state.witnessed_age_s is None:
        return "never; docs/audit.md says how a witness is asked"
    return f"{in_words(state.witnessed_age_s)} ago by {state.witnessed_by}, of {state.witnessed_size} entries"


def _witness_words(witness: "types.AuditWitness") -> str:
    words = "has co-signed nothing yet"
    if witness.cosigned_age_s is not None:
        words = f"co-signed {witness.size} entries {in_words(witness.cosigned_age_s)} ago"
    if witness.refused is not None:
        return f"REFUSES: {witness.refused}; {words}"
    if witness.silent_s is None:
        return words
    why = "" if witness.error is None else f": {witness.error.cause}"
    return f"{words}; silent for {in_words(witness.silent_s)}{why}"


def _retention_words(state: "types.AuditStatus") -> str:
    words = f"{state.retention_days} days"
    if state.retention_overridden:
        words += ", under six months: the setting that allows it is recorded in the log"
    return words if state.retention_held is None else f"{words}; nothing is removed now: {state.retention_held}"


def _oldest_words(state: "types.AuditStatus") -> str:
    if state.oldest_kept is None or state.oldest_kept_time_s is None:
        return "not looked at yet"
    return f"entry {state.oldest_kept}, from {moment(state.oldest_kept_time_s)}"


def _entries_text(page: "types.AuditPage") -> str:
    rows = [
        (
            entry.sequence,
            moment(entry.time_s),
            entry.action,
            (entry.record or {}).get("outcome", entry.why_not or "-"),
            _actor(entry.record or {}),
            _target(entry.record or {}),
        )
        for entry in reversed(page.entries)
    ]
    text = table(("number", "time", "action", "outcome", "actor", "about"), rows, empty="Nothing was found.")
    if page.go_on_before is not None:
        text += f"\nThere may be more: --before {page.go_on_before}"
    elif page.oldest_kept:
        text += f"\nThe entries before {page.oldest_kept} were removed: they were older than the retention."
    return text


def _entry_text(entry: "types.AuditEntry") -> str:
    head = f"Entry {entry.sequence}, {moment(entry.time_s)}, {entry.action}\nleaf hash {entry.leaf_hash}"
    return f"{head}\n{_record_text(entry.record) if entry.record is not None else entry.why_not}"


def _record_text(record: dict[str, Any]) -> str:
    lines = []
    for name, value in record.items():
        told = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else value
        lines.append(f"  {name}: {printable(str(told))}")
    return "\n".join(lines)


def _actor(record: dict[str, Any]) -> str:
    actor = record.get("actor", {})
    return str(actor.get("id") or actor.get("kind", "-"))


def _target(record: dict[str, Any]) -> str:
    target = record.get("target", {})
    return str(target.get("id") or record.get("session_id") or record.get("reason") or "-")


def _removed_words(removed: Removed) -> str:
    words = (
        f"  {removed.count} entries were removed by retention ({removed.days} days), as entry {removed.said_by} of "
        f"{moment(removed.said_ns / 1e9)} says; their hashes hold"
    )
    if removed.missing:
        words += f"\n  {removed.missing} of them were gone before they were due: retention did not remove those"
    return words


def _verified_text(found: Verified, took_s: float) -> str:
    lines = [
        f"{found.origin}: {found.size} entries hold, in {in_words(took_s)}.",
        f"  root {found.root.hex()}",
    ]
    if found.first_wall_ns is not None and found.last_wall_ns is not None:
        lines.append(
            f"  from {moment(found.first_wall_ns / 1e9)} to {moment(found.last_wall_ns / 1e9)}, {found.boots} boots"
        )
    if found.removed is not None:
        lines.append(_removed_words(found.removed))
    if found.unsigned:
        lines.append(f"  {found.unsigned} more are not signed yet: whoever can write the folder can cut them off")
    lines += [f"  {name} saw {size} entries at {moment(time_s)}" for name, (size, time_s) in found.witnessed.items()]
    lines += [f"  {count} co-signatures of {name} were NOT CHECKED" for name, count in found.unknown.items()]
    lines += [
        f"  the clock was set by {step.step_ns / 1e9:+.1f} s before entry {step.sequence}" for step in found.clock_steps
    ]
    return "\n".join(lines)
