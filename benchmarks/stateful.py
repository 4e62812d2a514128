"""What keeping state is worth. `python -m benchmarks.stateful [--model demo|random-140m|PATH]`.

It runs `holdfast bench stateful`, on the model of about 140 million random weights unless told otherwise, and holds its
figures against what the project promises. `--check` leaves with 1 when one misses; other arguments are the command's.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PREFILL_REDUCTION = 0.983
TTFT_REDUCTION = 0.90
# No worse than vanilla: in tokens exactly; in time but for what `gateway_overhead` allows the gateway at the median,
# and 5 % for the noise of a median.
TTFT_ADDED_S = 0.002
TTFT_NOISE = 0.05


def missed(figures: Mapping[str, Any], *, times: bool = True) -> list[str]:
    """What `figures`, as the command prints them, do not reach; empty when they hold.

    Args:
        times: False: those of times are left out. They are the larger model's: a small one prefills so fast that the
            gateway's own milliseconds count.
    """
    stateful, vanilla = figures["stateful"], figures["vanilla"]
    few = vanilla["prefill_tokens_per_turn"]
    # Where the answers differ (random weights), so do the prompts after them: then each arm's own account compares.
    comparable = bool(figures["identical_output"])
    lost, lost_by_vanilla = stateful["account_per_turn"]["lost"], vanilla["account_per_turn"]["lost"]
    fewer, prefilled = figures["prefill_reduction"], stateful["prefill_tokens_per_turn"]
    checks = {
        f"prefills {fewer:.2%} fewer tokens, not {PREFILL_REDUCTION:.1%}": fewer >= PREFILL_REDUCTION,
        f"prefills {prefilled:g} tokens a turn; vanilla {few:g}": prefilled <= few or not comparable,
        f"loses {lost:g} tokens a turn that could be found again; vanilla {lost_by_vanilla:g}": lost <= lost_by_vanilla,
    }
    if times:
        sooner, later_s = figures["ttft_reduction"], figures["ttft_over_vanilla_p50_s"]
        allowed_s = vanilla["ttft_p50_s"] * TTFT_NOISE + TTFT_ADDED_S
        said = f"the first token comes {later_s * 1e3:.1f} ms after vanilla's; allowed are {allowed_s * 1e3:.1f}"
        checks |= {
            f"the first token comes {sooner:.1%} sooner, not {TTFT_REDUCTION:.0%}": sooner >= TTFT_REDUCTION,
            said: later_s <= allowed_s,
        }
    return [text for text, holds in checks.items() if not holds]


def main() -> int:
    """Run it, print the figures, and say what they miss."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="random-140m")
    parser.add_argument("--check", action="store_true")
    chosen, others = parser.parse_known_args()
    command = [str(Path(sys.executable).with_name("holdfast")), "bench", "stateful", "--model", chosen.model, "--json"]
    with subprocess.Popen([*command, *others], stdout=subprocess.PIPE) as process:
        try:
            said, _ = process.communicate()
        except KeyboardInterrupt:
            # The command was told too, and takes its appliance down before it leaves.
            return process.wait()
    sys.stdout.write(said.decode())
    if process.returncode != 0:
        return process.returncode
    misses = missed(json.loads(said), times=chosen.model != "demo")
    for miss in misses:
        print(f"missed: {miss}", file=sys.stderr)
    return int(bool(misses) and chosen.check)


if __name__ == "__main__":
    sys.exit(main())
