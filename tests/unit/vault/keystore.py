"""A key store in memory with the real interface, so that tests of the vault read as stories."""

import dataclasses
import threading

from appliance.vault import KeyPurpose, KeyRecord, Rotation


class MemoryKeys:
    """Implements `appliance.vault.KeyStore`; several threads may share it.

    Attributes:
        records: what a restarted appliance would find.
        reservations: every reservation, in order.
        full: reservations fail, as on a full disk.
    """

    def __init__(self) -> None:
        self.records: dict[str, KeyRecord] = {}
        self.reservations: list[tuple[str, int]] = []
        self.full = False
        self._lock = threading.Lock()

    def add(self, records: list[KeyRecord]) -> None:
        with self._lock:
            self.records.update((record.key_id, record) for record in records)

    def apply(self, rotation: Rotation) -> None:
        self.add([rotation.created, rotation.retired])
        with self._lock:
            for record in rotation.rewrapped:
                self.records[record.key_id] = dataclasses.replace(
                    self.records[record.key_id], parent_id=record.parent_id, wrapped=record.wrapped
                )
            for key_id in rotation.destroyed:
                del self.records[key_id]

    def shred(self, *scopes: str) -> None:
        with self._lock:
            self.records = {key_id: record for key_id, record in self.records.items() if record.scope not in scopes}

    def load(self, key_id: str) -> KeyRecord | None:
        with self._lock:
            return self.records.get(key_id)

    def active(self, scope: str, purpose: KeyPurpose) -> KeyRecord | None:
        found = [r for r in self._all() if (r.scope, r.purpose, r.retired) == (scope, purpose, False)]
        return max(found, key=lambda record: record.version, default=None)

    def children(self, parent_id: str) -> list[KeyRecord]:
        return [record for record in self._all() if record.parent_id == parent_id]

    def retired(self, scope: str) -> list[KeyRecord]:
        return [record for record in self._all() if record.scope == scope and record.retired]

    def reserve_uses(self, key_id: str, total: int) -> None:
        if self.full:
            raise OSError("no space left on device")
        with self._lock:
            self.reservations.append((key_id, total))
            self.records[key_id] = dataclasses.replace(self.records[key_id], uses_reserved=total)

    def root_id(self) -> str | None:
        return next((record.root_id for record in self._all()), None)

    def stored(self, scope: str, purpose: KeyPurpose) -> KeyRecord:
        """The active key, which must be there."""
        record = self.active(scope, purpose)
        assert record is not None
        return record

    def _all(self) -> list[KeyRecord]:
        with self._lock:
            return list(self.records.values())
