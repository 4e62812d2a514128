"""What the gateway and the engine say to each other about the keys of tiers, over a socket that the engine inherits.

Rules:

- Standard library only: the gateway's environment, the engine's and the cage import this module.
- The socket is one of a pair: it has no name that anybody could connect to. A key travels over it and nowhere else; a
  descriptor's number stands in the engine's environment, and that is no secret.
- The gateway gives a key to who the kernel says is a process of the engine's, and of this user (unix(7), SO_PASSCRED).
- One packet a question, one an answer, which repeats what was asked. Without an answer there is no key.
- Sealing is the last word: no answer that was under way follows it, and who cannot be told loses the channel.
"""

import asyncio
import multiprocessing
import os
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from multiprocessing import util
from typing import Any, Final, NamedTuple

KEY_SOCKET: Final = "HOLDFAST_KEY_SOCKET"
"""Names the descriptor of the engine's end, in the engine's environment."""
KEY_BYTES: Final = 32

_KEY, _NONE, _GONE, _SEALED = b"K", b"N", b"G", b"S"
_LABELS = re.compile(rb"([A-Za-z0-9_.-]{1,64})~([A-Za-z0-9_.-]{1,64})")
_MOST_BYTES: Final = 1024
_CREDENTIALS = struct.Struct("iII")  # struct ucred: process, user, group
_MAX_OPEN_QUESTIONS: Final = 256


class Answer(NamedTuple):
    """What the gateway said of one session. No key and not `gone`: there is none now."""

    tenant: str
    session: str
    key: bytes | None
    gone: bool


class SessionGone(Exception):
    """There is no such session, and never will be: what tiers hold of it is of no use."""


# The engine's end


def question(tenant: str, session: str) -> bytes:
    """What the engine sends."""
    return f"{tenant}~{session}".encode()


def read_answer(packet: bytes) -> Answer | None:
    """What the engine received; `None`: the vault was sealed, and every key is to be forgotten.

    Raises:
        ValueError: it is nothing that the gateway says.
    """
    if packet == _SEALED:
        return None
    kind, rest = packet[:1], packet[1:]
    key, labels = (rest[:KEY_BYTES], rest[KEY_BYTES:]) if kind == _KEY else (None, rest)
    matched = _LABELS.fullmatch(labels)
    if kind not in (_KEY, _NONE, _GONE) or matched is None:
        raise ValueError("the gateway said what is no answer")
    return Answer(matched[1].decode(), matched[2].decode(), key, kind == _GONE)


def inherited_socket(environment: Mapping[str, str]) -> socket.socket | None:
    """The engine's end, in a process that inherited it."""
    named = environment.get(KEY_SOCKET, "")
    if not named.isdecimal():
        return None
    try:
        inherited = socket.socket(fileno=int(named))
    except OSError:
        return None
    if (inherited.family, inherited.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        inherited.detach()  # another's descriptor
        return None
    return inherited


def hand_down(environment: Mapping[str, str]) -> None:
    """Have the processes that this one spawns inherit the engine's end, too.

    vLLM starts its core by `spawn`, which closes every descriptor that it was not told of, and has no way to be told.
    """
    named = environment.get(KEY_SOCKET, "")
    if not named.isdecimal() or multiprocessing.parent_process() is not None:
        return
    spawn = util.spawnv_passfds

    def spawn_with_socket(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
        if "--multiprocessing-fork" in args:  # not the tracker of resources
            passfds = [*passfds, int(named)]
        return spawn(path, args, passfds)

    util.spawnv_passfds = spawn_with_socket


# The gateway's end


class KeyChannel:
    """Answers one engine after another.

    Args:
        key_of: the key of a session's tiers, by the labels of its tenant and its own. `SessionGone` says that there
            will never be one; whatever else it raises, that there is none now.
    """

    def __init__(self, key_of: Callable[[str, str], Awaitable[bytes]]) -> None:
        self._key_of = key_of
        self._owns: Callable[[int], bool] = lambda _: False
        self._socket: socket.socket | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self.refused_total = 0

    def open(self, owns: Callable[[int], bool]) -> socket.socket:
        """A new pair; the engine's end, for the caller to pass on and close.

        Args:
            owns: whether a process is the engine's.
        """
        self.close()
        self._owns = owns
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours, self._receive, ours)
        return theirs

    def close(self) -> None:
        """Answer nobody any more."""
        self._answer_no_more()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def sealed(self) -> None:
        """Have the engine forget every key, and answer nothing that it asked before.

        An engine that cannot be told forgets them with the channel, and gets no key until it is started again.
        """
        self._answer_no_more()
        if self._socket is not None and not self._send(self._socket, _SEALED):
            self.close()

    def _answer_no_more(self) -> None:
        for task in self._answering:
            task.cancel()

    def _receive(self, ours: socket.socket) -> None:
        try:
            packet, ancillary, _, _ = ours.recvmsg(_MOST_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
        except BlockingIOError:
            return
        except OSError:
            packet, ancillary = b"", []
        if not packet:
            asyncio.get_running_loop().remove_reader(ours)  # the engine has ended
            return
        matched = _LABELS.fullmatch(packet)
        if matched is None or not self._is_the_engines(ancillary) or len(self._answering) >= _MAX_OPEN_QUESTIONS:
            self.refused_total += 1
            return
        task = asyncio.create_task(self._answer(ours, matched[1].decode(), matched[2].decode()))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    def _is_the_engines(self, ancillary: Sequence[tuple[int, int, bytes]]) -> bool:
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                process, user, _ = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])
                return user == os.geteuid() and self._owns(process)
        return False

    async def _answer(self, ours: socket.socket, tenant: str, session: str) -> None:
        asked = question(tenant, session)
        try:
            answer = _KEY + await self._key_of(tenant, session)
        except SessionGone:
            answer = _GONE
        except Exception:  # a sealed vault, a database that does not answer: there is no key now
            answer = _NONE
        self._send(ours, answer + asked)

    def _send(self, ours: socket.socket, packet: bytes) -> bool:
        try:
            ours.send(packet)
        except OSError:  # the engine has ended, or does not read: without an answer there is no key
            self.refused_total += 1
            return False
        return True
