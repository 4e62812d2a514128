"""What a process that holds keys does about its own memory. Standard library only: every process may use it."""

import contextlib
import ctypes
import os
import resource
from pathlib import Path
from typing import Literal

_PR_SET_DUMPABLE = 4
_CAP_IPC_LOCK = 14
# How cryptsetup begins the UUID of a mapping that encrypts; CRYPT-VERITY and CRYPT-INTEGRITY hide nothing.
_ENCRYPTING_MAPPINGS = ("CRYPT-LUKS", "CRYPT-PLAIN", "CRYPT-TCRYPT", "CRYPT-BITLK", "CRYPT-FVAULT2", "CRYPT-LOOPAES")
_MAX_LAYERS = 16  # of block devices under one another


def forbid_core_dumps() -> None:
    """No core of this process or of its children, and no other user's debugger on it.

    The limit is inherited; that a process cannot be traced is not, and each one says it for itself. The limit is one
    byte, not none: a limit of none still lets a dump go to a pipe, and many distributions send it down one; one byte
    forbids both (core(5); fs/coredump.c in Linux).

    Raises:
        OSError: the kernel refused.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except ValueError:  # none at all, from whoever started this process, and no right to raise it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE) failed")


def lockable_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """How much memory a process that this one starts may keep out of swap (mlock(2)); None: as much as it likes."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    rights = next((line.split()[1] for line in status.read_text().splitlines() if line.startswith("CapEff:")), "0")
    return None if hard == resource.RLIM_INFINITY or int(rights, 16) >> _CAP_IPC_LOCK & 1 else hard


def plaintext_swap_devices(
    swaps: Path = Path("/proc/swaps"),
    block_devices: Path = Path("/sys/class/block"),
    numbered_devices: Path = Path("/sys/dev/block"),
) -> list[str]:
    """Swap areas that put memory on a disk unencrypted, as far as can be told.

    Not among them: zram, dm-crypt, and what lies on dm-crypt altogether (a logical volume, a file on its file system).
    """
    try:
        lines = swaps.read_text().splitlines()[1:]
    except FileNotFoundError:
        return []
    areas = [line.split()[:2] for line in lines if line.strip()]
    return [
        name
        for name, kind in areas
        if not _is_protected(_device_of(name, kind, numbered_devices), block_devices, _MAX_LAYERS)
    ]


def _device_of(name: str, kind: str, numbered_devices: Path) -> str | None:
    """The block device that a swap area lies on; None: it cannot be told."""
    if kind != "file":
        return Path(name).resolve().name
    try:
        number = Path(name).stat().st_dev
        return (numbered_devices / f"{os.major(number)}:{os.minor(number)}").resolve(strict=True).name
    except OSError:
        return None


def _is_protected(device: str | None, block_devices: Path, layers: int) -> bool:
    if device is None or layers == 0:
        return False
    if device.startswith("zram"):
        return True
    with contextlib.suppress(OSError):
        if (block_devices / device / "dm" / "uuid").read_text().startswith(_ENCRYPTING_MAPPINGS):
            return True
    try:
        below = [lower.name for lower in (block_devices / device / "slaves").iterdir()]
    except OSError:
        return False
    return bool(below) and all(_is_protected(lower, block_devices, layers - 1) for lower in below)


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
