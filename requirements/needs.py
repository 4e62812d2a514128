"""Says whether a program that the tests start is here, and what to type when it is not: `needs.py postgresql`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Look for each of the named programs; as root on a machine of continuous integration, install what is missing."""
    missing = [name for name in sys.argv[1:] if not FOUND[name]()]
    if missing and os.environ.get("CI") and os.geteuid() == 0:
        for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-qy", "--no-install-recommends", *missing]):
            subprocess.run(command, check=True, stdout=sys.stderr)
        missing = [name for name in missing if not FOUND[name]()]
    if missing:
        raise SystemExit(
            f"The tests start {', '.join(missing)}, and it is not installed.\n"
            f"Next: sudo apt-get install {' '.join(missing)}"
        )


def postgresql() -> bool:
    """Whether a PostgreSQL server's programs are here; Debian keeps them off the PATH."""
    return bool(shutil.which("initdb") or [*Path("/usr/lib/postgresql").glob("*/bin/initdb")])


FOUND = {"postgresql": postgresql}

if __name__ == "__main__":
    main()
