"""What the engine is answered when it asks for the key of a session's tiers.

Rules:

- A session without a key was forgotten: what tiers hold of it goes.
- A strict tenant's sessions are in no tier. An engine that finds files of the time before the setting asks for their
  keys when it starts, and is told that they are gone.
- None for the moment: the vault is sealed, or the label is not among those that are remembered.
"""

from collections.abc import Awaitable, Callable, Collection

from appliance.engine.tier_keys import SessionGone
from appliance.identity import Identity
from appliance.sessions import Sessions
from appliance.sessions.archive import UnknownSession
from appliance.sessions.labels import known_labels
from appliance.settings import SessionSettings
from appliance.vault import KeyMissing, Vault


def key_of(
    sessions: Sessions, strict_tenants: Callable[[], Awaitable[Collection[str]]]
) -> Callable[[str, str], Awaitable[bytes]]:
    """Answers for `KeyChannel`.

    Args:
        strict_tenants: their labels. Asked until it answers, and not again: a tenant that is made later has no files of
            the time before.
    """
    strict: Collection[str] | None = None

    async def key(tenant_label: str, session_label: str) -> bytes:
        nonlocal strict
        if strict is None:
            strict = await strict_tenants()
        if tenant_label in strict:
            raise SessionGone
        try:
            return await sessions.tier_key(tenant_label, session_label)
        except (UnknownSession, KeyMissing):
            raise SessionGone from None

    return key


async def strict_labels(settings: SessionSettings, identity: Identity, vault: Vault) -> Collection[str]:
    """The labels of tenants of whom nothing is kept beyond the idle timeout.

    Raises:
        HoldfastError: the vault is sealed, or the store fails.
    """
    names = {name for name, own in settings.tenants.items() if own.retention == "strict"}
    tenant_ids = await identity.tenant_ids(names) if names else []
    return known_labels(vault, tenant_ids).values()
