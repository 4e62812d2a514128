"""How much an API key may ask for: requests a minute, requests at once, tokens a day.

Rules:

- A request enters first, which costs nothing to decide: its rate and how many run at once. What it asks for is looked
  at afterwards. One that was refused then has been a request all the same.
- A turn's tokens are reserved before it runs, as if it used all that it may, and settled when it is over.
- What was admitted is settled or released exactly once; doing it again changes nothing.
- A day is a UTC day. A turn counts for the day on which its tokens were reserved, and a clock that is set back over
  midnight changes no day's count.
- What a day has used is stored with the turn that used it, in one transaction; reservations live in memory only.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy import Executable, select
from sqlalchemy.dialects import postgresql, sqlite

from appliance.identity.errors import DailyTokensSpent, ModelNotAllowed, RateLimited, TooManyConcurrent
from appliance.identity.types import ApiKey, Caller
from appliance.store import Change, Store, tables

_MINUTE_S = 60.0
_DAY_S = 86_400


@dataclass(slots=True)
class _Use:
    """What one key is using now."""

    recent: deque[float] = field(default_factory=deque)  # when requests of the last minute came
    running: int = 0
    day: str = ""
    used: int = 0  # tokens of the day that are settled
    reserved: Counter[str] = field(default_factory=Counter)  # tokens that running turns may use, by day


class Admission:
    """A request that was let in. Reserve its tokens; then settle it with what it used, or release it.

    Attributes:
        reserved: tokens.
    """

    __slots__ = ("_day", "_key", "_open", "_quotas", "reserved")

    def __init__(self, quotas: "Quotas", key: ApiKey) -> None:
        self._quotas = quotas
        self._key = key
        self._day = ""
        self._open = True
        self.reserved = 0

    def reserve(self, model: str, tokens: int) -> None:
        """Let the turn run that may use `tokens`. Blocks for one read when a key is first seen in a day.

        Raises:
            ModelNotAllowed: the key may not ask for the model.
            DailyTokensSpent: the day's tokens do not suffice.
        """
        self._day = self._quotas._reserve(self._key, model, tokens)
        self.reserved = tokens

    def settle(self, tokens: int) -> list[Change]:
        """The turn is over and used `tokens`; returns what to commit with it."""
        if not self._open:
            return []
        self._open = False
        return self._quotas._end(self._key, self._day, self.reserved, tokens)

    def release(self) -> None:
        """The turn is over and used nothing."""
        self.settle(0)


class Quotas:
    """The use of every key, in one gateway.

    Args:
        now: wall clock, epoch seconds.
    """

    def __init__(self, store: Store, *, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now = now
        self._uses: dict[str, _Use] = {}
        self._add = _add_statement(store.dialect)

    def enter(self, caller: Caller) -> Admission:
        """Let a request in, before anything of it is read.

        Raises:
            RateLimited, TooManyConcurrent: the key asks too often, or for too much at once.
        """
        key = caller.key
        if key is None:
            raise TypeError("only an API key is admitted to a model")
        scopes, now = key.scopes, self._now()
        use = self._uses.setdefault(key.key_id, _Use())
        self._check_rate(use, scopes.requests_per_minute, now)
        if scopes.concurrent_requests is not None and use.running >= scopes.concurrent_requests:
            raise TooManyConcurrent(
                "too many requests at once",
                cause=f"{use.running} of this key's requests are running, and it may have {scopes.concurrent_requests}",
                remedy="Wait until one is over",
            )
        if scopes.requests_per_minute is not None:
            use.recent.append(now)
        use.running += 1
        return Admission(self, key)

    def _reserve(self, key: ApiKey, model: str, tokens: int) -> str:
        """The day that the tokens are of."""
        scopes, now = key.scopes, self._now()
        if scopes.models is not None and model not in scopes.models:
            raise ModelNotAllowed(
                f"this key may not use the model {model!r}",
                cause=f"it is for {', '.join(sorted(scopes.models)) or 'no model'}",
                remedy="Ask for one of those, or ask an administrator for another key",
            )
        use = self._uses[key.key_id]
        day = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")
        self._check_day(key, use, day, now, tokens)
        use.reserved[day] += tokens
        return day

    def _check_rate(self, use: _Use, limit: int | None, now: float) -> None:
        if limit is None:
            return
        # A clock that was set back must not keep old requests recent for ever.
        while use.recent and not 0 <= now - use.recent[0] < _MINUTE_S:
            use.recent.popleft()
        if len(use.recent) < limit:
            return
        retry_after_s = math.ceil(use.recent[0] + _MINUTE_S - now) if use.recent else _MINUTE_S
        raise RateLimited(
            "too many requests within a minute",
            cause=f"this key may send {limit} requests a minute",
            remedy=f"Ask again in {retry_after_s:.0f} s",
            retry_after_s=retry_after_s,
        )

    def _check_day(self, key: ApiKey, use: _Use, day: str, now: float, reserve_tokens: int) -> None:
        limit = key.scopes.tokens_per_day
        if use.day != day:
            use.day = day
            use.used = 0 if limit is None else self._stored_use(key.key_id, day)
        if limit is None or use.used + use.reserved[day] + reserve_tokens <= limit:
            return
        retry_after_s = _DAY_S - now % _DAY_S
        raise DailyTokensSpent(
            "the day's tokens do not suffice for this request",
            cause=f"of {limit} tokens {use.used} are used, {use.reserved[day]} are reserved by running requests, "
            f"and this one may use {reserve_tokens}",
            remedy="Ask with a smaller max_tokens, or after midnight UTC",
            retry_after_s=retry_after_s,
        )

    def _stored_use(self, key_id: str, day: str) -> int:
        quota_days = tables.quota_days
        query = select(quota_days.c.tokens).where(quota_days.c.api_key_id == key_id, quota_days.c.day == day)
        return self._store.read_blocking(lambda db: db.execute(query).scalar()) or 0

    def _end(self, key: ApiKey, day: str, reserved: int, tokens: int) -> list[Change]:
        use = self._uses[key.key_id]
        use.running -= 1
        use.reserved[day] -= reserved
        if not use.reserved[day]:
            del use.reserved[day]
        if use.day == day:
            use.used += tokens
        if not use.running and key.scopes.requests_per_minute is None and key.scopes.tokens_per_day is None:
            del self._uses[key.key_id]  # nobody asks what there was
        if key.scopes.tokens_per_day is None or tokens == 0:
            return []
        return [Change(self._add, {"api_key_id": key.key_id, "day": day, "tokens": tokens})]


def _add_statement(dialect: str) -> Executable:
    """Adds to what a day has used."""
    quota_days = tables.quota_days
    if dialect == "postgresql":
        pg_row = postgresql.insert(quota_days)
        return pg_row.on_conflict_do_update(
            index_elements=["api_key_id", "day"], set_={"tokens": quota_days.c.tokens + pg_row.excluded.tokens}
        )
    row = sqlite.insert(quota_days)
    return row.on_conflict_do_update(
        index_elements=["api_key_id", "day"], set_={"tokens": quota_days.c.tokens + row.excluded.tokens}
    )
