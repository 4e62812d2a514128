"""What the audit log costs: appends, verification, proofs. `python -m benchmarks.audit`.

Everything in one run, on this machine's disk:

- Durable appends through a real recorder and a real appender, 64 writers at once and one alone; in turns with what they
  are held against, so that what else the machine does falls on all of them alike:
  - `sync_each`: one sync a record. It is the log without the grouping: the same records are sealed, numbered, hashed
    and framed, and each is synced before the next is begun, in one process: what a program does that keeps its own
    log. It has no hand-over to another process, which ours pays. 64 writers are held to three times that.
  - `append_fsync`: one `fsync`, of a record of ready-made bytes that was appended to a file. One writer is held to 2.5
    times that.
  - `bare_sync`: `pwrite` and `fdatasync` of ready-made bytes, back to back, into space that was taken before; and
    `paced_sync`, the same with a pause before it that is about as long as one writer's disk has between two records.
    They are no log, and say what the disk gives at most.
- The same appends on a disk whose syncs take at least 0.3 ms (`slow_disk`), `slow_…`: how much of a record's time is
  the disk's is chance, and grouping saves nothing else. There both are held to the bare syncs.
- What the admission's record adds to a request that comes at a steady rate: the median time to the first byte through a
  gateway, less that through the same gateway without this one record (`without_admissions`), in turns; each on one
  core, which it shares with its appender. Beside it stands what a record by itself takes at that rate, `paced_record`.
- Full verification of a log, against hashing the same bytes once and nothing else. The memory is that of `holdfast
  audit verify`, a process of its own, over a tenth of the log and over the whole: the 10 million entries of README's
  table take 5 GB of disk, and ten minutes.
- An inclusion proof in a tree of 80 million leaves: its size, and the time to check it.

`--check` leaves with 1 when a figure misses what the project promises.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

import uvloop

from appliance.audit.entry import ENTRY_BYTES, AuditKeys, Draft, seal, search_tag
from appliance.audit.events import MODELS_READ, TURN_ADMITTED, Actor, Event
from appliance.audit.launch import Launcher
from appliance.audit.log import AuditLog, Head, Stamp
from appliance.audit.notes import Checkpoint, SigningKey, sign_checkpoint
from appliance.audit.recorder import Recorder, spelled
from appliance.audit.tree import HASH_BYTES, inclusion_proof, node_hash, root_of, verify_inclusion
from appliance.audit.verify import verify_log
from appliance.randomness import DrawnAhead
from appliance.store import DatabaseKeys, Store, key_changes
from appliance.vault import RootKey, Vault
from benchmarks.load import Agents, Target, at_rate, percentile
from benchmarks.running import make_appliance, running_gateway, running_stub
from benchmarks.slow_disk import slow_disk

WRITERS: Final = 64
APPENDS_PER_S: Final = 10_000.0
APPEND_P99_MS: Final = 20.0
TIMES_OF_SINGLE_SYNCS: Final = 3.0
ONE_WRITER_TIMES: Final = 2.5
SLOW_SYNC_MS: Final = 0.3
ADMISSIONS_PER_S: Final = 50.0
ADMISSION_MS: Final = 1.0
VERIFIED_PER_S: Final = 200_000.0
SHARE_OF_HASHING: Final = 0.6
MORE_MEMORY_MB: Final = 8.0  # what two runs over one log differ by, and some more
PROOF_BYTES: Final = 3072
PROOF_CHECK_MS: Final = 1.0
_LEAVES: Final = 80_000_000
_TURNS: Final = 10
_PACE_S: Final = 200e-6
_FRAMING_BYTES: Final = 6  # of a frame of the journal: a length and a CRC-32
_TAKEN_BYTES: Final = 16 << 20
_LOT: Final = 16_384  # entries: a journal that had as many is begun anew, so that only tiles are left to verify
_WATCH: Final = """
import os, resource, sys
child = os.fork()
if not child:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execv(sys.argv[1], sys.argv[1:])
_, status = os.waitpid(child, 0)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status != 0)
"""
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
    """Durable appends, many writers and one; and what stands for one sync a record, in turns with them."""
    run_dir = place / "run"
    run_dir.mkdir(parents=True)
    launcher = Launcher(place / "audit", run_dir)
    recorder = Recorder(lambda: vault, system_scope="system", versions=_VERSIONS, random_bytes=DrawnAhead())
    running = asyncio.create_task(recorder.run(launcher.connect))
    await recorder.record(_EVENT)
    await recorder.sign_with(SigningKey("benchmark", os.urandom(32)).to_bytes())

    async def write(until: float, took: list[float]) -> None:
        while (began := time.perf_counter()) < until:
            await recorder.record(_EVENT)
            took.append(time.perf_counter() - began)

    async def write_at_once(writers: int, part_s: float, took: list[float]) -> None:
        until = time.perf_counter() + part_s
        await asyncio.gather(*(write(until, took) for _ in range(writers)))

    async def write_at_rate(part_s: float, took: list[float]) -> None:
        begun = time.perf_counter()
        for number in range(int(part_s * ADMISSIONS_PER_S)):
            await asyncio.sleep(max(0.0, begun + number / ADMISSIONS_PER_S - time.perf_counter()))
            began = time.perf_counter()
            await recorder.record(_EVENT)
            took.append(time.perf_counter() - began)

    each = _SyncedEach(place / "each", vault)
    plain = _Appended(place / "plain")
    bare = _BareSyncs(place / "bare")
    await write_at_once(WRITERS, 0.5, [])
    took: dict[str, list[float]] = {
        name: [] for name in ("many", "one", "paced_record", "bare_sync", "paced_sync", "append_fsync", "sync_each")
    }
    many_s = 0.0
    for _ in range(_TURNS):
        _timed_until(seconds / _TURNS, bare.sync, took["bare_sync"])
        _timed_until(seconds / _TURNS, bare.sync, took["paced_sync"], pause_s=_PACE_S)
        _timed_until(seconds / _TURNS, plain.append, took["append_fsync"])
        _timed_until(seconds / _TURNS, each.append, took["sync_each"])
        await write_at_once(1, seconds / _TURNS, took["one"])
        await write_at_rate(seconds / _TURNS, took["paced_record"])
        began = time.perf_counter()
        await write_at_once(WRITERS, seconds / _TURNS, took["many"])
        many_s += time.perf_counter() - began
    running.cancel()
    await launcher.stop()
    for files in (each, plain, bare):
        files.close()
    figures = {"many_per_s": len(took["many"]) / many_s}
    for name in ("bare_sync", "append_fsync", "sync_each", "one"):
        figures[f"{name}_per_s"] = len(took[name]) / sum(took[name])
    for name, those in took.items():
        figures[f"{name}_p50_ms"] = 1000 * percentile(those, 0.5)
        figures[f"{name}_p99_ms"] = 1000 * percentile(those, 0.99)
    return figures


class _BareSyncs:
    """One sync a record of bytes that are there already, each as long as a frame of the journal."""

    def __init__(self, path: Path) -> None:
        self._record = _ready_made()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(self._descriptor, 0, _TAKEN_BYTES)
        os.fsync(self._descriptor)
        self._at = 0

    def sync(self) -> None:
        os.pwrite(self._descriptor, self._record, self._at)
        os.fdatasync(self._descriptor)
        self._at = (self._at + len(self._record)) % (_TAKEN_BYTES - len(self._record))

    def close(self) -> None:
        os.close(self._descriptor)


class _Appended:
    """One `fsync` a record of bytes that are there already, at the end of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._record = _ready_made()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def append(self) -> None:
        os.write(self._descriptor, self._record)
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class _SyncedEach:
    """The log in this process, without the grouping."""

    def __init__(self, directory: Path, vault: Vault) -> None:
        self._vault = vault
        self._log = _open_log(directory)
        self._random_bytes = DrawnAhead()

    def append(self) -> None:
        self._log.append([_draft(self._vault, random_bytes=self._random_bytes)])

    def close(self) -> None:
        self._log.close()


def _timed_until(seconds: float, work: Callable[[], None], took: list[float], *, pause_s: float = 0.0) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        if pause_s:
            time.sleep(pause_s)
        took.append(_timed(work))


@functools.cache
def _search_tag(keys: AuditKeys, key_id: bytes, label: str, value: str) -> bytes:
    """A recorder remembers them, too."""
    return search_tag(keys, key_id, label, value)


def _ready_made() -> bytes:
    """As long as a frame of the journal."""
    return os.urandom(len(_draft(None).sealed) + ENTRY_BYTES + _FRAMING_BYTES)


def _draft(
    vault: Vault | None,
    event: Event = _EVENT,
    versions: Mapping[str, str] = _VERSIONS,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> Draft:
    return seal(
        event.kind.number,
        spelled(event, versions),
        keys=vault,
        scope="ten_1",
        actor=event.actor.id,
        session=event.session_id,
        random=random_bytes(32),
        tag=lambda *asked: _search_tag(*asked),
    )


def _open_log(directory: Path) -> AuditLog:
    return AuditLog.open(directory, boot_id=bytes(16), clock=lambda: Stamp(time.time_ns(), time.monotonic_ns()))


def admit(place: Path, *, seconds: float) -> dict[str, float]:
    """Milliseconds to the first byte of a turn at a steady rate, with the admission's record and without it."""
    place.mkdir()
    cores = sorted(os.sched_getaffinity(0))
    one, others = cores[:1], cores[1:] or cores
    os.sched_setaffinity(0, others)
    first: dict[str, list[float]] = {"api": [], "benchmarks.without_admissions": []}
    with contextlib.ExitStack() as running:
        running.callback(os.sched_setaffinity, 0, cores)
        engine = place / "engine.sock"
        running.enter_context(running_stub(engine, cores=others))
        targets = []
        for module in first:
            state = place / module
            key = make_appliance(state)
            gateway = running.enter_context(running_gateway(state, engine, cores=one, module=module))
            targets.append((Target(module, port=gateway.port, api_key=key), Agents(module, 64)))

        async def ask() -> None:
            for turn in range(_TURNS + 1):
                for target, agents in targets:
                    times = await at_rate(target, agents, per_second=ADMISSIONS_PER_S, seconds=seconds / _TURNS)
                    if times.errors:
                        raise RuntimeError(f"{target.name} refused: {times.errors[0]}")
                    if turn:  # the first one warms up
                        first[target.name] += times.first

        uvloop.run(ask())
    recorded, not_recorded = (1000 * percentile(those, 0.5) for those in first.values())
    return {
        "admission_added_ms": recorded - not_recorded,
        "first_byte_p50_ms": recorded,
        "without_record_p50_ms": not_recorded,
    }


def verify(place: Path, vault: Vault, *, entries: int) -> dict[str, float]:
    """Entries a second, by the processor's time; what hashing the same bytes alone reaches; memory at two sizes."""
    directory = place / "verified"
    key = SigningKey("benchmark", b"k" * 32)
    draft = _draft(vault, Event(MODELS_READ, Actor("principal", "prn_1"), tenant_id="ten_1"), {})
    log = _open_log(directory)
    peaks_mb = []
    lots = -(-entries // _LOT)
    entries = lots * _LOT
    for size in (-(-lots // 10) * _LOT, entries):
        _grow(log, key, draft, size)
        peaks_mb.append(_verifying_process_mb(directory, key))
    log.close()
    began = time.process_time()
    verify_log(directory, key.verifier())
    took = time.process_time() - began
    alone = _hashing_alone(directory, draft, entries)
    return {
        "verified_entries": float(entries),
        "verified_per_s": entries / took,
        "hashing_alone_per_s": entries / alone,
        "share_of_hashing": alone / took,
        "verify_rss_tenth_mb": peaks_mb[0],
        "verify_rss_whole_mb": peaks_mb[1],
    }


def _grow(log: AuditLog, key: SigningKey, draft: Draft, size: int) -> None:
    """Append one sealed record again and again: to whoever has no key, they are entries like any others."""

    def sign(head: Head) -> str:
        return sign_checkpoint(Checkpoint(key.name, head.size, head.root), key)

    while log.size < size:
        log.append([draft] * _LOT)
        log.publish(sign)


def _verifying_process_mb(directory: Path, key: SigningKey) -> float:
    """The most memory that `holdfast audit verify` has, in MB.

    A process counts what it was forked from: a small one stands between it and this one.
    """
    holdfast = Path(sys.executable).with_name("holdfast")
    command = [str(holdfast), "audit", "verify", "--log", str(directory), "--key", str(key.verifier())]
    watched = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _WATCH, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(watched.stdout) / 1024


def _hashing_alone(directory: Path, draft: Draft, entries: int) -> float:
    """Seconds for what verification cannot do without: each file once; one hash a leaf, one a record, one a node."""
    seconds = 0.0
    for path in directory.rglob("*"):
        if path.is_file() and path.name != "journal":
            data = path.read_bytes()
            began = time.process_time()
            sha256(data).digest()
            seconds += time.process_time() - began
    leaf, sealed, pair = b"\0" * (1 + ENTRY_BYTES), draft.sealed, b"\0" * (1 + 2 * HASH_BYTES)
    began = time.process_time()
    for _ in range(entries):
        sha256(leaf).digest()
        sha256(sealed).digest()
        sha256(pair).digest()
    return seconds + time.process_time() - began


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
    for slow, name, said in (
        ("", "sync_each", "the log with one sync a record"),
        ("slow_", "bare_sync", f"bare syncs, where one takes {SLOW_SYNC_MS:g} ms"),
    ):
        times = figures[f"{slow}many_per_s"] / figures[f"{slow}{name}_per_s"]
        yield (
            f"{WRITERS} writers: at least {TIMES_OF_SINGLE_SYNCS:g} times {said} ({times:.1f})",
            times >= TIMES_OF_SINGLE_SYNCS,
        )
    for slow, name, said in (
        ("", "append_fsync", "a record appended and one fsync"),
        ("slow_", "bare_sync", f"one bare sync, where it takes {SLOW_SYNC_MS:g} ms"),
    ):
        times = figures[f"{slow}one_p50_ms"] / figures[f"{slow}{name}_p50_ms"]
        yield f"one writer within {ONE_WRITER_TIMES:g} times of {said} ({times:.1f})", times <= ONE_WRITER_TIMES
    yield (
        f"an admission's record adds to a request at {ADMISSIONS_PER_S:g}/s: under {ADMISSION_MS:g} ms, median",
        figures["admission_added_ms"] < ADMISSION_MS,
    )
    verified, share = figures["verified_per_s"], figures["share_of_hashing"]
    yield (
        f"verification: {VERIFIED_PER_S:,.0f}/s, or {SHARE_OF_HASHING:.0%} of hashing alone",
        verified >= VERIFIED_PER_S or share >= SHARE_OF_HASHING,
    )
    tenth, whole = figures["verify_rss_tenth_mb"], figures["verify_rss_whole_mb"]
    yield (
        f"verification of ten times the entries: at most {MORE_MEMORY_MB:g} MB more memory ({whole - tenth:.1f})",
        whole - tenth <= MORE_MEMORY_MB,
    )
    yield f"a proof in 80 million: at most {PROOF_BYTES} bytes", figures["proof_bytes"] <= PROOF_BYTES
    yield f"checked in under {PROOF_CHECK_MS:g} ms", figures["proof_check_ms"] < PROOF_CHECK_MS


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each kind of append and sync")
    parser.add_argument("--entries", type=int, default=1_000_000, help="in the log that is verified")
    parser.add_argument("--place", type=Path, help="a directory on the disk to measure; the temporary one by default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a figure misses its bound")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-audit-", dir=given.place) as name:
        place = Path(name)
        vault = open_vault(place)
        figures = uvloop.run(append(place / "append", vault, seconds=given.seconds))
        with slow_disk(SLOW_SYNC_MS / 1000):
            slow = uvloop.run(append(place / "slow", vault, seconds=given.seconds / 2))
        figures |= {f"slow_{name}": value for name, value in slow.items()}
        figures |= admit(place / "admit", seconds=2 * given.seconds)
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
