"""What the gateway takes to be on the device, and how large it takes a turn to be."""

from dataclasses import dataclass

import pytest

from appliance.engine.protocol import LeaseReport, LeaseState
from appliance.engine.residence import Residence

KEY = ("tenant", "session")


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ended(residence: Residence, *, tokens: int = 1000, at_bytes: int = 4000, output: int = 100) -> None:
    residence.ended(KEY, prompt_bytes=at_bytes, prompt_tokens=tokens, output_tokens=output, idle_timeout_s=15.0)


def report(**tokens: int) -> LeaseReport:
    leases = tuple(LeaseState(session, "tenant", 1, held, 15.0) for session, held in tokens.items())
    return LeaseReport(leases, 0, 100, 100, 32, None, 0, 0)


def test_what_a_turn_left_is_there_while_its_lease_stands(clock: Clock) -> None:
    residence = Residence(clock)
    assert residence.resident_tokens(KEY) == 0
    ended(residence)
    assert residence.resident_tokens(KEY) == 1100
    clock.now += 15.0
    assert residence.resident_tokens(KEY) == 0


def test_a_report_says_better_until_it_is_old_or_the_session_goes_on(clock: Clock) -> None:
    residence = Residence(clock)
    ended(residence)
    clock.now += 1.0
    residence.told(report(session=640), [KEY], asked_at=clock.now)
    assert residence.resident_tokens(KEY) == 640
    residence.told(report(), [KEY], asked_at=clock.now)
    assert residence.resident_tokens(KEY) == 0
    clock.now += 1.0
    ended(residence, tokens=2000)
    assert residence.resident_tokens(KEY) == 2100
    clock.now += 10.0
    assert residence.resident_tokens(KEY) == 2100


def test_a_report_says_nothing_of_a_session_that_it_was_not_asked_about(clock: Clock) -> None:
    residence = Residence(clock)
    ended(residence)
    clock.now += 1.0
    residence.told(report(other=64), [("tenant", "other")], asked_at=clock.now)
    assert residence.resident_tokens(KEY) == 1100
    assert residence.resident_tokens(("tenant", "other")) == 64


def test_a_turn_that_ended_after_the_report_was_asked_for_is_not_in_it(clock: Clock) -> None:
    residence = Residence(clock)
    asked_at = clock.now
    clock.now += 0.1
    ended(residence)
    residence.told(report(), [KEY], asked_at)
    assert residence.resident_tokens(KEY) == 1100


def test_a_prompt_is_as_dense_as_its_session_s_last(clock: Clock) -> None:
    residence = Residence(clock)
    assert residence.prompt_tokens(KEY, 4000) == 1000
    ended(residence, tokens=2000, at_bytes=4000)
    assert residence.prompt_tokens(KEY, 5000) == 2500
    assert 1000 < residence.prompt_tokens(("tenant", "other"), 4000) < 2000
    assert residence.prompt_tokens(("tenant", "other"), 0) == 1


def test_an_answer_is_as_long_as_its_client_says_and_may_ask_for(clock: Clock) -> None:
    residence = Residence(clock)
    assert residence.output_tokens(at_most=None, hinted=None) == 256
    assert residence.output_tokens(at_most=16, hinted=None) == 16
    assert residence.output_tokens(at_most=5000, hinted=900) == 900
    for _ in range(200):
        ended(residence, output=20)
    assert residence.output_tokens(at_most=None, hinted=None) == 20


def test_only_the_sessions_used_last_are_remembered(clock: Clock) -> None:
    residence = Residence(clock)
    ended(residence)
    for number in range(10_000):
        residence.ended(("tenant", str(number)), prompt_bytes=1, prompt_tokens=1, output_tokens=1, idle_timeout_s=15.0)
    assert residence.resident_tokens(KEY) == 0
    assert residence.resident_tokens(("tenant", "9999")) == 2
