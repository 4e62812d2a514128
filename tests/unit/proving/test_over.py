"""A proof is over when what it made is gone: whoever breaks it off, and whenever."""

import asyncio
from typing import Any, cast

import pytest

from api.proving import isolation

pytestmark = pytest.mark.anyio


class Proof:
    """Stands in for a proof: proves nothing, and takes its time to remove what it made."""

    def __init__(self) -> None:
        self.removing, self.may_end = asyncio.Event(), asyncio.Event()
        self.removed = False

    async def prepare(self) -> None:
        pass

    async def pairs(self, *_: object) -> list[Any]:
        return []

    other_tiers = timing = crossing = words = pairs

    async def remove(self) -> None:
        self.removing.set()
        await self.may_end.wait()
        self.removed = True


async def test_a_proof_that_is_broken_off_while_it_cleans_up_is_over_when_that_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proof, not_asked = Proof(), cast("Any", None)
    monkeypatch.setattr(isolation, "_Proof", lambda *_: proof)
    proving = asyncio.create_task(isolation.prove_isolation(not_asked, not_asked))
    await proof.removing.wait()
    proving.cancel()
    for _ in range(10):  # it has had every chance to end
        await asyncio.sleep(0)
    assert not proving.done()
    proof.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await proving
    assert proof.removed
