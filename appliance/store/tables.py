"""Every table of the database, once.

Rules:

- Identifiers are text, times are seconds since the epoch (UTC).
- A person's words, names and ids are in `Encrypted` columns only; what must be found again has a keyed hash beside it
  (`…_lookup`).
- A table with `Encrypted` columns has one primary key column, a `tenant_id` and a `row_version`: all three are bound
  into its ciphertexts. `row_version` counts the versions of what is encrypted or bound.
- What says who may do what, whose a row is, or how it is found, is bound (`info=BOUND`): who can write the database and
  has no key cannot change it unnoticed. Such a table has an `Encrypted` column that is never NULL; where there may be
  nothing to say in it, nothing is sealed. A new column to be bound is `BOUND_ONCE_SET`, and NULL in the older rows.
- A change here needs a migration: `tests/unit/store` compares the two.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

from appliance.store.encrypted import BOUND, BOUND_ONCE_SET, Encrypted

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

meta = Table(
    "meta",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("scope", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("parent_id", Text),
    Column("version", Integer, nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("uses_reserved", BigInteger, nullable=False),
    Column("root_id", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("retired", Boolean, nullable=False),
    Index(None, "scope", "purpose"),
    Index(None, "parent_id"),
)

tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("name_lookup", LargeBinary, nullable=False, unique=True, info=BOUND),
    Column("name", Encrypted, nullable=False),
    Column("idle_timeout_s", Double, info=BOUND),
    Column("isolation", Text, nullable=False, server_default="session", info=BOUND),
    Column("created_at", Double, nullable=False),
    Column("row_version", Integer, nullable=False),
    Column("audit_digests", Text, info=BOUND_ONCE_SET),
    Column("cache_epoch", Integer, info=BOUND_ONCE_SET),
    Column("harness_lines", Text, info=BOUND_ONCE_SET),
)

principals = Table(
    "principals",
    metadata,
    Column("principal_id", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id")),
    Column("name_lookup", LargeBinary, nullable=False, unique=True, info=BOUND),
    Column("name", Encrypted, nullable=False),
    Column("role", Text, nullable=False, info=BOUND),
    Column("uid", BigInteger, unique=True, info=BOUND),
    Column("permissions", Text, nullable=False, info=BOUND),
    Column("created_at", Double, nullable=False),
    Column("row_version", Integer, nullable=False),
    Index(None, "tenant_id"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("principal_id", Text, ForeignKey("principals.principal_id"), nullable=False, info=BOUND),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id")),
    Column("secret_lookup", LargeBinary, nullable=False, unique=True, info=BOUND),
    Column("label", Encrypted, nullable=False),
    Column("scopes", Text, nullable=False, info=BOUND),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, info=BOUND),
    Column("revoked_at", Double, info=BOUND),
    Column("row_version", Integer, nullable=False),
    Index(None, "principal_id"),
    Index(None, "tenant_id"),
)

quota_days = Table(
    "quota_days",
    metadata,
    Column("api_key_id", Text, primary_key=True),
    Column("day", Text, primary_key=True),
    Column("tokens", BigInteger, nullable=False),
    Index(None, "day"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("principal_id", Text, nullable=False, info=BOUND),
    Column("tree_id", Text, nullable=False, info=BOUND),
    Column("parent_session_id", Text),
    Column("client_id_lookup", LargeBinary, info=BOUND),
    Column("client_id", Encrypted, nullable=False),
    Column("model", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("turns", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("last_used_at", Double, nullable=False),
    Column("over_at", Double),
    Column("row_version", Integer, nullable=False),
    UniqueConstraint("tenant_id", "principal_id", "client_id_lookup"),
    Index(None, "parent_session_id"),
    Index(None, "tree_id"),
)

turns = Table(
    "turns",
    metadata,
    Column("turn_id", Text, primary_key=True),
    Column("session_id", Text, ForeignKey("sessions.session_id"), nullable=False, info=BOUND),
    Column("tenant_id", Text, nullable=False),
    Column("number", Integer, nullable=False, info=BOUND),
    Column("response_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("request", Encrypted, nullable=False),
    Column("response", Encrypted, nullable=False),
    Column("token_ids", Encrypted, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("finish_reason", Text),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double, nullable=False),
    Column("row_version", Integer, nullable=False),
    UniqueConstraint("session_id", "number"),
    Index(None, "response_id"),
)

# Keyed hashes of the histories that were answered: how a session without an id is found again.
chain = Table(
    "chain",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("link", LargeBinary, primary_key=True),
    Column("session_id", Text, nullable=False),
    Column("turn_number", Integer, nullable=False),
    Index(None, "session_id"),
    sqlite_with_rowid=False,
)

# The epoch of a session tree is part of its cache salt: forgetting raises it.
trees = Table(
    "trees",
    metadata,
    Column("tree_id", Text, primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("epoch", Integer, nullable=False),
)
