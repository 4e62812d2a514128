"""What the engine says of all that it keeps: for the metrics, `holdfast kv status` and `kv top`.

Rules:

- Standard library only, as `protocol`: both environments import this module.
- The engine sums up: whatever it keeps, a picture has so many tenants and sessions at most. Those beyond are counted.
- Labels are those of leases: they say nothing about whom they name.
- What comes over the wire is checked field by field (`wire`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Self

from appliance.engine import wire
from appliance.engine.wire import MalformedMessage

KV_PATH: Final = "/holdfast/kv"
TIERS: Final = ("device", "dram", "disk")
TIER_STATES: Final = ("ok", "quarantined", "failed")
MAX_SESSIONS: Final = 1000
MAX_TENANTS: Final = 64
KEPT_FOR: Final = ("in_use", "lease", "share", "worth")
DISK_FAULTS: Final = ("damaged", "lost", "error", "no_key")
NOT_STORED: Final = ("slow", "error", "no_key", "too_large", "quota", "off")
_LAST_ERROR = re.compile(r"[ -~]{0,200}")
OTHER_TENANTS: Final = "other"
"""The label of all tenants beyond the `MAX_TENANTS` that keep most, together."""


@dataclass(frozen=True, slots=True)
class TierPicture:
    """One tier. Blocks are all of one size, `block_bytes`.

    `leased_blocks` are those of sessions whose lease runs. A lease is of the device: the other tiers have none.
    `sessions` have something in the tier.
    """

    tier: str
    state: str
    block_bytes: int
    capacity_blocks: int
    used_blocks: int
    leased_blocks: int
    sessions: int

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `KvPicture.to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = wire.record(value, cls)
        tier, state = record["tier"], record["state"]
        if tier not in TIERS or state not in TIER_STATES:
            raise MalformedMessage(f"a tier ({', '.join(TIERS)}) and its state ({', '.join(TIER_STATES)})")
        return cls(
            tier=str(tier),
            state=str(state),
            block_bytes=wire.count(record, "block_bytes"),
            capacity_blocks=wire.count(record, "capacity_blocks"),
            used_blocks=wire.count(record, "used_blocks"),
            leased_blocks=wire.count(record, "leased_blocks"),
            sessions=wire.count(record, "sessions"),
        )


@dataclass(frozen=True, slots=True)
class DiskPicture:
    """What became of blocks on the disk since the engine began.

    Attributes:
        waiting_bytes: that are to be written.
        not_stored_total: blocks that were not written, by each cause of `NOT_STORED`.
        faults_total: blocks that could not be read, by each cause of `DISK_FAULTS`. They were computed again.
        last_error: what went wrong last, in words; empty: nothing did.
        last_error_age_s: how long ago.
    """

    stored_blocks_total: int
    loaded_blocks_total: int
    evicted_blocks_total: int
    expired_blocks_total: int
    waiting_bytes: int
    not_stored_total: Mapping[str, int]
    faults_total: Mapping[str, int]
    last_error: str
    last_error_age_s: float | None

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `KvPicture.to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = wire.record(value, cls)
        error, age_s = record["last_error"], record["last_error_age_s"]
        if not isinstance(error, str) or not _LAST_ERROR.fullmatch(error):
            raise MalformedMessage("last_error: at most 200 printable characters")
        return cls(
            stored_blocks_total=wire.count(record, "stored_blocks_total"),
            loaded_blocks_total=wire.count(record, "loaded_blocks_total"),
            evicted_blocks_total=wire.count(record, "evicted_blocks_total"),
            expired_blocks_total=wire.count(record, "expired_blocks_total"),
            waiting_bytes=wire.count(record, "waiting_bytes"),
            not_stored_total=_by_cause(record["not_stored_total"], NOT_STORED),
            faults_total=_by_cause(record["faults_total"], DISK_FAULTS),
            last_error=error,
            last_error_age_s=None if age_s is None else wire.number(record, "last_error_age_s", 0.0),
        )


@dataclass(frozen=True, slots=True)
class CanaryPicture:
    """Whether what came back from a tier was what the model computes.

    Attributes:
        compared_blocks_total: of restored blocks, how many were computed again.
        worst_error: the largest root mean square of a difference, as a share of the values'; None: it is no number.
        quarantined: one was too large, in this engine or in one before: nothing is restored any more.
        compared_age_s: how long ago blocks were compared last; None: never.
        dropped_samples_total: how many times blocks were noted and went without having been compared.
    """

    compared_blocks_total: int
    worst_error: float | None
    quarantined: bool
    compared_age_s: float | None
    dropped_samples_total: int

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `KvPicture.to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = wire.record(value, cls)
        return cls(
            compared_blocks_total=wire.count(record, "compared_blocks_total"),
            worst_error=None if record["worst_error"] is None else wire.number(record, "worst_error", 0.0),
            quarantined=wire.flag(record, "quarantined"),
            compared_age_s=None if record["compared_age_s"] is None else wire.number(record, "compared_age_s", 0.0),
            dropped_samples_total=wire.count(record, "dropped_samples_total"),
        )


@dataclass(frozen=True, slots=True)
class RecallPicture:
    """What was read from the disk into DRAM before a request asked for it, since the engine began.

    What is neither used nor in vain is in DRAM still.

    Attributes:
        used_blocks_total: that a request loaded later.
        in_vain_blocks_total: that left DRAM before any did.
        paused_for_s: for how long nothing is read ahead, because the disk was slow or failed; zero: it is not paused.
    """

    recalled_blocks_total: int
    used_blocks_total: int
    in_vain_blocks_total: int
    paused_for_s: float

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `KvPicture.to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = wire.record(value, cls)
        return cls(
            recalled_blocks_total=wire.count(record, "recalled_blocks_total"),
            used_blocks_total=wire.count(record, "used_blocks_total"),
            in_vain_blocks_total=wire.count(record, "in_vain_blocks_total"),
            paused_for_s=wire.number(record, "paused_for_s", 0.0),
        )


@dataclass(frozen=True, slots=True)
class TenantPicture:
    """What the sessions of one tenant keep, and what its leases came to since the engine began.

    Attributes:
        sessions: that keep something on the device; of them `leased_sessions` have a lease that runs.
        blocks: by tier, for each tier that is there. One that two sessions share counts once.
        worths_hits_per_s: of its sessions, as `KvPicture.worths_hits_per_s`.
    """

    tenant: str
    sessions: int
    leased_sessions: int
    blocks: Mapping[str, int]
    worths_hits_per_s: tuple[float, ...]
    reclaimed_blocks_total: int
    expired_leases_total: int

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `KvPicture.to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = wire.record(value, cls)
        return cls(
            tenant=wire.label(record, "tenant"),
            sessions=wire.count(record, "sessions"),
            leased_sessions=wire.count(record, "leased_sessions"),
            blocks=_by_tier(record["blocks"]),
            worths_hits_per_s=_worths(record["worths_hits_per_s"]),
            reclaimed_blocks_total=wire.count(record, "reclaimed_blocks_total"),
            expired_leases_total=wire.count(record, "expired_leases_total"),
        )


@dataclass(frozen=True, slots=True)
class HeldPicture:
    """What one session keeps in one tier, and why.

    Attributes:
        tokens: of the session's tokens, how many the last of the blocks ends at.
        kept_for: one of `KEPT_FOR`: a request waits or runs; its lease runs; other tenants leave it to its tenant; its
            worth alone.
        ends_in_s: when its lease on the device ends, or its time on the disk; None: when the room is wanted.
    """

    tier: str
    blocks: int
    tokens: int
    kept_for: str
    ends_in_s: float | None

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `KvPicture.to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = wire.record(value, cls)
        return cls(
            tier=wire.one_of(record, "tier", TIERS),
            blocks=wire.count(record, "blocks"),
            tokens=wire.count(record, "tokens"),
            kept_for=wire.one_of(record, "kept_for", KEPT_FOR),
            ends_in_s=None if record["ends_in_s"] is None else wire.number(record, "ends_in_s"),
        )


@dataclass(frozen=True, slots=True)
class SessionPicture:
    """What one session keeps, and what that is worth.

    Attributes:
        worth_hits_per_s: None where a request of it waits or runs, or nobody reckons it.
        held: in each tier that has something of it.
    """

    tenant: str
    session: str
    worth_hits_per_s: float | None
    held: tuple[HeldPicture, ...]

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `KvPicture.to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = wire.record(value, cls)
        worth = record["worth_hits_per_s"]
        return cls(
            tenant=wire.label(record, "tenant"),
            session=wire.label(record, "session"),
            worth_hits_per_s=None if worth is None else wire.number(record, "worth_hits_per_s"),
            held=tuple(HeldPicture.from_wire(each) for each in _values(record["held"], len(TIERS))),
        )


@dataclass(frozen=True, slots=True)
class KvPicture:
    """Everything that one engine keeps, summed up.

    Attributes:
        tiers: those that are there; the device is the first.
        tenants: those that keep most; one that keeps nothing any more is there for what was counted of it.
        sessions: those that keep most in some tier, as many as were asked for; or the one that was.
        sessions_total: all that keep something on the device; of them `leased_sessions_total` have a lease that runs.
        worths_hits_per_s: the lowest, the middle and the highest of all that are known; empty: none is.
        engine_life: tells one life of the engine from another; each begins to count anew.
        disk: None: there is no tier on disk.
        canary: None: there is no tier that anything is restored from.
        recall: None: there is no disk to read ahead from.
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
    engine_life: str
    disk: DiskPicture | None = None
    canary: CanaryPicture | None = None
    recall: RecallPicture | None = None

    def to_wire(self) -> dict[str, object]:
        """The picture as JSON has it."""
        return asdict(self)

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = wire.record(value, cls)
        return cls(
            block_size=wire.count(record, "block_size"),
            tiers=tuple(TierPicture.from_wire(each) for each in _values(record["tiers"], len(TIERS))),
            tenants=tuple(TenantPicture.from_wire(each) for each in _values(record["tenants"], MAX_TENANTS + 1)),
            sessions=tuple(SessionPicture.from_wire(each) for each in _values(record["sessions"], MAX_SESSIONS)),
            sessions_total=wire.count(record, "sessions_total"),
            leased_sessions_total=wire.count(record, "leased_sessions_total"),
            worths_hits_per_s=_worths(record["worths_hits_per_s"]),
            reclaimed_blocks_total=wire.count(record, "reclaimed_blocks_total"),
            expired_leases_total=wire.count(record, "expired_leases_total"),
            ignored_leases_total=wire.count(record, "ignored_leases_total"),
            engine_life=wire.label(record, "engine_life"),
            disk=None if record["disk"] is None else DiskPicture.from_wire(record["disk"]),
            canary=None if record["canary"] is None else CanaryPicture.from_wire(record["canary"]),
            recall=None if record["recall"] is None else RecallPicture.from_wire(record["recall"]),
        )


def worths_together(rows: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Rows as `KvPicture.worths_hits_per_s` in one; of several only the lowest and the highest: no middle is known."""
    known = [tuple(row) for row in rows if row]
    if len(known) < 2:
        return known[0] if known else ()
    return min(row[0] for row in known), max(row[-1] for row in known)


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


def read_session_asked(tenant: str | None, session: str | None) -> tuple[str, str] | None:
    """Of which session alone a picture is to be, by its tenant's label and its own; None: of those that keep most.

    Raises:
        MalformedMessage: when one is missing, or is no label.
    """
    if tenant is None and session is None:
        return None
    asked = {"tenant": tenant, "session": session}
    return wire.label(asked, "tenant"), wire.label(asked, "session")


def _by_cause(value: object, causes: Sequence[str]) -> dict[str, int]:
    if not isinstance(value, Mapping) or set(value) != set(causes):
        raise MalformedMessage(f"counts of {', '.join(causes)} and of nothing else")
    return {cause: wire.count(value, cause) for cause in causes}


def _by_tier(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping) or not set(value) <= set(TIERS):
        raise MalformedMessage(f"counts of some of {', '.join(TIERS)}")
    return {tier: wire.count(value, tier) for tier in value}


def _worths(value: object) -> tuple[float, ...]:
    return tuple(wire.number({"worth": each}, "worth") for each in _values(value, 3))


def _values(value: object, at_most: int) -> Sequence[object]:
    if not isinstance(value, list | tuple) or len(value) > at_most:
        raise MalformedMessage(f"a list of at most {at_most} values")
    return value
