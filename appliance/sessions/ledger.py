"""What the turns of this gateway's life came to: the newest of each session, a tenant's sums, times to first token.

For the live picture only: what is kept for good is in the transcript.

Rules:

- Bounded, whatever happens: so many sessions, tenants and observations; the oldest leave first. Tenants beyond are one,
  and a tenant that is removed makes room for another.
- Holds counts, times and ids; no word of what was said.
- A turn is warm when more of its prompt was found than computed.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from appliance.sessions.misses import Account, Cause

MAX_TENANTS: Final = 64
OTHER_TENANTS: Final = "other"
UNKNOWN_TIER: Final = "unknown"  # found, and it is not known where
_MAX_SESSIONS: Final = 16_384
_MAX_FIRST_TOKENS: Final = 4096


class TurnOf(NamedTuple):
    """Whose turn it was: our ids, and what the engine calls them."""

    session_id: str
    tenant_id: str
    session_label: str
    tenant_label: str


class LastTurn(NamedTuple):
    """The newest turn of a session: when it ended, epoch seconds; how long its first token took, if it was streamed."""

    of: TurnOf
    ended_at: float
    account: Account
    first_token_s: float | None


class FirstToken(NamedTuple):
    """How long a turn's first token took."""

    tenant_id: str
    warm: bool
    at: float
    seconds: float


class Quantiles(NamedTuple):
    """Of times to first token, in seconds; `since` is the oldest of them, epoch seconds."""

    turns: int
    p50_s: float
    p90_s: float
    p99_s: float
    since: float


@dataclass(slots=True)
class Sums:
    """Tokens of prompts since the gateway began."""

    turns: int = 0
    prompt_tokens: int = 0
    repeated_tokens: int = 0
    served: Counter[str] = field(default_factory=Counter)  # by tier
    computed: Counter[Cause] = field(default_factory=Counter)

    def add(self, account: Account) -> None:
        """Count one turn more."""
        self.turns += 1
        self.prompt_tokens += account.prompt_tokens
        self.repeated_tokens += account.repeated_tokens
        for tier, tokens in served_by_tier(account).items():
            self.served[tier] += tokens
        for cause, tokens in account.computed.items():
            self.computed[cause] += tokens


class Ledger:
    """The books of one gateway."""

    def __init__(self, *, max_sessions: int = _MAX_SESSIONS, max_first_tokens: int = _MAX_FIRST_TOKENS) -> None:
        self._max_sessions = max_sessions
        self._last: OrderedDict[str, LastTurn] = OrderedDict()
        self._by_label: dict[tuple[str, str], str] = {}
        self._tenants: OrderedDict[str, str] = OrderedDict()  # by the engine's label
        self._first_tokens: deque[FirstToken] = deque(maxlen=max_first_tokens)
        self.sums = Sums()
        self.sums_of: dict[str, Sums] = {}

    def note(self, of: TurnOf, account: Account, *, ended_at: float, first_token_s: float | None) -> None:
        """Enter a turn; `first_token_s` None: it was not streamed."""
        self.forget(of.session_id)
        self._last[of.session_id] = LastTurn(of, ended_at, account, first_token_s)
        self._by_label[of.tenant_label, of.session_label] = of.session_id
        if len(self._last) > self._max_sessions:
            self.forget(next(iter(self._last)))
        if of.tenant_label in self._tenants or len(self._tenants) < MAX_TENANTS:
            self._tenants[of.tenant_label] = of.tenant_id
        tenant_id = self.tenant_of(of.tenant_label)
        self.sums.add(account)
        self.sums_of.setdefault(tenant_id, Sums()).add(account)
        if first_token_s is not None:
            self._first_tokens.append(FirstToken(tenant_id, is_warm(account), ended_at, first_token_s))

    def forget(self, session_id: str) -> None:
        """Strike a session out."""
        gone = self._last.pop(session_id, None)
        if gone is not None:
            self._by_label.pop((gone.of.tenant_label, gone.of.session_label), None)

    def forget_tenant(self, tenant_id: str) -> None:
        """Strike a tenant out that was removed; in the sums of all it stays."""
        for last in [last for last in self._last.values() if last.of.tenant_id == tenant_id]:
            self.forget(last.of.session_id)
        self._tenants = OrderedDict(known for known in self._tenants.items() if known[1] != tenant_id)
        self.sums_of.pop(tenant_id, None)
        kept = [each for each in self._first_tokens if each.tenant_id != tenant_id]
        self._first_tokens = deque(kept, maxlen=self._first_tokens.maxlen)

    def of_labels(self, tenant_label: str, session_label: str) -> LastTurn | None:
        """The newest turn of the session that the engine calls so; None: it is not in the books."""
        session_id = self._by_label.get((tenant_label, session_label))
        return None if session_id is None else self._last[session_id]

    def tenant_of(self, tenant_label: str) -> str:
        """The id of the tenant that the engine calls so, or `OTHER_TENANTS`."""
        return self._tenants.get(tenant_label, OTHER_TENANTS)

    def newest(self) -> Iterator[LastTurn]:
        """The newest turn of each session, the newest of all first."""
        return reversed(self._last.values())

    def first_tokens(self, *, warm: bool, tenant_id: str | None = None) -> Quantiles | None:
        """Of the newest turns, a tenant's or all; None: there was none."""
        chosen = [
            each
            for each in self._first_tokens
            if each.warm is warm and (tenant_id is None or each.tenant_id == tenant_id)
        ]
        if not chosen:
            return None
        times = sorted(each.seconds for each in chosen)
        p50, p90, p99 = (times[min(len(times) - 1, len(times) * share // 100)] for share in (50, 90, 99))
        return Quantiles(len(times), p50, p90, p99, chosen[0].at)


def is_warm(account: Account) -> bool:
    """Whether more of a prompt was found than computed."""
    return 2 * account.served_tokens > account.prompt_tokens


def served_by_tier(account: Account) -> dict[str, int]:
    """What was found, by tier; all of it is `UNKNOWN_TIER`'s where the tiers are not known."""
    if account.served is not None:
        return account.served.by_tier()
    return {UNKNOWN_TIER: account.served_tokens} if account.served_tokens else {}
