"""Pauses of a task that goes on for ever, which pass at once and are counted."""

import asyncio
from types import ModuleType, SimpleNamespace

import pytest


class Enough(Exception):
    """The task paused as often as the test lets it."""


class Pauses:
    """In place of a module's `asyncio.sleep`.

    Attributes:
        slept_s: how long each pause was to be.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, *, most: int) -> None:
        self.slept_s: list[float] = []
        self._most = most
        monkeypatch.setattr(module, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": self._sleep}))

    async def _sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        if len(self.slept_s) == self._most:
            raise Enough
