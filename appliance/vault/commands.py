"""`holdfast unseal` and `holdfast seal`.

Rule: the passphrase goes from the terminal or a descriptor to the admin socket, and is overwritten after.
"""

import click

from appliance.cli import Command, Console, api_key_option, pass_console, passphrase_option


@click.command(cls=Command)
@passphrase_option
@api_key_option
@pass_console
def unseal(console: Console, passphrase_fd: int | None) -> None:
    """Open the vault with its passphrase."""
    client = console.admin(deadline_s=60)
    before = client.status()
    if not before.vault_sealed:
        console.result({"sealed": False, "changed": False}, "The vault is open already.")
        return
    passphrase = bytearray()
    if before.seal != "key-file":
        passphrase = console.secret("Passphrase", passphrase_fd, option="--passphrase-fd")
    try:
        state = client.unseal(passphrase)
    finally:
        passphrase[:] = bytes(len(passphrase))
    console.result(state, "The vault is open.")
    console.say(f"When everything is ready: {console.suggest('status')}")


@click.command(cls=Command)
@api_key_option
@pass_console
def seal(console: Console) -> None:
    """Close the vault: nothing is served until it is unsealed."""
    state = console.admin(deadline_s=60).seal()
    text = "The vault is sealed." if state.changed else "The vault was sealed already."
    console.result(state, f"{text} Requests are answered with 503 until `{console.suggest('unseal')}`.")
