"""Whose KV a request computes, and whether it may leave the device."""

from dataclasses import dataclass

from vllm.v1.kv_offload.base import ReqContext

from appliance.engine.inside.quotas import Owner
from appliance.engine.protocol import LEASE_FIELD, Lease
from appliance.engine.wire import MalformedMessage


@dataclass(frozen=True)
class _Read:
    """What a request's lease says, once it was read."""

    lease: Lease | None


@dataclass(frozen=True)
class Released:
    """Marks a request whose session was released while it was known: nothing more of it is stored."""


@dataclass(frozen=True)
class Withheld:
    """Marks a request that missed a chunk which a tier had and could not give it; `end_token`: where the chunk ends."""

    end_token: int


@dataclass(frozen=True)
class Ahead:
    """Marks what is read from the disk before a request asks for it."""


def session_of(lease: Lease) -> Owner:
    """Whose a lease is: the tenant's label and the session's."""
    return lease.tenant, lease.session


def lease_of(context: ReqContext) -> Lease | None:
    """The lease that a request carries; None where there is none that can be read."""
    read = context.get_state(_Read)
    if read is None:
        try:
            read = _Read(Lease.from_wire((context.kv_transfer_params or {})[LEASE_FIELD]))
        except (KeyError, MalformedMessage):
            read = _Read(None)
        context.set_state(read)
    lease: Lease | None = read.lease
    return lease


def owner_of(context: ReqContext) -> Owner | None:
    """Whose KV a request computes; None where nobody can ask for it again."""
    lease = lease_of(context)
    return None if lease is None else session_of(lease)


def withheld(context: ReqContext, key: bytes) -> None:
    """A tier had a chunk that a request asks for, and could not give it."""
    context.set_state(Withheld(context.get_offload_key_position(key) or 0))


def is_strict(context: ReqContext) -> bool:
    """Whether nothing of a request's session may be anywhere but on the device."""
    lease = lease_of(context)
    return lease is not None and lease.strict


def is_stored(context: ReqContext) -> bool:
    """Whether a request's KV may leave the device: it has a session, which is neither strict nor released."""
    return owner_of(context) is not None and not is_strict(context) and context.get_state(Released) is None
