"""What a receiver knows of a log from its checks so far: the next one goes on from there, without what came before.

Rules:

- It is the receiver's own file, and believed: keep it where nobody writes who could change what arrives.
- What is proved is kept as the roots of its complete subtrees. Of the newest entries the leaves are kept, too: of those
  that no checkpoint proves yet, and of `KEPT` before them, since what was not acknowledged is sent again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

from appliance.audit.files import write_whole
from appliance.audit.siem.batches import Taken
from appliance.audit.tree import HASH_BYTES, Frontier
from appliance.errors import Fault, HoldfastError

KEPT: Final = 16_384  # twice what is sent and not acknowledged at most (`shipper.MOST_UNACKNOWLEDGED`)
_FORMAT: Final = 1


class KnownInvalid(HoldfastError, ValueError):
    """The file is not what a check writes, or is of another log."""

    code: ClassVar[str] = "audit_known_invalid"
    fault: ClassVar[Fault] = Fault.CALLER


@dataclass(frozen=True, slots=True)
class Known:
    """A log, as far as it was checked.

    Attributes:
        edge: what is proved.
        first: the entry that the first of `leaves` is of.
        leaves: their hashes, up to the last entry that came.
        batches: the last batch of each series that was taken.
    """

    origin: str
    edge: Frontier
    first: int
    leaves: tuple[bytes, ...]
    batches: Mapping[str, Taken] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """One more than the last entry that came."""
        return self.first + len(self.leaves)

    def save(self, path: Path) -> None:
        """Put it in the place of what was known before. Blocks.

        Raises:
            OSError: what was known before is there still.
        """
        said = {
            "format": _FORMAT,
            "origin": self.origin,
            "proved": self.edge.size,
            "peaks": [peak.hex() for peak in self.edge.peaks],
            "first": self.first,
            "leaves": [leaf.hex() for leaf in self.leaves],
            "batches": {series: taken._asdict() for series, taken in self.batches.items()},
        }
        write_whole(path, json.dumps(said, indent=1).encode())

    @classmethod
    def load(cls, path: Path, origin: str) -> "Known | None":
        """What is known of the log `origin`; None: nothing is there yet. Blocks.

        Raises:
            KnownInvalid: something else is there.
        """
        try:
            said = json.loads(path.read_bytes())
            edge = Frontier(said["proved"], [bytes.fromhex(peak) for peak in said["peaks"]])
            leaves = tuple(bytes.fromhex(leaf) for leaf in said["leaves"])
            batches = {
                series: Taken(int(each["number"]), str(each["digest"])) for series, each in said["batches"].items()
            }
            found = cls(str(said["origin"]), edge, int(said["first"]), leaves, batches)
            known = said["format"] == _FORMAT and all(len(leaf) == HASH_BYTES for leaf in leaves)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _invalid(path, error.strerror or type(error).__name__) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _invalid(path, "it is not in the form that verify-export writes") from None
        if not known or not 0 <= found.first <= edge.size <= found.end:
            raise _invalid(path, "it is not in the form that verify-export writes")
        if found.origin != origin:
            raise _invalid(path, f"it is of {found.origin[:100]!r}, and the key of {origin!r}")
        return found


def _invalid(path: Path, cause: str) -> KnownInvalid:
    return KnownInvalid(
        "what is known of the log cannot be gone on from",
        cause=f"{path}: {cause}",
        remedy="Put the file back from a copy; or begin anew with another, and check from the log's beginning",
    )
