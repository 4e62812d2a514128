"""Opens records for who ships them, with the keys at hand."""

from collections.abc import Sequence

from appliance.audit.entry import Entry, EntryInvalid, EntryKeys, open_content
from appliance.audit.journal import Frame
from appliance.audit.siem.formats import Disclosed, Withheld
from appliance.vault import KeyMissing, VaultSealed


class KeyOpener:
    """Opens with keys that may be sealed or destroyed."""

    def __init__(self, keys: EntryKeys) -> None:
        self._keys = keys

    async def open(self, frames: Sequence[Frame]) -> list[Disclosed]:
        """See `Opener.open`."""
        opened = []
        for frame in frames:
            try:
                opened.append(disclosed(frame, self._keys))
            except VaultSealed:
                break
        return opened


def disclosed(frame: Frame, keys: EntryKeys) -> Disclosed:
    """An entry with its record, or with why that is withheld.

    Raises:
        VaultSealed: there are no keys now.
    """
    try:
        content, salt = open_content(Entry.unpack(frame.entry), frame.sealed, keys)
    except KeyMissing:
        return Disclosed.without(frame.entry, Withheld.SHREDDED)
    except EntryInvalid:
        return Disclosed.without(frame.entry, Withheld.DAMAGED)
    return Disclosed(frame.entry, content, salt)
