"""For whom KV is read ahead, in which order, and what is counted of it. Nothing here reads."""

import math

import pytest

from appliance.engine.inside.recall import SOON_S, Recall

MIB = 1 << 20
ANA, BEN, EVE, KIM = ("acme", "ana"), ("acme", "ben"), ("other", "eve"), ("other", "kim")
LIKELY, SOON, LATE = 0.1, 1.01 / SOON_S, 0.99 / SOON_S


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recall(clock: Clock) -> Recall:
    return Recall(clock)


def in_order(
    recall: Recall, *, waiting: tuple[tuple[str, str], ...] = (), **worths: float
) -> list[tuple[tuple[str, str], float]]:
    sessions = {name: session for session in (ANA, BEN, EVE, KIM) if (name := session[1])}
    expected = sorted(((sessions[name], worth) for name, worth in worths.items()), key=lambda each: -each[1])
    return list(recall.in_order(waiting, expected, lambda session: worths.get(session[1], -1.0)))


def came(recall: Recall, *keys: bytes, mib: int = 1, seconds: float = 0.001, whole: bool = True) -> None:
    recall.came(keys, wanted_bytes=mib * MIB, seconds=seconds, whole=whole)


def test_who_waits_goes_first_then_who_is_said_to_return_then_who_is_likely_to(recall: Recall) -> None:
    recall.hinted(EVE)
    order = in_order(recall, waiting=(KIM,), ana=LIKELY, ben=math.inf, eve=LATE)
    assert order == [(KIM, math.inf), (BEN, math.inf), (EVE, LATE / 2), (ANA, LIKELY / 2)]


def test_who_is_named_twice_is_read_for_once_and_as_the_most_certain(recall: Recall) -> None:
    recall.hinted(ANA)
    assert in_order(recall, waiting=(ANA, ANA), ana=math.inf) == [(ANA, math.inf)]


def test_nothing_is_read_for_who_is_not_expected_soon(recall: Recall) -> None:
    assert in_order(recall, ana=SOON, ben=LATE) == [(ANA, SOON / 2)]


def test_what_is_read_for_an_expectation_pushes_out_only_what_is_worth_less_than_half(recall: Recall) -> None:
    assert in_order(recall, ana=LIKELY) == [(ANA, LIKELY / 2)]
    recall.hinted(BEN)
    assert in_order(recall) == [(BEN, -0.5)]  # a hint is no claim to others' room


def test_a_hint_holds_until_the_session_is_here_or_over_or_it_is_old(recall: Recall, clock: Clock) -> None:
    for session in (ANA, BEN, EVE):
        recall.hinted(session)
    recall.arrived(ANA)
    recall.released({"ben"})
    assert [session for session, _ in in_order(recall)] == [EVE]
    clock.now += 600.0
    assert in_order(recall) == []


def test_a_session_that_could_not_be_read_is_left_alone_until_it_returns_or_a_while_has_passed(
    recall: Recall, clock: Clock
) -> None:
    for session in (ANA, BEN):
        recall.failed(session)
    assert in_order(recall, waiting=(ANA,), ben=LIKELY) == []
    recall.arrived(ANA)
    assert in_order(recall, waiting=(ANA,), ben=LIKELY) == [(ANA, math.inf)]
    clock.now += 60.0
    assert in_order(recall, ben=LIKELY) == [(BEN, LIKELY / 2)]


@pytest.mark.parametrize("trouble", ["slow", "failed"])
def test_a_disk_that_is_slow_or_fails_is_left_alone_longer_each_time(
    recall: Recall, clock: Clock, trouble: str
) -> None:
    pauses = []
    for _ in range(6):
        came(recall, mib=32, seconds=1.0 if trouble == "slow" else 0.001, whole=trouble == "slow")
        pauses.append(recall.paused_for_s)
        clock.now += recall.paused_for_s
    assert pauses == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    came(recall, mib=32, seconds=0.5)  # as fast as computing again
    assert recall.paused_for_s == 0.0
    came(recall, mib=32, seconds=1.0)
    assert recall.paused_for_s == 5.0


def test_each_chunk_is_counted_as_used_or_in_vain_once(recall: Recall) -> None:
    came(recall, b"a", b"b", b"c", b"d")
    recall.loaded([b"a", b"x"])
    recall.loaded([b"a", b"b"])
    recall.left(b"a")  # it was of use
    recall.left(b"c")
    recall.left(b"c")
    recall.left(b"x")
    assert recall.counts() == (4, 2, 1)


def test_who_says_ever_more_is_bounded(recall: Recall) -> None:
    for number in range(10_005):
        recall.hinted(("acme", f"s{number}"))
        recall.failed(("acme", f"s{number}"))
    assert len(recall._hinted) == len(recall._left_alone) == 10_000
    assert ("acme", "s4") not in recall._hinted


def test_who_was_sent_down_stays_there_until_it_returns(recall: Recall, clock: Clock) -> None:
    recall.hinted(ANA)
    recall.demoted(ANA)
    clock.now += 1e6
    assert in_order(recall, waiting=(ANA,), ana=math.inf) == []
    recall.arrived(ANA)
    assert in_order(recall, ana=LIKELY) == [(ANA, LIKELY / 2)]
