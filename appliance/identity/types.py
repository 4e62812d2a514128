"""Who may ask for what: frozen values, without a secret in them."""

import enum
from dataclasses import dataclass, field


class Role(enum.StrEnum):
    """What a principal is there for. What each may do is decided where it is done."""

    ADMIN = "admin"
    OPERATOR = "operator"
    AUDITOR = "auditor"
    CLIENT = "client"


class Permission(enum.StrEnum):
    """What no role brings by itself."""

    TRANSCRIPT_READ = "transcript:read"


class Isolation(enum.StrEnum):
    """What a tenant's sessions may find of each other's in the engine's cache. Between tenants: never anything."""

    SESSION = "session"  # nothing outside a session tree
    TENANT_PREFIX = "tenant-prefix"  # the tools and the system messages; everything after them is the session's own
    TENANT = "tenant"  # everything


@dataclass(frozen=True, slots=True)
class Scopes:
    """What an API key may do; None: without limit.

    Attributes:
        models: the names that it may ask for.
        tokens_per_day: prompt and completion together, in a UTC day.
    """

    models: frozenset[str] | None = None
    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None
    permissions: frozenset[Permission] = frozenset()

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "concurrent_requests", "tokens_per_day"):
            limit = getattr(self, name)
            if limit is not None and limit < 0:
                raise ValueError(f"{name} must not be negative")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose sessions, principals and keys belong together.

    Attributes:
        idle_timeout_s: overrides the appliance's; None: does not.
        cache_epoch: part of the salt of what its sessions share on the engine; raised, that is out of reach.
        takes_out_harness_lines: `sessions.harness_lines` are taken out of what its clients send, before anything else.
        audit_digests: the audit log has keyed digests of what its turns ask and are answered.
    """

    tenant_id: str
    name: str
    idle_timeout_s: float | None
    isolation: Isolation
    created_at: float
    audit_digests: bool = False
    cache_epoch: int = 0
    takes_out_harness_lines: bool = False


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody or something that asks. `tenant_id` None: of the appliance, not of a tenant."""

    principal_id: str
    tenant_id: str | None
    name: str
    role: Role
    permissions: frozenset[Permission] = frozenset()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key without its secret. Times in epoch seconds."""

    key_id: str
    tenant_id: str | None
    principal_id: str
    label: str | None
    scopes: Scopes
    created_at: float
    expires_at: float | None
    revoked_at: float | None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking now: a principal, its tenant, and the key that it brought; None: it came over the admin socket.

    `tenant` is None for a principal of the appliance and for no other: a tenant's never has the appliance's scope.

    Raises:
        ValueError: principal, tenant and key do not belong to one tenant, or all to the appliance.
    """

    principal: Principal
    tenant: Tenant | None = field(default=None)
    key: ApiKey | None = field(default=None)

    def __post_init__(self) -> None:
        whose = self.principal.tenant_id
        of_tenant = None if self.tenant is None else self.tenant.tenant_id
        if of_tenant != whose or (self.key is not None and self.key.tenant_id != whose):
            raise ValueError(f"the principal, the tenant and the key of {self.principal.principal_id} are not one's")


@dataclass(frozen=True, slots=True)
class RotatedKeys:
    """A key that wraps others was replaced.

    Attributes:
        keys: how many the new one wraps.
        erased: what the old one wrapped is in the database's files no more; False: that could not be done yet, and will
            be.
    """

    keys: int
    erased: bool
