"""What becomes of an agent's hints: advice within bounds, and never an error."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.openai.agent_hints import NO_HINTS, AgentHints, read_agent_hints


def read(nvext: Any) -> tuple[AgentHints, list[str]]:
    dropped: list[str] = []
    return read_agent_hints({"nvext": nvext}, dropped.append), dropped


def test_hints_are_read_as_they_are() -> None:
    given_hints = {"priority": -5, "strict_priority": 1, "osl": 1024, "speculative_prefill": True}
    assert read({"agent_hints": given_hints}) == (AgentHints(-5, 1, 1024, True), [])
    assert read(None) == (NO_HINTS, [])
    assert read({}) == (NO_HINTS, [])


@pytest.mark.parametrize(
    ("nvext", "dropped"),
    [
        (7, ["nvext"]),
        ({"agent_hints": []}, ["nvext.agent_hints"]),
        ({"agent_hints": {"priority": "high"}}, ["nvext.agent_hints.priority"]),
        ({"agent_hints": {"priority": True}}, ["nvext.agent_hints.priority"]),
        ({"agent_hints": {"osl": 0}}, ["nvext.agent_hints.osl"]),
        ({"agent_hints": {"strict_priority": -1}}, ["nvext.agent_hints.strict_priority"]),
        ({"agent_hints": {"osl": 1 << 40}}, ["nvext.agent_hints.osl"]),
        ({"agent_hints": {"speculative_prefill": 1}}, ["nvext.agent_hints.speculative_prefill"]),
        ({"agent_hints": {"latency_sensitivity": 5.0}}, ["nvext.agent_hints.latency_sensitivity"]),
        ({"token_data": [1], "agent_hints": None}, ["nvext.token_data"]),
    ],
)
def test_what_cannot_be_understood_is_dropped_and_named(nvext: Any, dropped: list[str]) -> None:
    assert read(nvext) == (NO_HINTS, dropped)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.dictionaries(st.text(), v)))
def test_no_hint_is_an_error(nvext: Any) -> None:
    hints, _ = read(nvext)
    hints.allowed(10).header(recalls=True)


def test_a_priority_is_taken_as_far_as_it_may_be_asked_for() -> None:
    assert AgentHints(50, 50).allowed(10) == AgentHints(10, 10)
    assert AgentHints(-50, 3).allowed(10) == AgentHints(-10, 3)
    assert AgentHints(5, 5, 7).allowed(0) == AgentHints(0, 0, 7)


def test_what_was_made_of_the_hints_is_said() -> None:
    assert NO_HINTS.header(recalls=True) is None
    assert AgentHints(10, None, 7).header(recalls=True) == "priority=10, osl=7"
    assert AgentHints(speculative_prefill=True).header(recalls=True) == "speculative_prefill=recall"
    assert AgentHints(speculative_prefill=True).header(recalls=False) == "speculative_prefill=no-effect"
    assert AgentHints(speculative_prefill=False).header(recalls=True) == "speculative_prefill=no-effect"
