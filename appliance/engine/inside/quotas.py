"""How much of a tier a tenant and a session may have. Pure.

Rules:

- Shares and caps are fractions of the tier's chunks. They come with each request's lease; the newest are in force.
- A share is what others leave: whatever another tenant brings in, it pushes a tenant out down to its share and no
  further. Nobody waits for room in a tier: what has none is left out.
- A cap is the most that there is of a tenant's sessions together, or of one session. At its tenant's cap a session
  pushes the tenant's others out; what still has no room is left out at the tail.
- What a session lost for a quota is remembered by the token that the first lost chunk ends at, for the account of its
  next turn. Behind a chunk that it lost nothing is taken in: without its head a tail is worth nothing.
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple, Self, TypeVar

from appliance.engine.protocol import Lease

_MOST_LOSSES: Final = 10_000
_T = TypeVar("_T")

Owner = tuple[str, str]  # tenant, session


class Quota(NamedTuple):
    """What holds for one session, as its lease says it."""

    tenant_share: float = 0.0
    tenant_cap: float = 1.0
    session_cap: float = 1.0

    @classmethod
    def of(cls, lease: Lease) -> Self:
        """What a lease says."""
        return cls(lease.tenant_share, lease.tenant_cap, lease.session_cap)


NO_QUOTA: Final = Quota()


class Quotas:
    """The quotas of one tier.

    Args:
        capacity: how many chunks the tier has.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._of: dict[str, Quota] = {}  # by tenant, where it has any
        self._shares: dict[str, float] = {}
        self._lost: OrderedDict[Owner, int] = OrderedDict()

    @property
    def shares(self) -> Mapping[str, float]:
        """What others leave, by tenant, where that is anything."""
        return self._shares

    def of(self, tenant: str) -> Quota:
        """What was in force for a tenant's session that was heard of last."""
        return self._of.get(tenant, NO_QUOTA)

    def in_force(self, tenant: str, quota: Quota) -> bool:
        """Note what is in force for a tenant; whether its share is another than before."""
        before = self.of(tenant)
        if quota == before:
            return False
        _keep(self._of, tenant, None if quota == NO_QUOTA else quota)
        _keep(self._shares, tenant, quota.tenant_share or None)
        return quota.tenant_share != before.tenant_share

    def guaranteed(self, tenant: str) -> int:
        """How many chunks others leave to a tenant."""
        return self._part(self._shares.get(tenant, 0.0))

    def above_share(self, tenant: str, held_chunks: int, wanted_by: str) -> int:
        """How many of a tenant's chunks may leave for another's."""
        return held_chunks if tenant == wanted_by else held_chunks - self.guaranteed(tenant)

    def within_cap(self, quota: Quota, wanted_chunks: int, session_chunks: int) -> int:
        """How many of so many chunks a session may bring in beside those it has."""
        if quota.session_cap >= 1:
            return wanted_chunks
        return max(0, min(wanted_chunks, self._part(quota.session_cap) - session_chunks))

    def over_cap(self, quota: Quota, chunks: int) -> int:
        """By how many chunks a tenant with so many is over its cap."""
        return 0 if quota.tenant_cap >= 1 else max(0, chunks - self._part(quota.tenant_cap))

    def can_follow(self, owner: Owner, coming: Collection[int]) -> int | None:
        """The token that what a session brings in must end before, for a chunk there is lost; None: none is.

        Args:
            coming: the tokens that the chunks to be brought in end at.
        """
        lost = self._lost.get(owner)
        return None if lost in coming else lost

    def lost(self, owner: Owner, end_token: int) -> None:
        """A session's chunk that ends there left for a quota, or was left out."""
        self._lost[owner] = min(end_token, self._lost.get(owner, end_token))
        self._lost.move_to_end(owner)
        if len(self._lost) > _MOST_LOSSES:
            self._lost.popitem(last=False)

    def came(self, owner: Owner, end_token: int) -> None:
        """A session has the chunk that ends there."""
        if end_token == self._lost.get(owner):
            del self._lost[owner]

    def is_lost(self, owner: Owner, end_token: int) -> bool:
        """Whether the first chunk that a session misses, which ends there, was lost for a quota."""
        lost = self._lost.get(owner)
        return lost is not None and lost <= end_token

    def forget(self, owner: Owner) -> None:
        """A session is over."""
        self._lost.pop(owner, None)

    def _part(self, fraction: float) -> int:
        return int(fraction * self._capacity)


def _keep(kept: dict[str, _T], tenant: str, value: _T | None) -> None:
    if value is None:
        kept.pop(tenant, None)
    else:
        kept[tenant] = value
