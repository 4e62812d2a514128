"""A key store in memory with the real interface, so that tests of the vault read as stories."""

from appliance.vault import KeyPurpose, KeyRecord, Rotation


class MemoryKeys:
    """Implements `appliance.vault.KeyStore`."""

    def __init__(self) -> None:
        self.records: dict[str, KeyRecord] = {}
        self.reservations: list[tuple[str, int]] = []

    def add(self, records: list[KeyRecord]) -> None:
        self.records.update((record.key_id, record) for record in records)

    def apply(self, rotation: Rotation) -> None:
        self.add([rotation.created, rotation.retired, *rotation.rewrapped])
        for key_id in rotation.destroyed:
            del self.records[key_id]

    def load(self, key_id: str) -> KeyRecord | None:
        return self.records.get(key_id)

    def active(self, scope: str, purpose: KeyPurpose) -> KeyRecord | None:
        found = [r for r in self.records.values() if (r.scope, r.purpose, r.retired) == (scope, purpose, False)]
        return max(found, key=lambda record: record.version, default=None)

    def children(self, parent_id: str) -> list[KeyRecord]:
        return [record for record in self.records.values() if record.parent_id == parent_id]

    def retired(self, scope: str) -> list[KeyRecord]:
        return [record for record in self.records.values() if record.scope == scope and record.retired]

    def reserve_uses(self, key_id: str, total: int) -> None:
        self.reservations.append((key_id, total))
        record = self.records[key_id]
        self.records[key_id] = KeyRecord(
            **{name: getattr(record, name) for name in record.__slots__} | {"uses_reserved": total}
        )

    def root_id(self) -> str | None:
        return next((record.root_id for record in self.records.values()), None)
