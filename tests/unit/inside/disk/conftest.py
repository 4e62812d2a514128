"""What the tests of the tier on disk share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.engine.inside.disk.store import DiskStore
from tests.unit.inside.disk.tier import Make, Tier


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes tiers on one folder, one after the other."""
    made: list[DiskStore] = []

    def tier(**arguments: Any) -> Tier:
        for store in made:
            store.close()
        made.clear()
        new = Tier(tmp_path / "tier", **arguments)
        made.append(new.store)
        return new

    yield tier
    for store in made:
        store.close()
