"""Trying the tier's folder, and finding again what an engine before left in it.

Rules:

- A folder that is in quarantine is used by an engine that knows of it from its start, and by no other.
- What has no place in the index goes: it is another copy of what is there, or behind what a bound allows.
"""

import errno
from collections.abc import Callable, Sequence
from typing import NamedTuple

from appliance.engine.inside.disk.files import ChunkFiles, ChunkName, FolderRefused, Found
from appliance.engine.inside.disk.index import DiskIndex
from appliance.engine.inside.quotas import Quota


class Opened(NamedTuple):
    """A folder that can be used.

    Attributes:
        left: what an engine before left in it, the session first that was used longest ago.
        shares: what each tenant was guaranteed then.
        quarantined: an engine before found what came back to be wrong.
    """

    files: ChunkFiles
    left: Sequence[Found]
    shares: dict[str, float]
    quarantined: bool


def open_folder(new_files: Callable[[], ChunkFiles], *, may_be_in_quarantine: bool) -> Opened:
    """Use the folder. Blocks.

    Args:
        may_be_in_quarantine: whether it may be in quarantine, or is refused then.

    Raises:
        FolderRefused: it is another's, or in quarantine.
        OSError: it cannot be used.
    """
    files = new_files()
    try:
        quarantined = files.is_quarantined()
        if quarantined and not may_be_in_quarantine:
            raise FolderRefused(errno.EPERM, "the folder is in quarantine")
        left, shares = sorted(files.scan(), key=lambda found: found.used_at), files.read_shares()
        for found in left:
            if not found.names:
                files.remove_folder(found.owner)
    except BaseException:
        files.close()
        raise
    return Opened(files, left, shares, quarantined)


def take_up(opened: Opened, index: DiskIndex, *, now: float, wall: float) -> list[ChunkName]:
    """Have an index know what was left; what of it has no place there.

    Args:
        now: seconds of a monotonic clock.
        wall: epoch seconds.
    """
    removals: list[ChunkName] = []
    for found in opened.left:
        used_at = now - max(0.0, wall - found.used_at)
        removals.extend(name for name in found.names if not index.found(name, used_at))
    for tenant, share in opened.shares.items():
        if index.chunks_of_tenant(tenant):
            index.quotas.in_force(tenant, Quota(share))
    return removals
