"""An engine with a tier on disk, in a process of its own, so that it can be killed and started again.

on_disk.py MODEL FOLDER CAPACITY [ROOM]   reads one JSON object a line: {"do": "turn", "session", "salt", "prompt"},
{"do": "release", "session"}, {"do": "forget", "session"}, {"do": "quarantine"}, {"do": "empty"}, {"do": "die",
"after"}, {"do": "settle"}, {"do": "break", "how"}, {"do": "mend"}, {"do": "status"}; answers each with one. After
"empty" nothing but the disk has anything. "forget" is "release" without waiting for the files to go. After "die" it is
killed as soon as it has done what `PHASES` names. With ROOM the folder is on a disk of so many bytes, which "break"
fills or makes read-only, and the tier's clock stands: with "mend" a minute passes. Its keys come over the socket that
HOLDFAST_KEY_SOCKET names.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any, cast

from appliance.engine.inside.connector import CopyingWorker
from appliance.engine.inside.connector.recalling import RecallingManager
from appliance.engine.inside.disk.files import HEADER_BYTES, ChunkFiles
from appliance.engine.inside.disk.store import DiskStatus
from appliance.engine.picture import KvPicture
from appliance.engine.protocol import Lease, TurnEnd, disk_tier, lease_params
from tests.engine.in_process import BLOCK, EngineInProcess
from tests.unit.inside.disk.small_disk import Mend, SmallDisk

FILE_BYTES = 2 * 2 * 64 * 2 * BLOCK + HEADER_BYTES  # layers, keys and values, hidden size, bfloat16, tokens
# What has just been done when it is killed.
PHASES: dict[str, tuple[type, str]] = {
    "read": (ChunkFiles, "read"),  # from the disk
    "decrypted": (ChunkFiles, "open"),  # into a row of DRAM
    "promoted": (RecallingManager, "_complete_promotion"),  # DRAM has it
    "loaded": (CopyingWorker, "submit_load"),  # the device has it
    "removed": (ChunkFiles, "remove"),
}
DRAM_BYTES = 4 << 20
_DEADLINE_S = 30.0


def main(model: Path, folder: Path, capacity_bytes: int, room_bytes: int = 0) -> None:
    small = SmallDisk(folder, room_bytes, file_bytes=FILE_BYTES) if room_bytes else None
    mend: Mend | None = None
    folder = folder / "tier" if small else folder
    disk = disk_tier(str(folder), capacity_bytes, 3600.0)
    engine = EngineInProcess(model, dram_bytes=DRAM_BYTES, disk=disk)
    clock = [time.monotonic()]
    if small:
        give_clock(_store(engine), lambda: clock[0])
    _say(ready=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "turn":
            _say(**_turn(engine, order))
        elif order["do"] == "release":
            engine.report([order["session"]])
            _say(**_settled(engine, folder))
        elif order["do"] == "forget":
            engine.report([order["session"]])
            _say(**_status(engine, folder))
        elif order["do"] == "quarantine":
            cast("Any", engine.connector)._tiers.quarantine()
            _say(**_settled(engine, folder))
        elif order["do"] == "empty":
            engine.connector.release_all()
            assert engine.scheduler.reset_prefix_cache(reset_connector=True)
            _say(**_settled(engine, folder))
        elif order["do"] == "die":
            _die_after(order["after"])
            _say(ready=True)
        elif order["do"] == "break":
            assert small is not None
            mend = {"full": small.fill, "read-only": small.forbid}[order["how"]]()
            _say(mounted=small.is_mounted)
        elif order["do"] == "mend":
            assert mend is not None
            mend()
            clock[0] += 60.0
            _say(ready=True)
        elif order["do"] == "status":
            _say(**_status(engine, folder))
        else:
            _say(**_settled(engine, folder))


def _turn(engine: EngineInProcess, order: dict[str, Any]) -> dict[str, Any]:
    lease = Lease(session=order["session"], tenant="acme", idle_timeout_s=60.0, turn=f"turn-{engine.steps}")
    answer = engine.turn(order["prompt"], salt=order["salt"], transfer=lease_params(lease), max_tokens=8)
    account = engine.ended(TurnEnd(lease.session, lease.tenant, lease.turn, "other", 8, 60.0))
    assert account is not None
    return {"cached": answer.cached_tokens, "token_ids": answer.token_ids, "reason": account.reason}


def give_clock(store: Any, clock: Callable[[], float]) -> None:
    """Have a store's clock be the test's."""
    for part in parts_of(store):
        part._now = clock


def parts_of(store: Any) -> tuple[Any, ...]:
    """What of a store looks at its clock."""
    return store, store._jobs, store._health, store._queue


def _store(engine: EngineInProcess) -> Any:
    return cast("Any", engine.connector)._tiers.secondary_tiers[0].store


def _status(engine: EngineInProcess, folder: Path) -> dict[str, Any]:
    """How the disk is seen from outside, at once."""
    picture = KvPicture.from_wire(engine.core.holdfast_kv_picture(0))
    assert picture.disk is not None
    return {
        "state": picture.tiers[2].state,
        "last_error": picture.disk.last_error,
        "not_stored": picture.disk.not_stored_total,
        "faults": picture.disk.faults_total,
        "files": len(glob(f"{folder}/**/*~*/*", recursive=True)),  # noqa: PTH207
    }


def _die_after(phase: str) -> None:
    if phase == "half a write":
        _die_in_a_write()
        return
    of, name = PHASES[phase]
    act = getattr(of, name)

    def act_and_die(*arguments: Any) -> None:
        act(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(of, name, act_and_die)


def _die_in_a_write() -> None:
    write = os.write

    def write_some_and_die(descriptor: int, data: Any) -> int:
        if len(data) != FILE_BYTES:
            return write(descriptor, data)
        write(descriptor, data[: 2 * HEADER_BYTES])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it lives")

    os.write = write_some_and_die


def _settled(engine: EngineInProcess, folder: Path) -> dict[str, Any]:
    """Step until nothing moves any more; how the tier stands."""
    tiers = cast("Any", engine.connector)._tiers
    (tier,) = tiers.secondary_tiers
    deadline = time.monotonic() + _DEADLINE_S
    while tiers.has_pending_work():
        assert time.monotonic() < deadline
        engine.core.step_fn()
    status = tier.store.status()
    # What was dropped goes a moment later, and `glob` passes over a folder that goes meanwhile.
    while len(paths := [Path(name) for name in glob(f"{folder}/**/*~*/*", recursive=True)]) != status.chunks:  # noqa: PTH207
        assert time.monotonic() < deadline
        time.sleep(0.001)
    files = b"".join(path.read_bytes() for path in paths)
    size = tier.block_size_bytes
    memory = bytes(tier._memory)
    rows = [row for start in range(0, len(memory), size) if any(row := memory[start + 100 : start + 132])]
    return {
        "rows": len(rows),
        "rows_in_plaintext": sum(row in files for row in rows),
        **_told(status),
    }


def _told(status: DiskStatus) -> dict[str, Any]:
    return {"chunks": status.chunks, "loaded": status.loaded_chunks, "faults": status.faults, "on": status.on}


def _say(**told: Any) -> None:
    os.write(1, json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
