"""What a turn is taken to need of the device."""

from typing import cast

from api.waiting import WaitingRoom
from appliance.engine.admission import Place
from appliance.engine.client import EngineClient
from appliance.settings import AdmissionSettings

CONTEXT = 1000  # tokens


async def enter(room: WaitingRoom, *, prompt_bytes: int, hinted: int | None) -> Place:
    return await room.enter(
        None,
        ("tenant", "session"),
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
