"""The child process that stretches a passphrase: `python -I -m appliance.vault.kdf`.

Standard input: a line of JSON with the parameters, then the passphrase until the end. Standard output: 32 bytes. It
imports the standard library and cryptography only. It is a process of its own so that the memory which Argon2id (RFC
9106) takes, and the passphrase in it, go when it ends.
"""

import base64
import json
import sys

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from appliance.vault.process import forbid_core_dumps

_KEY_BYTES = 32


def main() -> None:
    """Read, stretch, write."""
    forbid_core_dumps()
    parameters = json.loads(sys.stdin.buffer.readline())
    passphrase = sys.stdin.buffer.read()
    argon2 = Argon2id(
        salt=base64.b64decode(parameters["salt"]),
        length=_KEY_BYTES,
        iterations=parameters["iterations"],
        lanes=parameters["lanes"],
        memory_cost=parameters["memory_kib"],
    )
    sys.stdout.buffer.write(argon2.derive(passphrase))


if __name__ == "__main__":
    main()
