"""Keys of tiers: who gets one, what becomes of a question, and that they reach vLLM's core in its cage."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.engine.client import EngineClient
from appliance.engine.command_line import EngineSpec
from appliance.engine.inside.disk.channel import KeyAsker
from appliance.engine.inside.disk.cipher import NONCE_BYTES, AesGcm
from appliance.engine.inside.disk.files import Owner
from appliance.engine.inside.disk.keys import NoKey
from appliance.engine.launcher import EngineProcess
from appliance.engine.tier_keys import (
    KEY_SOCKET,
    KeyChannel,
    SessionGone,
    inherited_socket,
    question,
    read_answer,
)

ANA = Owner("acme", "ana")
KEY = bytes(range(32))


async def _key_of(tenant: str, session: str) -> bytes:
    if session == "gone":
        raise SessionGone
    if session == "sealed":
        raise RuntimeError("the vault is sealed")
    return KEY


@pytest.fixture
def channel() -> KeyChannel:
    return KeyChannel(_key_of)


async def _wait(asker: KeyAsker, owner: Owner) -> AesGcm | None:
    return await asyncio.to_thread(asker.keys.wait, owner)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (threads and other processes see to it)
            await asyncio.sleep(0.001)


def test_the_engine_gets_the_key_that_it_asks_for(channel: KeyChannel) -> None:
    async def main() -> None:
        asker = KeyAsker(channel.open(lambda process: process == os.getpid()))
        cipher = await _wait(asker, ANA)
        assert cipher is not None
        assert _sealed(cipher) == _sealed(AesGcm(KEY))
        asker.close()
        channel.close()

    asyncio.run(main())


def test_no_key_now_is_told_from_no_key_ever(channel: KeyChannel) -> None:
    async def main() -> None:
        asker = KeyAsker(channel.open(lambda _: True))
        gone: list[Owner] = []
        asker.keys.on_gone = gone.append
        assert await _wait(asker, Owner("acme", "sealed")) is None
        assert gone == []
        assert await _wait(asker, Owner("acme", "gone")) is None
        await _until(lambda: gone == [Owner("acme", "gone")])
        asker.close()
        channel.close()

    asyncio.run(main())


def test_who_is_not_of_the_engine_gets_nothing_though_it_holds_the_socket(channel: KeyChannel) -> None:
    async def main() -> None:
        theirs = channel.open(lambda process: process == os.getpid())
        script = f"import socket; socket.socket(fileno={theirs.fileno()}).send({question(*ANA)!r})"
        await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", script], pass_fds=[theirs.fileno()], check=True, timeout=20
        )
        await _until(lambda: channel.refused_total == 1)
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(100)
        theirs.close()
        channel.close()

    asyncio.run(main())


def test_a_vault_that_is_sealed_takes_the_keys_out_of_the_engine(channel: KeyChannel) -> None:
    async def main() -> None:
        asker = KeyAsker(channel.open(lambda _: True))
        assert await _wait(asker, ANA) is not None
        channel.sealed()
        await _until(lambda: len(asker.keys) == 0)
        asker.close()
        channel.close()

    asyncio.run(main())


def test_a_key_that_was_had_before_the_vault_was_sealed_is_not_answered_after_it() -> None:
    async def main() -> None:
        asked, had = asyncio.Event(), asyncio.get_running_loop().create_future()

        async def key_of(tenant: str, session: str) -> bytes:
            asked.set()
            key: bytes = await had
            return key

        channel = KeyChannel(key_of)
        theirs = channel.open(lambda _: True)
        theirs.setblocking(False)
        theirs.send(question(*ANA))
        await asked.wait()
        had.set_result(KEY)  # the answer is due, and its task has not run yet
        channel.sealed()
        await _until(lambda: not channel._answering)
        packet = theirs.recv(100)
        assert packet
        assert read_answer(packet) is None
        with pytest.raises(BlockingIOError):
            theirs.recv(100)
        theirs.close()
        channel.close()

    asyncio.run(main())


def test_an_engine_that_cannot_be_told_that_the_vault_is_sealed_loses_the_channel(channel: KeyChannel) -> None:
    async def main() -> None:
        theirs = channel.open(lambda _: True)
        ours = channel._socket
        assert ours is not None
        with contextlib.suppress(BlockingIOError):
            while True:  # it reads nothing
                ours.send(b"K" + KEY + question(*ANA))
        channel.sealed()
        asker = KeyAsker(theirs)  # what lies there still is read, and then forgotten
        await _until(lambda: asker._socket is None)
        assert len(asker.keys) == 0
        assert asker.keys.look(ANA) is NoKey.REFUSED

    asyncio.run(main())


def test_a_gateway_that_is_gone_takes_the_keys_along_and_holds_nobody_up(channel: KeyChannel) -> None:
    async def main() -> None:
        asker = KeyAsker(channel.open(lambda _: True))
        assert await _wait(asker, ANA) is not None
        channel.close()
        await _until(lambda: len(asker.keys) == 0)
        assert asker.keys.look(ANA) is NoKey.REFUSED

    asyncio.run(main())


def test_without_a_socket_there_is_no_key() -> None:
    assert inherited_socket({}) is None
    assert inherited_socket({KEY_SOCKET: "no number"}) is None
    assert inherited_socket({KEY_SOCKET: "9999"}) is None
    assert KeyAsker(None).keys.look(ANA) is NoKey.REFUSED


def test_another_descriptor_is_not_taken_for_the_socket() -> None:
    one, two = socket.socketpair()
    with one, two:
        assert inherited_socket({KEY_SOCKET: str(one.fileno())}) is None
        one.send(b"it is open still")
        assert two.recv(100) == b"it is open still"


@pytest.mark.parametrize("packet", [b"", b"K", b"N", b"Xacme~ana", b"K" + KEY, b"Nacme", b"Nacme~a/b"])
def test_what_is_no_answer_is_refused(packet: bytes) -> None:
    with pytest.raises(ValueError, match="no answer"):
        read_answer(packet)


def test_the_key_reaches_the_core_that_vllm_spawns_in_its_cage(channel: KeyChannel, spec: EngineSpec) -> None:
    async def main() -> None:
        child = Path(__file__).with_name("asks_for_a_key.py")
        async with EngineClient(spec.socket) as client:
            engine = EngineProcess(
                spec,
                client,
                command=lambda _: [sys.executable, str(child)],
                base_environment={},
                keys=channel,
            )
            await engine.start()
            await _until(lambda: (spec.run_dir / "core-said").exists())
            assert (spec.run_dir / "core-said").read_text() == _sealed(AesGcm(KEY))
            await engine.stop()

    asyncio.run(main())


@pytest.fixture
def spec(tmp_path: Path) -> EngineSpec:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return EngineSpec(
        python=Path(sys.executable),
        model=tmp_path / "model",
        served_name="model",
        run_dir=tmp_path / "run",
        log_path=tmp_path / "engine.log",
    )


def _sealed(cipher: AesGcm) -> str:
    sealed = bytearray(8)
    cipher.seal(bytes(NONCE_BYTES), b"", memoryview(b"the text"), memoryview(sealed))
    return sealed.hex()
