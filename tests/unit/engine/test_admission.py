"""Who goes to the engine next: order, bounds, shares, and that nobody is forgotten."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.engine.admission import AdmissionLine, LineFull, Place, Wish

LONGEST_WAIT_S = 20.0


@dataclass
class World:
    """A line on a clock that the test moves."""

    now: float = 1000.0
    let_in: list[Place] = field(default_factory=list)

    def line(
        self, *, sequences: int = 1, most_waiting: int = 100, longest_wait_s: float = LONGEST_WAIT_S
    ) -> AdmissionLine:
        return AdmissionLine(
            sequences=sequences,
            longest_wait_s=longest_wait_s,
            most_waiting=most_waiting,
            clock=lambda: self.now,
            let_in=self.let_in.append,
        )


def wish(
    tenant: str = "a",
    *,
    resident: int | Callable[[], int] = 0,
    prompt: int = 1000,
    output: int = 100,
    sequences: int = 1,
    weight: float = 1.0,
    tier: int = 0,
    priority: int = 0,
) -> Wish:
    known = resident if callable(resident) else lambda: resident
    return Wish(tenant, prompt, output, known, sequences, weight, tier, priority)


def test_a_turn_goes_on_at_once_where_there_is_room() -> None:
    world = World()
    line = world.line(sequences=2)
    assert all(line.ask(wish()).admitted_at is not None for _ in range(2))
    assert line.ask(wish()).admitted_at is None
    assert world.let_in == []


def test_the_turn_with_most_of_its_prompt_on_the_device_goes_first() -> None:
    world = World()
    line = world.line()
    running = line.ask(wish())
    line.ask(wish(resident=100))
    most = line.ask(wish(resident=900))
    larger_but_emptier = line.ask(wish(resident=1000, prompt=4000))
    line.leave(running)
    assert world.let_in == [most]
    line.leave(most)
    assert world.let_in == [most, larger_but_emptier]


def test_what_is_resident_counts_as_it_is_when_there_is_room() -> None:
    world, held = World(), {"early": 900, "late": 0}
    line = world.line()
    running = line.ask(wish())
    line.ask(wish(resident=lambda: held["early"]))
    late = line.ask(wish(resident=lambda: held["late"]))
    held.update(early=0, late=500)
    line.leave(running)
    assert world.let_in == [late]


def test_who_has_waited_long_goes_first_and_is_not_passed() -> None:
    world = World()
    line = world.line(sequences=4)
    line.told(4000)
    small, other = line.ask(wish(prompt=900)), line.ask(wish(prompt=900))
    large = line.ask(wish(prompt=3800))
    passes = line.ask(wish(prompt=800, resident=800))
    assert passes.admitted_at is not None
    world.now += LONGEST_WAIT_S
    assert line.ask(wish(prompt=100, resident=100)).admitted_at is None
    line.leave(small)
    line.leave(passes)
    assert large.admitted_at is None
    line.leave(other)
    assert world.let_in[0] is large


def test_a_turn_larger_than_the_device_goes_alone() -> None:
    world = World()
    line = world.line(sequences=4)
    line.told(1000)
    alone = line.ask(wish(prompt=5000))
    assert alone.admitted_at is not None
    assert line.ask(wish(prompt=10, output=1)).admitted_at is None


def test_a_tier_goes_before_a_priority_and_a_priority_before_what_is_resident() -> None:
    world = World()
    line = world.line()
    running = line.ask(wish())
    resident = line.ask(wish(resident=900))
    urgent = line.ask(wish(priority=3))
    tier = line.ask(wish(tier=1, priority=-9))
    low = line.ask(wish(resident=1000, priority=-1))
    for place in (running, tier, urgent, resident):
        line.leave(place)
    assert world.let_in == [tier, urgent, resident, low]


def test_no_priority_reaches_another_tenant() -> None:
    world = World()
    line = world.line()
    running = line.ask(wish("b"))
    resident = line.ask(wish("a", resident=900))
    line.ask(wish("b", tier=1000, priority=1000))
    line.leave(running)
    assert world.let_in == [resident]


def test_a_tenant_that_had_much_waits_for_one_that_had_little() -> None:
    world = World()
    line = world.line()
    running = line.ask(wish("greedy"))  # and costs far more than was expected
    line.ask(wish("greedy", resident=1000))
    modest = line.ask(wish("modest"))
    line.leave(running, computed_tokens=200_000)
    assert world.let_in == [modest]


def test_an_idle_tenant_saves_nothing_up() -> None:
    world = World()
    line = world.line()
    for _ in range(50):
        line.leave(line.ask(wish("busy", prompt=100_000)))
    running = line.ask(wish("busy", prompt=10))
    places = [line.ask(wish("busy", resident=900)), *(line.ask(wish("idle", prompt=40_000)) for _ in range(5))]
    line.leave(running, computed_tokens=10)
    for _ in places:
        line.leave(world.let_in[-1])
    assert world.let_in.index(places[0]) <= 3


def test_a_tenant_that_asks_for_nothing_new_saves_nothing_up_either() -> None:
    world = World()
    line = world.line(sequences=2)
    line.ask(wish("slow", prompt=1))
    for _ in range(50):
        line.leave(line.ask(wish("busy", prompt=100_000)))
    running = line.ask(wish("busy", prompt=1, output=1))
    slow = [line.ask(wish("slow", prompt=60_000)) for _ in range(5)]
    busy = line.ask(wish("busy", resident=1000))
    line.leave(running)
    for _ in slow:
        line.leave(world.let_in[-1])
    assert world.let_in.index(busy) <= 3


def test_the_line_is_bounded_and_says_when_to_come_again() -> None:
    world = World()
    line = world.line(most_waiting=4)
    line.ask(wish())
    for _ in range(3):
        line.ask(wish("greedy"))
    with pytest.raises(LineFull, match="of this tenant"):
        line.ask(wish("greedy"))
    line.ask(wish("modest"))
    with pytest.raises(LineFull) as full:
        line.ask(wish("other"))
    assert 1.0 <= full.value.retry_after_s <= 30.0
    with pytest.raises(LineFull):
        line.refuse_full("modest")
    assert line.waiting == 4


def test_who_leaves_while_waiting_makes_room_for_those_it_held_back() -> None:
    world = World()
    line = world.line(sequences=4)
    line.told(2000)
    line.ask(wish(prompt=900))
    large = line.ask(wish(prompt=1900))
    world.now += LONGEST_WAIT_S
    small = line.ask(wish(prompt=500))
    assert small.admitted_at is None
    line.leave(large)
    assert world.let_in == [small]
    line.leave(large)
    assert (line.running, line.waiting) == (2, 0)


def test_a_larger_device_lets_in_who_waits() -> None:
    world = World()
    line = world.line(sequences=4)
    line.told(1200)
    line.ask(wish())
    waits = line.ask(wish())
    line.told(4000)
    assert world.let_in == [waits]


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, int, int, int]]:
    """What happens, each with the numbers that it may need."""
    kinds = st.sampled_from(["ask", "ask", "ask", "leave", "leave", "abandon", "pass", "told"])
    number = st.integers(0, 1000)
    return draw(st.lists(st.tuples(kinds, number, number, number, number), max_size=120))


@settings(max_examples=300)
@given(histories(), st.integers(1, 4), st.integers(1, 12))
def test_nobody_is_forgotten_and_nothing_is_exceeded(
    history: list[tuple[str, int, int, int, int]], sequences: int, most_waiting: int
) -> None:
    world = World()
    line = world.line(sequences=sequences, most_waiting=most_waiting)
    places: list[Place] = []
    pool: int | None = None
    for kind, first, second, third, fourth in history:
        running = [place for place in places if place.admitted_at is not None and not place.left]
        waiting = [place for place in places if place.admitted_at is None and not place.left]
        if kind == "ask":
            asked = wish(
                f"tenant{first % 3}",
                prompt=1 + second * 10,
                resident=third * 10,
                output=1 + fourth,
                sequences=1 + first % sequences,
                priority=fourth % 3,
            )
            try:
                places.append(line.ask(asked))
            except LineFull:
                assert line.waiting > 0
        elif kind == "leave" and running:
            line.leave(running[first % len(running)], None if second % 2 else second * 10)
        elif kind == "abandon" and waiting:
            line.leave(waiting[first % len(waiting)])
        elif kind == "pass":
            world.now += first / 10
        elif kind == "told":
            pool = 1 + first * 20
            line.told(pool)
        running = [place for place in places if place.admitted_at is not None and not place.left]
        waiting = [place for place in places if place.admitted_at is None and not place.left]
        assert (line.running, line.waiting) == (len(running), len(waiting))
        assert line.waiting <= most_waiting
        assert sum(place.wish.sequences for place in running) <= sequences
        assert running or not waiting  # somebody is with the engine whenever somebody wants to be
    for _ in range(2 * len(places)):  # all that are in end, and so on: everybody's turn comes
        for place in places:
            if place.admitted_at is not None:
                line.leave(place)
    assert all(place.admitted_at is not None or place.left for place in places)
    assert (line.running, line.waiting) == (0, 0)
    assert len(world.let_in) == len(set(world.let_in))


@settings(max_examples=60)
@given(st.lists(st.integers(1, 5000), min_size=20, max_size=60), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_tenants_that_always_wait_get_their_shares(costs: list[int], weight: float) -> None:
    world = World()
    line = world.line(most_waiting=1000, longest_wait_s=1e9)
    slack = 20_000
    line.told(slack)
    had = {"light": 0.0, "heavy": 0.0}
    cost = itertools.cycle(costs)

    def ask(tenant: str) -> Place:
        resident = 10_000 if tenant == "light" else 0  # all that locality can do for one of them
        return line.ask(
            wish(tenant, prompt=10_000, resident=resident, output=next(cost), weight=weight if tenant == "heavy" else 1)
        )

    inside = ask("light")
    for _ in range(3):
        ask("light")
        ask("heavy")
    for _ in range(300):
        world.now += 1
        tenant = inside.wish.tenant
        spent = inside.need_tokens - inside.wish.resident_tokens()
        had[tenant] += spent / inside.wish.weight
        ask(tenant)
        line.leave(inside, spent)
        inside = world.let_in[-1]
    largest = 15_000 / min(weight, 1)
    assert abs(had["light"] - had["heavy"]) <= slack + 2 * largest


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 30)), min_size=1, max_size=80))
def test_waiting_is_bounded_by_the_limit_and_by_those_who_waited_longer(arrivals: list[tuple[int, int]]) -> None:
    """One tenant, one sequence, each turn a second: who is overdue is passed by nobody who came later."""
    world = World()
    line = world.line(most_waiting=1000, longest_wait_s=5.0)
    inside = line.ask(wish())
    places: list[Place] = []
    for resident, every in arrivals:
        places.append(line.ask(wish(resident=resident, priority=resident % 3)))
        for _ in range(30 // every):
            world.now += 1
            overdue = [p for p in places if p.admitted_at is None and world.now - p.asked_at >= 5.0]
            line.leave(inside)
            if not line.running:
                inside = line.ask(wish())
                continue
            inside = world.let_in[-1]
            if overdue:
                assert inside is min(overdue, key=lambda place: place.number)
