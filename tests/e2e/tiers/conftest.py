"""One whole appliance with three tiers: sessions leave its small device for DRAM, and go on to the disk."""

from collections.abc import Iterator

import pytest

from tests.e2e.appliance.conftest import Appliance, holdfast

# The demonstration's model has 64 KiB of KV in a block of 32 tokens.
BLOCK_BYTES = 64 << 10
DEVICE_BLOCKS = 96
DRAM_BLOCKS = 640  # the proof's prompts, and what pushes them off the device, fit in at once
DISK_BLOCKS = 4096
TIERS = {
    "HOLDFAST_ENGINE__KV_CACHE_BYTES": str(DEVICE_BLOCKS * BLOCK_BYTES),
    "HOLDFAST_ENGINE__MAX_MODEL_LEN": "640",
    "HOLDFAST_TIERS__DRAM_BYTES": str(DRAM_BLOCKS * BLOCK_BYTES),
    "HOLDFAST_TIERS__DISK_BYTES": str(DISK_BLOCKS * 2 * BLOCK_BYTES),
}


@pytest.fixture(scope="session")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    state_dir = tmp_path_factory.mktemp("tiers") / "state"
    started = holdfast(state_dir, ("up", "--demo", "--detach", "--timeout", "270"), settings=TIERS)
    yield Appliance(state_dir, started["endpoint"], started["api_key"])
    holdfast(state_dir, ("down",))
