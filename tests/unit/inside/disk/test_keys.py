"""The tier's keys: asked for once, never waited for by who looks, and forgotten when they should be."""

import threading

from appliance.engine.inside.disk import keys as module
from appliance.engine.inside.disk.cipher import AesGcm
from appliance.engine.inside.disk.files import Owner
from appliance.engine.inside.disk.keys import NoKey, TierKeys

ANA = Owner("acme", "ana")


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _keys(clock: _Clock, *, sent: bool = True) -> tuple[TierKeys, list[Owner]]:
    asked: list[Owner] = []

    def ask(owner: Owner) -> bool:
        asked.append(owner)
        return sent

    return TierKeys(ask, now=clock), asked


def test_a_key_is_asked_for_once_and_is_there_when_it_was_answered() -> None:
    keys, asked = _keys(_Clock())
    assert keys.look(ANA) is NoKey.ASKED
    assert keys.look(ANA) is NoKey.ASKED
    keys.answered(ANA, bytes(32))
    assert isinstance(keys.look(ANA), AesGcm)
    assert asked == [ANA]


def test_a_question_that_is_not_answered_counts_as_refused_and_is_asked_again_later() -> None:
    clock = _Clock()
    keys, asked = _keys(clock)
    keys.look(ANA)
    clock.now = module.ANSWER_S
    assert keys.look(ANA) is NoKey.REFUSED
    assert asked == [ANA]
    clock.now = 60.0
    assert keys.look(ANA) is NoKey.ASKED
    assert asked == [ANA, ANA]


def test_without_a_gateway_nothing_is_waited_for() -> None:
    keys, _ = _keys(_Clock(), sent=False)
    assert keys.look(ANA) is NoKey.REFUSED
    assert keys.wait(ANA) is None


def test_a_thread_that_waits_is_told_at_once() -> None:
    keys, _ = _keys(_Clock())
    found: list[AesGcm | None] = []
    waiting = threading.Thread(target=lambda: found.append(keys.wait(ANA)))
    waiting.start()
    while keys.look(ANA) is NoKey.ASKED and not found:
        keys.answered(ANA, bytes(32))
    waiting.join(5)
    assert isinstance(found[0], AesGcm)


def test_an_answer_that_comes_after_its_session_was_dropped_is_not_kept() -> None:
    keys, _ = _keys(_Clock())
    keys.look(ANA)
    keys.drop(ANA)
    keys.answered(ANA, bytes(32))
    assert len(keys) == 0


def test_a_sealed_vault_takes_every_key_along() -> None:
    keys, _ = _keys(_Clock())
    keys.look(ANA)
    keys.answered(ANA, bytes(32))
    keys.drop_all()
    assert len(keys) == 0
    assert keys.look(ANA) is NoKey.ASKED


def test_so_many_keys_are_kept_those_used_last() -> None:
    keys, _ = _keys(_Clock())
    owners = [Owner("acme", f"s{number}") for number in range(module.MAX_KEYS + 1)]
    for owner in owners:
        keys.look(owner)
        keys.answered(owner, bytes(32))
        keys.look(owners[0])
    assert len(keys) == module.MAX_KEYS
    assert isinstance(keys.look(owners[0]), AesGcm)
    assert keys.look(owners[1]) is NoKey.ASKED


def test_who_asks_what_became_of_sessions_is_told_and_gets_no_key() -> None:
    ben, eve, ida = (Owner("acme", name) for name in ("ben", "eve", "ida"))
    gone: list[Owner] = []

    def ask(owner: Owner) -> bool:
        if owner != ida:
            keys.answered(owner, bytes(32) if owner == ANA else None, gone=owner == ben)
        return owner != ida

    keys = TierKeys(ask, on_gone=gone.append)
    assert keys.not_known([ANA, ben, eve, ida]) == [eve, ida]
    assert gone == [ben]
    assert len(keys) == 0


def test_a_sealed_vault_tells_of_nobody() -> None:
    keys, asked = _keys(_Clock())
    told: list[list[Owner]] = []
    asking = threading.Thread(target=lambda: told.append(keys.not_known([ANA])))
    asking.start()
    while not asked or asking.is_alive():
        keys.drop_all()
    asking.join(5)
    assert told == [[ANA]]


def test_a_session_is_gone_before_anybody_hears_that_it_has_no_key() -> None:
    keys, asked = _keys(_Clock())
    keys.look(ANA)
    heard: list[AesGcm | NoKey] = []
    keys.on_gone = lambda owner: heard.append(keys.look(owner))
    keys.answered(ANA, None, gone=True)
    assert heard == [NoKey.ASKED]
    assert keys.look(ANA) is NoKey.REFUSED
    assert asked == [ANA]
