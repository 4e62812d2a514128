"""The keys of the sessions' tiers, as far as the gateway gave them.

Rules:

- A key is asked for when it is first wanted; who looks never waits. An answer that does not come in `ANSWER_S` counts
  as none.
- No key: the session's chunks are not there, neither read nor written. It is asked for again after `_AGAIN_S`, unless
  the gateway says that the session is gone for good: then what the disk holds of it goes.
- So many keys are kept, those used last; a session that is dropped takes its key along.
- Who only wants to know whether a session is still there gets no key: it is let go of when it comes.
- Safe to call from several threads.
"""

import enum
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from appliance.engine.inside.disk.cipher import AesGcm
from appliance.engine.inside.disk.files import Owner

ANSWER_S: Final = 2.0
MAX_KEYS: Final = 4096
_AGAIN_S: Final = 10.0


class NoKey(enum.Enum):
    """Why there is no key."""

    ASKED = "asked"  # an answer is due
    REFUSED = "refused"  # the vault is sealed, the gateway does not answer, or the session is gone


class _Slot:
    __slots__ = ("answered_at", "asked_at", "cipher")

    def __init__(self, asked_at: float) -> None:
        self.asked_at = asked_at
        self.answered_at: float | None = None
        self.cipher: AesGcm | None = None


class TierKeys:
    """The keys.

    Args:
        ask: sends the question to the gateway, whose answer comes to `answered`. It must not block; false: it could
            not be sent.
        on_gone: called when the gateway says that a session is gone for good, by the thread that has the answer.
        now: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        ask: Callable[[Owner], bool],
        *,
        on_gone: Callable[[Owner], None] = lambda _: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._now = now
        self._slots: OrderedDict[Owner, _Slot] = OrderedDict()
        self._in_question: dict[Owner, bool | None] = {}  # whether it is known what became of it; None: not answered
        self._changed = threading.Condition()
        self.on_gone = on_gone

    def __len__(self) -> int:
        """How many keys are held."""
        with self._changed:
            return sum(slot.cipher is not None for slot in self._slots.values())

    def owners(self) -> list[Owner]:
        """Whose keys are held, or asked for."""
        with self._changed:
            return list(self._slots)

    def look(self, owner: Owner) -> AesGcm | NoKey:
        """A session's cipher, if its key is here; else it is asked for."""
        now = self._now()
        with self._changed:
            slot = self._slots.get(owner)
            if slot is not None:
                self._slots.move_to_end(owner)
                if slot.cipher is not None:
                    return slot.cipher
                if slot.answered_at is None and now - slot.asked_at >= ANSWER_S:
                    slot.answered_at = now
                if slot.answered_at is None:
                    return NoKey.ASKED
                if now - slot.answered_at < _AGAIN_S:
                    return NoKey.REFUSED
            self._slots[owner] = slot = _Slot(now)
            if len(self._slots) > MAX_KEYS:
                self._slots.popitem(last=False)
            if not self._ask(owner):
                slot.answered_at = now
                return NoKey.REFUSED
            return NoKey.ASKED

    def wait(self, owner: Owner) -> AesGcm | None:
        """A session's cipher, waited for as long as an answer may take. Blocks."""
        deadline = time.monotonic() + ANSWER_S
        while True:
            found = self.look(owner)
            if isinstance(found, AesGcm):
                return found
            left = deadline - time.monotonic()
            if found is NoKey.REFUSED or left <= 0:
                return None
            with self._changed:
                slot = self._slots.get(owner)
                if slot is not None and slot.cipher is None and slot.answered_at is None:
                    self._changed.wait(min(left, ANSWER_S))

    def not_known(self, owners: Sequence[Owner]) -> list[Owner]:
        """Ask what became of sessions: who is gone for good goes by `on_gone`. Blocks for as long as an answer may.

        Returns:
            Those of whom there was no answer, or none now.
        """
        with self._changed:
            self._in_question = dict.fromkeys(owners)
            for owner in owners:
                if not self._ask(owner):
                    self._in_question[owner] = False
            self._changed.wait_for(lambda: None not in self._in_question.values(), ANSWER_S)
            asked, self._in_question = self._in_question, {}
            return [owner for owner, is_known in asked.items() if not is_known]

    def answered(self, owner: Owner, key: bytes | None, *, gone: bool = False) -> None:
        """Take the gateway's answer; `None`: there is no key now, and never will be if the session is `gone`."""
        if gone:
            self.on_gone(owner)  # before anybody hears that there is no key
        with self._changed:
            if owner in self._in_question:
                self._in_question[owner] = gone or key is not None
            slot = self._slots.get(owner)
            if slot is not None:
                slot.answered_at = self._now()
                slot.cipher = None if key is None else AesGcm(key)
            self._changed.notify_all()

    def drop(self, owner: Owner) -> None:
        """Forget a session's key."""
        with self._changed:
            self._slots.pop(owner, None)
            self._changed.notify_all()

    def drop_all(self) -> None:
        """Forget every key: the vault was sealed, or the gateway is gone."""
        with self._changed:
            self._slots.clear()
            self._in_question = dict.fromkeys(self._in_question, False)
            self._changed.notify_all()
