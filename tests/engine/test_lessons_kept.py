"""What retention learned outlives the engine: its connector reads and writes the file that its configuration names."""

import dataclasses
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

from appliance.engine.inside.connector import StateConnector
from appliance.engine.inside.lessons import WRITE_EVERY_S
from appliance.engine.protocol import connector_config
from tests.engine.in_process import BLOCK, EngineInProcess, words


def life(engine: EngineInProcess, lessons: Path) -> StateConnector:
    """A scheduler's connector as an engine makes it when it starts, with the file that the command line names."""
    config: Any = copy(engine.scheduler.vllm_config)
    extra = connector_config(0.5, str(lessons))["kv_connector_extra_config"]
    config.kv_transfer_config = dataclasses.replace(config.kv_transfer_config, kv_connector_extra_config=extra)
    return StateConnector(config, KVConnectorRole.SCHEDULER, engine.scheduler.kv_cache_config)


def test_the_next_life_of_an_engine_knows_what_the_last_one_learned(
    engine: EngineInProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lessons.json"
    first = life(engine, path)
    assert not first.policy.lessons()["classes"]
    monkeypatch.setattr(engine.connector, "_lessons", first._lessons)
    monkeypatch.setattr(engine.connector._table, "policy", first.policy)
    for _ in range(3):
        engine.turn(words(1, 2 * BLOCK), session="session")
        engine.clock.advance(20.0)
    learned = first.policy.lessons()
    assert learned["classes"]
    assert not path.exists()
    engine.clock.advance(WRITE_EVERY_S)
    engine.tick()
    assert life(engine, path).policy.lessons()["classes"], "they are written down while it runs"
    first.shutdown()
    assert life(engine, path).policy.lessons() == first.policy.lessons()
