"""Elasticsearch's bulk API.

Rules:

- `create` with the event's stable id as `_id`: one that came before is answered 409, and counts as delivered.
- A request may be answered 200 with items that failed: each item is looked at. `acknowledged` goes up to the first that
  was not kept; that one ends the connection, its id and the reason are told, and from it on all is sent again. No
  event is left out: one that the index refuses stops the export until the index takes it.
- An event is the document itself, so its format is one of JSON.
- The API key needs `create_doc` on the index or data stream, nothing more.

Elasticsearch 8: Bulk API, Token-based authentication services.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from appliance.audit.siem.files import read_in_time
from appliance.audit.siem.https import DEADLINE_S, Answer, Client, open_client, read_secret
from appliance.audit.siem.syslog import Receiver, unreachable
from appliance.audit.siem.transport import ExportUnreachable, ExportUnusable, Message
from appliance.errors import HoldfastError

PORT: Final = 9200
MAX_MESSAGE_BYTES: Final = 64 << 10
_KEPT: Final = (200, 201, 409)  # 409: it is there from before
_WHOAMI: Final = "/_security/_authenticate"  # allowed to every key


class Elasticsearch:
    """The transport, as `transport.Transport` has it.

    Args:
        index: an index or a data stream.
        token_file: holds an API key, encoded as Elasticsearch gives it.
    """

    messages_at_once: Final = 256

    def __init__(
        self,
        receiver: Receiver,
        token_file: Path,
        *,
        index: str,
        max_payload_bytes: int = MAX_MESSAGE_BYTES,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._receiver = receiver
        self._token_file = token_file
        self._index = index
        self.max_payload_bytes = max_payload_bytes
        self._deadline_s = deadline_s

    def __str__(self) -> str:
        return f"Elasticsearch at {self._receiver}, {self._index}"

    async def connect(self) -> "Connection":
        """See `Transport.connect`."""
        key = await read_in_time(self._deadline_s, read_secret, self._token_file, self._receiver)
        client = await open_client(self._receiver, {"Authorization": f"ApiKey {key}"}, deadline_s=self._deadline_s)
        try:
            answer = await client.ask("GET", _WHOAMI)
            if answer.status != 200:
                raise _refused(answer, self._receiver, self._token_file)
        except BaseException:
            await client.close()
            raise
        return Connection(client, self._token_file, self._index)


class Connection:
    """A way to an index. Made by `Elasticsearch.connect`."""

    def __init__(self, client: Client, token_file: Path, index: str) -> None:
        self._client = client
        self._token_file = token_file
        self._path = f"/{index}/_bulk"
        self._acknowledged = 0
        self._error: HoldfastError | None = None

    @property
    def acknowledged(self) -> int:
        """See `transport.Connection.acknowledged`."""
        return self._acknowledged

    def arrived(self) -> int:
        """See `transport.Connection.arrived`."""
        return self.acknowledged

    async def send(self, messages: Sequence[Message]) -> None:
        """See `transport.Connection.send`. What was sent is acknowledged when this returns."""
        self.check()
        try:
            await self._send(messages)
        except HoldfastError as error:
            self._error = error
            raise

    def check(self) -> None:
        """See `transport.Connection.check`."""
        if self._error is not None:
            raise self._error

    async def ended_within(self, seconds: float) -> bool:
        """See `transport.Connection.ended_within`. It ends by what a request is answered, and not meanwhile."""
        if self._error is None:
            await asyncio.sleep(seconds)
        return self._error is not None

    async def close(self, *, in_good_order: bool = False) -> None:  # noqa: ARG002  (there is nothing to say)
        """See `transport.Connection.close`."""
        await self._client.close()

    async def _send(self, messages: Sequence[Message]) -> None:
        body = b"".join(
            b'{"create":{"_id":%b}}\n%b\n' % (json.dumps(each.stable_id).encode("ascii"), each.payload)
            for each in messages
        )
        answer = await self._client.ask("POST", self._path, body=body, kind="application/x-ndjson")
        if answer.status != 200:
            raise _refused(answer, self._client.receiver, self._token_file)
        items = answer.parsed().get("items")
        if not isinstance(items, list) or len(items) != len(messages):
            raise unreachable(self._client.receiver, answer.told())
        for message, item in zip(messages, items, strict=True):
            created = item.get("create") if isinstance(item, dict) else None
            if not isinstance(created, dict) or created.get("_id", message.stable_id) != message.stable_id:
                raise unreachable(self._client.receiver, answer.told())
            if created.get("status") not in _KEPT:
                raise self._not_kept(message, created)
            self._acknowledged += 1

    def _not_kept(self, message: Message, created: dict[str, Any]) -> ExportUnreachable:
        error = created.get("error")
        said = f"{error.get('type')}: {error.get('reason')}" if isinstance(error, dict) else ""
        status = created.get("status")
        told = Answer(status if isinstance(status, int) else 0, b"").told(said)
        return ExportUnreachable(
            f"{self._client.receiver} does not keep {message.stable_id}",
            cause=told,
            remedy="Nothing is lost: events wait in the log. 429 passes by itself; with any other status see that the "
            "index exists and that its mapping takes the event (docs/siem-formats.md)",
        )


def _refused(answer: Answer, receiver: Receiver, token_file: Path) -> HoldfastError:
    error = answer.parsed().get("error")
    reason = error.get("reason") if isinstance(error, dict) else None
    told = answer.told(reason if isinstance(reason, str) else None)
    if answer.status in (401, 403):
        return ExportUnusable(
            f"the API key for {receiver} cannot be used",
            cause=f"{token_file}: {told}",
            remedy="Put an API key there (its `encoded` form) that may `create_doc` in the index",
        )
    return unreachable(receiver, told)
