"""What the engine is answered when it asks for the key of a session's tiers."""

from collections.abc import Awaitable, Callable

from appliance.engine.tier_keys import SessionGone
from appliance.sessions import Sessions
from appliance.sessions.archive import UnknownSession
from appliance.vault import KeyMissing


def key_of(sessions: Sessions) -> Callable[[str, str], Awaitable[bytes]]:
    """Answers for `KeyChannel`. A session without a key was forgotten. None for the moment: the vault is sealed, or
    the label is not among those that are remembered.
    """

    async def key(tenant_label: str, session_label: str) -> bytes:
        try:
            return await sessions.tier_key(tenant_label, session_label)
        except (UnknownSession, KeyMissing):
            raise SessionGone from None

    return key
