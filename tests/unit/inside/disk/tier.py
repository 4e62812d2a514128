"""A tier on a disk for the tests: its keys are at hand, its chunks are numbered, and jobs are waited for."""

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from appliance.engine.inside.disk.files import Owner
from appliance.engine.inside.disk.jobs import Done, Piece
from appliance.engine.inside.disk.keys import TierKeys
from appliance.engine.inside.disk.store import _WRITERS, DiskStore
from appliance.engine.inside.quotas import Quota

CHUNK_BYTES = 64 << 10
FILE_BYTES = CHUNK_BYTES + 4096
FINGERPRINT = b"f" * 32
ANA, BEN, EVE = Owner("acme", "ana"), Owner("acme", "ben"), Owner("other", "eve")
DEADLINE_S = 20.0


def tier_key(owner: Owner) -> bytes:
    return hashlib.sha256("~".join(owner).encode()).digest()


def chunk_key(owner: Owner, number: int) -> bytes:
    return hashlib.sha256(f"{owner} {number}".encode()).digest() + bytes(4)


def content(key: bytes) -> bytearray:
    """What the chunk of a key holds: nothing that stands anywhere else."""
    return bytearray(hashlib.shake_128(b"content" + key).digest(CHUNK_BYTES))


class Gateway:
    """Answers what the tier asks, at once, from the keys of all sessions but those in `without`."""

    def __init__(self) -> None:
        self.without: set[Owner] = set()
        self.gone: set[Owner] = set()
        self.asked: list[Owner] = []
        self.silent = False
        self.keys = TierKeys(self._ask)

    def _ask(self, owner: Owner) -> bool:
        self.asked.append(owner)
        if not self.silent:
            self.answer(owner)
        return True

    def answer(self, owner: Owner) -> None:
        known = owner not in self.without | self.gone
        self.keys.answered(owner, tier_key(owner) if known else None, gone=owner in self.gone)


class Tier:
    """A store and what a test does with it."""

    def __init__(self, root: Path, *, gateway: Gateway | None = None, chunks: int = 100, **arguments: Any) -> None:
        self.gateway = gateway or Gateway()
        self.root = root
        self.numbers = itertools.count()
        defaults: dict[str, Any] = {
            "fingerprint": FINGERPRINT,
            "chunk_bytes": CHUNK_BYTES,
            "capacity_bytes": (chunks + _WRITERS - 1) * FILE_BYTES,
            "ttl_s": 3600.0,
            "worth": lambda _: 0.0,
        }
        self.store = DiskStore(root, keys=self.gateway.keys, **{**defaults, **arguments})

    def begin(self, owner: Owner, numbers: Sequence[int], **quota: float) -> int:
        """Have chunks written, and do not wait."""
        job = next(self.numbers)
        keys = [chunk_key(owner, number) for number in numbers]
        pieces = [Piece(key, number, memoryview(content(key))) for key, number in zip(keys, numbers, strict=True)]
        self.store.store(job, owner, pieces, Quota(**quota))
        return job

    def write(self, owner: Owner, numbers: Sequence[int], **quota: float) -> Done:
        return self.wait(self.begin(owner, numbers, **quota))

    def read(
        self, owner: Owner, numbers: Sequence[int], tenant: str | None = None, *, ahead: bool = False
    ) -> list[int]:
        """The numbers of the chunks that could be read; what they hold is what was written."""
        job = next(self.numbers)
        keys = {chunk_key(owner, number): number for number in numbers}
        buffers = {key: bytearray(CHUNK_BYTES) for key in keys}
        pieces = [Piece(key, number, memoryview(buffers[key])) for key, number in keys.items()]
        self.store.load(job, tenant or owner.tenant, pieces, ahead=ahead)
        done = self.wait(job)
        assert done.whole == (len(done.keys) == len(keys))
        for key in done.keys:
            assert buffers[key] == content(key)
        return sorted(keys[key] for key in done.keys)

    def wait(self, job: int) -> Done:
        found: dict[int, Done] = {}

        def is_over() -> bool:
            found.update((done.job, done) for done in self.store.finished())
            return job in found

        until(is_over)
        return found[job]

    def files(self) -> list[Path]:
        """The files of chunks."""
        return sorted(path for path in self.found("*~*/*") if path.is_file())

    def found(self, pattern: str) -> list[Path]:
        """What is below the root; a folder that goes meanwhile is passed over, where `Path.rglob` would raise."""
        return [Path(name) for name in glob(f"{self.root}/**/{pattern}", recursive=True, include_hidden=True)]  # noqa: PTH207

    def settle(self) -> None:
        """Return when no file is there that the store does not know of."""
        until(lambda: len(self.files()) == self.store.status().chunks)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow:
    """A disk that does not answer until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.calls = 0
        real = getattr(os, call)

        def slow(*arguments: Any) -> Any:
            self.calls += 1
            self.reached.set()
            assert self.go_on.wait(20)
            return real(*arguments)

        monkeypatch.setattr(f"appliance.engine.inside.disk.files.os.{call}", slow)


def flip(file: Path, at: int) -> None:
    """Change a bit of a file."""
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte[0] ^ 0x10]))


def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds; other threads see to that."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.001)  # lets the tier's threads go on


Make = Callable[..., Tier]
