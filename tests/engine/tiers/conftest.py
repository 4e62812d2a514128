"""What tests of an engine with a disk share: each file that asks for it has an engine of its own."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from appliance.engine.protocol import disk_tier
from appliance.engine.tier_keys import KEY_SOCKET

if TYPE_CHECKING:
    from tests.engine.in_process import EngineInProcess


@pytest.fixture(scope="module")
def on_disk(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[tuple[EngineInProcess, Path]]":
    """An engine whose DRAM holds less than its device, and a disk that holds everything."""
    from tests.engine.in_process import EngineInProcess
    from tests.engine.tiers.test_disk_in_process import CHUNK_BYTES, CHUNKS
    from tests.engine.tiers.test_disk_tier import Gateway

    folder = tmp_path_factory.mktemp("tier")
    gateway = Gateway()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(KEY_SOCKET, str(gateway.open()))
        disk = disk_tier(str(folder), 64 << 20, 3600.0)
        engine = EngineInProcess(tiny_model, dram_bytes=CHUNKS * CHUNK_BYTES, disk=disk)
        yield engine, folder
        engine.close()
    gateway.close()


@pytest.fixture
def folder(on_disk: "tuple[EngineInProcess, Path]") -> Path:
    """Where its disk is."""
    return on_disk[1]
