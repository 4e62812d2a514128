"""Which part of a request's prompt is shared within its tenant, and which salt goes into which block's hash.

vLLM puts a request's `cache_salt` into the hash of its first block, and each block's hash into the next one's. What a
lease calls shared is salted with the tenant's salt instead, up to the last block that lies wholly within it; the first
block behind takes the request's own salt, and with it all that follow.

Rules:

- Closed where in doubt: a request without a salt of its own, without a lease, with a malformed one, or whose prompt
  does not begin with exactly the tokens that the gateway counted, shares nothing.
- The keys of the blocks in every tier are these hashes: the boundary holds in all of them.
- No vLLM here: `connector/` asks, for each block.
"""

import enum
from collections.abc import Mapping, Sequence

from appliance.engine.protocol import LEASE_FIELD, Lease, SharedPrefix, token_digest
from appliance.engine.wire import MalformedMessage


class BlockSalt(enum.Enum):
    """What a block's hash takes besides what vLLM gives it."""

    AS_IT_IS = enum.auto()
    SHARED = enum.auto()  # the tenant's salt, in the place of the request's own
    OWN = enum.auto()  # the request's own salt, which the first block went without


def shared_prefix(
    transfer: Mapping[str, object] | None, own_salt: str | None, prompt: Sequence[int] | None
) -> SharedPrefix | None:
    """What of a prompt is shared.

    Args:
        transfer: the request's `kv_transfer_params`.
        prompt: its token ids.
    """
    if not own_salt or not transfer or LEASE_FIELD not in transfer or prompt is None:
        return None
    try:
        shared = Lease.from_wire(transfer[LEASE_FIELD]).shared
    except MalformedMessage:
        return None
    if shared is None or len(prompt) < shared.tokens:
        return None
    return shared if token_digest(prompt[: shared.tokens]) == shared.digest else None


def salt_of_block(shared: SharedPrefix | None, start_token: int, end_token: int) -> BlockSalt:
    """The salt of the block [start_token, end_token) of a prompt whose blocks follow each other from token 0 on."""
    if shared is None:
        return BlockSalt.AS_IT_IS
    if start_token == 0:
        return BlockSalt.SHARED if end_token <= shared.tokens else BlockSalt.AS_IT_IS
    return BlockSalt.OWN if start_token <= shared.tokens < end_token else BlockSalt.AS_IT_IS
