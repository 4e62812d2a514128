"""What the gateway and the engine say to each other about leases and turns, and how the engine loads our code.

Rules:

- Standard library only: the gateway's environment, the engine's and the cage import this module.
- A lease travels in a request's `kv_transfer_params` under `LEASE_FIELD`. Only the gateway puts it there.
- Labels are opaque: they name a session or a tenant to the engine and say nothing about either.
- What comes over a wire is checked, field by field (`wire`). A message that is not exactly what this module writes
  raises `MalformedMessage`; of ends of turns, which travel together, only those are refused that are not.
"""

import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from appliance.engine import wire
from appliance.engine.wire import MalformedMessage

VLLM_VERSION = "0.32.0"

LEASE_FIELD = "holdfast"
LEASES_PATH = "/holdfast/leases"
TURNS_PATH = "/holdfast/turns"
DEMOTE_PATH = "/holdfast/demote"

# The entry points' name in the groups `vllm.general_plugins` and `vllm.endpoint_plugins`. vLLM loads an endpoint
# plugin only when VLLM_PLUGINS names it, and then loads no other plugin.
PLUGIN_NAME = "holdfast"
PLUGIN_ENVIRONMENT: Mapping[str, str] = {"VLLM_PLUGINS": PLUGIN_NAME}

CONNECTOR_NAME = "StateConnector"
TIERED_CONNECTOR_NAME = "TieredStateConnector"
CONNECTOR_MODULE = "appliance.engine.inside.connector"
LEASE_FRACTION_FIELD = "holdfast_lease_fraction"
LESSONS_FIELD = "holdfast_lessons"

MAX_IDLE_TIMEOUT_S = 86_400.0
MAX_RELEASES = 10_000
MAX_TURN_ENDS = 1_000  # in one message
MAX_DEMOTED = 1_000  # the same
MAX_AWAITED = 1_000
AWAITED_S = 5.0
"""For how long a session that was named as awaited is, unless it is named again."""
TIERS_BEHIND = ("dram", "disk")
"""The tiers behind the device, in the order in which KV goes down."""
STOPS = ("tool_use", "end_turn", "other")
MISSES = ("", "evicted", "expired", "quota", "tier_fault")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The beginning of a prompt that other sessions of its tenant may find: the blocks wholly within `tokens` tokens.

    Attributes:
        salt: what salts those blocks; the first block behind them takes the request's `cache_salt`.
        tokens: how many, from the first on.
        digest: their `token_digest`. Where the prompt does not begin with them nothing is shared.
    """

    salt: str
    tokens: int
    digest: str

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `Lease.to_wire` wrote of it.

        Raises:
            MalformedMessage: when a field is missing, unknown, of another type or out of range.
        """
        record = wire.record(value, cls)
        digest = record["digest"]
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise MalformedMessage("digest: 64 hexadecimal digits")
        return cls(salt=wire.label(record, "salt"), tokens=wire.count(record, "tokens"), digest=digest)


def token_digest(token_ids: Sequence[int]) -> str:
    """SHA-256 of token ids, 32 bits each in this machine's order, in hexadecimal."""
    return hashlib.sha256(array("I", token_ids)).hexdigest()


@dataclass(frozen=True, slots=True)
class Lease:
    """What a request asks for: keep this session's KV for `idle_timeout_s` seconds after the request has ended.

    Attributes:
        turn: what the gateway will call the turn when it tells how it ended; empty: it will not.
        strict: the session is kept on the device alone, and when the time is over nowhere, wanted or not.
        parent: the session whose agent waits for this one's; empty: none does.
        tenant_share: of each tier's blocks, what other tenants' sessions leave to this one's tenant.
        tenant_cap: of each tier's blocks, the most that the tenant's sessions keep together.
        session_cap: of each tier's blocks, the most that this session keeps.
        shared: the part of its prompt that its tenant's sessions share; None: nothing is.
    """

    session: str
    tenant: str
    idle_timeout_s: float
    turn: str = ""
    strict: bool = False
    parent: str = ""
    tenant_share: float = 0.0
    tenant_cap: float = 1.0
    session_cap: float = 1.0
    shared: SharedPrefix | None = None

    def to_wire(self) -> dict[str, object]:
        """The value of `kv_transfer_params[LEASE_FIELD]`."""
        return {**_by_name(self), "shared": None if self.shared is None else _by_name(self.shared)}

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown, of another type or out of range.
        """
        record = wire.record(value, cls)
        return cls(
            session=wire.label(record, "session"),
            tenant=wire.label(record, "tenant"),
            idle_timeout_s=wire.number(record, "idle_timeout_s", 0.0, MAX_IDLE_TIMEOUT_S),
            turn="" if record["turn"] == "" else wire.label(record, "turn"),
            strict=wire.flag(record, "strict"),
            parent="" if record["parent"] == "" else wire.label(record, "parent"),
            tenant_share=wire.number(record, "tenant_share", 0.0, 1.0),
            tenant_cap=wire.number(record, "tenant_cap", 0.0, 1.0),
            session_cap=wire.number(record, "session_cap", 0.0, 1.0),
            shared=None if record["shared"] is None else SharedPrefix.from_wire(record["shared"]),
        )


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How a turn ended, as the gateway saw it.

    Attributes:
        turn: the label that the turn's lease had.
        stop: one of `STOPS`.
        idle_timeout_s: how long the session's lease lasts from the turn's end, now that it is known why it ended.
        returns_soon: its client says that the session's next turn follows.
    """

    session: str
    tenant: str
    turn: str
    stop: str
    output_tokens: int
    idle_timeout_s: float
    returns_soon: bool = False

    def to_wire(self) -> dict[str, object]:
        """The message as JSON has it."""
        return _by_name(self)

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown, of another type or out of range.
        """
        record = wire.record(value, cls)
        return cls(
            session=wire.label(record, "session"),
            tenant=wire.label(record, "tenant"),
            turn=wire.label(record, "turn"),
            stop=wire.one_of(record, "stop", STOPS),
            output_tokens=wire.count(record, "output_tokens"),
            idle_timeout_s=wire.number(record, "idle_timeout_s", 0.0, MAX_IDLE_TIMEOUT_S),
            returns_soon=wire.flag(record, "returns_soon"),
        )


@dataclass(frozen=True, slots=True)
class TurnAccount:
    """Where the prompt tokens of a turn were served from; what is in none of the tiers was computed.

    Attributes:
        reason: why blocks that the session had were not there any more: one of `MISSES`; empty: all were there, or
            the engine does not know.
    """

    turn: str
    device_tokens: int
    dram_tokens: int = 0
    disk_tokens: int = 0
    reason: str = ""

    def to_wire(self) -> dict[str, object]:
        """The account as JSON has it."""
        return _by_name(self)

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown, of another type or out of range.
        """
        record = wire.record(value, cls)
        return cls(
            turn=wire.label(record, "turn"),
            device_tokens=wire.count(record, "device_tokens"),
            dram_tokens=wire.count(record, "dram_tokens"),
            disk_tokens=wire.count(record, "disk_tokens"),
            reason=wire.one_of(record, "reason", MISSES),
        )


@dataclass(frozen=True, slots=True)
class LeaseState:
    """One session's lease as it stands. `tokens` are those whose KV it holds."""

    session: str
    tenant: str
    blocks: int
    tokens: int
    expires_in_s: float  # at or below zero: due


@dataclass(frozen=True, slots=True)
class LeaseReport:
    """The leases that were asked for, and what all those of one engine hold of its blocks.

    A block that two sessions share is counted once in `leased_blocks` and once in each session's `blocks`.
    `free_blocks` can be handed out at once, `leased_blocks` as soon as they are wanted. `total_blocks` leaves out the
    block that vLLM never hands out. `ignored_total` counts malformed leases that requests carried.
    """

    leases: tuple[LeaseState, ...]
    leased_blocks: int
    free_blocks: int
    total_blocks: int
    block_size: int  # tokens
    next_expiry_in_s: float | None
    reclaimed_blocks_total: int
    expired_total: int
    ignored_total: int = 0

    def to_wire(self) -> dict[str, object]:
        """The report as JSON has it."""
        return {**_by_name(self), "leases": [_by_name(lease) for lease in self.leases]}

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = wire.record(value, cls)
        leases = record["leases"]
        if not isinstance(leases, Sequence) or isinstance(leases, str | bytes):
            raise MalformedMessage("a list of leases")
        due_in = record["next_expiry_in_s"]
        return cls(
            leases=tuple(_lease_state(lease) for lease in leases),
            leased_blocks=wire.count(record, "leased_blocks"),
            free_blocks=wire.count(record, "free_blocks"),
            total_blocks=wire.count(record, "total_blocks"),
            block_size=wire.count(record, "block_size"),
            next_expiry_in_s=None if due_in is None else wire.number(record, "next_expiry_in_s"),
            reclaimed_blocks_total=wire.count(record, "reclaimed_blocks_total"),
            expired_total=wire.count(record, "expired_total"),
            ignored_total=wire.count(record, "ignored_total"),
        )


def lease_params(lease: Lease) -> dict[str, object]:
    """The `kv_transfer_params` of a request whose session is to keep its KV."""
    return {LEASE_FIELD: lease.to_wire()}


@dataclass(frozen=True, slots=True)
class LeasesRequest:
    """What the engine is told of sessions that have no request with it.

    Attributes:
        release: the labels of sessions that are over.
        awaited: tenant and session of those whose request waits at the gateway, who waits longest first. Their leases
            are reported.
        every: report every lease. With thousands of sessions the engine is at it for some tenths of a second.
    """

    release: tuple[str, ...] = ()
    awaited: tuple[tuple[str, str], ...] = ()
    every: bool = False


def leases_request(
    release: Iterable[str] = (), awaited: Iterable[tuple[str, str]] = (), *, every: bool = False
) -> bytes:
    """The body of a POST to `LEASES_PATH`: tick, release some sessions, expect others, report. See `LeasesRequest`."""
    return json.dumps({"release": list(release), "awaited": list(awaited), "every": every}).encode()


def read_leases_request(body: bytes) -> LeasesRequest:
    """What a body that `leases_request` wrote says; an empty body says nothing.

    Raises:
        MalformedMessage: when the body is anything else.
    """
    message = wire.read_json(body) if body else {}
    if not isinstance(message, dict) or not set(message) <= {"release", "awaited", "every"}:
        raise MalformedMessage("an object with no fields but `release`, `awaited` and `every`")
    release, awaited = message.get("release", []), message.get("awaited", [])
    if not isinstance(release, list) or len(release) > MAX_RELEASES:
        raise MalformedMessage(f"a list of at most {MAX_RELEASES} labels")
    if not isinstance(awaited, list) or len(awaited) > MAX_AWAITED:
        raise MalformedMessage(f"a list of at most {MAX_AWAITED} pairs of labels")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in awaited):
        raise MalformedMessage("pairs of a tenant's and a session's label")
    if not all(isinstance(label, str) and wire.LABEL.fullmatch(label) for label in itertools.chain(release, *awaited)):
        raise MalformedMessage("labels of 1 to 64 letters, digits, dots, dashes or underscores")
    every = wire.flag({"every": False, **message}, "every")
    return LeasesRequest(tuple(release), tuple((tenant, session) for tenant, session in awaited), every)


@dataclass(frozen=True, slots=True)
class DemoteRequest:
    """Sessions that are to keep nothing in the tiers before one, as if what they have there had left for want of room.

    Attributes:
        tier: one of `TIERS_BEHIND`.
        sessions: their labels.
    """

    tier: str
    sessions: tuple[str, ...]


def demote_request(tier: str, sessions: Iterable[str]) -> bytes:
    """The body of a POST to `DEMOTE_PATH`. See `DemoteRequest`."""
    return json.dumps({"tier": tier, "sessions": list(sessions)}).encode()


def read_demote_request(body: bytes) -> DemoteRequest:
    """What a body that `demote_request` wrote says.

    Raises:
        MalformedMessage: when the body is anything else.
    """
    record = wire.record(wire.read_json(body), DemoteRequest)
    return DemoteRequest(wire.one_of(record, "tier", TIERS_BEHIND), _labels(record["sessions"]))


def demote_answer(demoted: Iterable[str]) -> dict[str, object]:
    """What the engine answers at `DEMOTE_PATH`: the sessions that the tier has all of, and no tier before it anything
    that is theirs alone. Of the others something is not there, so far or for ever; they stay where they are."""
    return {"demoted": list(demoted)}


def read_demote_answer(body: bytes) -> frozenset[str]:
    """The sessions in a body that `demote_answer` became.

    Raises:
        MalformedMessage: the body is anything else.
    """
    message = wire.read_json(body)
    if not isinstance(message, dict) or message.keys() != {"demoted"}:
        raise MalformedMessage("an object with the field `demoted` and no other")
    return frozenset(_labels(message["demoted"]))


def _labels(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) > MAX_DEMOTED:
        raise MalformedMessage(f"a list of at most {MAX_DEMOTED} labels")
    if not all(isinstance(label, str) and wire.LABEL.fullmatch(label) for label in values):
        raise MalformedMessage("labels of 1 to 64 letters, digits, dots, dashes or underscores")
    return tuple(values)


def turn_ends_request(ends: Iterable[TurnEnd]) -> bytes:
    """The body of a POST to `TURNS_PATH`: so the turns ended; give their accounts."""
    return json.dumps({"ends": [end.to_wire() for end in ends]}).encode()


def read_turn_ends_request(body: bytes) -> tuple[TurnEnd | None, ...]:
    """The ends in a body that `turn_ends_request` wrote; None for one that is malformed, which costs no other a thing.

    Raises:
        MalformedMessage: when the body is no list of ends.
    """
    return tuple(_turn_end(end) for end in _only_list(wire.read_json(body), "ends"))


def turn_accounts_answer(accounts: Iterable[TurnAccount | None]) -> dict[str, object]:
    """What the engine answers at `TURNS_PATH`: an account for each end, None where it is told of no turn it knows."""
    return {"accounts": [None if account is None else account.to_wire() for account in accounts]}


def read_turn_accounts_answer(body: bytes) -> tuple[TurnAccount | None, ...]:
    """The accounts in a body that `turn_accounts_answer` became.

    Raises:
        MalformedMessage: when the body is anything else.
    """
    accounts = _only_list(wire.read_json(body), "accounts")
    return tuple(None if account is None else TurnAccount.from_wire(account) for account in accounts)


def connector_config(
    lease_fraction: float,
    lessons: str | None = None,
    dram_bytes: int = 0,
    disk: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The value of vLLM's `--kv-transfer-config`.

    Args:
        lease_fraction: of the device's blocks, the most that leases may hold together; 0 turns leases off.
        lessons: the file that keeps what retention learned; None: nothing does.
        dram_bytes: how much memory of the machine holds what does not fit on the device; 0: none, and no tier at all.
        disk: what vLLM is to know of the tier on disk: the class, its module, its options; None: there is none.

    Raises:
        ValueError: when the fraction is not in 0 to 0.95, or there is a disk but no DRAM, through which all goes.
    """
    if not 0 <= lease_fraction <= 0.95:
        raise ValueError(f"lease_fraction is {lease_fraction}: it must be between 0 and 0.95")
    if dram_bytes < 0 or (disk is not None and not dram_bytes):
        raise ValueError(f"dram_bytes is {dram_bytes}: a tier on disk needs some DRAM before it")
    if not dram_bytes:
        return {
            "kv_connector": CONNECTOR_NAME,
            "kv_connector_module_path": CONNECTOR_MODULE,
            # With "kv_both" vLLM delays each block that a request frees, for the sake of loads; this one makes none.
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {LEASE_FRACTION_FIELD: lease_fraction, LESSONS_FIELD: lessons},
        }
    return {
        "kv_connector": TIERED_CONNECTOR_NAME,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            LEASE_FRACTION_FIELD: lease_fraction,
            LESSONS_FIELD: lessons,
            "cpu_bytes_to_use": dram_bytes,
            "spec_name": "TierSpec",
            "spec_module_path": CONNECTOR_MODULE,
            "eviction_policy": "SessionChunks",
            "cache_policy_module_path": CONNECTOR_MODULE,
            "offload_prompt_only": False,  # the next prompt holds the answer, too
            "secondary_tiers": [] if disk is None else [dict(disk)],
        },
    }


def disk_tier(folder: str, capacity_bytes: int, ttl_s: float) -> dict[str, object]:
    """What vLLM is to know of the tier on disk: its files' folder, how much they take, how long one is kept unused."""
    return {
        "type": "DiskTier",
        "module_path": CONNECTOR_MODULE,
        "root_dir": folder,
        "capacity_bytes": capacity_bytes,
        "ttl_s": ttl_s,
    }


def connector_arguments(
    lease_fraction: float,
    lessons: str | None = None,
    dram_bytes: int = 0,
    disk: Mapping[str, object] | None = None,
) -> list[str]:
    """What `vllm serve` is given on its command line so that leases are kept, and tiers where there are some."""
    config = connector_config(lease_fraction, lessons, dram_bytes, disk)
    return ["--kv-transfer-config", json.dumps(config, separators=(",", ":"))]


def _by_name(message: Any) -> dict[str, object]:
    """The fields of a flat message. `dataclasses.asdict` copies them deeply, which takes ten times as long."""
    return {name: getattr(message, name) for name in message.__slots__}


def _turn_end(value: object) -> TurnEnd | None:
    try:
        return TurnEnd.from_wire(value)
    except MalformedMessage:
        return None


def _lease_state(value: object) -> LeaseState:
    record = wire.record(value, LeaseState)
    return LeaseState(
        session=wire.label(record, "session"),
        tenant=wire.label(record, "tenant"),
        blocks=wire.count(record, "blocks"),
        tokens=wire.count(record, "tokens"),
        expires_in_s=wire.number(record, "expires_in_s"),
    )


def _only_list(message: object, name: str) -> list[object]:
    if not isinstance(message, dict) or set(message) != {name}:
        raise MalformedMessage(f"an object with the field `{name}` and no other")
    values = message[name]
    if not isinstance(values, list) or len(values) > MAX_TURN_ENDS:
        raise MalformedMessage(f"`{name}`: a list of at most {MAX_TURN_ENDS} values")
    return values
