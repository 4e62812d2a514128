"""HTTP/1.1 on a connection, within bounds that come before any application.

Rules:

- The request line and the headers of one request have a size and a deadline: a connection that sends neither more nor
  less than it must is never waited for. The deadline begins with whatever comes after an answer, an empty line too.
- An answer waits for a client that does not read it only so long: then the connection is aborted, and whatever waits
  to send is told that the client is gone.
- What comes around a body (chunk extensions, trailer fields) has the size of the headers. Trailers are not kept.
- What is not HTTP, or too much of it, is answered in the same shape as every other error, with an `X-Request-ID`, and
  the connection is closed. Where an answer has begun already, or headers come too late, it is closed only. All are told
  to `tell_refused`.
- An answer that is over before its request was read ends the connection: nobody would bound the rest.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from api.openai.errors import HeadersLate, HeadersTooLarge, NotHttp, error_object, status_of
from appliance.errors import HoldfastError

TellRefused = Callable[[str, HoldfastError], None]
_HEADER_DEADLINE_S = 15.0


def _tell_nobody(source: str, error: HoldfastError) -> None:
    pass


class BoundedProtocol(HttpToolsProtocol):
    """What the data listener speaks, and what the admin listener's protocol is made of.

    Attributes:
        max_header_bytes: of the request line and all headers together, and of what comes between pieces of a body and
            after the last.
        unread_timeout_s: how long what was written may lie unread.
        tell_refused: is told the source and the error of what is refused here.
    """

    max_header_bytes = 64 << 10
    unread_timeout_s = 10.0
    tell_refused: TellRefused = staticmethod(_tell_nobody)
    cycle: RequestResponseCycle | None  # type: ignore[assignment]  # none before the first request

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._bytes_without_body = 0
        self._in_headers = True
        self._in_body = False
        self._refused = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More was written than the client reads."""
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self.unread_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        self._stop_unread_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Count what brings a body no further: the parser holds a field, however long, until it is complete."""
        if self._refused:
            return
        self._bytes_without_body += len(data)
        super().data_received(data)
        if self._bytes_without_body > self.max_header_bytes:
            self._refuse_headers()
        elif self._is_idle():
            # The wait for another request ended with the first byte, and the parser skips empty lines without a word.
            self._await_headers()

    def on_message_begin(self) -> None:
        """Another request on this connection."""
        super().on_message_begin()
        if not self._in_headers:
            self._await_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, and no trailer."""
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the application, unless it brought too much."""
        self._in_headers, self._bytes_without_body = False, 0
        self._stop_timer()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.max_header_bytes:
            self._refuse_headers()
            return
        self._in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Nothing of a refused request is kept."""
        self._bytes_without_body = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Nothing of a refused request is answered twice."""
        self._in_body = False
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the connection if all of the request was read."""
        if self._in_body and self.cycle is not None and self.cycle.response_complete:
            self.transport.close()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  (uvicorn's signature)
        """What came is no HTTP."""
        self._refuse(
            NotHttp(
                "the request cannot be read",
                cause="it is not HTTP/1.1 as RFC 9112 has it",
                remedy="Send it with an HTTP library",
            )
        )

    @staticmethod
    def content_of(error: HoldfastError, request_id: str) -> bytes:
        """A refusal's body, in the shape of the listener's other errors."""
        return error_object(error, request_id)

    def _is_idle(self) -> bool:
        """Whether no request is being read, and none has its answer still to come."""
        reading = self._in_headers or self._in_body
        return not (reading or self._refused) and (self.cycle is None or self.cycle.response_complete)

    def _await_headers(self) -> None:
        self._in_headers, self._bytes_without_body = True, 0
        self._header_timer = self.loop.call_later(_HEADER_DEADLINE_S, self._headers_late)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _headers_late(self) -> None:
        if not self.transport.is_closing():
            self.tell_refused(
                self._source,
                HeadersLate(
                    "the request's headers did not come in time",
                    cause=f"they were not complete {_HEADER_DEADLINE_S:g} s after the connection was ready for them",
                    remedy="Send them at once, and close a connection that is not needed",
                ),
            )
            self.transport.close()

    @property
    def _source(self) -> str:
        return "" if self.client is None else self.client[0]

    def _refuse_headers(self) -> None:
        self._refuse(
            HeadersTooLarge(
                "the request's headers are too large",
                cause=f"allowed are {self.max_header_bytes} bytes (gateway.max_header_bytes)",
                remedy="Send fewer or shorter headers",
            )
        )

    def _refuse(self, error: HoldfastError) -> None:
        if self._refused:
            return
        self._refused = True
        self._stop_timer()
        if self.transport.is_closing():
            return
        self.tell_refused(self._source, error)
        if not self._may_answer():
            self.transport.close()
            return
        request_id = os.urandom(16).hex()
        content = self.content_of(error, request_id)
        self.transport.write(
            STATUS_LINE[status_of(error)]
            + b"content-type: application/json\r\nconnection: close\r\n"
            + b"x-request-id: %s\r\ncontent-length: %d\r\n\r\n" % (request_id.encode(), len(content))
            + content
        )
        self.transport.close()

    def _may_answer(self) -> bool:
        """Whether an answer would stand where the client expects one, and not in the middle of another."""
        if self.cycle is None:
            return True
        if self._in_body:
            return not self.pipeline and not self.cycle.response_started
        return self.cycle.response_complete


def bounded_by(
    max_header_bytes: int,
    unread_timeout_s: float,
    tell_refused: TellRefused,
    protocol: type[BoundedProtocol] = BoundedProtocol,
) -> type[BoundedProtocol]:
    """`protocol` with bounds of its own: uvicorn makes protocols itself, from a class."""
    bounds = {
        "max_header_bytes": max_header_bytes,
        "unread_timeout_s": unread_timeout_s,
        "tell_refused": staticmethod(tell_refused),
    }
    return type(protocol.__name__, (protocol,), bounds)
