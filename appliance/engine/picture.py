"""What the engine says of all that it keeps: for the metrics, `holdfast kv status` and `kv top`.

Rules:

- Standard library only, as `protocol`: both environments import this module.
- The engine sums up: whatever it keeps, a picture has so many tenants and sessions at most. Those beyond are counted.
- Labels are those of leases: they say nothing about whom they name.
- What comes over the wire is checked field by field, as `protocol` does.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final, Self

from appliance.engine.protocol import MalformedMessage, _count, _label, _number, _record

KV_PATH: Final = "/holdfast/kv"
TIERS: Final = ("device", "dram", "disk")
TIER_STATES: Final = ("ok", "quarantined", "failed")
MAX_SESSIONS: Final = 1000
MAX_TENANTS: Final = 64
OTHER_TENANTS: Final = "other"
"""The label of all tenants beyond the `MAX_TENANTS` that keep most, together."""


@dataclass(frozen=True, slots=True)
class TierPicture:
    """One tier. Blocks are all of one size, `block_bytes`; `leased_blocks` are those of sessions whose lease runs."""

    tier: str
    state: str
    block_bytes: int
    capacity_blocks: int
    used_blocks: int
    leased_blocks: int

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `KvPicture.to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = _record(value, cls)
        tier, state = record["tier"], record["state"]
        if tier not in TIERS or state not in TIER_STATES:
            raise MalformedMessage(f"a tier ({', '.join(TIERS)}) and its state ({', '.join(TIER_STATES)})")
        return cls(
            tier=str(tier),
            state=str(state),
            block_bytes=_count(record, "block_bytes"),
            capacity_blocks=_count(record, "capacity_blocks"),
            used_blocks=_count(record, "used_blocks"),
            leased_blocks=_count(record, "leased_blocks"),
        )


@dataclass(frozen=True, slots=True)
class TenantPicture:
    """What the sessions of one tenant keep on the device; a block that two sessions share counts for both."""

    tenant: str
    sessions: int
    blocks: int

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `KvPicture.to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = _record(value, cls)
        return cls(_label(record, "tenant"), _count(record, "sessions"), _count(record, "blocks"))


@dataclass(frozen=True, slots=True)
class SessionPicture:
    """What one session keeps on the device, what that is worth and until when its lease runs.

    Attributes:
        worth_hits_per_s: None where a request of it waits or runs, or nobody reckons it.
        expires_in_s: at or below zero: it has run out.
    """

    tenant: str
    session: str
    blocks: int
    tokens: int
    worth_hits_per_s: float | None
    expires_in_s: float

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `KvPicture.to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = _record(value, cls)
        worth = record["worth_hits_per_s"]
        return cls(
            tenant=_label(record, "tenant"),
            session=_label(record, "session"),
            blocks=_count(record, "blocks"),
            tokens=_count(record, "tokens"),
            worth_hits_per_s=None if worth is None else _number(record, "worth_hits_per_s"),
            expires_in_s=_number(record, "expires_in_s"),
        )


@dataclass(frozen=True, slots=True)
class KvPicture:
    """Everything that one engine keeps, summed up.

    Attributes:
        tiers: those that are there; the device is the first.
        tenants: those that keep most.
        sessions: those that keep most, as many as were asked for.
        sessions_total: all that keep something on the device; of them `leased_sessions_total` have a lease that runs.
        worths_hits_per_s: the lowest, the middle and the highest of all that are known; empty: none is.
    """

    block_size: int  # tokens
    tiers: tuple[TierPicture, ...]
    tenants: tuple[TenantPicture, ...]
    sessions: tuple[SessionPicture, ...]
    sessions_total: int
    leased_sessions_total: int
    worths_hits_per_s: tuple[float, ...]
    reclaimed_blocks_total: int
    expired_leases_total: int
    ignored_leases_total: int

    def to_wire(self) -> dict[str, object]:
        """The picture as JSON has it."""
        return asdict(self)

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = _record(value, cls)
        worths = _values(record["worths_hits_per_s"], 3)
        return cls(
            block_size=_count(record, "block_size"),
            tiers=tuple(TierPicture.from_wire(each) for each in _values(record["tiers"], len(TIERS))),
            tenants=tuple(TenantPicture.from_wire(each) for each in _values(record["tenants"], MAX_TENANTS + 1)),
            sessions=tuple(SessionPicture.from_wire(each) for each in _values(record["sessions"], MAX_SESSIONS)),
            sessions_total=_count(record, "sessions_total"),
            leased_sessions_total=_count(record, "leased_sessions_total"),
            worths_hits_per_s=tuple(_number({"worth": each}, "worth") for each in worths),
            reclaimed_blocks_total=_count(record, "reclaimed_blocks_total"),
            expired_leases_total=_count(record, "expired_leases_total"),
            ignored_leases_total=_count(record, "ignored_leases_total"),
        )


def read_sessions_asked(given: str | None) -> int:
    """How many sessions a picture is to have, from what a query says; none, if it says nothing.

    Raises:
        MalformedMessage: when it is no number from 0 to `MAX_SESSIONS`.
    """
    if given is None:
        return 0
    if not (given.isascii() and given.isdigit()) or int(given[:9]) > MAX_SESSIONS:
        raise MalformedMessage(f"sessions: a whole number from 0 to {MAX_SESSIONS}")
    return int(given)


def _values(value: object, at_most: int) -> Sequence[object]:
    if not isinstance(value, list | tuple) or len(value) > at_most:
        raise MalformedMessage(f"a list of at most {at_most} values")
    return value
