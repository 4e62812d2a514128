"""What the benchmarks in the engine's environment are held to: they cannot be imported where the table is made."""

from typing import Final

# `tiers`, against vanilla vLLM.
FEWER_TOKENS: Final = 7.0  # times
SOONER: Final = 3.0  # times
# `recall`
NO_LATER: Final = 1.0  # times sooner
# `leases`
MOST_SHARE: Final = 0.01  # of a decode step
MOST_BYTES: Final = 2048  # of an idle session
MOST_SLOWER: Final = 0.05  # of a first token
# `demotion`
MOST_LONGER: Final = 0.05  # of a decode step
