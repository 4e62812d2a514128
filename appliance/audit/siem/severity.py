"""How grave an event is: one answer for every format.

Rule: it follows from the class and the outcome alone, so that whoever has the record finds the same.
"""

import enum

from appliance.audit.events import CATALOGUE


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
    known = CATALOGUE.get(event_class)
    if known is not None and known.is_grave:
        return Severity.MEDIUM
    return Severity.INFORMATIONAL if outcome in ("success", None) else Severity.LOW
