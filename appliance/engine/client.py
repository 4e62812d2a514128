"""Talk to the engine over its Unix socket.

Rules:

- Everything is bounded: the time to connect, the silence between two reads, the size of an answer and of one event.
- Whoever leaves a stream early closes its connection; vLLM takes that as the order to stop generating.
- A stream ends with `[DONE]`. One that stops earlier was lost, however politely its connection was closed, and so was
  one that brings an error event: vLLM sends one, and `[DONE]` behind it, when its core dies.
- No error text holds what a client sent or what the engine answered: the engine's own words travel in
  `EngineRejected.body` alone.
- The socket is reached through a descriptor of its directory, so that a deep home fits into the 108 bytes that a socket
  address has (unix(7)).

`stream` is the gateway's hot path: it hands out what the socket delivers, split into events, and decodes nothing.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Generic, Self, TypeVar

from appliance.engine.http import Broken, Connection, Pool, Unreachable, request_bytes
from appliance.engine.picture import KV_PATH, KvPicture
from appliance.engine.protocol import (
    DEMOTE_PATH,
    LEASES_PATH,
    TURNS_PATH,
    LeaseReport,
    TurnAccount,
    TurnEnd,
    demote_request,
    leases_request,
    read_demote_answer,
    read_turn_accounts_answer,
    turn_ends_request,
)
from appliance.engine.wire import MalformedMessage
from appliance.errors import Fault, HoldfastError

_JSON_HEADERS = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
_IDLE_TIMEOUT_S = 30.0  # the engine keeps a connection open for longer: see command_line.environment
_DONE = b"[DONE]"
_ERROR = b'{"error":'  # how vLLM begins the event of a failure in mid-stream; it says [DONE] behind it all the same

T = TypeVar("T")


class EngineUnavailable(HoldfastError):
    """Nothing answers on the engine's socket, or the engine says that it cannot take work."""

    code: ClassVar[str] = "engine_unavailable"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class EngineLost(HoldfastError):
    """The engine had the request and did not finish it: it died, fell silent or answered what cannot be read."""

    code: ClassVar[str] = "engine_lost"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class EngineRejected(HoldfastError):
    """The engine refused the request. `status` and `body` are its answer; the body may quote the request."""

    code: ClassVar[str] = "engine_rejected"
    fault: ClassVar[Fault] = Fault.CALLER

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(
            "the engine refused the request",
            cause=f"it answered with status {status}",
            remedy="Correct the request: what the engine said is in the answer",
        )
        self.status = status
        self.body = body


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model that the engine serves, and the longest context it takes, in tokens."""

    id: str
    max_model_len: int | None


class EngineClient:
    """One engine, over a pool of connections to its Unix socket.

    Args:
        socket: where the engine listens; neither it nor its directory need exist yet.
        connections: the most that are open at a time; a request beyond them waits.
        connect_timeout_s: for a connection, a free place in the pool included.
        silence_timeout_s: the longest the engine may say nothing while it owes an answer. Prefill of a long prompt
            behind a queue is silence too.
        max_answer_bytes: of one whole answer; of a stream it bounds one event.
    """

    def __init__(
        self,
        socket: Path,
        *,
        connections: int = 1024,
        connect_timeout_s: float = 5.0,
        silence_timeout_s: float = 600.0,
        max_answer_bytes: int = 32 << 20,
    ) -> None:
        self.socket = socket
        self._connections = connections
        self._max_answer_bytes = max_answer_bytes
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._directory_fd: int | None = None
        self._pool: Pool | None = None

    async def health(self, *, deadline_s: float = 5.0) -> bool:
        """Whether the engine answers and calls itself healthy."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._call("GET", "/health")
        except (TimeoutError, HoldfastError):
            return False
        return True

    async def models(self, *, deadline_s: float = 10.0) -> list[ModelCard]:
        """What the engine serves."""
        body = await self._within(deadline_s, "GET", "/v1/models")
        try:
            return [ModelCard(card["id"], card.get("max_model_len")) for card in json.loads(body)["data"]]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise _unreadable("its list of models") from None

    async def call(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str,
        headers: Mapping[str, str] | None = None,
        deadline_s: float = 600.0,
    ) -> tuple[int, bytes]:
        """Post a JSON `body` and read the whole answer.

        Cancelling the call closes its connection, and with that ends the work on the engine.

        Raises:
            EngineRejected: the answer was a 4xx.
            EngineUnavailable: nothing listens, or the engine turns work away.
            EngineLost: no whole answer came, or none within `deadline_s`.
        """
        sent = {**_JSON_HEADERS, "X-Request-Id": request_id, **(headers or {})}
        return 200, await self._within(deadline_s, "POST", path, body, sent)

    def stream(
        self, path: str, body: bytes, *, request_id: str, headers: Mapping[str, str] | None = None
    ) -> "EngineStream[bytes]":
        """Post a JSON `body` that asks for a stream: an async context manager that yields the payloads of its events.

        Usage::

            async with client.stream("/v1/chat/completions", body, request_id="req_1") as events:
                async for payload in events:  # bytes, without "data: "; "[DONE]" ends the loop
                    ...

        Raises:
            EngineRejected, EngineUnavailable, EngineLost: as `call`, on entering; EngineLost while iterating too.
        """
        sent = {**_JSON_HEADERS, "X-Request-Id": request_id, **(headers or {})}
        return EngineStream(self, path, body, sent, _one_by_one)

    def batches(
        self, path: str, body: bytes, *, request_id: str, headers: Mapping[str, str] | None = None
    ) -> "EngineStream[list[bytes]]":
        """As `stream`, but yields the payloads that came together in a list: what one read of the socket delivered."""
        sent = {**_JSON_HEADERS, "X-Request-Id": request_id, **(headers or {})}
        return EngineStream(self, path, body, sent, _together)

    async def leases(
        self,
        release: Sequence[str] = (),
        *,
        awaited: Sequence[tuple[str, str]] = (),
        every: bool = False,
        deadline_s: float = 5.0,
    ) -> LeaseReport:
        """Release the leases named by their labels, let the others expire that are due, and say what is held.

        Args:
            awaited: tenant and session, by their labels, of those whose request waits here for the engine: their leases
                are reported.
            every: report every lease. For whoever shows them: it holds up the engine and this process.

        Raises:
            MalformedMessage: the engine's environment holds another version of holdfast.
        """
        asked = leases_request(release, awaited, every=every)
        body = await self._within(deadline_s, "POST", LEASES_PATH, asked, _JSON_HEADERS)
        try:
            return LeaseReport.from_wire(json.loads(body))
        except MalformedMessage:
            raise
        except (ValueError, RecursionError):
            raise _unreadable("its report of leases") from None

    async def demote(self, tier: str, sessions: Sequence[str], *, deadline_s: float = 5.0) -> frozenset[str]:
        """Have sessions, by their labels, keep nothing in the tiers before one that has all of them.

        Returns:
            Those that it has all of. The others stay where they are.

        Raises:
            MalformedMessage: the engine's environment holds another version of holdfast.
        """
        asked = demote_request(tier, sessions)
        return read_demote_answer(await self._within(deadline_s, "POST", DEMOTE_PATH, asked, _JSON_HEADERS))

    async def kv(self, sessions: int = 0, *, of: tuple[str, str] | None = None, deadline_s: float = 5.0) -> KvPicture:
        """What is kept, summed up, with the `sessions` that keep most; or `of` one, by its tenant's and its own label.

        Raises:
            MalformedMessage: the engine's environment holds another version of holdfast.
        """
        asked = f"sessions={sessions}" if of is None else f"tenant={of[0]}&session={of[1]}"
        body = await self._within(deadline_s, "GET", f"{KV_PATH}?{asked}")
        try:
            return KvPicture.from_wire(json.loads(body))
        except MalformedMessage:
            raise
        except (ValueError, RecursionError):
            raise _unreadable("its picture of what it keeps") from None

    async def turns_ended(self, ends: Sequence[TurnEnd], *, deadline_s: float = 5.0) -> tuple[TurnAccount | None, ...]:
        """Tell how turns ended; an account for each, in their order, None for a turn that the engine does not know.

        Raises:
            MalformedMessage: the engine's environment holds another version of holdfast.
            EngineRejected: it speaks nothing of the kind.
        """
        body = await self._within(deadline_s, "POST", TURNS_PATH, turn_ends_request(ends), _JSON_HEADERS)
        accounts = read_turn_accounts_answer(body)
        if len(accounts) != len(ends):
            raise MalformedMessage("an account for each turn")
        if any(account is not None and account.turn != end.turn for account, end in zip(accounts, ends, strict=True)):
            raise MalformedMessage("each account that of the turn that was asked about")
        return accounts

    async def metrics(self, *, deadline_s: float = 10.0) -> str:
        """The engine's metrics, in Prometheus' text format."""
        return (await self._within(deadline_s, "GET", "/metrics")).decode("utf-8", "replace")

    async def close(self) -> None:
        """Close every connection."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        descriptor, self._directory_fd = self._directory_fd, None
        if descriptor is not None:
            os.close(descriptor)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _within(
        self,
        deadline_s: float,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        try:
            async with asyncio.timeout(deadline_s):
                return await self._call(method, path, body, headers)
        except TimeoutError:
            raise _lost(f"it did not finish its answer within {deadline_s:g} s") from None

    async def _call(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        connection = await self._open(method, path, body, headers)
        try:
            answer = await _bounded(connection, self._max_answer_bytes)
        except Broken as broken:
            raise _lost(str(broken)) from None
        finally:
            self._give_back(connection)
        if connection.status != 200:
            raise _refusal(connection.status, answer)
        return answer

    async def _open(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None) -> Connection:
        """Send the request; the answer's status is there when this returns. To be given back."""
        try:
            connection = await self._connected().take()
        except OSError:
            raise self._unavailable() from None
        except Unreachable:
            self._follow_directory()
            raise self._unavailable() from None
        try:
            await connection.ask(request_bytes(method, path, headers or {}, body))
        except Broken as broken:
            self._give_back(connection)
            raise _lost(str(broken)) from None
        except BaseException:
            self._give_back(connection)
            raise
        return connection

    def _give_back(self, connection: Connection) -> None:
        if self._pool is None:
            connection.close()
        else:
            self._pool.give_back(connection)

    def _unavailable(self) -> EngineUnavailable:
        return EngineUnavailable(
            "the engine cannot be reached",
            cause=f"nothing answers on {self.socket}",
            remedy="Wait for it to start: `holdfast status` says how far it is, `holdfast logs` why not",
        )

    def _connected(self) -> Pool:
        if self._pool is None:
            self._directory_fd = os.open(self.socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._pool = Pool(
                f"/proc/self/fd/{self._directory_fd}/{self.socket.name}",
                limit=self._connections,
                connect_timeout_s=self._connect_timeout_s,
                silence_timeout_s=self._silence_timeout_s,
                idle_timeout_s=_IDLE_TIMEOUT_S,
            )
        return self._pool

    def _follow_directory(self) -> None:
        """The directory may have been made anew: from the next connection on, the descriptor is the new one's."""
        with contextlib.suppress(OSError):
            if self._directory_fd is not None:
                current = os.open(self.socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                os.dup2(current, self._directory_fd, inheritable=False)
                os.close(current)


Batches = AsyncGenerator[list[bytes]]


class EngineStream(Generic[T]):
    """The events of one answer while it is generated. Made by `EngineClient.stream` and `EngineClient.batches`."""

    def __init__(
        self,
        client: EngineClient,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        hand_out: Callable[[Batches], AsyncGenerator[T]],
    ) -> None:
        self._client = client
        self._path = path
        self._body = body
        self._headers = headers
        self._connection: Connection | None = None
        self._hand_out = hand_out
        self._generator: AsyncGenerator[T] | None = None
        self._complete = False

    async def __aenter__(self) -> AsyncIterator[T]:
        client = self._client
        connection = await client._open("POST", self._path, self._body, self._headers)
        if connection.status != 200:
            try:
                answer = await _bounded(connection, client._max_answer_bytes)
            except Broken as broken:
                raise _lost(str(broken)) from None
            finally:
                client._give_back(connection)
            raise _refusal(connection.status, answer)
        self._connection = connection
        self._generator = self._hand_out(self._batches(connection.read))
        return self._generator

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        connection = self._connection
        if connection is None or self._generator is None:
            return
        try:
            await self._generator.aclose()
            if self._complete and not connection.reusable:
                # Behind [DONE] comes the end of the body: waited for, the connection is used again.
                with contextlib.suppress(TimeoutError, Broken, EngineLost):
                    async with asyncio.timeout(1.0):
                        await _bounded(connection, 1024)
        finally:
            self._client._give_back(connection)

    async def _batches(self, read: Callable[[], Awaitable[bytes]]) -> Batches:
        limit = self._client._max_answer_bytes
        parts: list[bytes] = []  # of an event whose end has not come
        parts_bytes = 0
        while True:
            try:
                received = await read()
            except Broken as broken:
                raise _lost(str(broken)) from None
            if not received:
                raise _lost("its answer ended in the middle")
            if parts:
                if b"\n\n" not in received and not (received[:1] == b"\n" and parts[-1][-1:] == b"\n"):
                    parts.append(received)
                    parts_bytes += len(received)
                    if parts_bytes > limit:
                        raise _lost(f"one event of its answer is larger than {limit} bytes")
                    continue
                received = b"".join([*parts, received])
                parts.clear()
            *events, rest = received.split(b"\n\n")
            if rest:
                parts.append(rest)
            parts_bytes = len(rest)
            batch: list[bytes] = []
            try:
                for event in events:
                    if event.startswith(b"data: ") and b"\n" not in event:
                        payload = event[6:]
                    else:
                        payload = _payload(event)
                        if not payload:
                            continue
                    if payload == _DONE:
                        self._complete = True
                        break
                    if payload.startswith(_ERROR):
                        raise _broken_off(payload)
                    batch.append(payload)
            except HoldfastError:
                if batch:
                    yield batch
                raise
            if batch:
                yield batch
            if self._complete:
                return


async def _one_by_one(batches: Batches) -> AsyncGenerator[bytes]:
    async with contextlib.aclosing(batches):
        async for batch in batches:
            for payload in batch:
                yield payload


def _together(batches: Batches) -> Batches:
    return batches


def _payload(event: bytes) -> bytes:
    """The data of an event that is not one plain line (WHATWG HTML, 9.2.6); empty for comments and other fields."""
    data = []
    for line in event.splitlines():
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        elif name not in (b"", b"event", b"id", b"retry"):
            raise _unreadable("its stream")
    return b"\n".join(data)


async def _bounded(connection: Connection, limit: int) -> bytes:
    parts = bytearray()
    while received := await connection.read():
        parts += received
        if len(parts) > limit:
            raise _lost(f"its answer is larger than {limit} bytes")
    return bytes(parts)


def _broken_off(payload: bytes) -> HoldfastError:
    try:
        code = json.loads(payload)["error"]["code"]
    except (ValueError, TypeError, KeyError, RecursionError):
        code = 500
    return _refusal(code if isinstance(code, int) else 500, payload)


def _refusal(status: int, body: bytes) -> HoldfastError:
    if status == 503:
        return EngineUnavailable(
            "the engine takes no work",
            cause="it answered with status 503",
            remedy="Repeat the request later: `holdfast status` says whether the engine is being restarted",
        )
    if 400 <= status < 500:
        return EngineRejected(status, body)
    return _lost(f"it answered with status {status}")


def _lost(cause: str) -> EngineLost:
    return EngineLost(
        "the engine did not finish the request",
        cause=cause,
        remedy="Repeat the request: the session is kept, and the engine is restarted if it died",
    )


def _unreadable(what: str) -> EngineLost:
    return EngineLost(
        "the engine's answer cannot be read",
        cause=f"{what} is not in the form that vLLM 0.32 documents",
        remedy="Check with `holdfast doctor` that the engine's environment holds the version that was locked",
    )
