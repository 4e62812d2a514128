"""What KV is worth: whose leaves first, what is learned, and that it stays small."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from appliance.engine.inside.retention import RetentionPolicy

HOUR = 3600.0


def worth(policy: RetentionPolicy, session: str, now: float, *, abandoned: bool = False) -> float:
    return policy.value(session=session, now=now, position=1000, abandoned=abandoned)


def finish(policy: RetentionPolicy, session: str, now: float, stop: str | None = "tool_use", output: int = 100) -> None:
    policy.finished(session=session, now=now, stop=stop, prompt_tokens=1000, output_tokens=output)


def turn(policy: RetentionPolicy, session: str, arrival: float, stop: str | None = "tool_use") -> None:
    policy.arrived(session=session, now=arrival)
    finish(policy, session, arrival, stop)


@pytest.fixture
def policy() -> RetentionPolicy:
    return RetentionPolicy()


def test_closed_sessions_and_abandoned_tails_go_before_anything_else(policy: RetentionPolicy) -> None:
    for session in ("closed", "diverged", "idle"):
        turn(policy, session, 0.0)
    policy.closed(session="closed", now=1.0)
    idle = worth(policy, "idle", 100 * HOUR)
    assert worth(policy, "closed", 1.0) < idle
    assert worth(policy, "diverged", 1.0, abandoned=True) < idle
    assert worth(policy, "never seen", 1.0) < idle


def test_a_context_whose_request_is_queued_is_kept_before_any_other(policy: RetentionPolicy) -> None:
    turn(policy, "due", 0.0)
    turn(policy, "queued", 0.0)
    policy.arrived(session="queued", now=900.0)
    assert worth(policy, "queued", 901.0) == math.inf > worth(policy, "due", 3.0)
    finish(policy, "queued", 902.0)
    assert worth(policy, "queued", 903.0) < math.inf


def test_who_called_a_tool_is_worth_more_than_who_answered(policy: RetentionPolicy) -> None:
    turn(policy, "tool", 0.0, "tool_use")
    turn(policy, "answer", 0.0, "end_turn")
    assert all(worth(policy, "tool", idle) > worth(policy, "answer", idle) for idle in (1.0, 10.0, 30.0))


def test_worth_falls_once_the_likely_moment_has_passed(policy: RetentionPolicy) -> None:
    turn(policy, "one", 0.0)
    later = [worth(policy, "one", idle) for idle in (5.0, 60.0, 299.0, 400.0, HOUR, 10 * HOUR)]
    assert later == sorted(set(later), reverse=True)
    assert later[-1] > 0


def test_among_the_long_idle_the_one_used_last_is_worth_most(policy: RetentionPolicy) -> None:
    for number in range(10):
        turn(policy, f"session {number}", 60.0 * number)
    now = 10 * HOUR
    worths = [worth(policy, f"session {number}", now) for number in range(10)]
    assert worths == sorted(worths)


@pytest.mark.parametrize("stop", ["tool_use", "end_turn", None])
def test_as_long_as_nothing_was_seen_of_the_long_idle_worth_falls_as_idle_time_grows(
    stop: str | None, policy: RetentionPolicy
) -> None:
    turn(policy, "one", 0.0, stop)
    for idle in (400.0, 800.0, 1600.0, 3200.0):
        assert 0.6 < 2 * worth(policy, "one", 2 * idle) / worth(policy, "one", idle) < 1.6


def test_what_was_seen_of_the_long_idle_outweighs_that(policy: RetentionPolicy) -> None:
    untaught = RetentionPolicy()
    for number in range(400):  # they return after fifty minutes, all of them
        turn(policy, f"session {number % 20}", 3000.0 * (number // 20) + number % 20, "end_turn")
    start = 3000.0 * 20
    for each in (policy, untaught):
        turn(each, "soon", start, "end_turn")
        turn(each, "later", start + 1500.0, "end_turn")
    now = start + 2800.0
    assert worth(policy, "soon", now) > worth(policy, "later", now)
    assert worth(untaught, "soon", now) < worth(untaught, "later", now)


def test_what_a_sessions_own_gaps_were_says_when_it_returns(policy: RetentionPolicy) -> None:
    for number in range(20):
        turn(policy, "quick", 5.0 * number)
        turn(policy, "slow", 300.0 * number)
    finish(policy, "quick", 10_000.0)
    finish(policy, "slow", 10_000.0)
    assert worth(policy, "quick", 10_003.0) > worth(policy, "slow", 10_003.0)
    assert worth(policy, "quick", 10_250.0) < worth(policy, "slow", 10_250.0)


def test_it_learns_a_rhythm_that_nobody_told_it(policy: RetentionPolicy) -> None:
    untaught = RetentionPolicy()
    for number in range(400):  # they return after three minutes, all of them
        turn(policy, f"session {number % 20}", 180.0 * (number // 20) + number % 20)
    start = 180.0 * 20
    for each in (policy, untaught):
        turn(each, "new", start)
        turn(each, "newer", start + 150.0)
    now = start + 170.0
    assert worth(policy, "new", now) > worth(policy, "newer", now)
    assert worth(untaught, "new", now) < worth(untaught, "newer", now)


def test_sessions_that_never_return_are_a_lesson_with_and_without_the_signal(policy: RetentionPolicy) -> None:
    untaught, silent = RetentionPolicy(), RetentionPolicy()
    for number in range(300):
        turn(policy, f"session {number}", float(number))
        policy.closed(session=f"session {number}", now=float(number))
        turn(silent, f"session {number}", float(number))
    now = 10 * HOUR
    for each in (policy, silent, untaught):
        turn(each, "new", now)
    assert worth(policy, "new", now + 5) < worth(untaught, "new", now + 5) / 2
    assert worth(silent, "new", now + 5) < worth(untaught, "new", now + 5) / 2


def test_two_requests_of_a_session_at_once_are_one_wait(policy: RetentionPolicy) -> None:
    turn(policy, "one", 0.0)
    policy.arrived(session="one", now=10.0)
    policy.arrived(session="one", now=11.0)
    learned = policy.lessons()
    finish(policy, "one", 12.0)
    assert policy.lessons() == learned
    assert sum(sum(said["ended"]) + said["lasted"] for said in learned["classes"]) == 1


def test_a_context_waits_until_the_last_of_its_requests_is_over(policy: RetentionPolicy) -> None:
    policy.arrived(session="one", now=0.0)
    policy.arrived(session="one", now=1.0)
    finish(policy, "one", 2.0)
    assert worth(policy, "one", 3.0) == math.inf
    finish(policy, "one", 4.0)
    assert worth(policy, "one", 5.0) < math.inf


def test_a_session_that_is_closed_while_its_request_runs_is_worth_nothing_afterwards(policy: RetentionPolicy) -> None:
    policy.arrived(session="one", now=0.0)
    policy.closed(session="one", now=1.0)
    assert worth(policy, "one", 1.0) == math.inf
    finish(policy, "one", 2.0)
    turn(policy, "idle", 0.0)
    assert worth(policy, "one", 3.0) < worth(policy, "idle", 100 * HOUR)


def test_who_waits_is_forgotten_last() -> None:
    policy = RetentionPolicy(max_sessions=10)
    policy.arrived(session="waits", now=0.0)
    for number in range(20):
        turn(policy, f"session {number}", float(number))
    assert worth(policy, "waits", 20.0) == math.inf


def test_a_session_that_returns_after_it_was_closed_begins_anew(policy: RetentionPolicy) -> None:
    turn(policy, "one", 0.0)
    policy.closed(session="one", now=1.0)
    policy.closed(session="one", now=2.0)
    policy.arrived(session="one", now=3.0)
    assert worth(policy, "one", 3.0) == math.inf
    finish(policy, "one", 4.0)
    assert 0 < worth(policy, "one", 5.0) < math.inf


def test_what_was_learned_survives_a_restart(policy: RetentionPolicy) -> None:
    chance = random.Random(1)  # noqa: S311 (the same every time)
    now = 0.0
    for number in range(2000):
        now += chance.expovariate(0.1)
        session = f"session {number % 40}"
        policy.arrived(session=session, now=now)
        finish(policy, session, now, chance.choice(["tool_use", "end_turn", None]), chance.choice([50, 200, 900]))
    kept = json.dumps(policy.lessons())
    assert len(kept) < 20_000
    again = RetentionPolicy()
    again.learn(json.loads(kept))
    assert again.lessons() == policy.lessons()
    again._relearn()
    policy._relearn()
    for stop in ("tool_use", "end_turn", None):
        for each in (policy, again):
            finish(each, "new", now, stop)
        for idle in (0.0, 5.0, 50.0, 500.0, 5000.0):
            assert worth(again, "new", now + idle) == pytest.approx(worth(policy, "new", now + idle), rel=1e-3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lessons: lessons.pop("edges_s"),
        lambda lessons: lessons["edges_s"].pop(),
        lambda lessons: lessons["classes"][0]["ended"].pop(),
        lambda lessons: lessons["classes"][0].update(lasted=-1),
        lambda lessons: lessons["classes"][0].update(lasted=math.nan),
        lambda lessons: lessons["classes"][0].update(lasted="many"),
        lambda lessons: lessons["classes"][0].update(lasted=10**400),
        lambda lessons: lessons["classes"][0].update({"class": [9, 9, 9]}),
        lambda lessons: lessons.update(classes=3),
    ],
)
def test_damaged_lessons_are_refused_and_nothing_of_them_is_taken_up(
    policy: RetentionPolicy, damage: Callable[[dict[str, Any]], object]
) -> None:
    turn(policy, "one", 0.0)
    turn(policy, "one", 10.0)
    lessons = policy.lessons()
    damage(lessons)
    fresh = RetentionPolicy()
    with pytest.raises(ValueError, match="lessons"):
        fresh.learn(lessons)
    assert not fresh.lessons()["classes"]


def test_so_many_sessions_are_known_and_the_longest_idle_is_forgotten_first() -> None:
    policy = RetentionPolicy(max_sessions=100)
    for number in range(1000):
        turn(policy, f"session {number}", float(number))
    known = [number for number in range(1000) if worth(policy, f"session {number}", 1000.0) > 0]
    assert known == list(range(900, 1000))


def test_old_lessons_fade(policy: RetentionPolicy) -> None:
    now = 0.0
    for number in range(120_000):
        now += 1.0
        turn(policy, f"session {number % 10}", now)
    counted = sum(sum(said["ended"]) + said["lasted"] for said in policy.lessons()["classes"])
    assert counted < 60_000


def test_a_clock_that_stands_still_or_went_back_breaks_nothing(policy: RetentionPolicy) -> None:
    turn(policy, "one", 100.0)
    policy.arrived(session="one", now=50.0)
    finish(policy, "one", 50.0)
    assert 0 < worth(policy, "one", 40.0) < math.inf


def test_a_context_whose_request_waits_elsewhere_is_kept_like_one_whose_request_is_here() -> None:
    policy = RetentionPolicy()
    turn(policy, "idle", 0.0)
    turn(policy, "awaited", 0.0)
    policy.awaited(sessions=["awaited", "from before a restart"], now=100.0, until=105.0)
    assert worth(policy, "awaited", 104.9) == worth(policy, "from before a restart", 104.9) == math.inf
    assert worth(policy, "awaited", 104.9, abandoned=True) < worth(policy, "idle", 104.9)
    assert worth(policy, "awaited", 105.0) == worth(policy, "idle", 105.0)


@pytest.mark.parametrize("over", ["arrived", "closed"])
def test_who_has_come_or_is_over_is_awaited_no_more(over: str) -> None:
    policy = RetentionPolicy()
    turn(policy, "one", 0.0)
    policy.awaited(sessions=["one"], now=1.0, until=100.0)
    if over == "arrived":
        turn(policy, "one", 2.0)
    else:
        policy.closed(session="one", now=2.0)
    assert worth(policy, "one", 3.0) < math.inf
    assert all(value < math.inf for _, value in policy.expected(now=3.0, most=10))


def test_who_is_expected_is_told_with_those_who_wait_first_and_then_the_likeliest(policy: RetentionPolicy) -> None:
    turn(policy, "long ago", 0.0)
    turn(policy, "answered", 900.0, "end_turn")
    turn(policy, "tool", 900.0, "tool_use")
    policy.arrived(session="runs", now=901.0)
    policy.awaited(sessions=["second", "tool"], now=901.0, until=910.0)
    told = policy.expected(now=902.0, most=10)
    assert [session for session, _ in told] == ["second", "tool", "answered", "long ago"]
    assert [value for _, value in told[:2]] == [math.inf, math.inf]
    assert [session for session, _ in policy.expected(now=910.0, most=2)] == ["tool", "answered"]  # those used last
