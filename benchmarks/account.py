"""What the account of a turn and the live picture cost. `python -m benchmarks.account [--json]`

Measured in this process, without an engine: what the gateway does for each turn (the account, the metrics, the ledger),
and what the engine does when a picture is asked for while it has 10,000 sessions. Prometheus asks once in 15 s.
"""

import json
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass

from api.metrics import Metrics
from appliance.engine.inside.leases import LeasedBlock, LeaseTable
from appliance.engine.inside.pictures import Totals, picture_of
from appliance.engine.picture import TierPicture
from appliance.engine.protocol import Lease
from appliance.sessions import Account, Ledger, Served, TurnOf, TurnState
from appliance.sessions.misses import Circumstances, Ran, account_of

SESSIONS = 10_000
PROMPT_TOKENS = 100_000
_SCRAPE_EVERY_S = 15.0
_DEVICE = TierPicture("device", "ok", 1 << 20, 40 * SESSIONS, 20 * SESSIONS, 20 * SESSIONS, SESSIONS)


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians."""

    account_us: float
    count_us: float
    picture_ms: float
    picture_bytes: int
    picture_share_of_time: float


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

    table = LeaseTable(20 * SESSIONS, time.monotonic, lambda block_id: block_id)
    for number in range(SESSIONS):
        lease = Lease(f"session-{number}", f"tenant-{number % 100}", 3600.0)
        blocks = [LeasedBlock(20 * number + place, 32 * (place + 1), (number, place)) for place in range(20)]
        table.arrived(lease)
        table.finished(lease, blocks, output_tokens=100)

    def picture() -> bytes:
        seen = picture_of(
            table.kept(), (), block_size=32, tiers=[_DEVICE], holders={"device": table}, totals=Totals(0, 0, 0)
        )
        return json.dumps(seen.to_wire()).encode()

    picture_s = median_s(picture, 30)
    return Figures(
        account_us=1e6 * median_s(lambda: account_of(before, now), 200),
        count_us=1e6 * median_s(lambda: count(metrics, ledger, turn, account), 2000),
        picture_ms=1e3 * picture_s,
        picture_bytes=len(picture()),
        picture_share_of_time=picture_s / _SCRAPE_EVERY_S,
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
    print(f"picture of {SESSIONS} sessions        {figures.picture_ms:9.2f} ms, {figures.picture_bytes} bytes")
    share = 100 * figures.picture_share_of_time
    print(f"  asked for every {_SCRAPE_EVERY_S:.0f} s          {share:9.3f} % of the engine's time")


if __name__ == "__main__":
    main()
