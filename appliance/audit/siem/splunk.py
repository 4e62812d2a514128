"""Splunk's HTTP Event Collector, with indexer acknowledgement.

Rules:

- `POST /services/collector/event`: a request holds many events, and is answered with an `ackId` when Splunk has taken
  it into memory. It counts as acknowledged when `/services/collector/ack` says so of that id: then it is indexed.
  Splunk says it once and forgets the id, so it is remembered here.
- `acknowledged` goes up in the order of sending. A request that is not acknowledged within `ACK_WITHIN_S` ends the
  connection, and all from it on is sent again.
- A token without acknowledgement is refused: what it answers means that Splunk has read the request, not that it keeps
  anything.
- Each connection has a channel of its own: ids of an earlier one mean nothing.
- An event is a text to Splunk, `_raw` is our line to the byte. Its source type is the token's.

Splunk Enterprise: Format events for HTTP Event Collector; About HTTP Event Collector Indexer Acknowledgment; Possible
error codes.
"""

import asyncio
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from appliance.audit.siem.files import read_in_time
from appliance.audit.siem.https import DEADLINE_S, Answer, Client, open_client, read_secret
from appliance.audit.siem.syslog import Receiver, unreachable
from appliance.audit.siem.transport import ExportUnusable, Message
from appliance.errors import HoldfastError

PORT: Final = 8088
MAX_MESSAGE_BYTES: Final = 10_000  # Splunk cuts off what is longer unless TRUNCATE says otherwise
ACK_WITHIN_S: Final = 300.0  # what Splunk advises: five minutes
_POLL_EVERY_S: Final = 1.0
_MOST_REQUESTS: Final = 64  # that are not acknowledged
_EVENT, _ACK, _HEALTH = "/services/collector/event", "/services/collector/ack", "/services/collector/health"


class SplunkHec:
    """The transport, as `transport.Transport` has it.

    Args:
        token_file: holds the token of an input that has acknowledgement enabled.
        hostname: the `host` of events.
        channel: makes a GUID for each connection.
    """

    messages_at_once: Final = 256

    def __init__(
        self,
        receiver: Receiver,
        token_file: Path,
        *,
        hostname: str,
        max_payload_bytes: int = MAX_MESSAGE_BYTES,
        deadline_s: float = DEADLINE_S,
        ack_within_s: float = ACK_WITHIN_S,
        poll_every_s: float = _POLL_EVERY_S,
        monotonic: Callable[[], float] = time.monotonic,
        channel: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self._receiver = receiver
        self._token_file = token_file
        self._hostname = hostname
        self.max_payload_bytes = max_payload_bytes
        self._deadline_s = deadline_s
        self._ack_within_s = ack_within_s
        self._poll_every_s = poll_every_s
        self._monotonic = monotonic
        self._channel = channel

    def __str__(self) -> str:
        return f"Splunk at {self._receiver}"

    async def connect(self) -> "Connection":
        """See `Transport.connect`."""
        token = await read_in_time(self._deadline_s, read_secret, self._token_file, self._receiver)
        headers = {"Authorization": f"Splunk {token}", "X-Splunk-Request-Channel": self._channel()}
        client = await open_client(self._receiver, headers, deadline_s=self._deadline_s)
        try:
            answer = await client.ask("GET", _HEALTH)
            if answer.status != 200:
                raise _refused(answer, self._receiver, self._token_file)
        except BaseException:
            await client.close()
            raise
        return Connection(
            client,
            self._token_file,
            hostname=self._hostname,
            ack_within_s=self._ack_within_s,
            poll_every_s=self._poll_every_s,
            monotonic=self._monotonic,
        )


class _Request(NamedTuple):
    """A request that is not acknowledged.

    Attributes:
        messages: how many messages of the connection were sent with it.
    """

    ack_id: int
    messages: int
    sent_s: float


class Connection:
    """A channel of a receiver. Made by `SplunkHec.connect`."""

    def __init__(
        self,
        client: Client,
        token_file: Path,
        *,
        hostname: str,
        ack_within_s: float,
        poll_every_s: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._client = client
        self._token_file = token_file
        self._hostname = hostname
        self._ack_within_s = ack_within_s
        self._poll_every_s = poll_every_s
        self._monotonic = monotonic
        self._sent = 0
        self._acknowledged = 0
        self._waiting: deque[_Request] = deque()
        self._indexed: set[int] = set()  # of those that wait
        self._changed = asyncio.Condition()
        self._ended = asyncio.create_task(self._ask_for_acknowledgements())

    @property
    def acknowledged(self) -> int:
        """See `transport.Connection.acknowledged`."""
        return self._acknowledged

    def arrived(self) -> int:
        """See `transport.Connection.arrived`."""
        return self.acknowledged

    async def send(self, messages: Sequence[Message]) -> None:
        """See `transport.Connection.send`. Waits while too many requests are not acknowledged."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._waiting) < _MOST_REQUESTS or self._ended.done())
        self.check()
        body = b"".join(self._event(each) for each in messages)
        answer = await self._client.ask("POST", _EVENT, body=body)
        if answer.status != 200:
            raise _refused(answer, self._client.receiver, self._token_file)
        said = answer.parsed()
        ack_id = said.get("ackId")
        if said.get("code") == 0 and ack_id is None:
            raise ExportUnusable(
                f"the token for {self._client.receiver} cannot be used",
                cause=f"{self._token_file}: its input acknowledges nothing, so what it takes may be lost",
                remedy="Enable indexer acknowledgement for the token in Splunk (useACK = 1)",
            )
        if not isinstance(ack_id, int) or any(each.ack_id == ack_id for each in self._waiting):
            raise unreachable(self._client.receiver, answer.told())
        self._sent += len(messages)
        async with self._changed:
            self._waiting.append(_Request(ack_id, self._sent, self._monotonic()))
            self._changed.notify_all()

    def check(self) -> None:
        """See `transport.Connection.check`."""
        if self._ended.done():
            raise self._ended.result()

    async def ended_within(self, seconds: float) -> bool:
        """See `transport.Connection.ended_within`."""
        done, _ = await asyncio.wait([self._ended], timeout=seconds)
        return bool(done)

    async def close(self, *, in_good_order: bool = False) -> None:  # noqa: ARG002  (there is nothing to say)
        """See `transport.Connection.close`. What is not acknowledged is sent again."""
        self._ended.cancel()
        await asyncio.gather(self._ended, return_exceptions=True)
        await self._client.close()

    def _event(self, message: Message) -> bytes:
        event = {
            "time": message.wall_ms / 1000,
            "host": self._hostname,
            "source": "holdfast",
            "event": message.payload.decode(),
            "fields": {"holdfast_id": message.stable_id},
        }
        return json.dumps(event, separators=(",", ":")).encode("ascii")

    async def _ask_for_acknowledgements(self) -> HoldfastError:
        """Until the connection ends; why it did."""
        try:
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._waiting)
                await asyncio.sleep(self._poll_every_s)
                await self._poll()
        except HoldfastError as error:
            return error
        finally:
            async with self._changed:
                self._changed.notify_all()

    async def _poll(self) -> None:
        asked = [each.ack_id for each in self._waiting if each.ack_id not in self._indexed]
        answer = await self._client.ask("POST", _ACK, body=json.dumps({"acks": asked}).encode("ascii"))
        if answer.status != 200:
            raise _refused(answer, self._client.receiver, self._token_file)
        acks = answer.parsed().get("acks")
        if not isinstance(acks, dict):
            raise unreachable(self._client.receiver, answer.told())
        self._indexed |= {ack_id for ack_id in asked if acks.get(str(ack_id)) is True}
        async with self._changed:
            while self._waiting and self._waiting[0].ack_id in self._indexed:
                request = self._waiting.popleft()
                self._indexed.discard(request.ack_id)
                self._acknowledged = request.messages
            self._changed.notify_all()
        if self._waiting and self._monotonic() >= self._waiting[0].sent_s + self._ack_within_s:
            cause = f"it has not indexed within {self._ack_within_s:g} s what it took"
            raise unreachable(self._client.receiver, cause)


def _refused(answer: Answer, receiver: Receiver, token_file: Path) -> HoldfastError:
    said = answer.parsed().get("text")
    told = answer.told(said if isinstance(said, str) else None)
    if answer.status in (401, 403):
        return ExportUnusable(
            f"the token for {receiver} cannot be used",
            cause=f"{token_file}: {told}",
            remedy="Put the token of an HTTP Event Collector input there, one that is enabled",
        )
    return unreachable(receiver, told)
