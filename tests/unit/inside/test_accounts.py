"""The account of a turn is what its first admission found, and only its tenant's gateway gets it."""

from appliance.engine.inside.accounts import Accounts
from appliance.engine.protocol import Lease, TurnAccount, TurnEnd


def lease(turn: str, tenant: str = "t") -> Lease:
    return Lease("s", tenant, 15.0, turn=turn)


def end(turn: str, tenant: str = "t") -> TurnEnd:
    return TurnEnd("s", tenant, turn, "end_turn", 1, 15.0)


def test_a_second_admission_changes_nothing() -> None:
    accounts = Accounts()
    accounts.admitted(lease("u"), 64)
    accounts.admitted(lease("u"), 0)
    assert accounts.ended(end("u")) == TurnAccount("u", 64)


def test_a_turn_without_a_label_and_one_that_was_never_admitted_have_none() -> None:
    accounts = Accounts()
    accounts.admitted(lease(""), 64)
    assert accounts.ended(end("u")) is None


def test_another_tenant_gets_none() -> None:
    accounts = Accounts()
    accounts.admitted(lease("u"), 64)
    assert accounts.ended(end("u", tenant="other")) is None


def test_the_oldest_go_when_there_are_too_many() -> None:
    accounts = Accounts(most=2)
    for turn in ("one", "two", "three"):
        accounts.admitted(lease(turn), 32)
    assert [accounts.ended(end(turn)) is None for turn in ("one", "two", "three")] == [True, False, False]
