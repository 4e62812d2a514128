"""Who goes to the engine next when there is more to do than it has room for.

Rules:

- As many turns are with the engine as it has room for: sequences, and tokens of KV. A turn that is larger than all of
  it goes alone.
- Between tenants: shares. What a tenant's turns made the engine compute, divided by its weight, may be at most
  `slack_tokens` ahead of the tenant that waits and had least; who is further ahead waits. (Start-time fair queueing,
  Goyal et al. 1996, with room for locality as in deficit longest-prefix match, Cao et al. 2025.) A tenant that had
  nothing to do saves nothing up.
- Within that, who has waited `longest_wait_s` goes first, the oldest before all others, and nobody passes until there
  is room for it.
- Else a tenant's own tier and priority decide among its own turns, then the share of the prompt whose KV is on the
  device: what waits may be evicted meanwhile, and the fullest has most to lose.
- The line is bounded. A tenant may hold three times as many places as are left, so that one alone never fills it.
- No I/O, no clock of its own, no waiting: who was let in after a wait is told through `let_in`.

Each operation costs microseconds while nobody waits, and a look at each who waits when a place is given back.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final

from appliance.errors import Fault, HoldfastError

_TENANT_TO_LEFT: Final = 3
_LEARNT_FROM_ONE: Final = 0.1  # of a mean, what one more turn counts
_RETRY_S: Final = (1.0, 30.0)


class LineFull(HoldfastError):
    """As many turns wait for the engine as may.

    Attributes:
        retry_after_s: when some of them will have been served.
    """

    code: ClassVar[str] = "queue_full"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE

    def __init__(self, cause: str, retry_after_s: float) -> None:
        super().__init__("the engine is busy", cause=cause, remedy="Send the request again in a moment")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Wish:
    """A turn that wants to the engine.

    Attributes:
        tenant: whose share it counts for.
        prompt_tokens, output_tokens: what it is expected to have, output for all its sequences together.
        sequences: how many answers were asked for.
        resident_tokens: says when asked how much of its prompt is on the device.
        weight: of its tenant.
        tier, priority: among its tenant's own turns; higher goes first, the tier before the priority.
    """

    tenant: str
    prompt_tokens: int
    output_tokens: int
    resident_tokens: Callable[[], int]
    sequences: int = 1
    weight: float = 1.0
    tier: int = 0
    priority: int = 0


@dataclass(eq=False, slots=True)
class Place:
    """A turn in the line or with the engine. Times are the clock's."""

    wish: Wish
    number: int
    asked_at: float
    admitted_at: float | None = None
    charged_tokens: float = 0.0
    left: bool = False

    @property
    def need_tokens(self) -> int:
        """Of KV, while it runs."""
        return self.wish.prompt_tokens + self.wish.output_tokens

    def resident_share(self) -> float:
        """Of its prompt, what is on the device; 0 to 1."""
        prompt = max(self.wish.prompt_tokens, 1)
        return min(self.wish.resident_tokens(), prompt) / prompt


@dataclass(slots=True)
class _Tenant:
    """Attributes: had: tokens that the engine computed for it, divided by its weight, as far as they still count."""

    had: float
    waiting: dict[int, Place] = field(default_factory=dict)
    running: int = 0


class AdmissionLine:
    """The turns that are with the engine, and those that wait for it.

    Args:
        sequences: how many the engine runs at once.
        longest_wait_s: after which a turn goes before all others of its tenant's share.
        most_waiting: turns; at least one.
        clock: seconds, monotonic.
        let_in: told of each turn that goes to the engine after it has waited.
        slack_tokens: how far a tenant may be ahead of another that waits.

    Attributes:
        pool_tokens: KV that the device holds; None: not known, only sequences count.
    """

    def __init__(
        self,
        *,
        sequences: int,
        longest_wait_s: float,
        most_waiting: int,
        clock: Callable[[], float],
        let_in: Callable[[Place], None] = lambda _: None,
        slack_tokens: float = 65_536,
    ) -> None:
        self._sequences = sequences
        self._longest_wait_s = longest_wait_s
        self._most_waiting = most_waiting
        self._clock = clock
        self._let_in = let_in
        self._slack_tokens = slack_tokens
        self._numbers = itertools.count()
        self._tenants: dict[str, _Tenant] = {}
        self._virtual = 0.0  # what a tenant that comes now counts as having had
        self._sequences_taken = 0
        self._tokens_taken = 0
        self._mean_run_s = 1.0
        self.pool_tokens: int | None = None
        self.running = 0
        self.waiting = 0

    def refuse_full(self, tenant: str) -> None:
        """Say whether one more of a tenant's turns could wait.

        Raises:
            LineFull: it could not.
        """
        if not self.waiting:
            return
        left = self._most_waiting - self.waiting
        if left <= 0:
            raise LineFull(f"{self.waiting} turns wait for it already (admission.most_waiting)", self._retry_after_s())
        known = self._tenants.get(tenant)
        mine = 0 if known is None else len(known.waiting)
        if mine >= _TENANT_TO_LEFT * left:
            raise LineFull(f"{mine} turns of this tenant wait for it already", self._retry_after_s())

    def ask(self, wish: Wish) -> Place:
        """Take a place; it is with the engine already where `admitted_at` is set, else `let_in` is called later.

        Raises:
            LineFull: there is no room at the engine and none in the line.
        """
        place = Place(wish, next(self._numbers), self._clock())
        if not self.waiting and self._fits(place):
            self._admit(self._tenant(wish.tenant), place)
            return place
        self.refuse_full(wish.tenant)
        self._tenant(wish.tenant).waiting[place.number] = place
        self.waiting += 1
        self._fill(quiet=place)
        return place

    def leave(self, place: Place, computed_tokens: int | None = None) -> None:
        """Give a place back: the turn is over, or does not want to wait any more. Doing it again changes nothing.

        Args:
            computed_tokens: what the engine computed for it; None: not known, what was expected counts.
        """
        if place.left:
            return
        place.left = True
        wish = place.wish
        tenant = self._tenants[wish.tenant]
        if place.admitted_at is None:
            del tenant.waiting[place.number]
            self.waiting -= 1
        else:
            self.running -= 1
            tenant.running -= 1
            self._sequences_taken -= wish.sequences
            self._tokens_taken -= place.need_tokens
            self._mean_run_s += _LEARNT_FROM_ONE * (self._clock() - place.admitted_at - self._mean_run_s)
            if computed_tokens is not None:
                tenant.had += (computed_tokens - place.charged_tokens) / wish.weight
        if self.waiting:
            self._fill()
        elif not self.running:
            self._tenants.clear()
            self._virtual = 0.0
            return
        if not tenant.waiting and not tenant.running and tenant.had <= self._virtual:
            del self._tenants[wish.tenant]

    def told(self, pool_tokens: int) -> None:
        """How much KV the device holds, and that what is resident may have changed."""
        self.pool_tokens = pool_tokens
        self._slack_tokens = float(pool_tokens)
        if self.waiting:
            self._fill()

    # Who

    def _fill(self, quiet: Place | None = None) -> None:
        """Let in whoever is next, as long as there is room. `quiet` asks right now: it need not be told."""
        while (place := self._next()) is not None:
            tenant = self._tenants[place.wish.tenant]
            del tenant.waiting[place.number]
            self.waiting -= 1
            self._admit(tenant, place)
            if place is not quiet:
                self._let_in(place)

    def _next(self) -> Place | None:
        if self.running and self._sequences_taken >= self._sequences:
            return None
        waiting = [tenant for tenant in self._tenants.values() if tenant.waiting]
        if not waiting:
            return None
        bound = min(tenant.had for tenant in waiting) + self._slack_tokens
        eligible = [tenant for tenant in waiting if tenant.had <= bound]
        # A dict keeps the order of asking: the first of each is its oldest.
        oldest = min((next(iter(tenant.waiting.values())) for tenant in eligible), key=lambda place: place.number)
        if self._clock() - oldest.asked_at >= self._longest_wait_s:
            return oldest if self._fits(oldest) else None
        best: tuple[float, int, Place] | None = None
        for tenant in eligible:
            fitting = [place for place in tenant.waiting.values() if self._fits(place)]
            if not fitting:
                continue
            rank = max((place.wish.tier, place.wish.priority) for place in fitting)
            for place in fitting:
                if (place.wish.tier, place.wish.priority) == rank:
                    worth = (place.resident_share(), -place.number, place)
                    if best is None or worth[:2] > best[:2]:
                        best = worth
        return None if best is None else best[2]

    def _fits(self, place: Place) -> bool:
        if not self.running:
            return True
        if self._sequences_taken + place.wish.sequences > self._sequences:
            return False
        return self.pool_tokens is None or self._tokens_taken + place.need_tokens <= self.pool_tokens

    def _admit(self, tenant: _Tenant, place: Place) -> None:
        wish = place.wish
        place.admitted_at = self._clock()
        place.charged_tokens = max(place.need_tokens - min(wish.resident_tokens(), wish.prompt_tokens), 1)
        self._virtual = max(self._virtual, tenant.had)
        tenant.had += place.charged_tokens / wish.weight
        tenant.running += 1
        self.running += 1
        self._sequences_taken += wish.sequences
        self._tokens_taken += place.need_tokens

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(self._virtual)
        elif not tenant.waiting:
            tenant.had = max(tenant.had, self._virtual)
        return tenant

    def _retry_after_s(self) -> float:
        lowest, highest = _RETRY_S
        return min(max(self._mean_run_s * self.waiting / max(self._sequences, 1), lowest), highest)
