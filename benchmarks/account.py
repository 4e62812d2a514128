"""What the account of a turn costs the gateway. `python -m benchmarks.account [--json]`

Measured in this process, without an engine: the account, the metrics, the ledger. What it costs the engine,
`benchmarks.leases` measures.
"""

import json
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass

from api.metrics import Metrics
from appliance.sessions import Account, Ledger, Served, TurnOf, TurnState
from appliance.sessions.misses import Circumstances, Ran, account_of

PROMPT_TOKENS = 100_000


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians."""

    account_us: float
    count_us: float


def median_s(action: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def measure() -> Figures:
    here = Circumstances(32, "one", 15.0, 0, served=Served(PROMPT_TOKENS - 160, 0, 0))
    ids = array("I", range(PROMPT_TOKENS + 200))
    before = Ran("model", ids[:PROMPT_TOKENS], PROMPT_TOKENS - 100, PROMPT_TOKENS - 200, 0.0, 1.0, here)
    now = Ran("model", ids, PROMPT_TOKENS + 100, PROMPT_TOKENS - 160, 2.0, 3.0, here)
    account = account_of(before, now)
    metrics, ledger = Metrics(), Ledger()
    turn = TurnOf("ses_1", "ten_1", "session", "tenant")

    return Figures(
        account_us=1e6 * median_s(lambda: account_of(before, now), 200),
        count_us=1e6 * median_s(lambda: count(metrics, ledger, turn, account), 2000),
    )


def count(metrics: Metrics, ledger: Ledger, turn: TurnOf, account: Account) -> None:
    metrics.turn(TurnState.COMPLETE, 0.001, account, completion=100, tenant_id=turn.tenant_id, first_token_s=0.1)
    ledger.note(turn, account, ended_at=3.0, first_token_s=0.1)


def main() -> None:
    figures = measure()
    if "--json" in sys.argv[1:]:
        print(json.dumps(asdict(figures)))
        return
    print(f"account of a turn of {PROMPT_TOKENS} tokens   {figures.account_us:9.1f} µs a turn")
    print(f"metrics and ledger                {figures.count_us:9.1f} µs a turn")


if __name__ == "__main__":
    main()
