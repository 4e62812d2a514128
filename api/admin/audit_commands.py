"""`holdfast audit`: look at the log, check it, prove what is in it, have it witnessed.

Rules:

- `verify`, `verify-proof`, `verify-export`, `witness cosign` and `witness serve` need the log's files or what
  travelled, and its public key: no appliance, no vault, no right but to read. They are the auditor's and the witness's,
  on machines of their own.
- The rest asks the running appliance, which decides who may, and records that it was asked.
"""

import hashlib
import json
import sys
import time
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from api.carried_files import carried_file, write_carried
from appliance.audit.digests import prompt_hash
from appliance.audit.log import PUBLIC_KEY
from appliance.audit.notes import VerifierKey, decode_note
from appliance.audit.proof import prove as make_proof
from appliance.audit.proof import verify_proof
from appliance.audit.reading import LogReader
from appliance.audit.siem.batches import PUBLIC_KEY as BATCHES_KEY
from appliance.audit.siem.batches import lines_of, verify_batches
from appliance.audit.siem.known import Known
from appliance.audit.siem.verify_export import ExportVerified, verify_export
from appliance.audit.verify import Removed, Verified, verify_log
from appliance.audit.witness import Witness, own_key, read_request
from appliance.audit.witnessing import cosigned_note
from appliance.cli import EXIT_STATUS, Console, Group, api_key_option, in_words, moment, pass_console, printable, table
from appliance.errors import Fault

if TYPE_CHECKING:
    from api.admin import types

_PROGRESS_EVERY_S = 0.5
_EXCERPT_DEADLINE_S = 6 * 3600.0
_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
_EXPORT_HEADINGS = ("name", "to", "format", "delivered", "behind by", "error", "last error")
_LOG_OPTION = click.option(
    "--log",
    "log_dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder of the log; by default the appliance's.",
)
_KEY_OPTION = click.option(
    "--key",
    "key_text",
    metavar="VKEY",
    help="The log's public key, or a file with it; by default the folder's own, which whoever changed the log could "
    "have changed too.",
)


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
@_LOG_OPTION
@_KEY_OPTION
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
    directory = _directory(console, log_dir)
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
        _log_key(directory, key_text),
        witnesses=[_vkey(text) for text in witnesses],
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
@_LOG_OPTION
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
    directory = _directory(console, log_dir)
    log = LogReader(directory)
    note = "" if witness_key is None else cosigned_note(directory, sequence, _vkey(witness_key))
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
@_LOG_OPTION
@_KEY_OPTION
@click.option(
    "--witness", "witness_key", metavar="VKEY", help="Who must have co-signed it, and says when the entry was there."
)
@pass_console
def check_proof(
    console: Console, file: Any, log_dir: Path | None, key_text: str | None, witness_key: str | None
) -> None:
    """Check a proof with the log's public key and nothing else; its time with the public key of a witness."""
    key = _vkey(key_text) if key_text is not None else _log_key(_directory(console, log_dir), None)
    witness = None if witness_key is None else _vkey(witness_key)
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


@audit.command("verify-export")
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
    key = _vkey(key_text)
    note = None if checkpoint is None else decode_note(checkpoint.read_bytes())
    known = None if known_file is None else Known.load(known_file, key.name)
    if known is not None and asked_from is not None:
        raise click.UsageError(f"--from is for the first check: {known_file} says where this one goes on")
    taken = {} if known is None else known.batches
    if file.is_dir():
        batches = verify_batches(file, _vkey(batch_key or str(file / BATCHES_KEY)), known=taken)
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


# Destinations


@audit.group("export", cls=Group)
def exporting() -> None:
    """Send the log to a SIEM: where to, how far behind it is, and what is in the way."""


@exporting.command("add")
@click.argument("name")
@click.argument("url")
@click.option("--format", "form", default="ocsf", show_default=True, help="What events are written in.")
@click.option("--ca", type=_FILE, help="Certificates that the receiver's may be from, PEM.")
@click.option("--certificate", type=_FILE, help="Ours, PEM.")
@click.option("--private-key", type=_FILE, help="Of our certificate, PEM without a passphrase.")
@click.option("--server-name", default="", help="What the receiver's certificate is for, if not the host of the URL.")
@click.option("--token-file", type=_FILE, help="A file with the token that the receiver wants to be shown.")
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
    console.result(exports, table(_EXPORT_HEADINGS, rows, empty=empty))


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


# Witnesses


@audit.group(cls=Group)
def witness() -> None:
    """Have a checkpoint co-signed by somebody who remembers the one before."""


@witness.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--witness", "witness_key", metavar="VKEY", help="Who will be asked; by default somebody new.")
@click.option("--from", "old_size", type=click.IntRange(0), help="The size that the witness says it saw last.")
@api_key_option
@pass_console
def export(console: Console, file: Path, witness_key: str | None, old_size: int | None) -> None:
    """Write what the witness is asked, to carry to it."""
    vkey = None if witness_key is None else str(_vkey(witness_key))
    asked = console.admin(deadline_s=60).audit_witness_request(witness=vkey, old_size=old_size)
    write_carried(file, asked.request.encode())
    console.result(
        {"file": str(file), "size": asked.size},
        f"{file} asks for a co-signature of {asked.size} entries. At the witness: "
        f"holdfast audit witness cosign {file} REPLY --state DIR --key {asked.public_key}",
    )


@witness.command()
@click.argument("request", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.argument("reply", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--state",
    "state",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Where the witness keeps its key and what it saw; made if it is not there. Keep it apart from the log.",
)
@click.option("--key", "key_text", metavar="VKEY", required=True, help="The log's public key, or a file with it.")
@click.option("--name", default="", help="What a new witness is called, such as its host's name.")
@pass_console
def cosign(console: Console, request: Path, reply: Path, state: Path, key_text: str, name: str) -> None:
    """As the witness: check that the log goes on from what was seen before, and co-sign it."""
    key = own_key(state, name or "holdfast-witness")
    line = Witness(state, key).cosign(request.read_bytes(), _vkey(key_text), int(time.time()))
    write_carried(reply, line)
    console.result(
        {"file": str(reply), "witness": str(key.verifier())},
        f"{reply} is the co-signature. Back at the appliance: "
        f"holdfast audit witness import {request} {reply} --witness {key.verifier()}",
    )


@witness.command("serve")
@click.option(
    "--state",
    "state",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="As for `cosign`: what was seen in one way is known in the other.",
)
@click.option(
    "--key",
    "key_texts",
    metavar="VKEY",
    multiple=True,
    required=True,
    help="The public key of a log that is witnessed, or a file with it; again for each log.",
)
@click.option("--listen", metavar="HOST:PORT", required=True, help="Where it is asked; port 0: one that is free.")
@click.option("--certificate", type=_FILE, help="For TLS, PEM; without it only the loopback is listened on.")
@click.option("--private-key", type=_FILE, help="Of the certificate, PEM without a passphrase.")
@click.option("--client-ca", type=_FILE, help="Answer only who shows a certificate of these, PEM.")
@click.option("--name", default="", help="What a new witness is called, such as its host's name.")
@pass_console
def serve_witness(
    console: Console,
    state: Path,
    key_texts: tuple[str, ...],
    listen: str,
    certificate: Path | None,
    private_key: Path | None,
    client_ca: Path | None,
    name: str,
) -> None:
    """As the witness: answer appliances over the network (C2SP tlog-witness), until told to stop."""
    import logging

    from api.witness_service import serve

    host, _, port = listen.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise click.BadParameter("a host and a port: 192.0.2.7:8443, [::1]:8443", param_hint="--listen")
    if (certificate is None) != (private_key is None) or (client_ca is not None and certificate is None):
        raise click.UsageError("--certificate and --private-key go together, and --client-ca with them")
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    key = own_key(state, name or "holdfast-witness")
    vkey = str(key.verifier())

    def listening(address: str) -> None:
        console.result({"address": address, "witness": vkey}, f"{vkey}\nis asked at {address}")
        sys.stdout.flush()

    serve(
        state,
        key,
        [_vkey(text) for text in key_texts],
        host=host,
        port=int(port),
        certificate=certificate,
        private_key=private_key,
        client_ca=client_ca,
        listening=listening,
    )


@witness.command("import")
@click.argument("request", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.argument("reply", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--witness", "witness_key", metavar="VKEY", required=True, help="The witness's public key.")
@api_key_option
@pass_console
def take(console: Console, request: Path, reply: Path, witness_key: str) -> None:
    """Take a witness's reply; the log is held to it from then on."""
    asked = request.read_bytes()
    read_request(asked)
    taken = console.admin(deadline_s=60).audit_witness_reply(
        request=asked.decode(), reply=reply.read_text(encoding="utf-8"), witness=str(_vkey(witness_key))
    )
    console.result(taken, f"{taken.witness} saw {taken.size} entries.")


# Keys and places


def _directory(console: Console, named: Path | None) -> Path:
    return named or console.state_dir / "audit"


def _log_key(directory: Path, text: str | None) -> VerifierKey:
    return _vkey(text if text is not None else str(directory / PUBLIC_KEY))


def _vkey(text: str) -> VerifierKey:
    """A public key, from the command line or from the file that is named there."""
    path = Path(text)
    if "+" not in text or path.is_file():
        try:
            text = path.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise click.BadParameter(f"{text} is no public key and no file with one: {error.strerror}") from None
    return VerifierKey.parse(text)


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
        return "not known: it was not checked since the start; `holdfast audit verify` does it now"
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


def _last_error_words(export: "types.AuditExport") -> str:
    if export.last_error is None or export.last_error_s is None:
        return "none"
    return f"{in_words(max(0.0, time.time() - export.last_error_s))} ago: {export.last_error.cause}"


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
