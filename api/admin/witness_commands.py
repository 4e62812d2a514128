"""`holdfast audit witness`: have the log witnessed, by what is carried; be a witness, asked over the network or not.

Rule: `cosign` and `serve` are the witness's: they need what travelled and the log's public key, and no appliance.
"""

import sys
import time
from pathlib import Path

import click

from api.admin.audit_arguments import FILE, verifier_key
from api.carried_files import write_carried
from appliance.audit.witness import Witness, own_key, read_request
from appliance.cli import Console, Group, api_key_option, pass_console


@click.group(cls=Group)
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
    vkey = None if witness_key is None else str(verifier_key(witness_key))
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
    line = Witness(state, key).cosign(request.read_bytes(), verifier_key(key_text), int(time.time()))
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
@click.option("--certificate", type=FILE, help="For TLS, PEM; without it only the loopback is listened on.")
@click.option("--private-key", type=FILE, help="Of the certificate, PEM without a passphrase.")
@click.option("--client-ca", type=FILE, help="Answer only who shows a certificate of these, PEM.")
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
        [verifier_key(text) for text in key_texts],
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
        request=asked.decode(), reply=reply.read_text(encoding="utf-8"), witness=str(verifier_key(witness_key))
    )
    console.result(taken, f"{taken.witness} saw {taken.size} entries.")
