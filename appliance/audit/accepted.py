"""The witnesses of this node's log that somebody accepted, sealed beside the log.

Rules:

- Whoever takes a co-signature says here whose it is, and of how many entries. The node's own check and its status hold
  the log to that, and to nobody else's word.
- It is sealed with a key of the vault's: whoever can write the log's folder makes no witness of this node's.
- It has a version, which grows with each acceptance. The event of that (`audit.witnessed`) and every mark
  (`audit.marks`) name it, so a file that was taken away, or put back to an older copy, is found. What they say counts
  only where it is sealed: an entry in plaintext can be made by whoever can write the folder.
- What is not believed is not gone on with by itself: an administrator who imports a reply begins it anew, and the event
  says so.
"""

import contextlib
import errno
import json
import threading
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

from appliance.audit.files import read_file, write_whole
from appliance.audit.log import unwritable
from appliance.audit.marks import WITNESSES, last_said
from appliance.audit.notes import KeyInvalid, VerifierKey
from appliance.audit.reading import LogReader, unreadable
from appliance.errors import Fault, HoldfastError
from appliance.vault import SYSTEM_SCOPE, Binding, KeyMissing, KeyPurpose, TamperedValue, Vault

ACCEPTED: Final = "witnesses"
_BINDING: Final = Binding("audit", "witnesses", "log", SYSTEM_SCOPE, 1)
_REMEDY: Final = (
    f"Put audit/{ACCEPTED} back from the newest copy; or take every carried witness's last reply again, which begins "
    "it anew: `holdfast audit witness import`; docs/audit.md, *Being witnessed*"
)


class WitnessesTampered(HoldfastError, ValueError):
    """It is not known which witnesses were accepted: what says so is not what this node wrote last."""

    code: ClassVar[str] = "audit_witnesses_tampered"
    fault: ClassVar[Fault] = Fault.CONFLICT


class _Saved(NamedTuple):
    """What was written; of version 0, nothing ever was. `saw`: the largest size that each co-signed."""

    version: int
    saw: dict[VerifierKey, int]


class AcceptedWitnesses:
    """Those of the log in `directory`. Everything here but `version` blocks."""

    def __init__(self, directory: Path, vault: Vault) -> None:
        self._directory = directory
        self._vault = vault
        self._is_learnt = False
        self._said: int | None = None  # the last version, by the log's word or of this run; None: nothing tells
        self._seen: _Saved | None = None  # what was believed last
        self._changing = threading.Lock()

    @property
    def version(self) -> int | None:
        """Of what was accepted last; None: it is not known yet."""
        return self._said

    def learn(self) -> None:
        """Find out what the log says of the last version, before a mark says another.

        Raises:
            LogUnreadable, EntryInvalid: the log's files do not do.
            HoldfastError: the vault is sealed.
        """
        with self._changing:
            if not self._is_learnt:
                self._said = last_said(LogReader(self._directory), self._vault, WITNESSES)
                self._is_learnt = True

    def accepted(self) -> dict[VerifierKey, int]:
        """Each witness, and the largest size that it co-signed. While the vault is sealed, what was known before.

        Raises:
            WitnessesTampered: it is not known.
            LogUnreadable: the file cannot be read.
            Otherwise as `learn`.
        """
        self.learn()
        with self._changing:
            if self._vault.sealed and self._seen is not None:
                return self._seen.saw
            return self._believed().saw

    def accept(self, witness: VerifierKey, size: int, *, anew: bool = False) -> str:
        """Say that a witness co-signed so many entries, as its checked reply shows; durable when this returns.

        Args:
            size: 0: its word is taken from now on, and the log is not held to any yet.
            anew: begin anew where what there is is not believed: for an administrator, who is asked each time.

        Returns:
            Why it was begun anew; empty: it was not.

        Raises:
            LogUnwritable: it cannot be kept.
            VaultSealed: the vault is sealed.
            Otherwise as `accepted`.
        """
        self.learn()
        with self._changing:
            begun_anew, saw = "", dict[VerifierKey, int]()
            try:
                saw = self._believed().saw
            except WitnessesTampered as error:
                if not anew:
                    raise
                begun_anew = error.cause
                with contextlib.suppress(HoldfastError):  # whatever is put back later is older
                    self._said = max(self._said or 0, self._load(self._directory / ACCEPTED).version)
            if saw.get(witness, -1) < size or begun_anew:
                version = (self._said or 0) + 1
                self._seen = self._save(_Saved(version, {**saw, witness: size}))
                self._said = version
            return begun_anew

    def _believed(self) -> _Saved:
        path = self._directory / ACCEPTED
        found = self._load(path)
        if self._said is None:
            raise _tampered(f"neither the log's newest entries nor a mark tells which version of {path} is the last")
        if found.version < self._said:
            there = f"{path} is of version {found.version}" if found.version else f"{path} is gone"
            raise _tampered(f"{there}, and version {self._said} was written last")
        self._said = found.version  # one that was killed before it could be told is newer than what is told
        self._seen = found
        return found

    def _load(self, path: Path) -> _Saved:
        try:
            opened = self._vault.decrypt(read_file(path), _BINDING)
            said = json.loads(opened)
            return _Saved(said["version"], {VerifierKey.parse(key): size for key, size in said["saw"].items()})
        except FileNotFoundError:
            return _Saved(0, {})
        except OSError as error:
            raise unreadable(path, error) from None
        except (TamperedValue, KeyMissing):
            raise _tampered(f"{path} was changed, or is another appliance's") from None
        except (ValueError, KeyError, TypeError, KeyInvalid):
            raise _tampered(f"{path} is not in the form that this version writes") from None

    def _save(self, now: _Saved) -> _Saved:
        path = self._directory / ACCEPTED
        said = {"version": now.version, "saw": {str(witness): size for witness, size in now.saw.items()}}
        sealed = self._vault.encrypt(SYSTEM_SCOPE, KeyPurpose.RECORDS, json.dumps(said).encode(), _BINDING)
        try:
            write_whole(path, sealed)
        except OSError as error:
            raise unwritable(path, error.errno or errno.EIO) from None
        return now


def _tampered(cause: str) -> WitnessesTampered:
    return WitnessesTampered("it is not known which witnesses the audit log has", cause=cause, remedy=_REMEDY)
