"""One typed tree of settings: defaults < `holdfast.toml` < environment < flags.

Rules:

- A setting that is not known is an error that names it, never ignored.
- The environment says `HOLDFAST_GATEWAY__PORT=8400`: section, two underscores, name. Values are TOML; what is
  not TOML is a string.
- No secret is a setting: secrets come over a file descriptor or from a 0600 file that a setting names.
- The tree is frozen: whoever wants another value builds another tree.
"""

import functools
import ipaddress
import json
import os
import tomllib
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from appliance.errors import Fault, HoldfastError

ENVIRONMENT_PREFIX = "HOLDFAST_"
SIX_MONTHS_DAYS = 183
TIER_DIR = "tier"  # of the state directory: where the tier on disk lies unless told otherwise
_GIB = 1 << 30
_WitnessName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
_IdleTimeout = Annotated[float, Field(ge=0, le=86_400)]  # seconds: no more is taken by the engine


class SettingsError(HoldfastError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""

    code: ClassVar[str] = "settings_invalid"
    fault: ClassVar[Fault] = Fault.CALLER


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GatewaySettings(_Section):
    """The data listener and its bounds."""

    host: str = "127.0.0.1"
    port: int = Field(8321, ge=0, le=65535)
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    tls_certificate: Path | None = None
    tls_private_key: Path | None = None
    max_body_bytes: int = Field(16 << 20, ge=1024)
    max_header_bytes: int = Field(64 << 10, ge=4096)
    max_json_values: int = Field(250_000, ge=1000)  # in a body; counted by its brackets, braces and commas
    max_messages: int = Field(20_000, ge=1)
    max_streams: int = Field(1024, ge=1)
    request_timeout_s: float = Field(600.0, gt=0)
    drain_timeout_s: float = Field(30.0, ge=0)
    unread_timeout_s: float = Field(10.0, gt=0)  # how long an answer waits for a client that does not read it

    @model_validator(mode="after")
    def _tls_beyond_loopback(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_private_key is None):
            raise ValueError("tls_certificate and tls_private_key go together")
        if self.tls_certificate is None and not is_loopback(self.host):
            raise ValueError(f"{self.host} is not a loopback address: set tls_certificate and tls_private_key")
        return self


class VaultSettings(_Section):
    """How the root key is sealed."""

    seal: Literal["passphrase", "key-file"] = "passphrase"
    plaintext_swap: Literal["warn", "refuse"] = "warn"


class StoreSettings(_Section):
    """Where rows are kept. No URL: SQLite in the state directory."""

    url: str | None = None


class EngineSettings(_Section):
    """The engine that serves one model."""

    python: Path | None = None  # the interpreter of the engine's environment; None: found beside the gateway's
    model: Path | None = None  # a folder with config.json and weights; None: the demonstration model
    served_name: str | None = None  # what clients call it; None: the folder's name
    socket: Path | None = None  # an engine that somebody else runs, on this Unix socket; None: started and watched here
    block_size: int = Field(32, ge=1)  # tokens; on a CPU a multiple of 32
    kv_cache_bytes: int = Field(1 * _GIB, ge=1 << 20)
    max_model_len: int | None = None  # tokens; None: what the model says
    max_num_seqs: int = Field(16, ge=1)
    isolation: Literal["required", "where-allowed"] = "where-allowed"  # namespaces of its own
    eager: bool | None = None  # skip compilation: quicker to start, slower to run; None: on a CPU
    ready_timeout_s: float = Field(600.0, gt=0)
    restart_backoff_s: float = Field(1.0, gt=0)  # doubles up to a minute
    tool_call_parser: str | None = None  # how the model writes tool calls: the name of one of vLLM's parsers
    lease_fraction: float = Field(0.9, ge=0, le=0.95)  # of the device's blocks, the most that leases may hold


class TenantRetention(_Section):
    """What is kept of one tenant's sessions. None: as for everybody. Shares and caps: of each tier's blocks."""

    retention: Literal["soft", "strict"] = "soft"  # strict: all is dropped at the idle timeout
    idle_timeout_s: _IdleTimeout | None = None
    idle_timeout_after_tool_use_s: _IdleTimeout | None = None
    kv_share: float = Field(default=0.0, ge=0, le=1)  # what other tenants' idle sessions leave to it
    kv_cap: float = Field(default=1.0, ge=0, le=1)  # the most that its idle sessions hold together
    session_kv_cap: float = Field(default=1.0, ge=0, le=1)  # the most that one of them holds


class TierSettings(_Section):
    """Where sessions' KV goes when the device is full, the nearest first."""

    dram_bytes: int = Field(0, ge=0)  # of this machine's memory; 0: nothing leaves the device
    disk_bytes: int = Field(0, ge=0)  # of encrypted files; 0: none
    disk_dir: Path | None = None  # None: in the state directory
    disk_ttl_s: float = Field(12 * 3600.0, gt=0)  # how long a file is kept that nobody asks for

    @model_validator(mode="after")
    def _dram_before_disk(self) -> Self:
        if self.disk_bytes and not self.dram_bytes:
            raise ValueError("disk_bytes needs dram_bytes: what goes to the disk and comes back goes through DRAM")
        return self


class SessionSettings(_Section):
    """How long a session's KV is worth its room."""

    idle_timeout_s: _IdleTimeout = 15.0
    idle_timeout_s_by_model: dict[str, _IdleTimeout] = Field(default_factory=dict)
    idle_timeout_after_tool_use_s: _IdleTimeout = 120.0
    idle_timeout_after_tool_use_s_by_model: dict[str, _IdleTimeout] = Field(default_factory=dict)
    session_kv_cap: float = Field(default=1.0, ge=0, le=1)
    tenants: dict[str, TenantRetention] = Field(default_factory=dict)  # by name

    @model_validator(mode="after")
    def _shares_can_be_kept(self) -> Self:
        if sum(tenant.kv_share for tenant in self.tenants.values()) > 1:
            raise ValueError("sessions.tenants: the kv_share of all tenants together is more than 1")
        return self


class AdmissionSettings(_Section):
    """Who goes to the engine when it is full, and what a tenant may ask for. Tenants by name."""

    most_waiting: int = Field(256, ge=1)  # turns
    longest_wait_s: float = Field(60.0, ge=0)  # after which a turn goes first
    weight_by_tenant: dict[str, Annotated[float, Field(gt=0, le=1000)]] = Field(default_factory=dict)  # others: 1
    # The highest `priority` and `strict_priority` that agents may ask for; the lowest priority is minus that.
    most_priority: int = Field(10, ge=0, le=1_000_000)
    most_priority_by_tenant: dict[str, Annotated[int, Field(ge=0, le=1_000_000)]] = Field(default_factory=dict)


class RetentionOverride(_Section):
    """Whose word it is that the audit log is kept for less than six months, and why. Both are recorded in it."""

    by: str = Field(min_length=1, max_length=200)
    reason: str = Field(min_length=1, max_length=200)


class WitnessSettings(_Section):
    """A witness that is asked over the network (C2SP tlog-witness) to co-sign each checkpoint of the audit log."""

    url: str = Field(max_length=1024)  # https://host[:port][/prefix]: what stands before /add-checkpoint
    vkey: str = Field(max_length=1024)  # its public key
    ca: Path  # whom its certificate may be from, PEM
    certificate: Path | None = None  # ours, PEM; None: we show none
    private_key: Path | None = None
    server_name: str = ""  # what its certificate must be for; empty: the host of the url

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        try:
            url = urllib.parse.urlsplit(self.url)
            usable = url.scheme == "https" and bool(url.hostname) and url.port != 0
        except ValueError:
            usable = False
        if not usable or "@" in url.netloc or url.query or url.fragment:
            raise ValueError(f"{self.url!r} is no address of a witness: https://host[:port][/prefix]")
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key go together")
        return self


class AuditSettings(_Section):
    """How long the audit log is kept, and who witnesses it."""

    # 24 hours that the log lived through each: `appliance.audit.retention` says how they are counted.
    retention_days: int = Field(400, ge=7, le=36_500)
    retention_override: RetentionOverride | None = None
    witness: dict[_WitnessName, WitnessSettings] = Field(
        default_factory=dict, max_length=8
    )  # by what it is called here

    @model_validator(mode="after")
    def _six_months(self) -> Self:
        if self.retention_days < SIX_MONTHS_DAYS and self.retention_override is None:
            raise ValueError(
                f"retention_days is {self.retention_days}, and a high-risk system's logs are kept for six months "
                f"({SIX_MONTHS_DAYS} days) or more (Regulation (EU) 2024/1689, Articles 19 and 26(6)): where that does "
                "not bind you, say so with retention_override = { by = ..., reason = ... }"
            )
        return self


class Settings(_Section):
    """Every setting of one appliance."""

    state_dir: Path
    demo: bool = False
    gateway: GatewaySettings = Field(default_factory=lambda: GatewaySettings.model_validate({}))
    vault: VaultSettings = Field(default_factory=lambda: VaultSettings.model_validate({}))
    store: StoreSettings = Field(default_factory=StoreSettings)
    engine: EngineSettings = Field(default_factory=lambda: EngineSettings.model_validate({}))
    tiers: TierSettings = Field(default_factory=lambda: TierSettings.model_validate({}))
    sessions: SessionSettings = Field(default_factory=lambda: SessionSettings.model_validate({}))
    admission: AdmissionSettings = Field(default_factory=lambda: AdmissionSettings.model_validate({}))
    audit: AuditSettings = Field(default_factory=lambda: AuditSettings.model_validate({}))

    @model_validator(mode="after")
    def _tier_beside_everything_else(self) -> Self:
        """The engine writes in the tier's folder, and takes files away there: nothing else may lie in it."""
        if self.tiers.disk_dir is None:
            return self
        tier, state = self.tiers.disk_dir.resolve(), self.state_dir.resolve()
        if tier.is_relative_to(state) and not tier.is_relative_to(state / TIER_DIR):
            raise ValueError(f"tiers.disk_dir is {tier}: of the state directory, only {state / TIER_DIR} is the tier's")
        others = {"the state directory": state}
        if self.engine.model is not None:
            others["the model"] = self.engine.model.resolve()
        for name, place in others.items():
            if place.is_relative_to(tier):
                raise ValueError(f"tiers.disk_dir is {tier}, with {name} in it ({place}): name a folder of its own")
        return self

    @property
    def tenant_names(self) -> Mapping[str, str]:
        """The tenants' names that settings go by: by the setting, as `holdfast.toml` writes it."""
        by_name: Mapping[str, Mapping[str, object]] = {
            "sessions.tenants": self.sessions.tenants,
            "admission.weight_by_tenant": self.admission.weight_by_tenant,
            "admission.most_priority_by_tenant": self.admission.most_priority_by_tenant,
        }
        return {
            f"{setting}.{json.dumps(name, ensure_ascii=False)}": name
            for setting, names in by_name.items()
            for name in names
        }


def default_state_dir(environment: Mapping[str, str]) -> Path:
    """Where an appliance lives unless told otherwise: `$XDG_STATE_HOME/holdfast`, else `~/.local/state/holdfast`."""
    base = environment.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "holdfast"


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    state_dir: Path | None = None,
) -> Settings:
    """Read the settings of the appliance in `state_dir`.

    Args:
        flags: a nested mapping of what was given on the command line; a `None` in it counts as not given.
        environment: the process's environment by default.
        state_dir: where `holdfast.toml` is looked for; by default `HOLDFAST_STATE_DIR`, else `default_state_dir`.

    Raises:
        SettingsError: names the file or variable, the setting and what is allowed.
    """
    environment = os.environ if environment is None else environment
    named = environment.get(f"{ENVIRONMENT_PREFIX}STATE_DIR")
    root = state_dir or (Path(named) if named else default_state_dir(environment))
    tree: dict[str, Any] = {}
    _merge(tree, _file_settings(root / "holdfast.toml"))
    _merge(tree, _environment_settings(environment))
    _merge(tree, flags or {})
    tree["state_dir"] = root.expanduser().absolute()
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise SettingsError(
            f"the setting {name or '(root)'} cannot be used",
            cause=first["msg"],
            remedy=f"Correct it in {root / 'holdfast.toml'}, in the environment or on the command line",
        ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect with an address; a name is not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _file_settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(
            f"{path} cannot be read", cause=str(error), remedy="Mend the file, or move it away"
        ) from None


def _environment_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        section, underscores, name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
        if underscores:
            tree.setdefault(section, {})[name] = _value(text)
        elif (meant := _mistyped().get(section)) is not None:
            raise SettingsError(
                f"the environment's {variable} is not a setting",
                cause="two underscores part a section from its setting",
                remedy=f"Write {meant}, or unset it",
            )
    return tree


@functools.cache
def _mistyped() -> dict[str, str]:
    """What settings are called with one underscore too few, and their right names."""
    return {
        f"{section}_{name}": f"{ENVIRONMENT_PREFIX}{section}__{name}".upper()
        for section, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section)
        for name in field.annotation.model_fields
    }


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(into: dict[str, Any], over: Mapping[str, Any]) -> None:
    for name, value in over.items():
        if isinstance(value, Mapping) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        elif isinstance(value, Mapping):
            into[name] = {}
            _merge(into[name], value)
        elif value is not None:
            into[name] = value
