"""Whether an ordinary process may have namespaces of its own here, and which right is lacking where it may not.

Rules:

- Standard library only: the installer asks too, before any environment exists.
- It is tried in a process of its own, in the way that the engine's cage goes: namespaces, then the user's own identity
  in them, then a mount. Ubuntu 24.04 grants the first of these to everybody, and refuses what follows.
"""

import os
import subprocess
import sys
from pathlib import Path

# Each switch that refuses them: where it stands in /proc/sys, what it is then, what it has to be.
_SWITCHES = (
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
    ("kernel.unprivileged_userns_clone", "0", "1"),
    ("user.max_user_namespaces", "0", "10000"),
)
_TIMEOUT_S = 20.0
_PROBE = """
import ctypes, os, sys
USER, NET, NS, PID, IPC = 0x10000000, 0x40000000, 0x00020000, 0x20000000, 0x08000000
REC_PRIVATE = 0x4000 | 0x40000
libc = ctypes.CDLL(None, use_errno=True)
wanted = NET | NS | PID | IPC
user, group = os.geteuid(), os.getegid()
if user or libc.unshare(wanted):
    if libc.unshare(wanted | USER):
        sys.exit("unshare: " + os.strerror(ctypes.get_errno()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        try:
            with open("/proc/self/" + name, "w") as file:
                file.write(text)
        except OSError as error:
            sys.exit(name + ": " + error.strerror)
if libc.mount(b"none", b"/", None, REC_PRIVATE, None):
    sys.exit("mount: " + os.strerror(ctypes.get_errno()))
"""


def refused() -> str | None:
    """Why this user's processes get no namespaces of their own; None: they get them. Blocks for a moment."""
    try:
        outcome = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it was not found out within {_TIMEOUT_S:g} s"
    return (outcome.stderr.strip() or "the probe failed") if outcome.returncode else None


def remedy(switches: Path = Path("/proc/sys")) -> str:
    """The command that gives the right that is lacking, as far as this system tells which it is."""
    prefix = "" if os.geteuid() == 0 else "sudo "
    commands = [
        f"{prefix}sysctl -w {name}={wanted}"
        for name, refusing, wanted in _SWITCHES
        if _value(switches / name.replace(".", "/")) == refusing
    ]
    if commands:
        return f"Allow unprivileged user namespaces: {' && '.join(commands)}"
    return "Allow unprivileged user namespaces, of a container by how it is started (its seccomp and AppArmor profiles)"


def _value(switch: Path) -> str:
    try:
        return switch.read_text().strip()
    except OSError:
        return ""
