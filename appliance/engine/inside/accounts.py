"""Where each turn's prompt was served from, until the gateway asks.

Rules:

- A turn is admitted once: what a preempted request finds when it comes back is not what its prompt was served from.
- So many accounts are kept at most; the oldest go first. Nobody need ever ask for one.
- A label reaches no account of another tenant's.
"""

from collections import OrderedDict
from typing import Final

from appliance.engine.protocol import Lease, TurnAccount, TurnEnd

MAX_ACCOUNTS: Final = 4096


class Accounts:
    """The accounts of the turns that were admitted last."""

    def __init__(self, most: int = MAX_ACCOUNTS) -> None:
        self._most = most
        self._accounts: OrderedDict[tuple[str, str, str], TurnAccount] = OrderedDict()

    def admitted(
        self, lease: Lease, device_tokens: int, dram_tokens: int = 0, disk_tokens: int = 0, reason: str = ""
    ) -> None:
        """A turn's request was given its blocks; what it hits in each tier is known now."""
        key = (lease.tenant, lease.session, lease.turn)
        if not lease.turn or key in self._accounts:
            return
        self._accounts[key] = TurnAccount(lease.turn, device_tokens, dram_tokens, disk_tokens, reason)
        if len(self._accounts) > self._most:
            self._accounts.popitem(last=False)

    def ended(self, end: TurnEnd) -> TurnAccount | None:
        """The account of a turn that ended; None: it was never admitted, or too many were since."""
        return self._accounts.get((end.tenant, end.session, end.turn))
