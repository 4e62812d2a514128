"""Every destination of this node's log.

Rule: a destination is started, looked at and stopped here; whatever becomes of one concerns nobody else.
"""

import asyncio
import platform
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final

from appliance.audit.entry import AuditKeys
from appliance.audit.siem.shipper import Destination, Shipper, View
from appliance.audit.siem.syslog import Receiver
from appliance.errors import Fault, HoldfastError
from appliance.settings import SiemSettings

CURSORS: Final = "siem"
_LAST_EVENTS_S: Final = 2.0  # for what was recorded last to leave
_LOOK_EVERY_S: Final = 0.05


class NoSuchDestination(HoldfastError, LookupError):
    """The settings name no such destination."""

    code: ClassVar[str] = "audit_export_unknown"
    fault: ClassVar[Fault] = Fault.MISSING


class Exports:
    """The destinations that the settings name, for the log in `directory`.

    Args:
        size: how many entries the appender has answered for.
        keys: open records; may raise `VaultSealed`.
    """

    def __init__(
        self,
        destinations: Sequence[SiemSettings],
        directory: Path,
        *,
        size: Callable[[], Awaitable[int]],
        keys: AuditKeys,
    ) -> None:
        self._shippers = {
            each.name: Shipper(
                _destination(each), directory, directory / CURSORS / f"{each.name}.cursor", size=size, keys=keys
            )
            for each in destinations
        }
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to ship to all of them."""
        self._tasks = [asyncio.create_task(shipper.run()) for shipper in self._shippers.values()]

    @property
    def names(self) -> list[str]:
        """What the destinations are called."""
        return list(self._shippers)

    def view(self, name: str) -> View:
        """How one of them is now."""
        return self._shippers[name].view()

    def views(self) -> list[View]:
        """How each is now."""
        return [shipper.view() for shipper in self._shippers.values()]

    async def try_out(self, name: str) -> View:
        """Send a test event to a destination; how it is then.

        Raises:
            NoSuchDestination: the settings do not name it.
            ExportUnreachable, ExportUnusable: it was not taken; says why.
        """
        shipper = self._shippers.get(name)
        if shipper is None:
            known = ", ".join(self._shippers) or "there is none"
            raise NoSuchDestination(
                f"there is no destination {name!r}",
                cause=f"the settings name: {known}",
                remedy="Add it to holdfast.toml as [[audit.siem]] and start the appliance again; see docs/siem.md",
            )
        await shipper.try_out()
        return shipper.view()

    async def stop(self, size: int | None = None) -> None:
        """End it; destinations that are connected get a moment for what is not sent yet of the log's `size`."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _LAST_EVENTS_S
        while (  # noqa: ASYNC110  (many senders, and no hurry)
            size is not None and loop.time() < deadline_s and any(_is_behind(each, size) for each in self.views())
        ):
            await asyncio.sleep(_LOOK_EVERY_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _is_behind(view: View, size: int) -> bool:
    return view.connected and not view.waits_for and view.sent < size


def _destination(settings: SiemSettings) -> Destination:
    receiver = Receiver(
        host=settings.host,
        port=settings.port,
        server_name=settings.server_name or settings.host,
        ca=settings.ca,
        certificate=settings.certificate,
        private_key=settings.private_key,
    )
    return Destination(settings.name, receiver, settings.max_message_bytes, platform.node())
