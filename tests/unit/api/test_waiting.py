"""What a turn is taken to need of the device, and who is told that it waits."""

import asyncio
from collections.abc import Sequence
from typing import cast

from api.waiting import WaitingRoom
from appliance.engine.admission import Place
from appliance.engine.client import EngineClient, EngineUnavailable
from appliance.engine.protocol import LeaseReport
from appliance.settings import AdmissionSettings

CONTEXT = 1000  # tokens


class Engine:
    """Hears who waits."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[list[tuple[str, str]]] = asyncio.Queue()

    async def leases(self, *, awaited: Sequence[tuple[str, str]], deadline_s: float) -> LeaseReport:
        self.heard.put_nowait(list(awaited))
        raise EngineUnavailable("it hears and says nothing", cause=f"{deadline_s} s", remedy="")


async def enter(
    room: WaitingRoom, *, session: str = "session", prompt_bytes: int = 40, hinted: int | None = 1
) -> Place:
    return await room.enter(
        None,
        ("tenant", session),
        prompt_bytes=prompt_bytes,
        sequences=1,
        most_output_tokens=None,
        hinted_output_tokens=hinted,
        most_context_tokens=CONTEXT,
        tier=0,
        priority=0,
    )


async def test_no_turn_needs_more_than_the_model_takes_whatever_it_says() -> None:
    room = WaitingRoom(cast("EngineClient", None), AdmissionSettings.model_validate({}), sequences=4)
    boastful = await enter(room, prompt_bytes=400, hinted=2**31 - 1)
    assert boastful.need_tokens <= CONTEXT
    padded = await enter(room, prompt_bytes=16 << 20, hinted=None)
    assert padded.need_tokens <= CONTEXT + 1


async def test_the_engine_is_told_whose_turns_wait_the_longest_first_and_each_once() -> None:
    engine = Engine()
    room = WaitingRoom(cast("EngineClient", engine), AdmissionSettings.model_validate({}), sequences=1)
    await enter(room, session="runs")
    waiting = [asyncio.create_task(enter(room, session=session)) for session in ("ana", "ben", "ana")]
    assert await engine.heard.get() == [("tenant", "ana"), ("tenant", "ben")]
    room.close()
    for turn in waiting:
        turn.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
