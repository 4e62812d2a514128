"""Chunks whose session's key is on its way, refused, or gone for good."""

import pytest

from appliance.engine.inside.disk.store import Presence
from tests.unit.inside.disk.tier import (
    ANA,
    BEN,
    EVE,
    Gateway,
    Make,
    chunk_key,
    until,
)


def test_a_chunk_without_a_key_is_withheld_and_one_whose_session_is_gone_is_absent(make: Make) -> None:
    make().write(ANA, [1])
    gateway = Gateway()
    gateway.without = {ANA}
    tier = make(gateway=gateway)
    until(lambda: tier.store.find(chunk_key(ANA, 1), "acme") is not Presence.ASK_AGAIN)
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.WITHHELD
    gateway.keys.answered(ANA, None, gone=True)
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.ABSENT


def test_no_key_is_a_miss_and_costs_nothing_but_that(make: Make) -> None:
    make().write(ANA, [1])
    gateway = Gateway()
    gateway.without = {ANA}
    tier = make(gateway=gateway)
    tier.store.find(chunk_key(ANA, 1), "acme")
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.WITHHELD
    assert tier.read(ANA, [1]) == []
    assert not tier.write(ANA, [2]).whole
    assert tier.store.status().not_stored == {"no_key": 1}
    assert tier.store.status().faults["no_key"] == 2
    assert len(tier.files()) == 1  # it is of use again when there is a key


def test_a_key_that_was_revoked_while_its_session_is_on_the_disk_takes_the_session_along(make: Make) -> None:
    make().write(ANA, [1, 2])
    gateway = Gateway()
    gateway.gone = {ANA}
    tier = make(gateway=gateway)
    assert tier.read(ANA, [1]) == []
    assert tier.store.find(chunk_key(ANA, 2), "acme") is Presence.ABSENT
    until(lambda: not tier.found("acme~ana"))


def test_a_session_that_was_forgotten_while_no_engine_ran_leaves_the_disk_without_being_asked_for(make: Make) -> None:
    first = make()
    for owner in (ANA, BEN, EVE):
        first.write(owner, range(3))
    gateway = Gateway()
    gateway.gone, gateway.without = {ANA}, {EVE}
    tier = make(gateway=gateway)
    until(lambda: {file.parent.name for file in tier.files()} == {"acme~ben", "other~eve"})
    until(lambda: not tier.found("acme~ana"))
    assert len(gateway.keys) == 0  # nobody used one
    assert tier.store.status().faults == {}
    assert sorted(gateway.asked) == [ANA, BEN, EVE]


def test_whoever_the_gateway_could_not_tell_of_is_asked_for_again_until_it_can(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._ASK_AGAIN_S", 0.01)
    first = make()
    for owner in (ANA, BEN):
        first.write(owner, range(3))
    gateway = Gateway()
    gateway.without = {ANA, BEN}  # the vault is sealed
    tier = make(gateway=gateway)
    until(lambda: gateway.asked.count(ANA) > 1)
    gateway.gone = {ANA}
    until(lambda: not tier.found("acme~ana"))
    gateway.without = set()
    tier.settle()
    assert tier.read(BEN, range(3)) == [0, 1, 2]


def test_who_asks_while_the_key_is_on_its_way_is_told_to_ask_again(make: Make) -> None:
    make().write(ANA, [1])
    gateway = Gateway()
    gateway.silent = True
    tier = make(gateway=gateway)
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.ASK_AGAIN
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.ASK_AGAIN
    assert gateway.asked.count(ANA) <= 2  # the start asks once, too
    gateway.answer(ANA)
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.HERE


def test_whoever_expects_a_session_hears_whether_its_key_is_there(make: Make) -> None:
    gateway = Gateway()
    gateway.silent = True
    gateway.without = {BEN}
    tier = make(gateway=gateway)
    assert tier.store.expect(ANA) is Presence.ASK_AGAIN
    gateway.answer(ANA)
    assert tier.store.expect(ANA) is Presence.HERE
    tier.store.expect(BEN)
    gateway.answer(BEN)
    assert tier.store.expect(BEN) is Presence.ABSENT
    assert tier.store.status().faults == {}  # nobody missed anything
