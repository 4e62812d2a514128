"""A proof is over when what it made is gone: whoever breaks it off, and whenever."""

import asyncio
from typing import Any

import pytest

from api.proving import isolation

pytestmark = pytest.mark.anyio


class Proof:
    """Stands in for a proof: proves nothing, and takes its time to remove what it made."""

    def __init__(self, *_: object) -> None:
        self.removing, self.may_end = asyncio.Event(), asyncio.Event()
        self.removed = False
        made.append(self)

    async def prepare(self) -> None:
        pass

    async def pairs(self, *_: object) -> list[Any]:
        return []

    other_tiers = timing = crossing = words = pairs

    async def remove(self) -> None:
        self.removing.set()
        await self.may_end.wait()
        self.removed = True


made: list[Proof] = []


async def test_a_proof_that_is_broken_off_while_it_cleans_up_is_over_when_that_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isolation, "_Proof", Proof)
    proving = asyncio.create_task(isolation.prove_isolation(None, None))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    (proof,) = made
    await proof.removing.wait()
    proving.cancel()
    await asyncio.wait((proving,), timeout=0.05)
    assert not proving.done()
    proof.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await proving
    assert proof.removed
