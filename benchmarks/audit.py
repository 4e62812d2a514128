"""What the audit log costs: appends, verification, proofs. `python -m benchmarks.audit`.

Everything in one run, on this machine's disk:

- durable appends through a real appender, 64 writers at once and one alone, against one `fdatasync` for each record;
- full verification of a log, against hashing the same bytes once and nothing else;
- an inclusion proof in a tree of 80 million leaves: its size, and the time to check it.

`--check` leaves with 1 when a figure misses what the project promises.
"""

import argparse
import asyncio
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

import uvloop

from appliance.audit.entry import seal
from appliance.audit.events import TURN_ADMITTED, Actor, Event
from appliance.audit.launch import Launcher
from appliance.audit.log import AuditLog, Head, Stamp
from appliance.audit.notes import Checkpoint, SigningKey, sign_checkpoint
from appliance.audit.recorder import Recorder
from appliance.audit.tree import inclusion_proof, node_hash, root_of, verify_inclusion
from appliance.audit.verify import verify_log
from appliance.store import DatabaseKeys, Store, key_changes
from appliance.vault import RootKey, Vault
from benchmarks.load import percentile

WRITERS: Final = 64
APPENDS_PER_S: Final = 10_000.0
APPEND_P99_MS: Final = 20.0
TIMES_OF_SINGLE_SYNCS: Final = 3.0
ONE_WRITER_TIMES: Final = 2.5
VERIFIED_PER_S: Final = 200_000.0
SHARE_OF_HASHING: Final = 0.6
PROOF_BYTES: Final = 3072
PROOF_CHECK_MS: Final = 1.0
_LEAVES: Final = 80_000_000
_EVENT: Final = Event(
    TURN_ADMITTED,
    Actor("principal", "prn_0123456789abcdef0123456789abcdef", "client"),
    tenant_id="ten_1",
    source="127.0.0.1",
    target=("model", "holdfast-demo"),
    request_id="0123456789abcdef0123456789abcdef",
    session_id="ses_0123456789abcdef0123456789abcdef",
    counts={"prompt_bytes": 4321},
)
_VERSIONS: Final = {"holdfast": "0.1.0", "python": "3.11.7", "vllm": "0.32.0"}


def open_vault(place: Path) -> Vault:
    """A vault with the keys of the system and of `ten_1`."""
    store = Store.open(f"sqlite:///{place / 'keys.db'}")
    vault = Vault(DatabaseKeys(store))
    vault.open(RootKey(b"r" * 32))
    for records in (vault.new_system_keys(), vault.new_tenant_keys("ten_1")):
        store.write_blocking(key_changes(records))
    return vault


async def append(place: Path, vault: Vault, *, seconds: float) -> dict[str, float]:
    """Durable appends, many writers and one."""
    run_dir = place / "run"
    run_dir.mkdir()
    launcher = Launcher(place / "audit", run_dir)
    recorder = Recorder(lambda: vault, system_scope="system", versions=_VERSIONS)
    running = asyncio.create_task(recorder.run(launcher.connect))
    await recorder.record(_EVENT)
    await recorder.sign_with(SigningKey("benchmark", os.urandom(32)).to_bytes())

    async def write(until: float, took: list[float]) -> None:
        while (began := time.perf_counter()) < until:
            await recorder.record(_EVENT)
            took.append(time.perf_counter() - began)

    figures = {}
    for name, writers in (("many", WRITERS), ("one", 1)):
        await asyncio.gather(*(write(time.perf_counter() + 0.5, []) for _ in range(writers)))
        took: list[float] = []
        began = time.perf_counter()
        await asyncio.gather(*(write(began + seconds, took) for _ in range(writers)))
        figures[f"{name}_per_s"] = len(took) / (time.perf_counter() - began)
        figures[f"{name}_p50_ms"] = 1000 * percentile(took, 0.5)
        figures[f"{name}_p99_ms"] = 1000 * percentile(took, 0.99)
    running.cancel()
    await launcher.stop()
    return figures


def single_syncs(place: Path, seconds: float) -> float:
    """Records a second when each is written and synced by itself, into space that was taken before."""
    record = os.urandom(900)
    descriptor = os.open(place / "single", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, 64 << 20)
        os.fsync(descriptor)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            os.pwrite(descriptor, record, count % 60_000 * len(record))
            os.fdatasync(descriptor)
            count += 1
        return count / (time.perf_counter() - began)
    finally:
        os.close(descriptor)


def verify(place: Path, vault: Vault, *, entries: int) -> dict[str, float]:
    """Entries a second, by the processor's time; and what hashing the same bytes alone reaches."""
    directory = place / "verified"
    key = SigningKey("benchmark", b"k" * 32)
    log = AuditLog.open(directory, boot_id=bytes(16), clock=lambda: Stamp(time.time_ns(), time.monotonic_ns()))

    def sign(head: Head) -> str:
        return sign_checkpoint(Checkpoint(key.name, head.size, head.root), key)

    draft = seal(
        _EVENT.kind.number,
        _EVENT.record(_VERSIONS),
        keys=vault,
        scope="ten_1",
        actor=_EVENT.actor.id,
        session=_EVENT.session_id,
        random=os.urandom(32),
    )
    for first in range(0, entries, 1000):
        log.append([draft] * min(1000, entries - first))
        log.publish(sign)
    log.close()
    began = time.process_time()
    verify_log(directory, key.verifier())
    took = time.process_time() - began
    data = [path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "journal"]
    began = time.process_time()
    for part in data:
        hashlib.sha256(part).digest()
    # Hashing alone does what it cannot do without: one hash a leaf, one a record, one a node.
    leaf, sealed, pair = b"\0" * 189, draft.sealed, b"\0" * 65
    for _ in range(entries):
        sha256(leaf).digest()
        sha256(sealed).digest()
        sha256(pair).digest()
    alone = time.process_time() - began
    return {
        "verified_per_s": entries / took,
        "hashing_alone_per_s": entries / alone,
        "share_of_hashing": alone / took,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


class Synthetic:
    """The hashes of a tree whose leaves are all alike: each level has one."""

    def __init__(self) -> None:
        self._levels = [sha256(b"\0leaf").digest()]

    def hash_at(self, level: int, index: int) -> bytes:  # noqa: ARG002  (every node of a level is the same)
        while len(self._levels) <= level:
            self._levels.append(node_hash(self._levels[-1], self._levels[-1]))
        return self._levels[level]


def prove() -> dict[str, float]:
    """An inclusion proof of 80 million leaves."""
    tree = Synthetic()
    root, index = root_of(tree, _LEAVES), 12_345_678
    proof = inclusion_proof(tree, index, _LEAVES)
    leaf = tree.hash_at(0, index)
    took = min(_timed(lambda: verify_inclusion(leaf, index, _LEAVES, proof, root)) for _ in range(20))
    return {"proof_bytes": float(sum(map(len, proof))), "proof_check_ms": 1000 * took}


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _promises(figures: dict[str, float]) -> Iterator[tuple[str, bool]]:
    yield f"{WRITERS} writers: at least {APPENDS_PER_S:,.0f} durable appends/s", figures["many_per_s"] >= APPENDS_PER_S
    yield f"{WRITERS} writers: p99 under {APPEND_P99_MS:g} ms", figures["many_p99_ms"] < APPEND_P99_MS
    times = figures["many_per_s"] / figures["single_syncs_per_s"]
    yield f"at least {TIMES_OF_SINGLE_SYNCS:g} times one sync a record ({times:.1f})", times >= TIMES_OF_SINGLE_SYNCS
    alone = figures["one_p50_ms"] / (1000 / figures["single_syncs_per_s"])
    yield f"one writer within {ONE_WRITER_TIMES:g} times of one sync ({alone:.1f})", alone <= ONE_WRITER_TIMES
    verified, share = figures["verified_per_s"], figures["share_of_hashing"]
    yield (
        f"verification: {VERIFIED_PER_S:,.0f}/s, or {SHARE_OF_HASHING:.0%} of hashing alone",
        verified >= VERIFIED_PER_S or share >= SHARE_OF_HASHING,
    )
    yield f"a proof in 80 million: at most {PROOF_BYTES} bytes", figures["proof_bytes"] <= PROOF_BYTES
    yield f"checked in under {PROOF_CHECK_MS:g} ms", figures["proof_check_ms"] < PROOF_CHECK_MS


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each kind of append")
    parser.add_argument("--entries", type=int, default=200_000, help="in the log that is verified")
    parser.add_argument("--place", type=Path, help="a directory on the disk to measure; the temporary one by default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a figure misses its bound")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-audit-", dir=given.place) as name:
        place = Path(name)
        vault = open_vault(place)
        figures = {"single_syncs_per_s": single_syncs(place, given.seconds)}
        figures |= uvloop.run(append(place, vault, seconds=given.seconds))
        figures |= verify(place, vault, entries=given.entries)
        figures |= prove()
    promises = dict(_promises(figures))
    if given.json:
        sys.stdout.write(json.dumps({"figures": figures, "met": promises}, indent=2) + "\n")
    else:
        for name_, value in figures.items():
            print(f"{name_:<22}{value:>14,.2f}")
        for promise, kept in promises.items():
            print(f"{'met   ' if kept else 'MISSED'}  {promise}")
    return 1 if given.check and not all(promises.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
