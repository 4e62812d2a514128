"""The destinations of a node's log, in a file that nobody changes from outside without being noticed.

Rules:

- What is written carries a keyed hash under the system's AUDIT key. Nobody makes one without the vault: not the
  exporter either, which gets the secrets of entries and no others.
- What is read was written here, or `SavedTampered` is raised. While the vault is sealed nobody can tell: `VaultSealed`.
- Where cursors are and no file is, somebody took it away: that is no empty list.
- It has a version, which grows with each change: the log knows which one has to be there (`audit.marks`). Here an older
  copy of the appliance's own reads as what it says.
"""

import hmac
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

from appliance.audit.entry import AuditKeys
from appliance.audit.files import write_whole
from appliance.audit.siem.destinations import Destination
from appliance.errors import Fault, HoldfastError
from appliance.vault import SYSTEM_SCOPE, KeyMissing

CURSOR_SUFFIX: Final = ".cursor"
_LABEL: Final = "siem-destinations"


class SavedTampered(HoldfastError, ValueError):
    """The file is not what this appliance wrote."""

    code: ClassVar[str] = "audit_exports_tampered"
    fault: ClassVar[Fault] = Fault.CONFLICT


class Saved(NamedTuple):
    """What was written: of version 0, nothing ever was."""

    version: int
    destinations: list[Destination]


def save(path: Path, destinations: Sequence[Destination], version: int, keys: AuditKeys) -> None:
    """Write them. Blocks.

    Raises:
        OSError: the file says what it said before.
        HoldfastError: the vault is sealed.
    """
    said = _said([each.record() for each in destinations], version)
    key_id = keys.audit_key_id(SYSTEM_SCOPE)
    tag = keys.audit_secret(key_id, _LABEL, said)
    sealed = {**json.loads(said), "key": key_id.hex(), "tag": tag.hex()}
    write_whole(path, json.dumps(sealed, indent=1).encode())


def load(path: Path, keys: AuditKeys) -> Saved:
    """What was written; nothing where nothing is. Blocks.

    Raises:
        SavedTampered: the file was changed, or taken away, outside of the appliance.
        DestinationInvalid: it holds what cannot be a destination in this version.
        OSError: it cannot be read.
        HoldfastError: the vault is sealed.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        left = sorted(path.parent.glob(f"*{CURSOR_SUFFIX}"))
        if left:
            raise _tampered(f"{path} is gone, and {left[0].name} tells that it was there") from None
        return Saved(0, [])
    try:
        sealed = json.loads(content)
        records, version = sealed["destinations"], sealed["version"]
        said, key_id, tag = _said(records, version), bytes.fromhex(sealed["key"]), bytes.fromhex(sealed["tag"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _tampered(f"{path} is not in the form that this appliance writes") from None
    try:
        expected = keys.audit_secret(key_id, _LABEL, said)
    except KeyMissing:
        raise _tampered(f"{path} is under a key that this appliance does not have") from None
    if not hmac.compare_digest(expected, tag):
        raise _tampered(f"{path} was changed outside of the appliance")
    return Saved(int(version), [Destination.read(each) for each in records])


def _said(records: object, version: object) -> bytes:
    return json.dumps({"destinations": records, "version": version}, sort_keys=True, separators=(",", ":")).encode()


def _tampered(cause: str) -> SavedTampered:
    return SavedTampered(
        "the destinations of the audit log are not those that were saved here",
        cause=cause,
        remedy="Put the file back from a copy, or move the folder away and add them again: `holdfast audit export add`",
    )
