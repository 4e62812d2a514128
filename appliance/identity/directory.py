"""Tenants, principals and API keys: made, found, revoked.

Rules:

- An API key is 256 random bits, shown once. The store holds a keyed hash of it; nothing here logs or returns it again.
- Names and labels are encrypted; they are found by keyed hash.
- What says who may do what is bound to its row's ciphertext: a row is opened before anything is believed of it, and
  sealed again when it changes.
- A revoked key is refused at the very next request: whatever is remembered of keys is dropped by a revocation, and a
  look at the store that one overtook is not remembered.
- While a tenant is shredded its keys are refused, and none of its encryption keys is rotated.
- A key whose tenant or principal is not there any more is no key: a row that is missing never widens what one may do.
- A store that others write to is asked every time.
"""

import asyncio
import base64
import contextlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final

from sqlalchemy import Connection, Table, insert, select, update
from sqlalchemy.engine import RowMapping

from appliance.errors import HoldfastError
from appliance.identity.errors import InvalidApiKey, NameTaken, NotAnAdministrator, RoleDiffers, UnknownIdentity
from appliance.identity.types import (
    ApiKey,
    Caller,
    Isolation,
    Permission,
    Principal,
    Role,
    RotatedKeys,
    Scopes,
    Tenant,
)
from appliance.store import (
    Change,
    Erasures,
    RowCipher,
    Store,
    StoreBusy,
    StoreConflict,
    key_changes,
    rotation_changes,
    tables,
)
from appliance.vault import SYSTEM_SCOPE, Binding, KeyMissing, KeyPurpose, TamperedValue, Vault

DAMAGE: Final = (TamperedValue, KeyMissing)
"""What opening a row raises that was changed outside, or the key of which was."""
SECRET_PREFIX = "hf_"  # noqa: S105 (says what a secret begins with)
_SECRET_BYTES = 32
_SECRET_LENGTH = len(SECRET_PREFIX) + 43  # base64url without padding
_KNOWN_CALLERS = 10_000
_CHANGE_ATTEMPTS = 8
_INSERT_TENANT = insert(tables.tenants)
_INSERT_PRINCIPAL = insert(tables.principals)
_INSERT_API_KEY = insert(tables.api_keys)


class Identity:
    """Who there is.

    Args:
        now: wall clock, epoch seconds.
        random_bytes: source of identifiers and keys.
    """

    def __init__(
        self,
        store: Store,
        vault: Vault,
        *,
        now: Callable[[], float] = time.time,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._store = store
        self._vault = vault
        self._rows = RowCipher(vault)
        self._now = now
        self._random_bytes = random_bytes
        self._callers: OrderedDict[bytes, Caller] = OrderedDict()
        self._revocations = 0
        self._one_rotation = asyncio.Lock()
        self._shut_out: set[str] = set()  # tenants that are being shredded now

    # Asking

    async def authenticate(self, secret: str) -> Caller:
        """Who brought this API key.

        Raises:
            InvalidApiKey: it is unknown, revoked or expired.
            VaultSealed: nobody can be told from anybody.
        """
        if len(secret) != _SECRET_LENGTH or not secret.isascii():
            raise _invalid("it is not a key of this appliance")
        lookup = self._secret_lookup(secret)
        caller = self._callers.get(lookup)
        if caller is None:
            revocations = self._revocations
            caller = await self._caller_of_secret(lookup)
            if self._store.exclusive and revocations == self._revocations:
                self._callers[lookup] = caller
                if len(self._callers) > _KNOWN_CALLERS:
                    self._callers.popitem(last=False)
        self._check(caller)
        return caller

    async def caller_of_uid(self, uid: int) -> Caller:
        """The administrator that this user of the machine is.

        Raises:
            NotAnAdministrator: nobody made them one.
        """
        principals = tables.principals
        query = select(principals).where(principals.c.uid == uid, principals.c.tenant_id.is_(None))
        row = await self._store.read(lambda db: db.execute(query).mappings().first())
        if row is None:
            raise NotAnAdministrator(
                f"the user with uid {uid} may not administer this appliance",
                cause="the administrator is the user who ran `holdfast init`",
                remedy="Run the command as that user, or bring an administrator's API key with --api-key-fd",
            )
        return Caller(self._principal(row))

    # Keys of the appliance and of its tenants

    async def establish(self) -> None:
        """Make the system's own keys: the first thing that a new database holds."""
        await self._store.write(key_changes(self._vault.new_system_keys()))

    async def rotate_keys(self, tenant: Tenant | None) -> RotatedKeys:
        """Replace the key that wraps a tenant's keys, or the system's. What was encrypted stays as it is.

        Raises:
            VaultSealed, TamperedValue, StoreFull, StoreBusy, StoreUnavailable: nothing is rotated.
        """
        async with self._one_rotation:
            rotation = await asyncio.to_thread(self._vault.rotate, SYSTEM_SCOPE if tenant is None else tenant.tenant_id)
            await self._store.write([*rotation_changes(rotation), Erasures.due()])
        return RotatedKeys(len(rotation.rewrapped), await self._store.erasures.erase())

    # Tenants

    async def create_tenant(
        self,
        name: str,
        *,
        idle_timeout_s: float | None = None,
        isolation: Isolation = Isolation.SESSION,
        also: Callable[[str], Sequence[Change]] = lambda _: (),
    ) -> Tenant:
        """A new tenant with keys of its own.

        Args:
            also: what the same transaction changes besides, given the tenant's id.

        Raises:
            NameTaken: there is one of that name.
        """
        tenant = Tenant(self._new_id("ten"), name, idle_timeout_s, isolation, self._now())
        records = self._vault.new_tenant_keys(tenant.tenant_id)
        row = {
            "tenant_id": tenant.tenant_id,
            "name_lookup": self._name_lookup("tenant", "", name),
            "name": name,
            "idle_timeout_s": idle_timeout_s,
            "isolation": tenant.isolation.value,
            "created_at": tenant.created_at,
            "row_version": 1,
            "audit_digests": None,
            "cache_epoch": None,
            "harness_lines": None,
        }
        sealed = self._rows.seal(tables.tenants, row, scope=tenant.tenant_id, purpose=KeyPurpose.RECORDS)
        changes = [*key_changes(records), Change(_INSERT_TENANT, sealed), *also(tenant.tenant_id)]
        await self._add(changes, f"a tenant named {name!r}", "holdfast tenant list")
        return tenant

    async def tenants(self, ids: Collection[str] | None = None) -> list[Tenant]:
        """Every tenant, or those of `ids`, and no other's row is opened; oldest first."""
        query = select(tables.tenants).order_by(tables.tenants.c.created_at)
        if ids is not None:
            query = query.where(tables.tenants.c.tenant_id.in_(ids))
        rows = await self._store.read(lambda db: db.execute(query).mappings().all())
        return [self._tenant(row) for row in rows]

    async def survey(self) -> tuple[list[Tenant], dict[str, HoldfastError]]:
        """As `tenants`, of those whose row opens; and the ids of the others, each with why it does not.

        Raises:
            VaultSealed: none opens.
        """
        query = select(tables.tenants).order_by(tables.tenants.c.created_at)
        rows = await self._store.read(lambda db: db.execute(query).mappings().all())
        found: list[Tenant] = []
        damaged: dict[str, HoldfastError] = {}
        for row in rows:
            try:
                found.append(self._tenant(row))
            except DAMAGE as error:
                damaged[str(row["tenant_id"])] = error
        return found, damaged

    async def has_tenant(self, tenant_id: str) -> bool:
        """Whether there is a tenant of that id. No row is opened."""
        query = select(tables.tenants.c.tenant_id).where(tables.tenants.c.tenant_id == tenant_id)
        return await self._store.read(lambda db: db.execute(query).first()) is not None

    async def tenant(self, name_or_id: str) -> Tenant:
        """The tenant of a name or an id.

        Raises:
            UnknownIdentity: there is none.
        """
        tenants = tables.tenants
        lookup = self._name_lookup("tenant", "", name_or_id)
        query = select(tenants).where((tenants.c.tenant_id == name_or_id) | (tenants.c.name_lookup == lookup))
        row = await self._store.read(lambda db: db.execute(query).mappings().first())
        if row is None:
            raise _no_tenant(name_or_id)
        return self._tenant(row)

    async def tenant_ids(self, names: Collection[str]) -> list[str]:
        """The ids of the tenants of these names. No row is opened: a damaged one is in nobody's way."""
        lookups = [self._name_lookup("tenant", "", name) for name in names]
        query = select(tables.tenants.c.tenant_id).where(tables.tenants.c.name_lookup.in_(lookups))
        return list(await self._store.read(lambda db: db.execute(query).scalars().all()))

    async def taken_names(self, names: Collection[str]) -> frozenset[str]:
        """Those of these names that a tenant has. No row is opened: a damaged one is in nobody's way."""
        if not names:
            return frozenset()
        by_lookup = {self._name_lookup("tenant", "", name): name for name in names}
        query = select(tables.tenants.c.name_lookup).where(tables.tenants.c.name_lookup.in_(by_lookup))
        found = await self._store.read(lambda db: db.execute(query).scalars().all())
        return frozenset(by_lookup[lookup] for lookup in found)

    async def choose_digests(self, tenant: Tenant, *, on: bool) -> Tenant:
        """Have keyed digests of a tenant's texts in the audit log, or no more. In force for the next request.

        Raises:
            UnknownIdentity: there is no such tenant any more.
            TamperedValue: its row was changed outside; it is left as it is.
            StoreBusy: others changed it again and again meanwhile.
        """

        def chosen(known: Tenant) -> Tenant:
            return replace(known, audit_digests=on)

        return await self._change_tenant(tenant, chosen)

    async def choose_harness_lines(self, tenant: Tenant, *, taken_out: bool) -> Tenant:
        """Have known lines of harnesses' own accounting taken out of what a tenant's clients send, or no more.

        Raises:
            UnknownIdentity, TamperedValue, StoreBusy: as `choose_digests`.
        """
        return await self._change_tenant(tenant, lambda known: replace(known, takes_out_harness_lines=taken_out))

    async def choose_isolation(self, tenant: Tenant, isolation: Isolation) -> Tenant:
        """Have a tenant's sessions share on the engine what `isolation` says, from the next request on.

        What was shared before is out of reach, also when the same is chosen again later.

        Raises:
            UnknownIdentity, TamperedValue, StoreBusy: as `choose_digests`.
        """

        def chosen(known: Tenant) -> Tenant:
            if known.isolation is isolation:
                return known
            return replace(known, isolation=isolation, cache_epoch=known.cache_epoch + 1)

        return await self._change_tenant(tenant, chosen)

    async def raise_cache_epoch(self, tenant: Tenant) -> Tenant:
        """Put what a tenant's sessions share on the engine out of reach: from the next request on it is computed anew.

        Raises:
            UnknownIdentity, TamperedValue, StoreBusy: as `choose_digests`.
        """
        return await self._change_tenant(tenant, lambda known: replace(known, cache_epoch=known.cache_epoch + 1))

    @contextlib.asynccontextmanager
    async def shutting_out(self, tenant_id: str) -> AsyncIterator[None]:
        """Refuse a tenant's API keys from the very next request on, and rotate no keys, while the body runs."""
        self._shut_out.add(tenant_id)
        try:
            async with self._one_rotation:
                yield
        finally:
            self._forget_callers()
            self._shut_out.discard(tenant_id)

    async def _change_tenant(self, tenant: Tenant, change: Callable[[Tenant], Tenant]) -> Tenant:
        query = select(tables.tenants).where(tables.tenants.c.tenant_id == tenant.tenant_id)
        try:
            for _ in range(_CHANGE_ATTEMPTS):
                row = await self._store.read(lambda db: db.execute(query).mappings().first())
                if row is None:
                    raise _no_tenant(tenant.tenant_id)
                known = self._tenant(row)
                changed = change(known)
                if changed == known or await self._replace_tenant(row, changed):
                    return changed
        finally:
            self._forget_callers()
        raise StoreBusy(
            f"the tenant {tenant.name!r} is as it was",
            cause="somebody else changed it each time that it was looked at",
            remedy="Ask again",
        )

    # Principals

    async def create_principal(
        self,
        tenant: Tenant | None,
        name: str,
        role: Role,
        *,
        uid: int | None = None,
        permissions: frozenset[Permission] = frozenset(),
    ) -> Principal:
        """A new principal of a tenant, or of the appliance.

        Raises:
            NameTaken: its tenant has one of that name, or the uid is somebody's.
        """
        tenant_id = None if tenant is None else tenant.tenant_id
        principal = Principal(self._new_id("prn"), tenant_id, name, role, permissions)
        row = {
            "principal_id": principal.principal_id,
            "tenant_id": tenant_id,
            "name_lookup": self._name_lookup("principal", tenant_id or SYSTEM_SCOPE, name),
            "name": name,
            "role": role.value,
            "uid": uid,
            "permissions": json.dumps(sorted(permissions)),
            "created_at": self._now(),
            "row_version": 1,
        }
        sealed = await self._seal(tables.principals, row)
        await self._add([Change(_INSERT_PRINCIPAL, sealed)], f"a principal named {name!r}", "holdfast key list")
        return principal

    async def principal(self, tenant: Tenant | None, name: str, role: Role) -> Principal:
        """The principal of a name and a role, of a tenant or of the appliance; made where there is none of the name.

        Raises:
            RoleDiffers: there is one of that name with another role.
            NameTaken: somebody else made one meanwhile.
        """
        known = next((each for each in await self.principals(tenant) if each.name == name), None)
        if known is None:
            return await self.create_principal(tenant, name, role)
        if known.role is not role:
            raise RoleDiffers(
                f"the principal {name!r} is there already, with the role {known.role.value}",
                cause=f"a principal has one role, and a key of the role {role.value} was asked for",
                remedy=f"Ask for its own with --role {known.role.value}, or give the principal another name",
            )
        return known

    async def principals(self, tenant: Tenant | None) -> list[Principal]:
        """The principals of a tenant, or of the appliance; oldest first."""
        principals = tables.principals
        tenant_id = None if tenant is None else tenant.tenant_id
        query = select(principals).where(principals.c.tenant_id.is_not_distinct_from(tenant_id))
        ordered = query.order_by(principals.c.created_at)
        rows = await self._store.read(lambda db: db.execute(ordered).mappings().all())
        return [self._principal(row) for row in rows]

    # API keys

    async def create_key(
        self, principal: Principal, scopes: Scopes, *, label: str | None = None, expires_at: float | None = None
    ) -> tuple[ApiKey, str]:
        """A new API key, and its secret: the only time that it is shown."""
        secret = SECRET_PREFIX + base64.urlsafe_b64encode(self._random_bytes(_SECRET_BYTES)).rstrip(b"=").decode()
        key = ApiKey(
            key_id=self._new_id("ak"),
            tenant_id=principal.tenant_id,
            principal_id=principal.principal_id,
            label=label,
            scopes=scopes,
            created_at=self._now(),
            expires_at=expires_at,
            revoked_at=None,
        )
        row = {
            "key_id": key.key_id,
            "principal_id": key.principal_id,
            "tenant_id": key.tenant_id,
            "secret_lookup": self._secret_lookup(secret),
            "label": label or "",
            "scopes": _scopes_text(scopes),
            "created_at": key.created_at,
            "expires_at": expires_at,
            "revoked_at": None,
            "row_version": 1,
        }
        sealed = await self._seal(tables.api_keys, row)
        await self._add([Change(_INSERT_API_KEY, sealed)], "that key", "holdfast key list")
        return key, secret

    async def keys(self, tenant: Tenant | None = None) -> list[ApiKey]:
        """The API keys of a tenant, or all; oldest first."""
        api_keys = tables.api_keys
        query = select(api_keys).order_by(api_keys.c.created_at)
        if tenant is not None:
            query = query.where(api_keys.c.tenant_id == tenant.tenant_id)
        rows = await self._store.read(lambda db: db.execute(query).mappings().all())
        return [self._api_key(row) for row in rows]

    async def revoke_key(self, key_id: str, *, tenant_id: str | None = None) -> ApiKey:
        """Revoke an API key. Durable, and in force for the next request, when this returns; again, it changes nothing.

        Args:
            tenant_id: whose it has to be; None: anybody's.

        Raises:
            UnknownIdentity: there is no such key.
            TamperedValue: its row was changed outside; it opens nothing as it is.
            StoreBusy: others changed it again and again meanwhile.
        """
        self._forget_callers()
        try:
            for _ in range(_CHANGE_ATTEMPTS):
                row = await self._key_row(key_id, tenant_id)
                if row["revoked_at"] is not None or await self._revoke(row):
                    return self._api_key(await self._key_row(key_id, tenant_id))
        finally:
            self._forget_callers()
        raise StoreBusy(
            f"the API key {key_id} is not revoked",
            cause="somebody else changed it each time that it was looked at",
            remedy="Revoke it again",
        )

    # Private

    async def _key_row(self, key_id: str, tenant_id: str | None) -> RowMapping:
        query = select(tables.api_keys).where(tables.api_keys.c.key_id == key_id)
        if tenant_id is not None:
            query = query.where(tables.api_keys.c.tenant_id == tenant_id)
        row = await self._store.read(lambda db: db.execute(query).mappings().first())
        if row is None:
            raise UnknownIdentity(
                f"there is no API key {key_id}", cause="no key has that id", remedy="`holdfast key list` names them"
            )
        return row

    async def _revoke(self, row: RowMapping) -> bool:
        """Whether the key was revoked: not when its row has become another one since it was read."""
        api_keys = tables.api_keys
        opened = self._rows.open(api_keys, row)
        revoked = {**opened, "revoked_at": self._now(), "row_version": row["row_version"] + 1}
        statement = (
            update(api_keys)
            .where(api_keys.c.key_id == row["key_id"], api_keys.c.row_version == row["row_version"])
            .values(await self._seal(api_keys, revoked))
        )
        return await self._store.transact(lambda db: db.execute(statement).rowcount == 1)

    async def _replace_tenant(self, row: RowMapping, changed: Tenant) -> bool:
        """Whether the tenant was changed: not when its row has become another one since it was read."""
        tenants = tables.tenants
        opened = self._rows.open(tenants, row)
        chosen = {
            **opened,
            "audit_digests": "on" if changed.audit_digests else "off",
            "isolation": changed.isolation.value,
            "cache_epoch": changed.cache_epoch,
            "harness_lines": "taken-out" if changed.takes_out_harness_lines else "kept",
            "row_version": row["row_version"] + 1,
        }
        statement = (
            update(tenants)
            .where(tenants.c.tenant_id == row["tenant_id"], tenants.c.row_version == row["row_version"])
            .values(await self._seal(tenants, chosen))
        )
        return await self._store.transact(lambda db: db.execute(statement).rowcount == 1)

    async def _caller_of_secret(self, lookup: bytes) -> Caller:
        api_keys, principals, tenants = tables.api_keys, tables.principals, tables.tenants

        def query(db: Connection) -> tuple[RowMapping, RowMapping | None, RowMapping | None] | None:
            key = db.execute(select(api_keys).where(api_keys.c.secret_lookup == lookup)).mappings().first()
            if key is None:
                return None
            who = select(principals).where(principals.c.principal_id == key["principal_id"])
            principal = db.execute(who).mappings().first()
            whose = select(tenants).where(tenants.c.tenant_id == key["tenant_id"])
            return key, principal, db.execute(whose).mappings().first()

        rows = await self._store.read(query)
        if rows is None:
            raise _invalid("it is not a key of this appliance")
        key, principal, tenant = rows
        if principal is None or (tenant is None and key["tenant_id"] is not None):
            raise _invalid("whose it was is not there any more")
        return Caller(
            principal=self._principal(principal),
            tenant=None if tenant is None else self._tenant(tenant),
            key=self._api_key(key),
        )

    def _check(self, caller: Caller) -> None:
        key = caller.key
        if key is None or key.revoked_at is not None:
            raise _invalid("it was revoked")
        if key.tenant_id in self._shut_out:
            raise _invalid("its tenant is being shredded")
        if key.expires_at is not None and key.expires_at <= self._now():
            raise _invalid("it has expired")

    async def _add(self, changes: list[Change], what: str, listed_by: str) -> None:
        try:
            await self._store.write(changes)
        except StoreConflict:
            raise NameTaken(
                f"there is {what} already", cause="names are unique", remedy=f"Choose another; `{listed_by}` shows them"
            ) from None

    def _forget_callers(self) -> None:
        self._revocations += 1
        self._callers.clear()

    async def _seal(self, table: Table, row: Mapping[str, object]) -> dict[str, object]:
        scope = str(row["tenant_id"] or SYSTEM_SCOPE)
        await self._rows.prepare(scope=scope, purpose=KeyPurpose.RECORDS)
        return self._rows.seal(table, row, scope=scope, purpose=KeyPurpose.RECORDS)

    def _tenant(self, row: RowMapping) -> Tenant:
        name = _text(self._rows.open(tables.tenants, row)["name"])
        if not isinstance(row["created_at"], int | float):  # SQLite keeps what it is given, and nothing is bound to it
            raise TamperedValue(Binding("tenants", "created_at", row["tenant_id"], row["tenant_id"], 0))
        return Tenant(
            tenant_id=row["tenant_id"],
            name=name or "",
            idle_timeout_s=row["idle_timeout_s"],
            isolation=Isolation(row["isolation"]),
            created_at=row["created_at"],
            audit_digests=row["audit_digests"] == "on",
            cache_epoch=row["cache_epoch"] or 0,
            takes_out_harness_lines=row["harness_lines"] == "taken-out",
        )

    def _principal(self, row: RowMapping) -> Principal:
        name = _text(self._rows.open(tables.principals, row)["name"])
        permissions = frozenset(Permission(permission) for permission in json.loads(row["permissions"]))
        return Principal(row["principal_id"], row["tenant_id"], name or "", Role(row["role"]), permissions)

    def _api_key(self, row: RowMapping) -> ApiKey:
        return ApiKey(
            key_id=row["key_id"],
            tenant_id=row["tenant_id"],
            principal_id=row["principal_id"],
            label=_text(self._rows.open(tables.api_keys, row)["label"]) or None,
            scopes=_scopes(row["scopes"]),
            created_at=row["created_at"],
            expires_at=row["expires_at"],
            revoked_at=row["revoked_at"],
        )

    def _secret_lookup(self, secret: str) -> bytes:
        return self._vault.mac(SYSTEM_SCOPE, KeyPurpose.LOOKUP, "api-key", secret.encode())

    def _name_lookup(self, kind: str, scope: str, name: str) -> bytes:
        return self._vault.mac(SYSTEM_SCOPE, KeyPurpose.LOOKUP, f"{kind}-name", scope.encode(), name.encode())

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._random_bytes(16).hex()}"


def _scopes_text(scopes: Scopes) -> str:
    return json.dumps(
        {
            "models": None if scopes.models is None else sorted(scopes.models),
            "requests_per_minute": scopes.requests_per_minute,
            "concurrent_requests": scopes.concurrent_requests,
            "tokens_per_day": scopes.tokens_per_day,
            "permissions": sorted(scopes.permissions),
        }
    )


def _scopes(text: str) -> Scopes:
    record = json.loads(text)
    return Scopes(
        models=None if record["models"] is None else frozenset(record["models"]),
        requests_per_minute=record["requests_per_minute"],
        concurrent_requests=record["concurrent_requests"],
        tokens_per_day=record["tokens_per_day"],
        permissions=frozenset(Permission(permission) for permission in record["permissions"]),
    )


def _text(value: object) -> str | None:
    return value.decode() if isinstance(value, bytes) else None


def _no_tenant(name_or_id: str) -> UnknownIdentity:
    return UnknownIdentity(
        f"there is no tenant {name_or_id!r}",
        cause="no tenant has that name or id",
        remedy="`holdfast tenant list` names them",
    )


def _invalid(cause: str) -> InvalidApiKey:
    return InvalidApiKey(
        "the API key is not accepted", cause=cause, remedy="Ask an administrator for a key: `holdfast key create`"
    )
