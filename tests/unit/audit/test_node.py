"""What a node says of its log: why it is not signed, and since when."""

from pathlib import Path
from typing import Any

import pytest

from appliance.audit.node import NodeAudit
from appliance.audit.recorder import AuditUnavailable
from appliance.vault import Vault
from tests.unit.vault.keystore import MemoryKeys

pytestmark = pytest.mark.anyio
FULL = {"code": "audit_log_unwritable", "message": "it cannot be written", "cause": "tile: full", "remedy": "Make room"}


class Node:
    """A node whose appender says what a test has it say, by a clock that is set by hand."""

    def __init__(self, state_dir: Path) -> None:
        self.now_s = 1000.0
        self.said: dict[str, Any] = {"size": 9, "checkpoint_size": 9, "checkpoint_age_s": 1.0, "error": None}
        self.audit = NodeAudit(state_dir, Vault(MemoryKeys()), versions={}, monotonic=lambda: self.now_s)
        self.audit._recorder.status = self._status  # type: ignore[method-assign]

    async def _status(self) -> dict[str, Any]:
        if not self.said:
            raise AuditUnavailable("no answer", cause="it hangs", remedy="Wait")
        return dict(self.said)

    def open(self) -> None:
        """As `sign` does once the vault is open."""
        self.audit._signs_since = self.now_s
        self.audit.opened.set()

    async def trouble(self) -> str:
        await self.audit.status()
        return self.audit.checkpoint_trouble


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


async def test_a_checkpoint_that_cannot_be_made_is_told_with_its_cause_until_one_is(node: Node) -> None:
    assert (node.audit.checkpoint_trouble, node.audit.checkpoint_age_s) == ("", None), "nothing is known yet"
    node.said["error"] = FULL
    assert await node.trouble() == "no checkpoint can be made: tile: full"
    node.said["error"] = None
    assert await node.trouble() == ""


async def test_a_checkpoint_that_is_minutes_late_is_told_though_the_appender_hangs(node: Node) -> None:
    node.open()
    node.said.update(size=12)
    assert await node.trouble() == ""
    node.said.clear()
    node.now_s += 300.0
    with pytest.raises(AuditUnavailable):
        await node.audit.status()
    assert node.audit.checkpoint_age_s == 301.0
    assert node.audit.checkpoint_trouble == "no checkpoint was made for 300 s, and 3 entries wait"


async def test_where_nothing_waits_and_while_nobody_can_sign_an_old_checkpoint_is_not_late(node: Node) -> None:
    node.said.update(checkpoint_age_s=86_400.0)
    node.open()
    node.now_s += 1000.0
    assert await node.trouble() == "", "nothing is new"
    node.audit.opened.clear()
    node.said.update(size=12)
    assert await node.trouble() == "", "the vault is sealed, and that is told"
    node.open()
    assert await node.trouble() == "", "it is signed at once"
    node.now_s += 300.0
    assert "no checkpoint was made for 300 s" in await node.trouble()


async def test_a_first_checkpoint_that_never_comes_is_told(node: Node) -> None:
    node.said.update(checkpoint_size=0, checkpoint_age_s=None)
    node.open()
    node.now_s += 300.0
    assert await node.trouble() == "no checkpoint was made for 300 s, and 9 entries wait"
