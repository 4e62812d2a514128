"""The tier on disk under a real engine: killed and started again, it goes on from there, with the same words."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.engine.inside.disk.files import HEADER_BYTES
from appliance.engine.tier_keys import KEY_SOCKET, KeyChannel, SessionGone
from tests.engine.in_process import words
from tests.unit.inside.disk.tier import until

PROMPT = words(3, 640)
BLOCK = 32
FILE_BYTES = 2 * 2 * 64 * 2 * BLOCK + HEADER_BYTES  # layers, keys and values, hidden size, bfloat16, tokens


class Engine:
    """An engine in a process of its own, which this one gives keys to."""

    def __init__(
        self, model: Path, folder: Path, keys: "Gateway", *, capacity_bytes: int = 64 << 20, room_bytes: int = 0
    ) -> None:
        theirs = keys.open()
        command = [sys.executable, "-m", "tests.engine.tiers.on_disk", str(model), str(folder), str(capacity_bytes)]
        command += [str(room_bytes)] if room_bytes else []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            pass_fds=[theirs],
            env={**os.environ, KEY_SOCKET: str(theirs)},
            cwd=Path(__file__).parents[3],
        )
        os.close(theirs)
        assert self._told()["ready"]

    def turn(self, prompt: list[int], *, session: str = "ana", salt: str = "salt") -> dict[str, Any]:
        return self.do(do="turn", prompt=prompt, session=session, salt=salt)

    def do(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        return self._told()

    def dies(self, after: str, *orders: dict[str, Any]) -> None:
        """Give orders, and have it killed in the middle of them, when it has done what `on_disk` names so."""
        assert self.process.stdin is not None
        self.do(do="die", after=after)
        with self.process, contextlib.suppress(BrokenPipeError):
            for order in orders:
                self.process.stdin.write(json.dumps(order) + "\n")
            self.process.wait(300)
        assert self.process.returncode == -signal.SIGKILL

    def kill(self) -> None:
        with self.process:
            self.process.kill()

    def _told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                told: dict[str, Any] = json.loads(line)
                return told
        raise AssertionError("the engine has ended")


class Gateway:
    """The gateway's end, in a loop of its own."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self._channel = KeyChannel(self._key_of)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def open(self) -> int:
        async def opened() -> int:
            return self._channel.open(lambda _: True).detach()

        return asyncio.run_coroutine_threadsafe(opened(), self._loop).result(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._channel.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _key_of(self, tenant: str, session: str) -> bytes:
        if session in self.gone:
            raise SessionGone
        return hashlib.sha256(f"{tenant}~{session}".encode()).digest()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.close()


def order(session: str, salt: str) -> dict[str, Any]:
    """A turn."""
    return {"do": "turn", "prompt": PROMPT, "session": session, "salt": salt}


@pytest.mark.timeout(600)
def test_an_engine_that_was_killed_while_it_read_or_evicted_goes_on_from_the_disk_with_the_same_words(
    tiny_model: Path, tmp_path: Path, gateway: Gateway
) -> None:
    folder, capacity_bytes = tmp_path / "tier", 1 << 20  # two prompts, and not three
    first = Engine(tiny_model, folder, gateway, capacity_bytes=capacity_bytes)
    cold = first.turn(PROMPT)
    assert cold["cached"] == 0
    settled = first.do(do="settle")
    assert settled["on"]
    assert settled["rows"] >= len(PROMPT) // BLOCK
    assert settled["rows_in_plaintext"] == 0
    assert settled["chunks"] >= len(PROMPT) // BLOCK
    first.do(do="empty")
    first.dies("read", order("ana", "salt"))

    second = Engine(tiny_model, folder, gateway, capacity_bytes=capacity_bytes)
    warm = second.turn(PROMPT)
    assert warm["cached"] >= len(PROMPT) - BLOCK
    assert warm["token_ids"] == cold["token_ids"]
    status = second.do(do="settle")
    assert status["loaded"] >= len(PROMPT) // BLOCK - 1
    assert status["faults"] == {}
    eve = second.turn(PROMPT, session="eve", salt="another")
    assert eve["cached"] == 0
    status = second.do(do="settle")
    assert status["rows_in_plaintext"] == 0
    after = second.do(do="release", session="ana")
    assert {path.parent.name for path in folder.rglob("*~*/*")} == {"acme~eve"}
    assert after["chunks"] == len(PROMPT) // BLOCK
    second.dies("removed", order("ben", "third"), {"do": "settle"}, order("cleo", "fourth"), {"do": "settle"})
    assert {path.parent.name for path in folder.rglob("*~*/*")} > {"acme~eve"}

    third = Engine(tiny_model, folder, gateway, capacity_bytes=capacity_bytes)
    assert third.turn(PROMPT, session="eve", salt="another")["token_ids"] == eve["token_ids"]
    assert third.do(do="settle")["faults"] == {}
    assert not list(folder.rglob("*.part"))
    assert not list(folder.rglob("acme~ana/*"))
    third.kill()


@pytest.mark.timeout(900)
def test_an_engine_that_was_killed_on_the_way_to_the_disk_or_back_uses_nothing_that_is_torn(
    tiny_model: Path, tmp_path: Path, gateway: Gateway
) -> None:
    folder = tmp_path / "tier"
    first = Engine(tiny_model, folder, gateway)
    cold = first.turn(PROMPT)
    first.do(do="settle")
    first.dies("half a write", order("ben", "another"))
    torn = [path for path in folder.rglob("acme~ben/*") if path.stat().st_size < FILE_BYTES]
    assert torn

    for phase in ("decrypted", "promoted", "loaded", None):
        engine = Engine(tiny_model, folder, gateway)
        for session, salt in (("ana", "salt"), ("ben", "another")):
            answer = engine.turn(PROMPT, session=session, salt=salt)
            assert answer["token_ids"] == cold["token_ids"]
            assert (answer["cached"] >= len(PROMPT) - BLOCK) or (session, phase) == ("ben", "decrypted")
        assert engine.do(do="settle")["faults"] == {}
        assert not any(path.exists() for path in torn)
        assert not list(folder.rglob("*.part"))
        engine.do(do="empty")
        if phase is None:
            engine.kill()
        else:
            engine.dies(phase, order("ana", "salt"))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_while_the_disk_is_full_or_read_only_answers_are_the_same_and_it_is_used_again_when_it_is_well(
    tiny_model: Path, tmp_path: Path, gateway: Gateway, how: str
) -> None:
    engine = Engine(tiny_model, tmp_path, gateway, room_bytes=100 * FILE_BYTES)
    blocks = len(PROMPT) // BLOCK
    cold = engine.turn(PROMPT)
    assert engine.do(do="settle")["chunks"] == blocks
    assert engine.do(do="status")["state"] == "ok"

    engine.do(do="break", how=how)
    ben = engine.turn(PROMPT, session="ben", salt="another")
    assert (ben["cached"], ben["token_ids"]) == (0, cold["token_ids"])
    engine.do(do="empty")
    warm = engine.turn(PROMPT)  # what is there can be read
    assert warm["cached"] >= len(PROMPT) - BLOCK
    assert warm["token_ids"] == cold["token_ids"]
    ben = engine.turn(PROMPT, session="ben", salt="another")
    assert (ben["cached"], ben["token_ids"]) == (0, cold["token_ids"])
    status = engine.do(do="status")
    assert status["state"] == "failed"
    assert status["last_error"].rpartition("(")[2].strip(")") in ("ENOSPC", "EROFS", "EFBIG")
    assert status["not_stored"]["error"] >= 2 * blocks
    engine.do(do="forget", session="ana")

    engine.do(do="mend")
    engine.turn(PROMPT, session="cleo", salt="third")  # who writes looks at the clock when there is something to do
    engine.do(do="empty")
    ben = engine.turn(PROMPT, session="ben", salt="another")
    assert (ben["cached"], ben["token_ids"]) == (0, cold["token_ids"])
    assert engine.do(do="settle")["chunks"] == 2 * blocks  # and no file more: what was forgotten meanwhile is gone
    engine.do(do="empty")
    ben = engine.turn(PROMPT, session="ben", salt="another")
    assert ben["cached"] >= len(PROMPT) - BLOCK
    assert ben["token_ids"] == cold["token_ids"]
    status = engine.do(do="status")
    assert (status["state"], status["faults"], status["files"]) == (
        "ok",
        dict.fromkeys(status["faults"], 0),
        2 * blocks,
    )
    engine.kill()


@pytest.mark.timeout(400)
def test_a_session_that_was_forgotten_meanwhile_and_a_file_that_was_changed_are_recomputed(
    tiny_model: Path, tmp_path: Path, gateway: Gateway
) -> None:
    folder = tmp_path / "tier"
    first = Engine(tiny_model, folder, gateway)
    cold = {session: first.turn(PROMPT, session=session, salt=session) for session in ("ana", "ben")}
    first.do(do="settle")
    first.dies("removed", {"do": "release", "session": "ana"})
    assert list(folder.rglob("acme~ana/*")), "it was killed before all of them were gone"
    for file in folder.rglob("acme~ben/*"):
        with file.open("r+b") as opened:
            opened.seek(5000)
            opened.write(b"\0\1\2\3")
    gateway.gone = {"ana"}

    second = Engine(tiny_model, folder, gateway)
    until(lambda: not list(folder.rglob("acme~ana/*")))  # though nobody asked for it
    again = {session: second.turn(PROMPT, session=session, salt=session) for session in ("ana", "ben")}
    assert [again[session]["cached"] for session in ("ana", "ben")] == [0, 0]
    assert [again[session]["reason"] for session in ("ana", "ben")] == ["", "tier_fault"]
    assert {session: again[session]["token_ids"] for session in again} == {
        session: cold[session]["token_ids"] for session in cold
    }
    faults = second.do(do="settle")["faults"]
    assert faults["damaged"] > 0
    second.kill()


@pytest.mark.timeout(400)
def test_what_an_engine_before_found_to_be_wrong_is_not_restored(
    tiny_model: Path, tmp_path: Path, gateway: Gateway
) -> None:
    folder = tmp_path / "tier"
    first = Engine(tiny_model, folder, gateway)
    cold = first.turn(PROMPT)
    first.do(do="settle")
    first.do(do="quarantine")
    until((folder / "quarantined").exists)
    first.kill()

    second = Engine(tiny_model, folder, gateway)
    again = second.turn(PROMPT)
    assert (again["cached"], again["reason"]) == (0, "tier_fault")
    assert again["token_ids"] == cold["token_ids"]
    second.kill()
