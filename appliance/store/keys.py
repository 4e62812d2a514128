"""The vault's wrapped keys, in the table `keys`."""

from collections.abc import Iterable

from sqlalchemy import bindparam, delete, insert, select, update
from sqlalchemy.engine import RowMapping

from appliance.store import tables
from appliance.store.store import Store
from appliance.store.writer import Change
from appliance.vault import KeyPurpose, KeyRecord, Rotation

_keys = tables.keys
_INSERT = insert(_keys)
_RESERVE = (
    update(_keys)
    .where(_keys.c.key_id == bindparam("b_key_id"), _keys.c.uses_reserved < bindparam("b_total"))
    .values(uses_reserved=bindparam("b_total"))
)
_RETIRE = update(_keys).where(_keys.c.key_id == bindparam("b_key_id")).values(retired=True)
_REWRAP = (
    update(_keys)
    .where(_keys.c.key_id == bindparam("b_key_id"))
    .values(parent_id=bindparam("b_parent_id"), wrapped=bindparam("b_wrapped"))
)
_DESTROY = delete(_keys).where(_keys.c.key_id == bindparam("b_key_id"))


class DatabaseKeys:
    """A `KeyStore` over a store. Every call blocks; `reserve_uses` waits for the writer."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def load(self, key_id: str) -> KeyRecord | None:
        """The record of one key."""
        query = select(_keys).where(_keys.c.key_id == key_id)
        row = self._store.read_blocking(lambda db: db.execute(query).mappings().first())
        return None if row is None else _record(row)

    def active(self, scope: str, purpose: KeyPurpose) -> KeyRecord | None:
        """The newest key of a scope and purpose that is not retired."""
        query = (
            select(_keys)
            .where(_keys.c.scope == scope, _keys.c.purpose == purpose.value, _keys.c.retired.is_(False))
            .order_by(_keys.c.version.desc())
            .limit(1)
        )
        row = self._store.read_blocking(lambda db: db.execute(query).mappings().first())
        return None if row is None else _record(row)

    def children(self, parent_id: str) -> list[KeyRecord]:
        """The keys that one key wraps."""
        query = select(_keys).where(_keys.c.parent_id == parent_id).order_by(_keys.c.key_id)
        return [_record(row) for row in self._store.read_blocking(lambda db: db.execute(query).mappings().all())]

    def retired(self, scope: str) -> list[KeyRecord]:
        """The retired keys of a scope, oldest first."""
        query = select(_keys).where(_keys.c.scope == scope, _keys.c.retired.is_(True)).order_by(_keys.c.version)
        return [_record(row) for row in self._store.read_blocking(lambda db: db.execute(query).mappings().all())]

    def reserve_uses(self, key_id: str, total: int) -> None:
        """Account for `total` encryptions; durable when it returns."""
        self._store.write_blocking([Change(_RESERVE, {"b_key_id": key_id, "b_total": total})])

    def root_id(self) -> str | None:
        """The root key that the database belongs to; None: it is empty."""
        query = select(_keys.c.root_id).where(_keys.c.parent_id.is_(None)).limit(1)
        return self._store.read_blocking(lambda db: db.execute(query).scalar())


def key_changes(records: Iterable[KeyRecord]) -> list[Change]:
    """What stores new keys."""
    return [Change(_INSERT, _row(record)) for record in records]


def rotation_changes(rotation: Rotation) -> list[Change]:
    """What stores a rotation, in one change set."""
    return [
        *key_changes([rotation.created]),
        Change(_RETIRE, {"b_key_id": rotation.retired.key_id}),
        *(
            Change(_REWRAP, {"b_key_id": record.key_id, "b_parent_id": record.parent_id, "b_wrapped": record.wrapped})
            for record in rotation.rewrapped
        ),
        *(Change(_DESTROY, {"b_key_id": key_id}) for key_id in rotation.destroyed),
    ]


def _row(record: KeyRecord) -> dict[str, object]:
    return {
        "key_id": record.key_id,
        "scope": record.scope,
        "purpose": record.purpose.value,
        "parent_id": record.parent_id,
        "version": record.version,
        "wrapped": record.wrapped,
        "uses_reserved": record.uses_reserved,
        "root_id": record.root_id,
        "created_at": record.created_at,
        "retired": record.retired,
    }


def _record(row: RowMapping) -> KeyRecord:
    return KeyRecord(
        key_id=row["key_id"],
        scope=row["scope"],
        purpose=KeyPurpose(row["purpose"]),
        parent_id=row["parent_id"],
        version=row["version"],
        wrapped=bytes(row["wrapped"]),
        uses_reserved=row["uses_reserved"],
        root_id=row["root_id"],
        created_at=row["created_at"],
        retired=row["retired"],
    )
