"""What encryption costs the tier on disk: the same store with it and without, in turns, in one run.

    python -m benchmarks.disk_tier [--folder FOLDER] [--chunk-mib 2] [--gib 1] [--rounds 5] [--json]

Bars: with encryption at least 80 % of the bytes a second without, in both directions, each the median of the rounds;
and at most one core of the processor. Runs on the file system of FOLDER: the disk is part of what is measured. Without
encryption nothing is authenticated either, so all of the difference is what safety costs.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from appliance.engine.inside.disk.files import HEADER_BYTES, Owner
from appliance.engine.inside.disk.jobs import Piece
from appliance.engine.inside.disk.keys import TierKeys
from appliance.engine.inside.disk.store import DiskStore

BAR = 0.8
CORES_BAR = 1.0
_OWNER = Owner("tenant", "session")
_AT_ONCE = 16  # chunks in a job
_WAYS, _KINDS = ("write", "read"), ("plain", "encrypted")


class Speed(NamedTuple):
    """One round in one direction."""

    bytes_per_s: float
    cores: float


def main() -> int:
    """0 when the bars are held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.cwd())
    parser.add_argument("--chunk-mib", type=float, default=2.0)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    chunk_bytes = int(chosen.chunk_mib * (1 << 20))
    chunks = max(_AT_ONCE, int(chosen.gib * (1 << 30)) // chunk_bytes)
    source = memoryview(os.urandom(chunks * chunk_bytes))
    target = memoryview(bytearray(_AT_ONCE * chunk_bytes))
    speeds: dict[tuple[str, str], list[Speed]] = {}
    for _ in range(chosen.rounds):
        folder = Path(tempfile.mkdtemp(prefix="disk-tier-", dir=chosen.folder))
        try:
            _round(folder, source, target, chunk_bytes, speeds)
        finally:
            shutil.rmtree(folder)
    return _report(speeds, as_json=chosen.json)


def _store(folder: Path, chunk_bytes: int, chunks: int, *, encrypt: bool) -> DiskStore:
    keys = TierKeys(lambda _: True)
    keys.look(_OWNER)
    keys.answered(_OWNER, bytes(32))
    return DiskStore(
        folder,
        fingerprint=bytes(32),
        chunk_bytes=chunk_bytes,
        capacity_bytes=(chunks + 8) * (chunk_bytes + HEADER_BYTES),
        ttl_s=3600.0,
        keys=keys,
        worth=lambda _: 0.0,
        _encrypt=encrypt,
    )


def _key(number: int) -> bytes:
    return number.to_bytes(36, "big")


def _round(
    folder: Path,
    source: memoryview,
    target: memoryview,
    chunk_bytes: int,
    speeds: dict[tuple[str, str], list[Speed]],
) -> None:
    """Everything written, then read, by both stores: job by job in turns, so that the disk's moods fall on both."""
    chunks = len(source) // chunk_bytes
    stores = {kind: _store(folder / kind, chunk_bytes, chunks, encrypt=kind == "encrypted") for kind in _KINDS}
    for way in _WAYS:
        spent = {kind: [0.0, 0.0] for kind in _KINDS}
        for first in range(0, chunks, _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, chunks))
            memory = source[first * chunk_bytes :] if way == "write" else target
            pieces = [
                Piece(_key(n), n, memory[at * chunk_bytes : (at + 1) * chunk_bytes]) for at, n in enumerate(numbers)
            ]
            for kind in _KINDS if first // _AT_ONCE % 2 else _KINDS[::-1]:
                began, used = time.monotonic(), time.process_time()
                if way == "write":
                    stores[kind].store(first, _OWNER, pieces)
                else:
                    stores[kind].load(first, _OWNER.tenant, pieces)
                stores[kind].drain()
                spent[kind][0] += time.monotonic() - began
                spent[kind][1] += time.process_time() - used
                for done in stores[kind].finished():
                    assert done.whole, stores[kind].status()
        for kind, (took_s, used_s) in spent.items():
            speeds.setdefault((way, kind), []).append(Speed(chunks * chunk_bytes / took_s, used_s / took_s))
    for store in stores.values():
        store.close()


def _report(speeds: dict[tuple[str, str], list[Speed]], *, as_json: bool) -> int:
    told: dict[str, dict[str, float]] = {}
    for way in _WAYS:
        median = {kind: statistics.median(speed.bytes_per_s for speed in speeds[way, kind]) for kind in _KINDS}
        told[way] = {
            "plain_mib_s": median["plain"] / (1 << 20),
            "encrypted_mib_s": median["encrypted"] / (1 << 20),
            "share": median["encrypted"] / median["plain"],
            "cores": statistics.median(speed.cores for speed in speeds[way, "encrypted"]),
            "cores_plain": statistics.median(speed.cores for speed in speeds[way, "plain"]),
        }
    held = all(figures["share"] >= BAR and figures["cores"] <= CORES_BAR for figures in told.values())
    if as_json:
        print(json.dumps({"held": held, **told}))
    else:
        print("         plain MiB/s  encrypted MiB/s  share   cores (plain)")
        for way, figures in told.items():
            print(
                f"{way:7}  {figures['plain_mib_s']:11.0f}  {figures['encrypted_mib_s']:15.0f}"
                f"  {figures['share']:5.0%}   {figures['cores']:.2f} ({figures['cores_plain']:.2f})"
            )
        print(f"bars: {BAR:.0%} in both directions, {CORES_BAR:g} core: {'held' if held else 'NOT held'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
