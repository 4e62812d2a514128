"""What the admin API says, as pydantic models: the schema of `--json` and of the screens.

Rules:

- Units are in the names; times are epoch seconds, UTC.
- No model holds a secret, save `CreatedKey`, which is shown once, and `Transcript`, which its reader asked for.
- Nothing here imports a web framework: clients use these types too.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from appliance.errors import HoldfastError

Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Wire(BaseModel):
    """The base of what crosses the admin socket."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ErrorBody(Wire):
    """An error as the admin API answers it; `fault` is the name of an `appliance.errors.Fault`."""

    code: str
    message: str
    cause: str
    remedy: str
    fault: str

    @classmethod
    def of(cls, error: HoldfastError) -> "ErrorBody":
        """What is told of an error."""
        return cls(**error.record(), fault=error.fault.value)


# Status


PartState = Literal["ready", "starting", "sealed", "degraded", "failed", "stopped", "unknown"]


class Trouble(Wire):
    """Something that is wrong with a part, and what to do about it. It says nothing that changes while it lasts."""

    what: str
    remedy: str


class Part(Wire):
    """One part of the appliance: what it is in, and why; `troubles`: of the audit log, each thing that is wrong."""

    name: Literal["vault", "audit", "store", "engine"]
    state: PartState
    detail: str
    troubles: list[Trouble] = []


class Leases(Wire):
    """What the engine keeps on the device for sessions whose lease runs, at the moment of the status. What it keeps
    beyond that, until the room is wanted, is neither free nor leased: `KvStatus` has it."""

    sessions: int
    leased_blocks: int
    free_blocks: int
    total_blocks: int
    block_size_tokens: int
    next_expiry_in_s: float | None
    expired_total: int
    reclaimed_blocks_total: int


class TierSeen(Wire):
    """One tier of the engine, as it was seen last. `detail` says what is wrong with it; empty: nothing is."""

    tier: Literal["device", "dram", "disk"]
    state: Literal["ok", "quarantined", "failed"]
    capacity_bytes: int
    used_bytes: int
    detail: str


class SessionCounts(Wire):
    """How many sessions are kept, and how many of them had a turn within the last hour."""

    total: int
    active_last_hour: int


class Status(Wire):
    """The appliance at one moment, `observed_at`.

    `settings_of_nobody`: settings that go by the name of a tenant which does not exist; None: tenants' names cannot be
    read now.
    """

    ready: bool
    endpoint: str
    model: str | None
    demo: bool
    seal: str
    pid: int
    started_at: float
    observed_at: float
    uptime_s: float
    draining: bool
    running_turns: int
    parts: list[Part]
    engine_restarts: int | None
    engine_isolated: bool | None
    engine_isolation_detail: str | None
    leases: Leases | None
    tiers: list[TierSeen]
    sessions: SessionCounts | None
    versions: dict[str, str]
    state_dir: str
    settings_of_nobody: list[str] | None

    @property
    def vault_sealed(self) -> bool:
        """Whether nothing is served because the vault is sealed."""
        return any(part.name == "vault" and part.state == "sealed" for part in self.parts)


class VaultState(Wire):
    """Whether the vault is sealed now, and whether this request changed that."""

    sealed: bool
    changed: bool


class KeysToRotate(Wire):
    """Whose encryption keys are to be under another key; None: the system's."""

    tenant: str | None


class RotatedKeys(Wire):
    """A key that wraps others was replaced; `keys` are under the new one.

    `erased`: nothing that the old one wrapped is left in the database's files; False when that could not be done yet.
    The gateway does it as soon as it can.
    """

    tenant_id: str | None
    keys: int
    erased: bool


# Tenants and keys

# What sessions of one tenant may find of each other's in the engine's cache: nothing outside a session tree, the tools
# and system messages, or everything. Sessions of two tenants never find anything.
IsolationMode = Literal["session", "tenant-prefix", "tenant"]


class NewTenant(Wire):
    """A tenant to create."""

    name: Name
    idle_timeout_s: float | None = Field(default=None, ge=0, le=86_400)
    isolation: IsolationMode = "session"


class TenantChoices(Wire):
    """What is set for a tenant; None: stays as it is.

    `audit_digests`: the audit log has keyed digests of what its turns ask and answer. `isolation`: what its sessions
    share on the engine.
    """

    audit_digests: bool | None = None
    take_out_harness_lines: bool | None = None
    isolation: IsolationMode | None = None


class TenantKeeping(Wire):
    """What is kept of a tenant's sessions with `model`, by all settings together. Shares and caps: of each tier.

    `retention`: strict drops everything at the idle timeout. `kv_share` is what others' idle sessions leave to it,
    `kv_cap` the most that its idle sessions hold together, `session_kv_cap` the most that one of them holds.
    `model` None: no model is served now, so that none's own settings count.
    """

    model: str | None
    retention: Literal["soft", "strict"]
    idle_timeout_s: float
    idle_timeout_after_tool_use_s: float
    kv_share: float
    kv_cap: float
    session_kv_cap: float


class Tenant(Wire):
    """One tenant. `idle_timeout_s`: what was chosen when it was made; `keeping`: what is in force."""

    tenant_id: str
    name: str
    idle_timeout_s: float | None
    isolation: IsolationMode
    audit_digests: bool
    takes_out_harness_lines: bool
    keeping: TenantKeeping
    created_at: float


class DamagedTenant(Wire):
    """A tenant whose row does not open, so that not even its name is known: `why` not."""

    tenant_id: str
    why: str


class Tenants(Wire):
    """Every tenant that the caller may know of; of the `damaged` ones nothing else can be told."""

    tenants: list[Tenant]
    damaged: list[DamagedTenant] = []


class ShreddedTenant(Wire):
    """A tenant that is no more: all of its keys are destroyed.

    `sessions`, `turns`: how many it had. `erased`: nothing of its keys is left in the database's files; False when that
    could not be done yet. The gateway tries again by itself, also after a restart.
    `leases_released`: the engine was told to let go of all that it held; False when the engine could not be reached, or
    the tenant's key was damaged. What it holds is out of reach either way, because the tenant's key is gone.
    """

    tenant_id: str
    sessions: int
    turns: int
    erased: bool
    leases_released: bool


class Limits(Wire):
    """What a key may do. None: no limit; `models` None: every model."""

    models: list[str] | None = None
    requests_per_minute: int | None = Field(default=None, ge=1)
    concurrent_requests: int | None = Field(default=None, ge=1)
    tokens_per_day: int | None = Field(default=None, ge=1)
    permissions: list[Literal["transcript:read"]] = []


# What a principal is there for: `docs/cli.md` says what each may. A client is always a tenant's.
ApplianceRole = Literal["admin", "operator", "auditor"]
RoleName = Literal["admin", "operator", "auditor", "client"]


class NewKey(Wire):
    """A key to create for a principal of a tenant; the principal is made if the tenant has none of that name.

    `tenant` may be left out where there is one only. A principal that is there has to have the role.
    """

    tenant: Name | None = None
    principal: Name
    role: RoleName = "client"
    label: Name | None = None
    limits: Limits = Limits()
    expires_in_s: float | None = Field(default=None, gt=0)


class NewApplianceKey(Wire):
    """A key to create for a principal of the appliance, made if there is none of that name. It asks for no turns."""

    principal: Name
    role: ApplianceRole
    label: Name | None = None
    permissions: list[Literal["transcript:read"]] = []
    expires_in_s: float | None = Field(default=None, gt=0)


class Key(Wire):
    """One API key, without its secret, which is kept nowhere. `tenant_id` None: its principal is of the appliance."""

    key_id: str
    tenant_id: str | None
    tenant: str | None
    principal_id: str
    principal: str | None
    role: RoleName | None
    label: str | None
    limits: Limits
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class Keys(Wire):
    """Every key that the caller may know of."""

    keys: list[Key]


class CreatedKey(Wire):
    """A new key with its secret, which is not shown again."""

    key: Key
    secret: str


# Sessions


class Session(Wire):
    """What may be known of a session without reading it."""

    session_id: str
    tenant_id: str
    principal_id: str
    tree_id: str
    parent_session_id: str | None
    model: str
    origin: str
    turns: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    created_at: float
    last_used_at: float


class SessionPage(Wire):
    """The sessions last used, latest first; `truncated` says that there are more than were asked for."""

    sessions: list[Session]
    truncated: bool


class TranscriptTurn(Wire):
    """One turn as it was said. `new_messages` are those that the turn before did not have."""

    number: int
    response_id: str
    model: str
    state: str
    new_messages: list[dict[str, Any]]
    answer: dict[str, Any]
    parameters: dict[str, Any]
    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str | None
    started_at: float
    ended_at: float


class Transcript(Wire):
    """A session and what was said in it: the newest of the turns asked for, in order; truncated: there are some before
    them."""

    session: Session
    client_id: str | None
    turns: list[TranscriptTurn]
    truncated: bool


class Divergence(Wire):
    """Where a history parted from that of the turn before: at a token of the prompt, counted from 0, and in a message,
    counted from 1; None: in none. `change` says what kind of change it was."""

    token: int
    message: int | None
    role: str | None
    change: str


class ExplainedTurn(Wire):
    """What became of a prompt's tokens: `served_tokens` were found on the engine, the others were computed, by cause.
    All of them together are the prompt's. `served_from` says in which tier they were found; None: it is not certain.
    `first_token_s`: how long the first token took, a wait for the engine too; None: the answer was not streamed, none
    came, or the turn was written down before this was kept."""

    number: int
    started_at: float
    prompt_tokens: int
    served_tokens: int
    computed_tokens: dict[str, int]
    served_from: dict[str, int] | None
    first_token_s: float | None
    divergence: Divergence | None


class Finding(Wire):
    """Something that had tokens computed again in several turns, and what can be done about it."""

    what: str
    message: int | None
    role: str | None
    turns: list[int]
    tokens: int
    remedy: str


class KvHeld(Wire):
    """What a tier has of one session: `blocks`, the last of which ends at `tokens` of its tokens.

    `kept_for`: "in_use" a request of it waits or runs; "lease" its lease runs; "share" others leave that much to its
    tenant; "worth" nobody wanted the room who is worth more. `ends_in_s`: when its lease ends, or its time on the
    disk; None: when the room is wanted.
    """

    tier: Literal["device", "dram", "disk"]
    blocks: int
    tokens: int
    kept_for: Literal["in_use", "lease", "share", "worth"]
    ends_in_s: float | None


class Explanation(Wire):
    """Why a session's prompts had to be computed, in its newest turns; `truncated` says that there are turns before
    them. Holds no word of what was said.

    `kept`: what the engine has of the session now, by tier; empty: nothing, None: it could not be asked.
    `worth_hits_per_s`: as in `KvSession`.
    """

    session: Session
    kept: list[KvHeld] | None
    worth_hits_per_s: float | None
    turns: list[ExplainedTurn]
    findings: list[Finding]
    truncated: bool


class Forgotten(Wire):
    """A session that is no more: its key is destroyed.

    `erased`: nothing of its key is left in the database's files; False when that could not be done yet. The gateway
    tries again by itself, also after a restart.
    `lease_released`: the engine was told to let go of what it held; False when the engine could not be reached. What
    it holds is out of reach either way, because the session's salt changed.
    """

    session_id: str
    turns: int
    erased: bool
    lease_released: bool


# What is kept of sessions


class KvTier(Wire):
    """A tier of the engine, with something of `sessions`. Of `capacity_blocks` `used_blocks` are taken; of those
    `leased_blocks` belong to sessions whose lease runs, which yield to whoever needs the room. `found_tokens` of
    prompts were found there since the gateway began, `found_share` of all prompts' tokens. `state` "quarantined": it
    gave back something wrong, and nothing is read from it any more. `detail` says what is wrong; empty: nothing is."""

    tier: Literal["device", "dram", "disk"]
    state: Literal["ok", "quarantined", "failed"]
    detail: str
    block_bytes: int
    capacity_blocks: int
    used_blocks: int
    leased_blocks: int
    sessions: int
    free_blocks: int
    capacity_bytes: int
    used_bytes: int
    found_tokens: int
    found_share: float | None


class KvDisk(Wire):
    """What became of blocks on the disk since the engine began: of those that were not written (`not_stored_total`) and
    those that could not be read (`faults_total`) the cause, and what went wrong last, `last_error_age_s` ago."""

    stored_blocks_total: int
    loaded_blocks_total: int
    evicted_blocks_total: int
    expired_blocks_total: int
    waiting_bytes: int
    not_stored_total: dict[str, int]
    faults_total: dict[str, int]
    last_error: str | None
    last_error_age_s: float | None


class KvCanary(Wire):
    """Whether what came back from a tier was what the model computes: how many blocks were computed again to tell, and
    the largest error, as a share of the values' root mean square; None: it was no number. `quarantined`: it was too
    large, and nothing is restored any more. `compared_age_s`: seconds since blocks were compared last; None: never.
    `dropped_samples_total`: how many times blocks were noted and went without having been compared."""

    compared_blocks_total: int
    worst_error: float | None
    quarantined: bool
    compared_age_s: float | None
    dropped_samples_total: int


class KvRecall(Wire):
    """What was read from the disk into DRAM before a request asked for it, since the engine began. What is neither used
    nor in vain is in DRAM still. `paused_for_s`, above zero: the disk was slow or failed, and is left alone."""

    recalled_blocks_total: int
    used_blocks_total: int
    in_vain_blocks_total: int
    paused_for_s: float


class FirstTokens(Wire):
    """Times to the first token of the newest streamed turns, in seconds; the oldest of them ended at `since`."""

    turns: int
    p50_s: float
    p90_s: float
    p99_s: float
    since: float


class KvTenantTier(Wire):
    """What a tenant's sessions keep in a tier; a block that two of them share counts once.

    Others leave it `share_blocks`; None: nobody knows now whose it is. Of its idle sessions there are `cap_blocks` at
    most; None: as many as there is room for.
    """

    tier: Literal["device", "dram", "disk"]
    blocks: int
    share_blocks: int | None
    cap_blocks: int | None


class KvTenant(Wire):
    """A tenant's part. `tenant_id` is "other" for all tenants beyond the first 64 together. `kept_sessions` keep
    something on the device, of them `leased_sessions` have a lease that runs. `worths_hits_per_s` are the lowest, the
    median and the highest of their worths; of several tenants together the lowest and the highest. Blocks that its
    leases gave up for others, and leases that ran out, are since the engine began; tokens are of prompts, since the
    gateway began. `warm` turns found more of their prompt than they had to compute."""

    tenant_id: str
    kept_sessions: int
    leased_sessions: int
    worths_hits_per_s: list[float]
    reclaimed_blocks_total: int
    expired_leases_total: int
    kept: list[KvTenantTier]
    turns: int
    prompt_tokens: int
    repeated_tokens: int
    found_tokens: dict[str, int]
    computed_tokens: dict[str, int]
    warm: FirstTokens | None
    cold: FirstTokens | None


class KvLastTurn(Wire):
    """What became of the prompt of a session's newest turn; `first_token_s` as in `ExplainedTurn`."""

    ended_at: float
    prompt_tokens: int
    found_tokens: dict[str, int]
    computed_tokens: dict[str, int]
    first_token_s: float | None


class KvSession(Wire):
    """What is kept of one session, by tier. Ids are None where the gateway does not know the session any more.

    `worth_hits_per_s`: the lowest leaves first; None while a request of it waits or runs.
    """

    session_id: str | None
    tenant_id: str | None
    worth_hits_per_s: float | None
    kept: list[KvHeld]
    last_turn: KvLastTurn | None


class KvStatus(Wire):
    """What the engine keeps, at `observed_at`, as it was seen `age_s` before; what came of it since `counted_since`.

    `tiers` is empty when the engine could not be asked. `disk`, `canary` and `recall` are None where there is no such
    tier. `sessions` are those that keep most in some tier; of the disk's, the 10,000 that were used last are
    looked through. `kept_sessions` counts all on the device. `found_tokens` names tiers, and "unknown" for what was
    found it is not known where. `repeated_tokens` of all prompts' tokens had been in the turn before.
    `reclaimed_blocks_per_s` is over `reclaimed_over_s` seconds.
    """

    observed_at: float
    age_s: float | None
    counted_since: float
    block_size_tokens: int | None
    tiers: list[KvTier]
    disk: KvDisk | None
    canary: KvCanary | None
    recall: KvRecall | None
    kept_sessions: int | None
    leased_sessions: int | None
    worths_hits_per_s: list[float]
    reclaimed_blocks_total: int | None
    reclaimed_blocks_per_s: float | None
    reclaimed_over_s: float | None
    expired_leases_total: int | None
    ignored_leases_total: int | None
    turns: int
    prompt_tokens: int
    repeated_tokens: int
    found_tokens: dict[str, int]
    computed_tokens: dict[str, int]
    warm: FirstTokens | None
    cold: FirstTokens | None
    tenants: list[KvTenant]
    sessions: list[KvSession]


# Proofs


ProofVerdict = Literal["PASS", "FAIL", "UNKNOWN", "NOT CONFIGURED"]


class IsolationProofAsked(Wire):
    """How thorough a proof is to be. `rounds`: how often each of the times that are compared is taken."""

    rounds: int = Field(24, ge=8, le=500)


class ProofCheck(Wire):
    """One thing that was looked at; `mode` and `tier` are empty where it is of all of them."""

    name: str
    mode: str
    tier: str
    verdict: ProofVerdict
    expected: str
    found: str


class IsolationProof(Wire):
    """What crosses between sessions, as it was found. `verdict` is the worst of the checks'; what is not configured is
    none."""

    verdict: ProofVerdict
    checks: list[ProofCheck]
    took_s: float


# The audit log


class AuditError(Wire):
    """What is in the way of the audit log, of a check of it, or of its export."""

    code: str
    message: str
    cause: str
    remedy: str


class AuditExport(Wire):
    """A destination of the audit log.

    `sent` entries went over the connection there is; `delivered` ones are never sent again, and are seen to be
    `of_this_log`: else none of them counts for retention. `lag_entries` are not sent, `lag_s` is the age of the oldest
    of them. `waits_for` says what it waits for where that is no error; `last_error` what was in the way last, at
    `last_error_s`, epoch seconds, though it may be so no longer.
    """

    name: str
    url: str
    to: str
    format: str
    connected: bool
    sent: int
    delivered: int
    of_this_log: bool
    lag_entries: int
    lag_s: float
    waits_for: str
    error: AuditError | None
    last_error: AuditError | None = None
    last_error_s: float | None = None


class AuditExports(Wire):
    """Every destination of the audit log. `exporter_pid` is the process that ships to them; None: there is none."""

    destinations: list[AuditExport]
    exporter_pid: int | None


class NewAuditExport(Wire):
    """A destination to add, as `appliance.audit.siem.destinations.Destination` has it.

    `first` is the entry to begin with; None: the next one to come.
    """

    name: Annotated[str, Field(max_length=64)]
    url: Annotated[str, Field(max_length=2048)]
    format: Annotated[str, Field(max_length=64)] = "ocsf"
    server_name: Annotated[str, Field(max_length=255)] = ""
    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    token_file: Path | None = None
    max_message_bytes: int = Field(0, ge=0)
    first: int | None = Field(0, ge=0)


class AuditWitness(Wire):
    """A witness that is asked over the network.

    `size` is how many entries it co-signed last, 0 when it never did; `cosigned_age_s` how long ago. `silent_s`: for
    how long it has co-signed nothing that it was asked for; None: it does. `refused`: why it says that this log is not
    the one that it saw; `error`: why it co-signs nothing now.
    """

    name: str
    url: str
    size: int
    cosigned_age_s: float | None
    silent_s: float | None
    refused: str | None
    error: AuditError | None


class AuditStatus(Wire):
    """The audit log of this node.

    `size` counts its entries; `checkpoint_size` those under the newest checkpoint. `checkpoint_age_s` is None when
    there is none; how old one is that was there before the appender started, its file's time tells.

    `whole`: every entry that there was at the last check is as it was written, and nothing else says that some are
    gone; None: it is not known. The appliance checks the log itself, every day: `checked_age_s` is how long ago, None
    when it has not since the start; `checked_size` how many entries were whole, 0 when some were not; `check_error`
    what is wrong, or why it could not be looked at.

    `witnessed_size` entries are co-signed by `witnessed_by`, the last of the accepted witnesses to do so, which was
    verified; 0: by nobody; None: it is not known which those are. How long ago that was, `witnessed_age_s`, is by the
    witness's clock. `witnesses` are those that are asked over the network.

    `exports` are the destinations; `exports_error` says why it is not known which there are.

    `oldest_kept` is the first entry that retention left; None when nobody has looked yet, as before the vault is open.
    `retention_held` says why what is older than the retention is still there; `alarm` what an administrator has to
    know; `restored` from which backup the database was put back before this start.
    """

    size: int
    checkpoint_size: int
    checkpoint_age_s: float | None
    signs: bool
    public_key: str | None
    witnessed_size: int | None
    witnesses: list[AuditWitness]
    witnessed_by: str | None
    witnessed_age_s: float | None
    retention_days: int
    retention_overridden: bool
    retention_held: str | None
    oldest_kept: int | None
    oldest_kept_time_s: float | None
    whole: bool | None
    checked_age_s: float | None
    checked_size: int
    check_error: AuditError | None
    exports: list[AuditExport]
    exports_error: AuditError | None
    alarm: str | None
    restored: str | None
    directory: str
    error: AuditError | None


class OlderCopyAcknowledged(Wire):
    """Which alarm was ended: of an older copy of the `log` or the `database`, or that it was `unknown`; None: none."""

    acknowledged: str | None


class AuditEntry(Wire):
    """An entry. `record` is None where it cannot be opened, and `why_not` says why; `salt` opens its commitment."""

    sequence: int
    time_s: float
    action: str
    leaf_hash: str
    record: dict[str, Any] | None
    salt: str | None
    why_not: str | None


class AuditPage(Wire):
    """Entries, the newest first; `go_on_before`: there may be more below this number.

    `oldest_kept`: where the search could begin; those before it were removed.
    """

    entries: list[AuditEntry]
    go_on_before: int | None
    oldest_kept: int


class AuditDigestAsked(Wire):
    """A text to be compared with a digest in the log, by its SHA-256 in hexadecimal."""

    tenant: Name
    text: Literal["prompt", "answer"]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class AuditDigest(Wire):
    """The keyed digest of a text, in hexadecimal, as turns of that tenant carry it."""

    tenant_id: str
    digest: str


class AuditWitnessAsked(Wire):
    """What a witness is asked: to be carried to it."""

    request: str
    size: int
    public_key: str


class AuditWitnessReply(Wire):
    """What came back: the request that it answers, the reply, and the witness's public key."""

    request: Annotated[str, Field(max_length=1 << 20)]
    reply: Annotated[str, Field(max_length=1 << 20)]
    witness: Annotated[str, Field(max_length=1024)]


class AuditWitnessed(Wire):
    """A witness's reply was kept: it saw so many entries."""

    witness: str
    size: int
