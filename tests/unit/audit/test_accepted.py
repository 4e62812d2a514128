"""Whom a node accepted as a witness is remembered sealed, and who takes that away or puts it back is found."""

import asyncio
import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest

from appliance.audit import accepted, marks, witnessing
from appliance.audit.accepted import ACCEPTED, AcceptedWitnesses, WitnessesTampered
from appliance.audit.entry import seal
from appliance.audit.events import AUDIT_WITNESSED, STORE_MARKED, SYSTEM, EventClass
from appliance.audit.events import Event as AuditEvent
from appliance.audit.files import write_whole
from appliance.audit.log import PUBLIC_KEY, WITNESSED, AuditLog
from appliance.audit.node import NodeAudit
from appliance.audit.notes import Algorithm, SigningKey
from appliance.audit.verify import verify_log
from appliance.audit.witness import Witness
from appliance.audit.witnessing import make_request
from appliance.vault import RootKey, Vault, VaultSealed
from tests.unit.audit.making import KEY, draft, open_log, sign
from tests.unit.vault.keystore import MemoryKeys

ONE, TWO = (SigningKey(f"{name}.example", name.encode().ljust(32), Algorithm.COSIGNATURE) for name in ("one", "two"))
ROOT = b"r" * 32


def opened_vault() -> Vault:
    keys = MemoryKeys()
    vault = Vault(keys)
    vault.open(RootKey(ROOT))
    keys.add(vault.new_system_keys())
    return vault


class Node:
    """A log, and the witnesses that were accepted for it; `start` begins anew with what is on the disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / ACCEPTED
        self.vault = opened_vault()
        self._events = 0
        self.log: AuditLog = open_log(directory)
        self.witnesses = self.start()

    def start(self) -> AcceptedWitnesses:
        self.witnesses = AcceptedWitnesses(self.directory, self.vault)
        return self.witnesses

    def tell(self, kind: EventClass, version: int | None, *, plain: bool = False) -> None:
        """Append a mark, or that a witness co-signed."""
        self._events += 1
        counts = {"mark": self._events} if kind is STORE_MARKED else {}
        counts |= {} if version is None else {"witnesses": version}
        sealed = seal(
            kind.number,
            AuditEvent(kind, SYSTEM, counts=counts).record({"holdfast": "0"}),
            keys=None if plain else self.vault,
            scope="system",
            actor="",
            session="",
            random=hashlib.sha256(b"event %d" % self._events).digest(),
        )
        self.log.append([sealed])


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "audit")


def test_who_was_accepted_is_known_after_a_start_with_what_each_co_signed_last(node: Node) -> None:
    assert (node.witnesses.version, node.witnesses.accepted(), node.witnesses.version) == (None, {}, 0)
    for witness, size, version in ((ONE, 300, 1), (TWO, 400, 2), (ONE, 500, 3), (ONE, 400, 3)):
        assert node.witnesses.accept(witness.verifier(), size) == ""
        assert node.witnesses.version == version
    for witnesses in (node.witnesses, node.start()):
        assert witnesses.accepted() == {ONE.verifier(): 500, TWO.verifier(): 400}
    assert ONE.name.encode() not in node.file.read_bytes()


def test_every_flipped_byte_of_what_is_remembered_is_found(node: Node) -> None:
    node.witnesses.accept(ONE.verifier(), 300)
    content = node.file.read_bytes()
    for at in range(len(content)):
        node.file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(WitnessesTampered) as found:
            node.witnesses.accepted()
        assert str(node.file) in found.value.cause


@pytest.mark.parametrize("told", [STORE_MARKED, AUDIT_WITNESSED])
@pytest.mark.parametrize("what", ["taken away", "put back"])
def test_what_was_taken_away_or_put_back_to_an_older_copy_is_found_by_the_logs_word(
    node: Node, told: EventClass, what: str
) -> None:
    node.witnesses.accept(ONE.verifier(), 300)
    older = node.file.read_bytes()
    node.witnesses.accept(TWO.verifier(), 300)
    node.tell(told, node.witnesses.version)
    node.log.append([draft(number) for number in range(20)])
    newest = node.file.read_bytes()
    if what == "taken away":
        node.file.unlink()
    else:
        node.file.write_bytes(older)
    for witnesses in (node.witnesses, node.start()):
        with pytest.raises(WitnessesTampered, match="it is not known which witnesses"):
            witnesses.accepted()
        assert witnesses.version == 2, "a mark that is made now says so still"
    with pytest.raises(WitnessesTampered):
        node.witnesses.accept(ONE.verifier(), 400)
    node.file.write_bytes(newest)
    assert len(node.witnesses.accepted()) == 2


def test_what_is_in_plaintext_can_be_made_by_anybody_and_says_nothing(node: Node) -> None:
    node.witnesses.accept(ONE.verifier(), 300)
    node.tell(STORE_MARKED, 1)
    node.tell(STORE_MARKED, 0, plain=True)
    node.file.unlink()
    with pytest.raises(WitnessesTampered):
        node.start().accepted()


def test_an_administrator_begins_it_anew_and_is_told_why(node: Node) -> None:
    node.witnesses.accept(ONE.verifier(), 300)
    node.tell(STORE_MARKED, 1)
    node.file.unlink()
    witnesses = node.start()
    assert f"{node.file} is gone" in witnesses.accept(TWO.verifier(), 300, anew=True)
    assert (witnesses.version, witnesses.accepted()) == (2, {TWO.verifier(): 300})
    assert witnesses.accept(TWO.verifier(), 300, anew=True) == ""
    assert node.start().accepted() == {TWO.verifier(): 300}


def test_a_run_that_was_killed_before_it_told_is_no_tampering(node: Node) -> None:
    node.witnesses.accept(ONE.verifier(), 300)
    node.tell(STORE_MARKED, 1)
    node.witnesses.accept(TWO.verifier(), 300)
    assert len(node.start().accepted()) == 2
    assert node.witnesses.version == 2


def test_where_nothing_within_reach_tells_it_is_not_known(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.witnesses.accept(ONE.verifier(), 300)
    node.tell(STORE_MARKED, 1)
    node.log.append([draft(number) for number in range(50)])
    monkeypatch.setattr(marks, "MOST_LOOKED_AT", 50)
    with pytest.raises(WitnessesTampered, match="not known which"):
        node.start().accepted()
    monkeypatch.setattr(marks, "MOST_LOOKED_AT", 51)
    assert len(node.start().accepted()) == 1
    monkeypatch.setattr(marks, "MOST_LOOKED_AT", 50)
    node.witnesses.accept(ONE.verifier(), 301)
    assert node.witnesses.version == 2
    before = node.file.read_bytes()
    node.start().accept(TWO.verifier(), 300, anew=True)
    assert node.witnesses.version == 3, "what is there is older than what is begun, whatever the log can tell"
    node.file.write_bytes(before)
    with pytest.raises(WitnessesTampered):
        node.witnesses.accepted()


def test_while_the_vault_is_sealed_what_was_known_before_holds_and_nobody_is_accepted(node: Node) -> None:
    node.witnesses.accept(ONE.verifier(), 300)
    fresh = AcceptedWitnesses(node.directory, node.vault)
    node.vault.seal()
    assert node.witnesses.accepted() == {ONE.verifier(): 300}
    with pytest.raises(VaultSealed):
        node.witnesses.accept(TWO.verifier(), 300)
    with pytest.raises(VaultSealed):
        fresh.accepted()


def published(place: Path) -> tuple[Path, AuditLog]:
    """A log of 30 entries under a checkpoint, and its folder."""
    directory = place / "audit"
    log = open_log(directory)
    log.append([draft(number) for number in range(30)])
    log.publish(sign)
    (directory / PUBLIC_KEY).write_text(f"{KEY.verifier()}\n")
    return directory, log


def test_a_reply_is_kept_with_who_gave_it_or_not_at_all(tmp_path: Path) -> None:
    directory, log = published(tmp_path)
    vault = opened_vault()
    audit = NodeAudit(tmp_path, vault, versions={})
    request = make_request(directory, old_size=0)
    kept = directory / WITNESSED / "30"
    asked, numbers = kept.read_text(), itertools.count()

    def keep(witness: SigningKey, **named: Any) -> Any:
        state = tmp_path / f"{witness.name}.{next(numbers)}"
        reply = Witness(state, witness).cosign(request, KEY.verifier(), 1_700_000_000)
        return asyncio.run(audit.keep_cosignature(request, reply, witness.verifier(), **named))

    seen, counts, details = keep(ONE)
    assert (seen.size, counts, details) == (30, {"witnesses": 2}, {"size": "30"})
    assert asyncio.run(audit.accepted_witnesses()) == {ONE.verifier(): 30}
    (directory / ACCEPTED).write_bytes(b"something else")
    as_it_was = kept.read_text()
    with pytest.raises(WitnessesTampered):
        keep(TWO)
    assert kept.read_text() == as_it_was != asked
    _, counts, details = keep(TWO, anew=True)
    assert (counts, "was changed" in details["begun_anew"]) == ({"witnesses": 3}, True)
    vault.seal()
    with pytest.raises(VaultSealed):
        keep(SigningKey("three.example", b"3" * 32, Algorithm.COSIGNATURE), anew=True)
    assert "three" not in kept.read_text()
    log.close()


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("before", [True, False])
def test_wherever_a_run_ends_while_a_new_witness_is_taken_its_line_is_no_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, before: bool
) -> None:
    directory, log = published(tmp_path)
    vault = opened_vault()
    request = make_request(directory, old_size=0)
    reply = Witness(tmp_path / "state", ONE).cosign(request, KEY.verifier(), 1_700_000_000)
    steps = itertools.count(1)

    class Ended(BaseException):
        """The process is gone."""

    def ending(write: Any) -> Any:
        def ends(*given: Any) -> None:
            ends_now = next(steps) == step
            if ends_now and before:
                raise Ended
            write(*given)
            if ends_now:
                raise Ended

        return ends

    with monkeypatch.context() as ends:
        ends.setattr(accepted, "write_whole", ending(write_whole))
        ends.setattr(witnessing, "_keep", ending(witnessing._keep))
        with pytest.raises(Ended):
            NodeAudit(tmp_path, vault, versions={})._keep_cosignature(request, reply, ONE.verifier(), False)
    known = AcceptedWitnesses(directory, vault).accepted()
    assert known == ({} if step == 1 and before else {ONE.verifier(): 30 if step == 3 and not before else 0})
    assert verify_log(directory, KEY.verifier(), witnesses=list(known), saw=known).size == 30
    assert next(steps) == step + 1
    log.close()
