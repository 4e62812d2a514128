"""Asks the gateway for the keys of tiers.

Rules:

- Asking never waits: a question that the socket does not take at once was not asked.
- A thread of its own takes the answers. When the gateway is gone every key is forgotten.
"""

import socket
import threading

from appliance.engine.inside.disk.files import Owner
from appliance.engine.inside.disk.keys import TierKeys
from appliance.engine.tier_keys import question, read_answer

_MOST_BYTES = 1024


class KeyAsker:
    """The engine's end of the channel.

    Args:
        inherited: the socket; `None`: there is no gateway to ask, and no key.
    """

    def __init__(self, inherited: socket.socket | None) -> None:
        self._socket = inherited
        self.keys = TierKeys(self._ask)
        if inherited is not None:
            inherited.settimeout(None)
            threading.Thread(target=self._take_answers, args=(inherited,), name="holdfast-keys", daemon=True).start()

    def close(self) -> None:
        """Ask no more."""
        if self._socket is not None:
            self._socket.shutdown(socket.SHUT_RDWR)

    def _ask(self, owner: Owner) -> bool:
        if self._socket is None:
            return False
        try:
            self._socket.send(question(*owner), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def _take_answers(self, inherited: socket.socket) -> None:
        with inherited:
            while packet := _received(inherited):
                answer = read_answer(packet)
                if answer is None:
                    self.keys.drop_all()
                else:
                    self.keys.answered(Owner(answer.tenant, answer.session), answer.key, gone=answer.gone)
        self._socket = None
        self.keys.drop_all()


def _received(inherited: socket.socket) -> bytes:
    try:
        return inherited.recv(_MOST_BYTES)
    except OSError:
        return b""
