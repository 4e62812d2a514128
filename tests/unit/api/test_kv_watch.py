"""The picture of what is kept: asked for once for all who want it, and never an old one for a new one."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from api.kv_counts import Counted, EngineCounts
from api.kv_watch import KvWatch, Seen, troubles
from api.server import _record_quarantines
from appliance.audit import AuditUnavailable, Event
from appliance.engine.client import EngineUnavailable
from appliance.engine.picture import (
    DISK_FAULTS,
    NOT_STORED,
    CanaryPicture,
    DiskPicture,
    KvPicture,
    RecallPicture,
    TierPicture,
)

PICTURE = KvPicture(32, (TierPicture("device", "ok", 1, 9, 3, 2, 1),), (), (), 0, 0, (), 0, 0, 0, "one")


class Engine:
    """Answers what it is set to, and counts."""

    def __init__(self) -> None:
        self.picture: KvPicture | None = PICTURE
        self.asked: list[int] = []
        self.answers = asyncio.Event()
        self.answers.set()

    async def kv(self, sessions: int, *, deadline_s: float) -> KvPicture:
        self.asked.append(sessions)
        await asyncio.sleep(0)
        await self.answers.wait()
        if self.picture is None:
            raise EngineUnavailable("gone", cause="", remedy="")
        return self.picture


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def watching() -> tuple[KvWatch, Engine, Clock, SimpleNamespace]:
    engine, clock, watch = Engine(), Clock(), SimpleNamespace(ready=True)
    return KvWatch(engine, watch, EngineCounts(str), clock=clock), engine, clock, watch  # type: ignore[arg-type]


async def test_however_many_ask_the_engine_is_asked_once() -> None:
    kv, engine, clock, _ = watching()
    await asyncio.gather(*(kv.look(5) for _ in range(20)))
    assert engine.asked == [5]
    await kv.look(3)
    assert engine.asked == [5]
    await kv.look(6)
    clock.now += 1.5
    await kv.look()
    assert engine.asked == [5, 6, 0]


async def asking(kv: KvWatch, *sessions: int) -> list["asyncio.Task[Seen | None]"]:
    """Those who wait for an answer that is to come."""
    tasks = [asyncio.create_task(kv.look(each)) for each in sessions]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


async def test_a_failure_is_the_answer_to_all_who_waited_for_it() -> None:
    kv, engine, _, _ = watching()
    engine.answers.clear()
    tasks = await asking(kv, 0, 0, 5, 0)
    engine.picture = None
    engine.answers.set()
    assert await asyncio.gather(*tasks) == [None] * 4
    assert engine.asked == [0]
    engine.picture = PICTURE
    assert await kv.look() is not None, "who comes later asks again"


async def test_who_wants_more_than_is_being_asked_for_asks_when_that_is_answered() -> None:
    kv, engine, _, _ = watching()
    engine.answers.clear()
    tasks = await asking(kv, 5, 9, 7, 2)
    engine.answers.set()
    seen = await asyncio.gather(*tasks)
    assert [each.sessions_asked for each in seen if each is not None] == [5, 9, 9, 5]
    assert engine.asked == [5, 9]


async def test_who_hangs_up_takes_nobodys_answer_along() -> None:
    kv, engine, _, _ = watching()
    engine.answers.clear()
    first, second = await asking(kv, 0, 0)
    first.cancel()
    await asyncio.wait([first])
    engine.answers.set()
    assert await second is not None
    assert engine.asked == [0]


async def test_nobody_waits_longer_than_the_deadline_whomever_waited_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.kv_watch._DEADLINE_S", 0.01)
    kv, engine, _, _ = watching()
    engine.answers.clear()
    async with asyncio.timeout(5):
        assert await asyncio.gather(*(kv.look(sessions) for sessions in (0, 5, 9))) == [None] * 3


async def test_what_cannot_be_had_is_not_made_up_from_what_was() -> None:
    kv, engine, clock, watch = watching()
    assert await kv.look() is not None
    clock.now += 10
    engine.picture = None
    assert await kv.look() is None
    assert kv.fresh() is None
    watch.ready = False
    assert await kv.look() is None
    assert len(engine.asked) == 2


async def test_a_rate_is_of_two_looks_at_one_life_of_the_engine() -> None:
    kv, engine, clock, _ = watching()
    await kv.look()
    assert kv.reclaimed_blocks_per_s() is None
    for _ in range(40):
        clock.now += 5
        engine.picture = replace(engine.picture or PICTURE, reclaimed_blocks_total=(clock.now - 100) * 2)  # type: ignore[arg-type]
        await kv.look()
    assert kv.reclaimed_blocks_per_s() == (2.0, 60.0)


@pytest.mark.parametrize("reclaimed", [0, 130])
async def test_a_rate_is_not_of_two_lives_of_the_engine_however_soon_the_later_began_and_however_far_it_counted(
    reclaimed: int,
) -> None:
    kv, engine, clock, _ = watching()
    rates = []
    for life, blocks in (("one", 70), ("one", 100), ("two", reclaimed), ("two", reclaimed + 30)):
        clock.now += 10
        engine.picture = replace(PICTURE, engine_life=life, reclaimed_blocks_total=blocks)
        await kv.look()
        rates.append(kv.reclaimed_blocks_per_s())
    assert rates == [None, (3.0, 10.0), None, (3.0, 10.0)]
    assert kv.counts.totals[Counted("holdfast_kv_reclaimed_blocks", ("other",))] == 100 + reclaimed + 30


async def test_more_tiers_are_known_when_they_were_seen() -> None:
    kv, engine, clock, _ = watching()
    assert not kv.has_more_tiers
    await kv.look()
    assert not kv.has_more_tiers
    clock.now += 2
    engine.picture = replace(PICTURE, tiers=(*PICTURE.tiers, TierPicture("dram", "ok", 1, 9, 3, 2, 1)))
    await kv.look()
    assert kv.has_more_tiers


async def test_a_tier_that_is_out_of_use_is_named_with_what_went_wrong() -> None:
    kv, engine, _, _ = watching()
    assert kv.trouble() == {}
    none: dict[str, int] = dict.fromkeys(NOT_STORED, 0)
    disk = DiskPicture(0, 0, 0, 0, 0, none, dict.fromkeys(DISK_FAULTS, 0), "No space left on device (ENOSPC)", 0.5)
    dram, on_disk = TierPicture("dram", "quarantined", 1, 9, 3, 0, 1), TierPicture("disk", "failed", 1, 9, 3, 0, 1)
    engine.picture = replace(PICTURE, tiers=(*PICTURE.tiers, dram, on_disk), disk=disk)
    await kv.look()
    assert list(kv.trouble()) == ["dram", "disk"]
    assert "ENOSPC" in kv.trouble()["disk"]
    assert troubles(PICTURE) == {}


async def test_a_quarantine_is_told_once_and_recorded_though_the_log_refuses_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.server._RECORD_AGAIN_S", 0.0)
    kv, engine, clock, _ = watching()
    recorded: list[Event] = []
    refusals = [AuditUnavailable("full", cause="", remedy="")]

    async def record(event: Event, *, privileged: bool = False) -> None:
        assert privileged
        if refusals:
            raise refusals.pop()
        recorded.append(event)

    services: Any = SimpleNamespace(kv=kv, audit=SimpleNamespace(record=record))
    recording = asyncio.create_task(_record_quarantines(services))
    tiers = (*PICTURE.tiers, TierPicture("dram", "quarantined", 1, 9, 3, 0, 1))
    wrong = replace(PICTURE, tiers=tiers, canary=CanaryPicture(12, 0.43, True, 1.0, 0))
    for picture in (PICTURE, wrong, wrong, PICTURE, wrong):
        engine.picture = picture
        clock.now += 10
        await kv.look()
    async with asyncio.timeout(5):
        while len(recorded) < 2:  # noqa: ASYNC110  (another task's)
            await asyncio.sleep(0)
    recording.cancel()
    assert [(event.kind.action, event.target, event.details) for event in recorded] == [
        ("kv.quarantined", ("tier", "dram"), {"worst_error": "0.43"})
    ] * 2


async def test_whether_the_engine_reads_ahead_is_known_when_it_was_seen() -> None:
    kv, engine, clock, _ = watching()
    assert not kv.recalls
    await kv.look()
    assert not kv.recalls
    engine.picture = replace(PICTURE, recall=RecallPicture(0, 0, 0, 0.0))
    clock.now += 10
    await kv.look()
    assert kv.recalls
