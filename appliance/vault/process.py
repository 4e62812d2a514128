"""What a process that holds keys does about its own memory. Standard library only: every process may use it."""

import ctypes
import resource
from pathlib import Path
from typing import Literal

_PR_SET_DUMPABLE = 4


def forbid_core_dumps() -> None:
    """No core of this process or of its children, and no other user's debugger on it.

    The limit is inherited; that a process cannot be traced is not, and each one says it for itself.

    Raises:
        OSError: the kernel refused.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE) failed")


def plaintext_swap_devices(
    swaps: Path = Path("/proc/swaps"), block_devices: Path = Path("/sys/class/block")
) -> list[str]:
    """Swap areas that put memory on a disk unencrypted. Encrypted device-mapper targets and zram are not among them."""
    try:
        lines = swaps.read_text().splitlines()[1:]
    except FileNotFoundError:
        return []
    names = [line.split()[0] for line in lines if line.strip()]
    return [name for name in names if not _is_protected(name, block_devices)]


def _is_protected(name: str, block_devices: Path) -> bool:
    device = Path(name).resolve().name if name.startswith("/dev/") else Path(name).name
    if device.startswith("zram"):
        return True
    try:
        return (block_devices / device / "dm" / "uuid").read_text().startswith("CRYPT-")
    except OSError:
        return False


def swap_warning(policy: Literal["warn", "refuse"], devices: list[str]) -> str | None:
    """What to tell an operator about plaintext swap, if anything.

    Raises:
        PlaintextSwap: there is some, and the policy refuses it.
    """
    if not devices:
        return None
    cause = f"swap on {', '.join(devices)} is not encrypted, and memory with keys and text in it can be written there"
    if policy == "refuse":
        # Imported here: a child process that only forbids its cores needs no error classes.
        from appliance.vault.errors import PlaintextSwap

        raise PlaintextSwap(
            "the appliance does not start with plaintext swap",
            cause=cause,
            remedy='Encrypt the swap or run `swapoff -a`; vault.plaintext_swap = "warn" starts all the same',
        )
    return f"{cause}. Encrypt it, or run `swapoff -a`"
