"""Deletions of keys that are to be made true on disk, until they are.

Rules:

- That an erasure is due stands in the database from the moment of the deletion: it is done at the next start at the
  latest, and again until it succeeds.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, NoReturn

from sqlalchemy import bindparam, delete, select, text

from appliance.errors import HoldfastError
from appliance.store import tables
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
        self._failed = asyncio.Event()

    @staticmethod
    def due() -> Change:
        """What a transaction that deletes keys does besides, so that they are erased."""
        return Change(_NOTE, {"name": _DUE, "value": secrets.token_hex(16)})

    async def erase(self) -> bool:
        """Make deletions true on disk, if some are not; False: that could not be done yet, and `run` will."""
        try:
            await self._erase()
        except HoldfastError as error:
            _LOG.warning("deleted keys may be on the disk still (%s); it is tried again", error.code)
            self._failed.set()
            return False
        return True

    async def run(self, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> NoReturn:
        """Erase what is due, now and whenever `erase` could not. Runs until cancelled."""
        first, longest = _PAUSES_S
        pause = first
        while True:
            self._failed.clear()
            try:
                await self._erase()
            except HoldfastError as error:
                _LOG.warning("deleted keys may be on the disk still (%s); again in %.0f s", error.code, pause)
                await sleep(pause)
                pause = min(2 * pause, longest)
            else:
                pause = first
                await self._failed.wait()

    async def _erase(self) -> None:
        due = await self._store.read(lambda db: db.execute(_WHICH).scalar())
        if due is not None:
            await self._store.erase()
            await self._store.write([Change(_DONE, {"b_value": due})])


# One statement: what two gateways delete at once is due for both.
_NOTE = text(
    "INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
)
_WHICH = select(tables.meta.c.value).where(tables.meta.c.name == _DUE)
_DONE = delete(tables.meta).where(tables.meta.c.name == _DUE, tables.meta.c.value == bindparam("b_value"))
