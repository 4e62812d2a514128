"""What the way to a SIEM keeps up with, and what it costs those who are served. `python -m benchmarks.siem`.

A real appender, exporter and rsyslog (TLS, both sides with a certificate), all on this machine:

- 5,100 events/s are appended, durably, and go out meanwhile: how far behind the export is, and how long after the last
  append rsyslog has written the last line;
- with nothing appended, how fast a destination catches up;
- what a request gains in latency while one does: requests of 1 ms of the loop in ten pieces, as a turn has it, asked by
  another process.

`--check` leaves with 1 when a figure misses what the project promises.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import uvloop

from appliance.audit.events import TURN_ADMITTED, Actor, Event
from appliance.audit.launch import Launcher
from appliance.audit.log import PUBLIC_KEY
from appliance.audit.notes import SigningKey
from appliance.audit.recorder import Recorder
from appliance.audit.siem.destinations import Destination
from appliance.audit.siem.exports import Exports
from appliance.vault import Vault
from benchmarks.audit import open_vault
from benchmarks.load import percentile
from tests.rsyslog import Pki, Rsyslog, running_rsyslog

LEAST_PER_S: Final = 5000
EVENTS_PER_S: Final = 5100  # that are appended: the clock of who appends is no better
LAG_S: Final = 1.0
ADDED_P99_MS: Final = 1.0
_EVERY_S: Final = 0.01
_PIECES: Final = 10
_PIECE_S: Final = 0.0001
_REQUEST_EVERY_S: Final = 0.004
_ASKING_S: Final = 5.0
_RECEIVER_NICE: Final = 19
_DEADLINE_S: Final = 60.0
_VERSIONS: Final = {"holdfast": "0.1.0", "python": "3.11.7", "vllm": "0.32.0"}
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


class Node:
    """The parts of a gateway that the log and its export need."""

    def __init__(self, place: Path, vault: Vault) -> None:
        self.state = place / "state"
        (self.state / "run").mkdir(mode=0o700, parents=True)
        self.launcher = Launcher(self.state / "audit", self.state / "run")
        self.recorder = Recorder(lambda: vault, system_scope="system", versions=_VERSIONS)
        self.exports = Exports(self.state, self.state / "audit", size=self.size, keys=vault)

    async def size(self) -> int:
        """How many entries are on the disk."""
        return int((await self.recorder.status())["size"])

    async def record(self, count: int) -> None:
        """Append events as fast as it goes."""
        for _ in range(0, count, 200):
            await self.recorder.record(*[_EVENT] * 200)

    async def until_sent(self, size: int) -> None:
        """Wait until the destination was sent everything."""
        async with asyncio.timeout(_DEADLINE_S):
            while self.exports.view("to").sent < size:  # noqa: ASYNC110  (another process's doing)
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running_node(place: Path, vault: Vault) -> AsyncIterator[Node]:
    """A node for as long as the context lasts."""
    node = Node(place, vault)
    recording = asyncio.create_task(node.recorder.run(node.launcher.connect))
    try:
        await node.recorder.record(_EVENT)
        key = SigningKey("benchmark", b"k" * 32)
        await node.recorder.sign_with(key.to_bytes())
        (node.state / "audit" / PUBLIC_KEY).write_text(f"{key.verifier()}\n")
        node.exports.start()
        yield node
    finally:
        await node.exports.stop()
        recording.cancel()
        await asyncio.gather(recording, return_exceptions=True)
        await node.launcher.stop()


async def keep_up(node: Node, receiver: Rsyslog, *, seconds: float) -> dict[str, float]:
    """Append at the promised rate while it goes out."""
    await node.until_sent(await node.size())
    before, began = await node.size(), time.perf_counter()
    appended, lags, writing = 0, [0.0], set[asyncio.Future[int]]()
    while (now := time.perf_counter()) < began + seconds:
        due = int((now - began) * EVENTS_PER_S) - appended
        if due:
            writing.add(recorded := node.recorder.record(*[_EVENT] * due))
            recorded.add_done_callback(writing.discard)
            appended += due
        lags.append(node.exports.view("to").lag_s)
        await asyncio.sleep(_EVERY_S)
    await asyncio.gather(*writing)
    ended = time.perf_counter()
    size = await node.size()
    await _until_written(receiver, size - 1)
    return {
        "appended_per_s": (size - before) / (ended - began),
        "lag_p50_s": percentile(lags, 0.5),
        "lag_most_s": max(lags),
        "last_line_after_s": time.perf_counter() - ended,
    }


async def catch_up(node: Node, destination: Destination, *, events: int) -> dict[str, float]:
    """What is sent a second when nothing is appended, and what that adds to requests."""
    idle = await _requests()
    await node.exports.remove("to")
    await node.record(events)
    size = await node.size()
    await node.exports.add(destination)
    began = time.perf_counter()
    busy = asyncio.create_task(_requests())
    await node.until_sent(size)
    figures = {"caught_up_per_s": size / (time.perf_counter() - began)}
    took = await busy
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        figures[f"request_idle_{name}_ms"] = 1000 * percentile(idle, part)
        figures[f"request_added_{name}_ms"] = 1000 * (percentile(took, part) - percentile(idle, part))
    return figures


async def _until_written(receiver: Rsyslog, sequence: int) -> None:
    async with asyncio.timeout(_DEADLINE_S):
        while f'"sequence":{sequence},' not in receiver.newest:  # noqa: ASYNC110  (another process's doing)
            await asyncio.sleep(0.02)


async def _requests() -> list[float]:
    """How long requests took that another process asked this loop for."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1):
            for _ in range(_PIECES):
                until = time.perf_counter() + _PIECE_S
                while time.perf_counter() < until:
                    pass
                await asyncio.sleep(0)
            writer.write(b"y")
        writer.close()

    # Spawned, not forked: the asker has nothing of this process to take care of.
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    port = server.sockets[0].getsockname()[1]
    asker = multiprocessing.get_context("spawn").Process(target=_ask, args=(port, theirs))
    asker.start()
    try:
        return await asyncio.to_thread(ours.recv)
    finally:
        await asyncio.to_thread(asker.join)
        server.close()


def _ask(port: int, results: Connection) -> None:
    took = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ends = time.perf_counter() + _ASKING_S
        while (began := time.perf_counter()) < ends:
            connection.sendall(b"x")
            connection.recv(1)
            took.append(time.perf_counter() - began)
            time.sleep(_REQUEST_EVERY_S)
    results.send(took)


async def measure(place: Path, vault: Vault, *, seconds: float, events: int) -> dict[str, float]:
    """Every figure, in one run."""
    pki = Pki(place / "pki")
    with running_rsyslog(place / "receiver", pki) as receiver:
        destination = Destination(
            "to",
            f"syslog+tls://127.0.0.1:{receiver.port}",
            ca=pki.folder / "ca.pem",
            certificate=pki.folder / "client.pem",
            private_key=pki.folder / "client.key",
        )
        async with running_node(place, vault) as node:
            await node.exports.add(destination)
            figures = await keep_up(node, receiver, seconds=seconds)
            _put_last(receiver.pid)
            return figures | await catch_up(node, destination, events=events)


def _put_last(pid: int) -> None:
    """Have a process work when nobody else does: a receiver is another machine, which a request does not wait for."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), _RECEIVER_NICE)


def promises_met(figures: dict[str, float]) -> dict[str, bool]:
    """Each promise, and whether the figures keep it."""
    return dict(_promises(figures))


def _promises(figures: dict[str, float]) -> Iterator[tuple[str, bool]]:
    kept_up = figures["appended_per_s"] >= LEAST_PER_S and figures["lag_most_s"] <= LAG_S
    yield f"keeps up with {LEAST_PER_S:,} events/s, never {LAG_S:g} s behind", kept_up
    yield f"the last line is written within {LAG_S:g} s", figures["last_line_after_s"] <= LAG_S
    yield f"catches up faster than {LEAST_PER_S:,} events/s", figures["caught_up_per_s"] > LEAST_PER_S
    yield f"adds under {ADDED_P99_MS:g} ms to a request, p99", figures["request_added_p99_ms"] < ADDED_P99_MS


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=10.0, help="of appending at the promised rate")
    parser.add_argument("--events", type=int, default=60_000, help="to catch up with")
    parser.add_argument("--place", type=Path, help="a directory on the disk to measure; the temporary one by default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a figure misses its bound")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-siem-", dir=given.place) as name:
        place = Path(name)
        figures = uvloop.run(measure(place, open_vault(place), seconds=given.seconds, events=given.events))
    promises = promises_met(figures)
    if given.json:
        sys.stdout.write(json.dumps({"figures": figures, "met": promises}, indent=2) + "\n")
    else:
        for name_, value in figures.items():
            print(f"{name_:<24}{value:>14,.2f}")
        for promise, kept in promises.items():
            print(f"{'met   ' if kept else 'MISSED'}  {promise}")
    return 1 if given.check and not all(promises.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
