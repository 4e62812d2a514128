"""Asks witnesses over the network to co-sign each new checkpoint: a process of its own, beside the gateway.

    python -m appliance.audit.asking LOG

Standard input brings one line of JSON, whom to ask, and ends with the gateway; standard output says what came of it, a
line of JSON for each time (`Told`).

Rules:

- It has no key, of a tenant's, of the system's or of the log's, and only reads the log's files: whatever a witness
  answers, nothing is signed, appended or kept here. The gateway keeps what it has verified itself (`witnesses`).
- The newest checkpoint is asked for, once; one request at a time for each witness. What fails is asked again after a
  pause that doubles up to a minute, and is never twice the same (jitter).
- Every step has a deadline, every answer a bound. TLS is verified against the CA that is given, and no other.
- A witness that saw more than this log has, or to whom this log cannot show that it goes on from what it saw, refuses:
  that is told as what it is, and asked again with the next checkpoint. What a power failure leaves is neither: a
  checkpoint that was seen and is not on the disk, while the entries are; hash tiles that are not whole.

Source: https://c2sp.org/tlog-witness, "add-checkpoint".
"""

import asyncio
import contextlib
import enum
import json
import logging
import os
import random
import sys
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

from appliance.audit.files import read_file
from appliance.audit.log import CHECKPOINT
from appliance.audit.notes import (
    MAX_NOTE_BYTES,
    Checkpoint,
    NoteInvalid,
    VerifierKey,
    decode_note,
    parse_number,
    size_of_note,
)
from appliance.audit.reading import LogReader, LogUnreadable, hashes_of, unreadable
from appliance.audit.tree import ProofInvalid, root_of, verify_consistency
from appliance.audit.witness import MAX_REPLY_BYTES, read_request, verify_reply
from appliance.audit.witnessing import request_for
from appliance.errors import ErrorRecord, Fault, HoldfastError
from appliance.vault.process import forbid_core_dumps

MAX_TOLD_BYTES: Final = 1 << 20
HEARTBEAT_S: Final = 10.0
_PATH: Final = "/add-checkpoint"
_PORT: Final = 443
_DEADLINE_S: Final = 20.0  # of one request, from looking for the witness to the last byte of its answer
_ROUND_S: Final = 120.0  # of everything that one checkpoint is asked for, reading the log's files with it
_MOST_REQUESTS: Final = 4
_LOOK_EVERY_S: Final = 0.5
_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_MOST_WORDS: Final = 200  # of what a witness says
_NICE: Final = 10
_LOG = logging.getLogger("holdfast.audit.witness")


class WitnessUnreachable(HoldfastError, ConnectionError):
    """A witness does not answer, or not as a witness does."""

    code: ClassVar[str] = "witness_unreachable"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class WitnessKnowsNot(HoldfastError):
    """A witness is not one of this log."""

    code: ClassVar[str] = "witness_does_not_know_log"
    fault: ClassVar[Fault] = Fault.CONFLICT


@dataclass(frozen=True, slots=True)
class WitnessAt:
    """A witness and where it is asked.

    Attributes:
        name: what it is called here.
        url: tlog-witness's submission prefix, https.
        vkey: its public key.
        ca: a file with the certificates that its may be from, PEM.
        certificate, private_key: ours, PEM files; None: we show none.
        server_name: what its certificate must be for; empty: the host of the url.
    """

    name: str
    url: str
    vkey: str
    ca: str
    certificate: str | None = None
    private_key: str | None = None
    server_name: str = ""

    @property
    def key(self) -> VerifierKey:
        """Its public key. Raises KeyInvalid."""
        return VerifierKey.parse(self.vkey)


class Outcome(enum.StrEnum):
    """What came of asking."""

    COSIGNED = "cosigned"
    SHORTER = "shorter"  # than what the witness saw: cut off, or restored from an old copy
    FORKED = "forked"  # another history than the one that the witness saw
    FAILED = "failed"

    @property
    def refused(self) -> bool:
        """Whether the witness says that this log is not the one that it saw."""
        return self in (Outcome.SHORTER, Outcome.FORKED)


@dataclass(frozen=True, slots=True)
class Told:
    """What came of asking a witness once.

    Attributes:
        name: the witness's.
        size: how many entries the checkpoint names.
        witness_size: how many the witness says that it saw, where it said so.
        request, reply: what is to be kept, where it co-signed.
        error: why it came to nothing.
    """

    name: str
    outcome: Outcome
    size: int = 0
    witness_size: int | None = None
    request: str = ""
    reply: str = ""
    error: ErrorRecord | None = None

    def line(self) -> bytes:
        """For the gateway."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Told":
        """What `line` says. Raises TypeError, ValueError."""
        return cls(**{**record, "outcome": Outcome(record["outcome"])})


class Answer(NamedTuple):
    """What a witness answered; nothing of it is believed."""

    status: int
    body: bytes

    def words(self) -> str:
        """For people: printable ASCII, cut."""
        said = self.body[: 2 * _MOST_WORDS].decode("ascii", "replace")
        seen = "".join(each if " " <= each <= "~" else " " for each in said).strip()[:_MOST_WORDS]
        return f"it answered {self.status}: {seen}" if seen else f"it answered {self.status}"


Post = Callable[[bytes], Awaitable[Answer]]
Sleep = Callable[[float], Awaitable[None]]


class Asker:
    """Asks one witness.

    Args:
        log: the log's folder.
        seen: the size that this witness co-signed last, as far as is known.
        post: sends a request; raises WitnessUnreachable.
        tell: is told what came of it.
        jitter: from 0 to 1, another one each time.
    """

    def __init__(
        self,
        at: WitnessAt,
        log: Path,
        *,
        seen: int,
        post: Post,
        tell: Callable[[Told], None],
        sleep: Sleep = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
        round_s: float = _ROUND_S,
    ) -> None:
        self._name = at.name
        self._key = at.key
        self._log = log
        self._seen = seen
        self._post = post
        self._tell = tell
        self._sleep = sleep
        self._jitter = jitter
        self._round_s = round_s

    async def run(self) -> None:
        """Ask for each new checkpoint, until cancelled; for the one that is there, too: it may be an old copy's."""
        asked, pause_s = "", 0.0
        while True:
            told, note = await self.ask(unless=asked)
            if told is None:
                await self._sleep(_LOOK_EVERY_S)
                continue
            self._tell(told)
            if told.outcome is Outcome.FAILED:
                pause_s = min(max(_PAUSE_S, 2 * pause_s), _LONGEST_PAUSE_S)
                await self._sleep(pause_s * (1 + self._jitter()) / 2)
            else:
                asked, pause_s = note, 0.0

    async def ask(self, *, unless: str = "") -> tuple[Told | None, str]:
        """Ask for the newest checkpoint once, and its note; None: there is none, or it is `unless`."""
        size = 0
        try:
            async with asyncio.timeout(self._round_s):
                note = await asyncio.to_thread(newest_note, self._log)
                if note in ("", unless):
                    return None, note
                size = size_of_note(note)
                return await self._ask(note)
        except TimeoutError:
            error: HoldfastError = _unreachable(f"it was not done within {self._round_s:g} s")
        except HoldfastError as raised:
            error = raised
        except (
            Exception
        ) as raised:  # a defect, perhaps of a library that reads answers: the others are asked all the same
            _LOG.exception("%s cannot be asked", self._name)
            error = _unreachable(f"{type(raised).__name__}: {raised}"[:_MOST_WORDS])
        return Told(self._name, Outcome.FAILED, size, error=error.record()), ""

    async def _ask(self, note: str) -> tuple[Told, str]:
        size = size_of_note(note)
        old_size = self._seen if self._seen <= size else 0
        for _ in range(_MOST_REQUESTS):
            request = await asyncio.to_thread(_sound_request, self._log, note, old_size)
            answer = await self._post(request)
            if answer.status == 200:
                verify_reply(answer.body, note, self._key)
                forgot = None if old_size >= self._seen else old_size
                self._seen = size
                reply = answer.body.decode()
                return Told(self._name, Outcome.COSIGNED, size, forgot, request.decode(), reply), note
            if answer.status == 422 and old_size:
                return Told(self._name, Outcome.FORKED, size, old_size), note
            if answer.status != 409:
                raise _refused(answer)
            witness_size = _size_in(answer, otherwise=old_size)
            if witness_size == old_size == size:
                return Told(self._name, Outcome.FORKED, size, witness_size), note
            if witness_size == old_size:
                raise _refused(answer)
            if witness_size > size:
                # It may have been asked otherwise meanwhile, by what somebody carried: for a newer checkpoint.
                note = await asyncio.to_thread(newest_note, self._log)
                size = size_of_note(note)
                if witness_size > size:
                    await asyncio.to_thread(_must_be_missing, self._log, witness_size)
                    return Told(self._name, Outcome.SHORTER, size, witness_size), note
            old_size = witness_size
        raise _unreachable("it names another size each time that it is asked")


def newest_note(log: Path) -> str:
    """The newest checkpoint of the log in a folder, with its signature; empty: there is none. Blocks.

    Raises:
        LogUnreadable, NoteInvalid: it cannot be read.
    """
    path = log / CHECKPOINT
    try:
        return decode_note(read_file(path, most=MAX_NOTE_BYTES))
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise unreadable(path, error) from None


def _must_be_missing(log: Path, size: int) -> None:
    """Raise where the log has `size` entries, no checkpoint for them yet: the next one shows whose they are. Blocks."""
    found = LogReader(log).size
    if found >= size:
        raise _unreachable(f"it saw {size} entries, of which this log has {found} and no checkpoint for them yet")


def _sound_request(log: Path, note: str, old_size: int) -> bytes:
    """`request_for`, with a proof that holds for this log's own checkpoint: no witness is shown another. Blocks.

    Raises:
        LogUnreadable, TileInvalid: the log's tiles cannot be read, or do not give its checkpoint.
    """
    request = request_for(log, note, old_size)
    checkpoint = Checkpoint.parse(note.rpartition("\n\n")[0] + "\n")
    old_root = root_of(hashes_of(log, checkpoint.size), old_size)
    try:
        verify_consistency(old_size, old_root, checkpoint.size, checkpoint.root, read_request(request).proof)
    except ProofInvalid as error:
        raise LogUnreadable(
            "the log cannot be shown to a witness",
            cause=f"its hash tiles do not give its own checkpoint of {checkpoint.size} entries: {error.cause}",
            remedy="`holdfast audit verify` names what is wrong with it",
        ) from None
    return request


def poster(at: WitnessAt, *, deadline_s: float = _DEADLINE_S) -> Post:
    """What sends a request to a witness over TLS."""
    # A gateway imports this module, and speaks to no witness.
    from appliance.audit.siem.https import open_client
    from appliance.audit.siem.syslog import Receiver
    from appliance.audit.siem.transport import ExportUnreachable, ExportUnusable

    url = urllib.parse.urlsplit(at.url)
    assert url.hostname is not None  # noqa: S101  (the settings saw to it)
    receiver = Receiver(
        host=url.hostname,
        port=url.port or _PORT,
        server_name=at.server_name or url.hostname,
        ca=Path(at.ca),
        certificate=None if at.certificate is None else Path(at.certificate),
        private_key=None if at.private_key is None else Path(at.private_key),
    )
    path = url.path.rstrip("/") + _PATH

    async def post(request: bytes) -> Answer:
        try:
            client = await open_client(receiver, {"Accept": "*/*"}, deadline_s=deadline_s)
            try:
                answered = await client.ask("POST", path, body=request, kind="text/plain; charset=utf-8")
            finally:
                await client.close()
        except (ExportUnreachable, ExportUnusable) as error:
            raise _unreachable(error.cause) from None
        if len(answered.body) > MAX_REPLY_BYTES:
            raise _unreachable(f"its answer has more than {MAX_REPLY_BYTES} bytes")
        return Answer(answered.status, answered.body)

    return post


def _size_in(answer: Answer, *, otherwise: int) -> int:
    """The size that a witness saw; where it says none, the tree is another one of the size that it was asked from."""
    if not answer.body:
        return otherwise
    try:
        return parse_number(answer.body.decode("ascii").removesuffix("\n"), "the witness's size")
    except (NoteInvalid, UnicodeDecodeError):
        raise _refused(answer) from None


def _refused(answer: Answer) -> HoldfastError:
    if answer.status in (403, 404):
        return WitnessKnowsNot(
            "the witness co-signs nothing of this log",
            cause=answer.words(),
            remedy="Give it this log's key, which `holdfast audit status` shows: `holdfast audit witness serve --key`",
        )
    return _unreachable(answer.words())


def _unreachable(cause: str) -> WitnessUnreachable:
    return WitnessUnreachable(
        "the witness does not co-sign",
        cause=cause,
        remedy="It is asked again by itself. See that it runs and both certificates hold; until it co-signs, "
        "`holdfast audit witness export` has a checkpoint carried to it",
    )


# The process


async def _run(log: Path) -> None:
    loop = asyncio.get_running_loop()
    gateway = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(gateway), sys.stdin)
    asked: Sequence[Mapping[str, Any]] = json.loads(await gateway.readline())
    askers = []
    for each in asked:
        at = WitnessAt(**each["at"])
        askers.append(Asker(at, log, seen=each["seen"], post=poster(at), tell=lambda told: _say(told.line())))
    running = [asyncio.create_task(each.run()) for each in askers]
    alive = asyncio.create_task(_say_that_it_lives())
    ended = asyncio.create_task(gateway.read())
    # A task that ends has a defect, and ends the process with its trace: it is started again.
    await asyncio.wait([ended, alive, *running], return_when=asyncio.FIRST_COMPLETED)
    for task in (alive, *running):
        if task.done():
            task.result()
        task.cancel()


async def _say_that_it_lives() -> None:
    while True:
        _say(b"\n")
        await asyncio.sleep(HEARTBEAT_S)


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def main() -> int:
    """Ask whom standard input names, until it ends."""
    forbid_core_dumps()
    os.umask(0o077)
    os.setpgid(0, 0)  # a terminal's signals are the gateway's
    os.nice(_NICE)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    with contextlib.suppress(BrokenPipeError):
        asyncio.run(_run(Path(sys.argv[1])))
    # Whatever waits in a thread for a disk that does not answer waits alone.
    os._exit(0)


if __name__ == "__main__":
    main()
