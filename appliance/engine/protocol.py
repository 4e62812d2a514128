"""What the gateway and the engine say to each other about leases, and how the engine is told to load our code.

Rules:

- Standard library only: the gateway's environment, the engine's and the cage import this module.
- A lease travels in a request's `kv_transfer_params` under `LEASE_FIELD`. Only the gateway puts it there.
- Labels are opaque: they name a session or a tenant to the engine and say nothing about either.
- What comes over a wire is checked here, field by field. A message that is not exactly what this module writes raises
  `MalformedMessage`, which says what was expected and never repeats what was found.
"""

import hashlib
import json
import math
import re
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Self

from appliance.errors import Fault, HoldfastError

VLLM_VERSION = "0.32.0"

LEASE_FIELD = "holdfast"
LEASES_PATH = "/holdfast/leases"

# The entry points' name in the groups `vllm.general_plugins` and `vllm.endpoint_plugins`. vLLM loads an endpoint
# plugin only when VLLM_PLUGINS names it, and then loads no other plugin.
PLUGIN_NAME = "holdfast"
PLUGIN_ENVIRONMENT: Mapping[str, str] = {"VLLM_PLUGINS": PLUGIN_NAME}

CONNECTOR_NAME = "StateConnector"
CONNECTOR_MODULE = "appliance.engine.inside.connector"
LEASE_FRACTION_FIELD = "holdfast_lease_fraction"

MAX_IDLE_TIMEOUT_S = 86_400.0
MAX_RELEASES = 10_000
_LARGEST = sys.float_info.max
_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class MalformedMessage(HoldfastError, ValueError):
    """A message about leases is not what this version of the protocol writes."""

    code: ClassVar[str] = "engine_message_malformed"
    fault: ClassVar[Fault] = Fault.INTERNAL

    def __init__(self, expected: str) -> None:
        super().__init__(
            "a message between the gateway and the engine is malformed",
            cause=f"expected {expected}",
            remedy="Install the same version of holdfast in the gateway's and in the engine's environment",
        )


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
        record = _record(value, cls)
        digest = record["digest"]
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise MalformedMessage("digest: 64 hexadecimal digits")
        return cls(salt=_label(record, "salt"), tokens=_count(record, "tokens"), digest=digest)


def token_digest(token_ids: Sequence[int]) -> str:
    """SHA-256 of token ids, 32 bits each in this machine's order, in hexadecimal."""
    return hashlib.sha256(array("I", token_ids)).hexdigest()


@dataclass(frozen=True, slots=True)
class Lease:
    """What a request asks for: keep this session's KV for `idle_timeout_s` seconds after the request has ended.

    `shared` is the part of its prompt that its tenant's sessions share; None: nothing is.
    """

    session: str
    tenant: str
    idle_timeout_s: float
    shared: SharedPrefix | None = None

    def to_wire(self) -> dict[str, object]:
        """The value of `kv_transfer_params[LEASE_FIELD]`."""
        return asdict(self)

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown, of another type or out of range.
        """
        record = _record(value, cls)
        return cls(
            session=_label(record, "session"),
            tenant=_label(record, "tenant"),
            idle_timeout_s=_number(record, "idle_timeout_s", 0.0, MAX_IDLE_TIMEOUT_S),
            shared=None if record["shared"] is None else SharedPrefix.from_wire(record["shared"]),
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
    """Every lease of one engine, and what they hold of its blocks.

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
        return asdict(self)

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Read what `to_wire` wrote.

        Raises:
            MalformedMessage: when a field is missing, unknown or of another type.
        """
        record = _record(value, cls)
        leases = record["leases"]
        if not isinstance(leases, Sequence) or isinstance(leases, str | bytes):
            raise MalformedMessage("a list of leases")
        due_in = record["next_expiry_in_s"]
        return cls(
            leases=tuple(_lease_state(lease) for lease in leases),
            leased_blocks=_count(record, "leased_blocks"),
            free_blocks=_count(record, "free_blocks"),
            total_blocks=_count(record, "total_blocks"),
            block_size=_count(record, "block_size"),
            next_expiry_in_s=None if due_in is None else _number(record, "next_expiry_in_s"),
            reclaimed_blocks_total=_count(record, "reclaimed_blocks_total"),
            expired_total=_count(record, "expired_total"),
            ignored_total=_count(record, "ignored_total"),
        )


def lease_params(lease: Lease) -> dict[str, object]:
    """The `kv_transfer_params` of a request whose session is to keep its KV."""
    return {LEASE_FIELD: lease.to_wire()}


def release_request(labels: Iterable[str] = ()) -> bytes:
    """The body of a POST to `LEASES_PATH`: tick, release the sessions so labelled, report."""
    return json.dumps({"release": list(labels)}).encode()


def read_release_request(body: bytes) -> tuple[str, ...]:
    """The labels of a body that `release_request` wrote; an empty body releases nothing.

    Raises:
        MalformedMessage: when the body is anything else.
    """
    if not body:
        return ()
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise MalformedMessage("a JSON object") from None
    if not isinstance(message, dict) or not set(message) <= {"release"}:
        raise MalformedMessage("an object with no field but `release`")
    labels = message.get("release", [])
    if not isinstance(labels, list) or len(labels) > MAX_RELEASES:
        raise MalformedMessage(f"a list of at most {MAX_RELEASES} labels")
    if not all(isinstance(label, str) and _LABEL.fullmatch(label) for label in labels):
        raise MalformedMessage("labels of 1 to 64 letters, digits, dots, dashes or underscores")
    return tuple(labels)


def connector_config(lease_fraction: float) -> dict[str, object]:
    """The value of vLLM's `--kv-transfer-config`.

    Args:
        lease_fraction: of the device's blocks, the most that leases may hold together; 0 turns leases off.

    Raises:
        ValueError: when the fraction is not in 0 to 0.95.
    """
    if not 0 <= lease_fraction <= 0.95:
        raise ValueError(f"lease_fraction is {lease_fraction}: it must be between 0 and 0.95")
    return {
        "kv_connector": CONNECTOR_NAME,
        "kv_connector_module_path": CONNECTOR_MODULE,
        # With "kv_both" vLLM delays each block that a request frees, for the sake of loads; this connector makes none.
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {LEASE_FRACTION_FIELD: lease_fraction},
    }


def connector_arguments(lease_fraction: float) -> list[str]:
    """What `vllm serve` is given on its command line so that leases are kept."""
    return ["--kv-transfer-config", json.dumps(connector_config(lease_fraction), separators=(",", ":"))]


def _lease_state(value: object) -> LeaseState:
    record = _record(value, LeaseState)
    return LeaseState(
        session=_label(record, "session"),
        tenant=_label(record, "tenant"),
        blocks=_count(record, "blocks"),
        tokens=_count(record, "tokens"),
        expires_in_s=_number(record, "expires_in_s"),
    )


def _record(value: object, shape: type) -> Mapping[str, object]:
    names = {field.name for field in fields(shape)}
    if not isinstance(value, Mapping) or set(value) != names:
        raise MalformedMessage(f"an object with the fields {', '.join(sorted(names))} and no other")
    return value


def _label(record: Mapping[str, object], name: str) -> str:
    value = record[name]
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        raise MalformedMessage(f"{name}: 1 to 64 letters, digits, dots, dashes or underscores")
    return value


def _count(record: Mapping[str, object], name: str) -> int:
    value = record[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MalformedMessage(f"{name}: a whole number, not negative")
    return value


def _number(record: Mapping[str, object], name: str, low: float = -math.inf, high: float = math.inf) -> float:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedMessage(f"{name}: a number")
    # The comparison is exact for whole numbers of any size, and false for what is not a number.
    if not max(low, -_LARGEST) <= value <= min(high, _LARGEST):
        raise MalformedMessage(f"{name}: a finite number between {low:g} and {high:g}")
    return float(value)
