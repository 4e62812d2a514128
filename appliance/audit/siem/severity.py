"""How grave an event is: one answer for every format.

Rule: it follows from the class and the outcome alone, so that whoever has the record finds the same.
"""

import enum
from typing import Final

from appliance.audit.events import (
    ADMIN_REFUSED,
    BACKUP_RESTORED,
    ENGINE_LOST,
    ENTRIES_MISSING,
    KV_QUARANTINED,
    LOG_RECOVERED,
    LOG_TAMPERED,
    NOT_AUTHENTICATED,
    OLDER_COPY,
    TURN_NOT_KEPT,
    VAULT_REFUSED,
    WITNESS_REFUSED,
    WITNESS_SILENT,
)

_MEDIUM: Final = frozenset(
    kind.number
    for kind in (
        ADMIN_REFUSED,
        BACKUP_RESTORED,
        ENGINE_LOST,
        ENTRIES_MISSING,
        KV_QUARANTINED,
        LOG_RECOVERED,
        LOG_TAMPERED,
        NOT_AUTHENTICATED,
        OLDER_COPY,
        TURN_NOT_KEPT,
        VAULT_REFUSED,
        WITNESS_REFUSED,
        WITNESS_SILENT,
    )
)


class Severity(enum.IntEnum):
    """OCSF's `severity_id`."""

    INFORMATIONAL = 1
    LOW = 2
    MEDIUM = 3

    @property
    def of_ten(self) -> int:
        """On the scale of CEF and LEEF: 0 to 3 are low there, 4 to 6 medium, 7 and more high."""
        return {Severity.INFORMATIONAL: 1, Severity.LOW: 3, Severity.MEDIUM: 6}[self]


def severity_of(event_class: int, outcome: object) -> Severity:
    """Of a class, and of how it ended; `outcome` None: the record is withheld."""
    if event_class in _MEDIUM:
        return Severity.MEDIUM
    return Severity.INFORMATIONAL if outcome in ("success", None) else Severity.LOW
