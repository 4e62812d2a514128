"""What the tests of faults run in a process of its own.

child.py write FOLDER                         writes chunks for ever; says the number of each that is there
child.py full|read-only|full-by-limit FOLDER  has a disk refuse what is written; reports as JSON
"""

import json
import os
import sys
from pathlib import Path

from tests.unit.inside.disk.small_disk import SmallDisk
from tests.unit.inside.disk.tier import ANA, FILE_BYTES, Tier

_ROOM_BYTES = 32 * FILE_BYTES


def write(folder: Path) -> None:
    tier = Tier(folder, chunks=10_000)
    number = 0
    while True:
        waiting = {tier.begin(ANA, [number + ahead]): number + ahead for ahead in range(4)}
        number += 4
        while waiting:
            for done in tier.store.finished():
                chunk = waiting.pop(done.job)
                if done.whole:
                    os.write(1, f"{chunk}\n".encode())


def refuse(fault: str, folder: Path) -> None:
    clock = [0.0]
    disk = SmallDisk(folder, _ROOM_BYTES, file_bytes=FILE_BYTES)
    tier = Tier(folder / "tier", now=lambda: clock[0])
    before = len(tier.write(ANA, range(8)).keys)
    mend = {"full": disk.fill, "read-only": disk.forbid, "full-by-limit": disk.limit}[fault]()
    refused = sum(not tier.write(ANA, [number]).whole for number in range(8, 60))
    status = tier.store.status()
    report = {
        "before": before,
        "refused": refused,
        "kept": len(tier.read(ANA, range(8))),
        "error": status.last_error.rpartition("(")[2].strip(")"),
        "parts": len(list(folder.rglob("*.part"))),
    }
    mend()
    clock[0] = 1000.0
    tier.write(ANA, range(60, 64))
    report["after"] = tier.store.status().chunks
    tier.store.close()
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    _folder = Path(sys.argv[2])
    write(_folder) if sys.argv[1] == "write" else refuse(sys.argv[1], _folder)
