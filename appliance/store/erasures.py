"""Deletions of keys that are to be made true on disk, until they are.

Rules:

- That an erasure is due stands in the database from the moment of the deletion: it is done at the next start at the
  latest, and again until it succeeds.
- One is under way at a time, for all that is due by then. Who waits for one that fails tries no other.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, NoReturn

from sqlalchemy import bindparam, delete, select, text

from appliance.errors import HoldfastError
from appliance.store import tables
from appliance.store.errors import ErasureHeld
from appliance.store.writer import Change

if TYPE_CHECKING:
    from appliance.store.store import Store

_DUE: Final = "erasure-due"  # in the table `meta`; its value is another for each deletion
_PAUSES_S: Final = (1.0, 600.0)  # after the first failure, and at most
_LOG = logging.getLogger("holdfast.store")


class Erasures:
    """The erasures of one database."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._one_at_a_time = asyncio.Lock()
        self._failed = asyncio.Event()
        self._failures = 0
        self._rewritten = ""  # what was due when only a read was in the way

    @staticmethod
    def due() -> Change:
        """What a transaction that deletes keys does besides, so that they are erased."""
        return Change(_NOTE, {"name": _DUE, "value": secrets.token_hex(16)})

    async def erase(self) -> bool:
        """Make deletions true on disk, if some are not; False: that could not be done yet, and `run` will."""
        failures = self._failures
        async with self._one_at_a_time:
            if self._failures == failures:
                try:
                    await self._erase()
                except HoldfastError as error:
                    _LOG.warning("deleted keys may be on the disk still (%s); it is tried again", error.code)
                    self._failures += 1
                    self._failed.set()
            return self._failures == failures

    async def run(self, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> NoReturn:
        """Erase what is due, now and whenever `erase` could not. Runs until cancelled."""
        first, longest = _PAUSES_S
        pause = first
        while True:
            self._failed.clear()
            try:
                async with self._one_at_a_time:
                    await self._erase()
            except HoldfastError as error:
                self._failures += 1
                _LOG.warning("deleted keys may be on the disk still (%s); again in %.0f s", error.code, pause)
                await sleep(pause)
                pause = min(2 * pause, longest)
            else:
                pause = first
                await self._failed.wait()

    async def _erase(self) -> None:
        due = await self._store.read(lambda db: db.execute(_WHICH).scalar())
        if due is not None:
            try:
                await self._store.erase(is_rewritten=due == self._rewritten)
            except ErasureHeld:
                self._rewritten = due
                raise
            await self._store.write([Change(_DONE, {"b_value": due})])


# One statement: what two gateways delete at once is due for both.
_NOTE = text(
    "INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
)
_WHICH = select(tables.meta.c.value).where(tables.meta.c.name == _DUE)
_DONE = delete(tables.meta).where(tables.meta.c.name == _DUE, tables.meta.c.value == bindparam("b_value"))
