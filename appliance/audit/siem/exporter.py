"""The exporter: the process that carries a node's log to its destinations, beside the gateway.

    python -m appliance.audit.siem.exporter LOG STATE

Standard input is its end of the link with the gateway (`link`); LOG is the log's folder, STATE has the cursors.

Rules:

- It has no key of a tenant's or of the system's, and cannot sign: for each entry that it opens it asks the gateway for
  that entry's secret, in small numbers, so that the gateway's loop is never busy with it for long.
- It only reads the log. What it needs of the appender, how far the log is on the disk, it asks the gateway.
- It yields the processor to everybody else, and ends with the link.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import uvloop

from appliance.audit import protocol
from appliance.audit.entry import PLAINTEXT, Entry, EntryInvalid
from appliance.audit.journal import Frame
from appliance.audit.siem import link
from appliance.audit.siem.destinations import Destination, format_of, transport_of
from appliance.audit.siem.formats import Disclosed
from appliance.audit.siem.opening import KeyOpener
from appliance.audit.siem.saved import CURSOR_SUFFIX
from appliance.audit.siem.shipper import Shipper, View, try_out
from appliance.audit.signing import public_key
from appliance.errors import HoldfastError
from appliance.vault import KeyMissing, VaultSealed
from appliance.vault.process import forbid_core_dumps

SECRET_BYTES: Final = 33  # a byte that says whether there is one, and the secret
ASKED_BYTES: Final = 16 + 16 + 32  # key id, nonce, commitment
_ASKED_AT_ONCE: Final = 16  # less than a tenth of a millisecond of the gateway's loop
_VIEWS_EVERY_S: Final = 0.25
_LAST_EVENTS_S: Final = 2.0  # for what was recorded last to leave
_LOOK_EVERY_S: Final = 0.05
_NICE: Final = 10


class _Secrets:
    """The secrets of some entries, as `EntryKeys`."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, ...], bytes | None] = {}

    def add(self, asked: Sequence[Entry], answer: bytes) -> None:
        """Take what the gateway answered; it stops where the vault is sealed."""
        for place, entry in enumerate(asked):
            said = answer[place * SECRET_BYTES : (place + 1) * SECRET_BYTES]
            if len(said) < SECRET_BYTES:
                return
            self._known[entry.key_id, entry.nonce, entry.commitment] = said[1:] if said[0] else None

    def audit_secret(self, key_id: bytes, label: str, *parts: bytes) -> bytes:
        """See `EntryKeys`."""
        if label != "entry" or (key_id, *parts) not in self._known:
            raise VaultSealed
        secret = self._known[(key_id, *parts)]
        if secret is None:
            raise KeyMissing(f"key_{key_id.hex()}")
        return secret


class _RemoteOpener:
    """Opens records with what the gateway tells of each."""

    def __init__(self, gateway: link.Link) -> None:
        self._gateway = gateway

    async def open(self, frames: Sequence[Frame]) -> list[Disclosed]:
        """See `shipper.Opener`."""
        secrets = _Secrets()
        asked = []
        for frame in frames:
            with contextlib.suppress(EntryInvalid):  # told when it is opened
                entry = Entry.unpack(frame.entry)
                if not entry.flags & PLAINTEXT:
                    asked.append(entry)
        for begin in range(0, len(asked), _ASKED_AT_ONCE):
            some = asked[begin : begin + _ASKED_AT_ONCE]
            body = b"".join([entry.key_id + entry.nonce + entry.commitment for entry in some])
            secrets.add(some, await self._gateway.ask(link.SECRETS, body))
        return await KeyOpener(secrets).open(frames)


class _Running:
    """A destination and the task that ships to it."""

    def __init__(self, destination: Destination, shipper: Shipper) -> None:
        self.destination = destination
        self.shipper = shipper
        self.task = asyncio.create_task(shipper.run())

    async def end(self) -> None:
        """End it; its cursor is saved."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class Exporter:
    """The shippers of one log, as the gateway says which."""

    def __init__(self, log: Path, state: Path) -> None:
        self._log = log
        self._state = state
        self._running: dict[str, _Running] = {}
        self._gateway: link.Link | None = None
        self._changing = asyncio.Lock()

    async def run(self, connection: socket.socket) -> None:
        """Serve the gateway at the other end of `connection` until it has gone."""
        _, gateway = await asyncio.get_running_loop().create_connection(lambda: link.Link(self._serve), sock=connection)
        self._gateway = gateway
        telling = asyncio.create_task(self._tell(gateway))
        try:
            await gateway.lost
        finally:
            telling.cancel()
            await asyncio.gather(telling, *(each.end() for each in self._running.values()), return_exceptions=True)

    async def _serve(self, kind: int, body: bytes) -> bytes:
        if kind == link.DESTINATIONS:
            async with self._changing:
                await self._take_up([Destination.read(each) for each in json.loads(body)])
        elif kind == link.TRY_OUT:
            await self._try_out(Destination.read(json.loads(body)))
        elif kind == link.STOP:
            async with self._changing:
                await self._stop(int(protocol.SEQUENCE.unpack(body)[0]))
        return b""

    async def _take_up(self, destinations: Sequence[Destination]) -> None:
        """Ship to these and no others; those that are as they were go on."""
        wanted = {each.name: each for each in destinations}
        for name, running in list(self._running.items()):
            if wanted.get(name) != running.destination:
                await running.end()
                del self._running[name]
        for name, destination in wanted.items():
            if name not in self._running:
                self._running[name] = _Running(destination, self._shipper(destination))

    def _shipper(self, destination: Destination) -> Shipper:
        assert self._gateway is not None  # noqa: S101  (who asks for it is at its other end)
        return Shipper(
            destination.name,
            format_of(destination),
            transport_of(destination),
            self._log,
            self._state / f"{destination.name}{CURSOR_SUFFIX}",
            size=self._size,
            opener=_RemoteOpener(self._gateway),
        )

    async def _try_out(self, destination: Destination) -> None:
        origin = (await asyncio.to_thread(public_key, self._log)).name
        form, transport = format_of(destination), transport_of(destination)
        await try_out(form, transport, origin=origin, wall_ms=int(time.time() * 1000))

    async def _stop(self, size: int) -> None:
        """End all; those that are connected get a moment for what is not sent yet of the log's `size`."""
        deadline_s = time.monotonic() + _LAST_EVENTS_S
        while time.monotonic() < deadline_s and any(  # noqa: ASYNC110  (many senders, and no hurry)
            _is_behind(each.shipper.view(), size) for each in self._running.values()
        ):
            await asyncio.sleep(_LOOK_EVERY_S)
        await asyncio.gather(*(each.end() for each in self._running.values()))
        self._running.clear()

    async def _size(self) -> int:
        assert self._gateway is not None  # noqa: S101
        return int(protocol.SEQUENCE.unpack(await self._gateway.ask(link.SIZE))[0])

    async def _tell(self, gateway: link.Link) -> None:
        """How each destination is, while it changes."""
        told: object = None
        size = 0
        while True:
            with contextlib.suppress(HoldfastError):
                size = await self._size()
            views = [asdict(each.shipper.view(size)) for each in self._running.values()]
            if views != told:
                with contextlib.suppress(HoldfastError):
                    await gateway.ask(link.VIEWS, json.dumps(views).encode())
                told = views
            await asyncio.sleep(_VIEWS_EVERY_S)


def secrets_for(body: bytes, secret: Callable[..., bytes]) -> bytes:
    """The gateway's answer to `link.SECRETS`: cut short where the vault is sealed.

    Args:
        secret: `AuditKeys.audit_secret`.
    """
    answer = bytearray()
    for at in range(0, len(body) - ASKED_BYTES + 1, ASKED_BYTES):
        asked = body[at : at + ASKED_BYTES]
        try:
            answer += b"\x01" + secret(asked[:16], "entry", asked[16:32], asked[32:])
        except KeyMissing:
            answer += bytes(SECRET_BYTES)
        except VaultSealed:
            break
    return bytes(answer)


def view_of(record: Mapping[str, object]) -> View:
    """A view as `link.VIEWS` tells it."""
    return View(**record)  # type: ignore[arg-type]  # both ends are ours, and of one version


def _is_behind(view: View, size: int) -> bool:
    return view.connected and not view.waits_for and view.sent < size


def _stand_aside() -> None:
    """Run when nobody else wants to, and leave a terminal's signals to the gateway.

    A group of its own, and no session: to the scheduler a session is a group whose members are nice to each other only
    (sched(7), autogroups). Not `SCHED_IDLE`: beside an engine on every core it would get three thousandths of one,
    and who has no privilege cannot leave it; silent for so long, it would be taken for one that hangs.
    """
    os.setpgid(0, 0)
    os.nice(_NICE)


def main() -> int:
    """Run the exporter on the socket that is standard input."""
    forbid_core_dumps()
    os.umask(0o077)
    _stand_aside()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    log, state = map(Path, sys.argv[1:3])
    connection = socket.socket(fileno=os.dup(0))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Exporter(log, state).run(connection))
    return 0


if __name__ == "__main__":
    sys.exit(main())
