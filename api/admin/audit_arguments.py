"""Where the commands about an audit log find it, and its public key: what several of them are given."""

from pathlib import Path

import click

from appliance.audit.log import PUBLIC_KEY
from appliance.audit.notes import VerifierKey
from appliance.cli import Console

FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
LOG_OPTION = click.option(
    "--log",
    "log_dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder of the log; by default the appliance's.",
)
KEY_OPTION = click.option(
    "--key",
    "key_text",
    metavar="VKEY",
    help="The log's public key, or a file with it; by default the folder's own, which whoever changed the log could "
    "have changed too.",
)


def log_directory(console: Console, named: Path | None) -> Path:
    """The folder of the log that is named, or the appliance's."""
    return named or console.state_dir / "audit"


def log_key(directory: Path, text: str | None) -> VerifierKey:
    """The log's public key, as it was given; else the folder's own."""
    return verifier_key(text if text is not None else str(directory / PUBLIC_KEY))


def verifier_key(text: str) -> VerifierKey:
    """A public key, from the command line or from the file that is named there."""
    path = Path(text)
    if "+" not in text or path.is_file():
        try:
            text = path.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise click.BadParameter(f"{text} is no public key and no file with one: {error.strerror}") from None
    return VerifierKey.parse(text)
