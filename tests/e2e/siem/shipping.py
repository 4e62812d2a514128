"""A log and a shipper with any format and transport, for tests of transports: what arrives must be the log."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from random import Random

from appliance.audit.log import AuditLog
from appliance.audit.reading import LogReader
from appliance.audit.siem.formats import Format
from appliance.audit.siem.ocsf import Ocsf
from appliance.audit.siem.opening import KeyOpener
from appliance.audit.siem.shipper import Shipper
from appliance.audit.siem.transport import Message, Transport
from appliance.audit.siem.verify_export import ExportVerified, verify_export
from tests.unit.audit.making import KEY, ORIGIN, Keys, drafts, open_log, sign

DEADLINE_S = 15.0


def messages(count: int, first: int = 0) -> list[Message]:
    """Events that are none of a log."""
    return [
        Message(b'{"number":%d}' % each, 1_700_000_000_000 + each, 1, "turn.admitted", f"{ORIGIN}/{each}")
        for each in range(first, first + count)
    ]


class Shipped:
    """A log of `entries` entries in `folder`, and its way to a destination. It does not rest long after an error."""

    def __init__(self, folder: Path, transport: Transport, *, form: Format | None = None, entries: int = 600) -> None:
        self.folder = folder
        self.log: AuditLog = open_log(folder / "audit")
        self.log.append(drafts(range(entries)))
        self.log.publish(sign)
        (folder / "audit" / "log.vkey").write_text(f"{KEY.verifier()}\n")
        self.errors: list[str] = []
        self.shipper = Shipper(
            "to",
            form or Ocsf(),
            transport,
            folder / "audit",
            folder / "siem" / "to.cursor",
            size=self._size,
            opener=KeyOpener(Keys()),
            random=Random(1),  # noqa: S311  (jitter)
            pause=self._pause,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Shipper]:
        """The shipper at work."""
        task = asyncio.create_task(self.shipper.run())
        try:
            yield self.shipper
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until_delivered(self) -> None:
        """Until everything is acknowledged."""
        async with self.running():
            await until(lambda: self.shipper.view().delivered == self.log.size)

    def check(self, lines: Sequence[str]) -> ExportVerified:
        """What arrived is the log, whole and proved."""
        found = verify_export(lines, KEY.verifier(), checkpoint=LogReader(self.folder / "audit").note)
        assert (found.first, found.end, found.proved_to) == (0, self.log.size, self.log.size)
        return found

    async def _size(self) -> int:
        return self.log.size

    async def _pause(self, seconds: float) -> None:
        if (error := self.shipper.view().error) is not None:
            self.errors.append(f"{error['message']}: {error['cause']}")
        await asyncio.sleep(min(seconds, 0.02))


async def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Wait for something that others do."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  (what is looked at is another's)
            await asyncio.sleep(0.01)
