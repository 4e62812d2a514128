"""What the gateway and its exporter say to each other, over a socket that they share with nobody.

Rules:

- Frames are those of `appliance.audit.protocol`. Either side may ask; answers come as they are ready.
- Every question is answered, what cannot be answered with an error. Whoever asks waits at most `_ANSWER_S`. When the
  link ends, everybody who waits is told.
- The exporter asks for the secret of one entry at a time (`SECRETS`): the key of a tenant, or of the system, never
  leaves the gateway.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Final, cast

from appliance.audit import protocol
from appliance.errors import REGISTRY, Fault, HoldfastError

# The exporter asks
SECRETS: Final = (
    1  # key id, nonce and commitment of some entries; answered with `SECRET_BYTES` for each, see `exporter`
)
SIZE: Final = 2  # how many entries the appender has answered for; answered with `protocol.SEQUENCE`
VIEWS: Final = 3  # how each destination is, as JSON; answered with nothing
# The gateway asks
DESTINATIONS: Final = 10  # what there is to ship to, as JSON; answered once what is not among it has ended
TRY_OUT: Final = 11  # one destination, as JSON; answered when it took a test event
STOP: Final = 12  # a size: ship until there, for a moment; answered when all have ended

_ANSWER_S: Final = 100.0  # longer than connecting and a test take

_LOG = logging.getLogger("holdfast.audit.siem")

Serve = Callable[[int, bytes], Awaitable[bytes]]


class ExporterLost(HoldfastError):
    """The exporter is not there, or does not answer."""

    code: ClassVar[str] = "audit_exporter_lost"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class Link(asyncio.Protocol):
    """One end. `serve` answers what the other end asks: it returns the answer, or raises what is told instead.

    Attributes:
        lost: done when the link has ended.
    """

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._received = bytearray()
        self._transport: asyncio.WriteTransport | None = None
        self._numbers = 0
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._heard_s = time.monotonic()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def silent_s(self) -> float:
        """For how long the other end has said nothing, though it waits for no answer of ours."""
        return 0.0 if self._serving else time.monotonic() - self._heard_s

    async def ask(self, kind: int, body: bytes = b"") -> bytes:
        """The other end's answer.

        Raises:
            ExporterLost: there is none.
            HoldfastError: what the other end raised.
        """
        if self._transport is None or self._transport.is_closing():
            raise _lost("it has ended")
        self._numbers += 1
        number = self._numbers
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._transport.write(protocol.pack(kind, number, body))
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await answer
        except TimeoutError:
            raise _lost(f"no answer in {_ANSWER_S:g} s") from None
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        self._heard_s = time.monotonic()
        self._received += data
        try:
            for message in protocol.take_messages(self._received):
                if message.kind in (protocol.DONE, protocol.REFUSED):
                    self._answered(message)
                else:
                    task = asyncio.create_task(self._answer(message))
                    self._serving.add(task)
                    task.add_done_callback(self._served)
        except protocol.Malformed:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  (asyncio's signature)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_lost("it has ended"))
        for task in self._serving:
            task.cancel()
        if not self.lost.done():
            self.lost.set_result(None)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._heard_s = time.monotonic()

    def _answered(self, message: protocol.Message) -> None:
        answer = self._waiting.get(message.number)
        if answer is None or answer.done():
            return
        if message.kind == protocol.DONE:
            answer.set_result(message.body)
        else:
            answer.set_exception(_remade(json.loads(message.body)))

    async def _answer(self, message: protocol.Message) -> None:
        try:
            answer = protocol.pack(protocol.DONE, message.number, await self._serve(message.kind, message.body))
        except HoldfastError as error:
            answer = _refusal(message, error)
        except Exception as error:  # a defect: whoever asked must not wait for an answer that never comes
            _LOG.exception("what the other end asked for cannot be answered")
            answer = _refusal(message, _defect(error))
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(answer)


def _refusal(message: protocol.Message, error: HoldfastError) -> bytes:
    return protocol.pack(protocol.REFUSED, message.number, json.dumps(error.record()).encode())


def _defect(error: Exception) -> HoldfastError:
    return HoldfastError(
        "the gateway and its exporter do not understand each other",
        cause=f"{type(error).__name__}: {error}"[:300],
        remedy="`holdfast logs gateway` has the trace; please report it",
    )


def _remade(record: dict[str, Any]) -> HoldfastError:
    """The error that the other end raised."""
    kind = REGISTRY.get(str(record["code"]), HoldfastError)
    error = kind.__new__(kind)
    HoldfastError.__init__(error, str(record["message"]), cause=str(record["cause"]), remedy=str(record["remedy"]))
    return error


def _lost(cause: str) -> ExporterLost:
    return ExporterLost(
        "the exporter of the audit log does not answer",
        cause=cause,
        remedy="It is started again by itself; events wait in the log. `holdfast logs gateway` says more",
    )
