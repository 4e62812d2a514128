"""Streamed chat completions, many at a time, timed: agents that resend their whole conversation, as SDKs do.

Rules:

- A conversation has `TURNS` turns of a system prompt, questions of 400 characters and the stub's own answers: six
  messages a request on the average. It begins with words of its own, so that each conversation is a session of its own.
- Times are taken in this process: from writing a request to the first byte of its stream, and to its end.
- A stream counts only if its status is 200 and it ended with `[DONE]`.
"""

import asyncio
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from benchmarks.stub import MODEL

TURNS = 5
_ANSWER = "".join(f" word{number}" for number in range(14))
_END = b"0\r\n\r\n"
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: a TCP port of the loopback, or a Unix socket."""

    name: str
    port: int = 0
    socket: str = ""
    api_key: str = ""

    def request(self, body: bytes, *, session: str = "") -> bytes:
        """The request, as it goes over the connection; `session` names the session that it belongs to."""
        authorization = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        authorization += f"X-Session-ID: {session}\r\n" if session else ""
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"{authorization}Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(slots=True)
class Times:
    """Seconds from a request's writing, for each stream that ended well."""

    first: list[float] = field(default_factory=list)
    end: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """A connection that carries one stream after the other."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._ended: asyncio.Future[None] | None = None
        self._first_at = 0.0

    @classmethod
    async def open(cls, target: Target) -> "Connection":
        """Connect to `target`."""
        loop = asyncio.get_running_loop()
        if target.socket:
            _, connection = await loop.create_unix_connection(cls, target.socket)
        else:
            _, connection = await loop.create_connection(cls, "127.0.0.1", target.port)
        return connection

    async def stream(self, request: bytes, times: Times) -> None:
        """Send a request and wait for the end of its stream."""
        assert self._transport is not None
        self._received.clear()
        self._first_at = 0.0
        self._ended = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self._transport.write(request)
        await self._ended
        if not self._received.startswith(b"HTTP/1.1 200") or _DONE not in self._received[-64:]:
            times.errors.append(bytes(self._received[:200]).decode("latin-1"))
            return
        times.first.append(self._first_at - began)
        times.end.append(time.perf_counter() - began)

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._first_at and b"data: " in data:
            self._first_at = time.perf_counter()
        if self._received.endswith(_END):
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  (asyncio's signature)
        self._finish()

    def _finish(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


def conversation(name: str) -> Iterator[bytes]:
    """The bodies of one conversation's requests."""
    messages = [{"role": "system", "content": _padded(f"You are the agent {name}.")}]
    for turn in range(TURNS):
        messages.append({"role": "user", "content": _padded(f"Question {turn} of {name}.")})
        yield json.dumps({"model": MODEL, "stream": True, "messages": messages}).encode()
        messages.append({"role": "assistant", "content": _ANSWER})


def _padded(text: str) -> str:
    return (text + " What else is there to say of it?" * 20)[:400]


class Agents:
    """Conversations without end, `width` of them at a time, taken in turn."""

    def __init__(self, name: str, width: int) -> None:
        self._name = name
        self._numbers = itertools.count()
        self._waiting: deque[Iterator[bytes]] = deque(self._new() for _ in range(width))

    def take(self) -> tuple[bytes, Iterator[bytes]]:
        """The next request's body, and its conversation: to be given back when the request is over."""
        agent = self._waiting.popleft() if self._waiting else self._new()
        body = next(agent, None)
        if body is None:
            agent = self._new()
            body = next(agent)
        return body, agent

    def give_back(self, agent: Iterator[bytes]) -> None:
        """The conversation can go on."""
        self._waiting.append(agent)

    def _new(self) -> Iterator[bytes]:
        return conversation(f"{self._name}-{next(self._numbers)}")


async def at_rate(target: Target, agents: Agents, *, per_second: float, seconds: float) -> Times:
    """Requests at fixed moments, whether earlier ones have ended or not."""
    times = Times()
    idle = [await Connection.open(target) for _ in range(4)]
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def one() -> None:
        connection = idle.pop() if idle else await Connection.open(target)
        body, agent = agents.take()
        await connection.stream(target.request(body), times)
        agents.give_back(agent)
        idle.append(connection)

    async with asyncio.TaskGroup() as requests:
        for number in range(round(per_second * seconds)):
            await asyncio.sleep(max(0.0, began + number / per_second - loop.time()))
            requests.create_task(one())
    for connection in idle:
        connection.close()
    return times


async def closed_loop(target: Target, agents: Agents, *, connections: int, seconds: float) -> tuple[Times, float]:
    """Each connection sends its next request when its last has ended; the streams, and the seconds that they took."""
    times = Times()
    began = time.perf_counter()

    async def worker() -> None:
        connection = await Connection.open(target)
        while time.perf_counter() - began < seconds:
            body, agent = agents.take()
            await connection.stream(target.request(body), times)
            agents.give_back(agent)
        connection.close()

    async with asyncio.TaskGroup() as workers:
        for _ in range(connections):
            workers.create_task(worker())
    return times, time.perf_counter() - began


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
