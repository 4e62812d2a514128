"""Why tokens had to be computed: exact to the token, named for what changed, and never guessed."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.sessions.misses import (
    REMEDIES,
    Account,
    Cause,
    Change,
    Circumstances,
    Divergence,
    ExplainedTurn,
    Ran,
    Served,
    account_of,
    divergence_of,
    findings_of,
)
from appliance.sessions.turn import Message

HERE = Circumstances(block_size=4, engine="one", idle_timeout_s=15.0, epoch=0)


def ran(
    prompt: Sequence[int],
    answer: Sequence[int] = (),
    *,
    cached: int = 0,
    at: float = 0.0,
    unknown: bool = False,
    model: str = "model",
    circumstances: Circumstances = HERE,
) -> Ran:
    found = None if unknown else cached
    return Ran(model, array("I", [*prompt, *answer]), len(prompt), found, at, at + 1.0, circumstances)


BEFORE = ran(range(10), [10, 11, 12])  # twelve tokens have KV: three blocks


def test_a_first_turn_is_computed_because_it_is_the_first() -> None:
    assert account_of(None, ran(range(9), cached=4)) == Account(9, 4, {Cause.FIRST_TURN: 5})


def test_an_extension_computes_what_is_new_and_the_end_of_a_block() -> None:
    assert account_of(BEFORE, ran(range(20), cached=12, at=2)) == Account(20, 12, {Cause.BLOCK_TAIL: 1, Cause.NEW: 7})


def test_the_last_token_of_a_prompt_is_computed_though_its_block_is_full() -> None:
    account = account_of(ran(range(16), [16]), ran(range(16), cached=12, at=2))
    assert account == Account(16, 12, {Cause.BLOCK_TAIL: 4})


def test_a_divergence_is_found_to_the_token() -> None:
    now = ran([*range(6), 99, *range(7, 13), 50, 51], cached=4, at=2)
    account = account_of(BEFORE, now)
    assert account == Account(15, 4, {Cause.BLOCK_TAIL: 2, Cause.DIVERGED: 7, Cause.NEW: 2}, diverged_at=6)


def test_a_prompt_that_stops_short_of_its_history_did_not_diverge() -> None:
    assert account_of(BEFORE, ran(range(6), cached=4, at=2)) == Account(6, 4, {Cause.BLOCK_TAIL: 2})


@pytest.mark.parametrize(
    ("now", "cause"),
    [
        (ran(range(20), at=2), Cause.EVICTED),
        (ran(range(20), at=15.9), Cause.EVICTED),
        (ran(range(20), at=16.1), Cause.EXPIRED),
        (ran(range(20), at=2, circumstances=Circumstances(4, "two", 15.0, 0)), Cause.ENGINE_RESTARTED),
        (ran(range(20), at=2, circumstances=Circumstances(4, "two", 15.0, 0, replica="a")), Cause.UNKNOWN),
        (ran(range(20), at=2, circumstances=Circumstances(4, "one", 15.0, 1)), Cause.SALT_CHANGED),
        (ran(range(20), at=2, circumstances=Circumstances(4, "one", 15.0, 0, was_over=True)), Cause.ENDED),
        (ran(range(20), at=2, circumstances=Circumstances(4, None, 15.0, 0)), Cause.UNKNOWN),
        (ran(range(20), at=0.9), Cause.CONCURRENT),
        (ran(range(20), at=1.0), Cause.EVICTED),
        (ran(range(20), at=2, unknown=True), Cause.UNKNOWN),
        (ran(range(20), at=17, unknown=True), Cause.UNKNOWN),
    ],
)
def test_what_could_have_been_found_has_a_cause_of_its_own(now: Ran, cause: Cause) -> None:
    assert account_of(BEFORE, now) == Account(20, 0, {cause: 12, Cause.BLOCK_TAIL: 1, Cause.NEW: 7})


@pytest.mark.parametrize(
    ("replica", "engine", "cause"),
    [
        ("a", "one", Cause.EVICTED),
        ("a", "two", Cause.ENGINE_RESTARTED),
        ("b", "two", Cause.OTHER_REPLICA),
        ("b", "one", Cause.OTHER_REPLICA),
        (None, "two", Cause.UNKNOWN),
    ],
)
def test_an_engine_that_was_started_again_is_no_other_replica(replica: str | None, engine: str, cause: Cause) -> None:
    before = replace(BEFORE, circumstances=replace(HERE, replica="a"))
    now = ran(range(20), at=2, circumstances=replace(HERE, replica=replica, engine=engine))
    assert account_of(before, now) == Account(20, 0, {cause: 12, Cause.BLOCK_TAIL: 1, Cause.NEW: 7})


@pytest.mark.parametrize("at", [-700_000.0, 0.5, 2.0, 700_000.0])
@pytest.mark.parametrize(
    ("paused_s", "cause"), [(-0.5, Cause.CONCURRENT), (14.0, Cause.EVICTED), (16.0, Cause.EXPIRED)]
)
def test_a_clock_that_was_set_between_two_turns_changes_no_cause(at: float, paused_s: float, cause: Cause) -> None:
    now = ran(range(20), at=at, circumstances=replace(HERE, paused_s=paused_s))
    assert account_of(BEFORE, now) == Account(20, 0, {cause: 12, Cause.BLOCK_TAIL: 1, Cause.NEW: 7})


def test_all_that_the_turn_before_had_is_lost_to_another_model_and_nothing_of_it_diverged() -> None:
    other = ran(range(100, 120), at=2, model="other")
    assert account_of(BEFORE, other) == Account(20, 0, {Cause.MODEL_CHANGED: 13, Cause.NEW: 7})
    assert account_of(BEFORE, ran(range(6), at=2, model="other")) == Account(6, 0, {Cause.MODEL_CHANGED: 6})
    found = ran(range(20), cached=16, at=2, model="other")  # it had answered before
    assert account_of(BEFORE, found) == Account(20, 16, {Cause.NEW: 4})


def test_only_a_token_that_was_generated_last_has_no_kv() -> None:
    nothing_generated = ran(range(16))
    assert account_of(nothing_generated, ran(range(20), at=2)) == Account(20, 0, {Cause.EVICTED: 16, Cause.NEW: 4})
    one_generated = ran(range(15), [15])
    lost = {Cause.EVICTED: 12, Cause.BLOCK_TAIL: 4, Cause.NEW: 4}
    assert account_of(one_generated, ran(range(20), at=2)) == Account(20, 0, lost)


def test_of_a_turn_that_was_broken_off_it_is_not_known_what_was_found() -> None:
    broken_off = ran([*range(6), 99, *range(7, 20)], at=2, unknown=True)
    told = {Cause.UNKNOWN: 4, Cause.BLOCK_TAIL: 2, Cause.DIVERGED: 7, Cause.NEW: 7}
    assert account_of(BEFORE, broken_off) == Account(20, 0, told, 6)
    assert account_of(None, ran(range(9), unknown=True)) == Account(9, 0, {Cause.UNKNOWN: 9})
    other = ran(range(20), at=2, unknown=True, model="other")
    assert account_of(BEFORE, other) == Account(20, 0, {Cause.UNKNOWN: 13, Cause.NEW: 7})


def test_what_was_written_down_before_there_was_more_of_it_can_be_read() -> None:
    assert Circumstances.from_wire([4, "one", 15.0, 0, True]) == Circumstances(4, "one", 15.0, 0, was_over=True)
    assert Circumstances.from_wire([4, "one", 15.0, 0, True, True, "t", [1, 2, 3, ""], 0.5]).replica is None
    broken_off = Circumstances(4, "one", 15.0, 0, served_known=False, paused_s=0.25, replica="a")
    assert Circumstances.from_wire(broken_off.to_wire()) == broken_off


def test_what_is_not_known_is_unknown() -> None:
    assert account_of(None, ran(range(9), cached=4), first=False) == Account(9, 4, {Cause.UNKNOWN: 5})
    assert account_of(ran(()), ran(range(9))) == Account(9, 0, {Cause.UNKNOWN: 9})
    nothing = Circumstances()
    account = account_of(BEFORE, ran(range(20), cached=8, at=2, circumstances=nothing))
    assert account == Account(20, 8, {Cause.UNKNOWN: 5, Cause.NEW: 7})
    interrupted = Ran("model", array("I"), 9, 0, 2.0, 3.0, HERE)
    assert account_of(BEFORE, interrupted) == Account(9, 0, {Cause.UNKNOWN: 9})


_tokens = st.lists(st.integers(0, 2), max_size=30)


@given(
    _tokens,
    _tokens,
    _tokens,
    st.none() | st.integers(0, 40),
    st.none() | st.integers(1, 5),
    st.sampled_from(["model", "other"]),
)
def test_every_token_is_counted_once(
    old: list[int], answer: list[int], prompt: list[int], cached: int | None, block_size: int | None, model: str
) -> None:
    circumstances = Circumstances(block_size, "one", 15.0, 0)
    unknown = cached is None
    now = ran(prompt, cached=cached or 0, unknown=unknown, at=2, model=model, circumstances=circumstances)
    account = account_of(ran(old, answer), now)
    assert account.served_tokens + sum(account.computed.values()) == len(prompt)
    assert all(tokens > 0 for tokens in account.computed.values())


SYSTEM: Message = {"role": "system", "content": "You help. It is 10:31."}
ASK: Message = {"role": "user", "content": "Look it up."}
ANSWER: Message = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": "{}"}}],
    "reasoning": "I should look.",
}
RESULT: Message = {"role": "tool", "content": "It is there."}
THANKS: Message = {"role": "user", "content": "Thanks."}
OLD = [SYSTEM, ASK, ANSWER, RESULT, ASK]


def parted(new: Sequence[Message], *, tools: Any = None, old_tools: Any = None, at: int = 3) -> Divergence | None:
    parameters: Mapping[str, Any] = {} if tools is None else {"tools": tools}
    old_parameters: Mapping[str, Any] = {} if old_tools is None else {"tools": old_tools}
    account = Account(20, 0, {Cause.DIVERGED: 10}, diverged_at=at)
    return divergence_of(account, (OLD, old_parameters, 18), (new, parameters))


@pytest.mark.parametrize(
    ("new", "message", "role", "change"),
    [
        ([{**SYSTEM, "content": "You help. It is 11:02."}, *OLD[1:], THANKS], 1, "system", Change.NUMBERS),
        ([{**SYSTEM, "content": "You help.\nIt is 10:31. "}, *OLD[1:], THANKS], 1, "system", Change.WHITESPACE),
        ([SYSTEM, {**ASK, "content": "Look here."}, *OLD[2:], THANKS], 2, "user", Change.CONTENT),
        ([SYSTEM, ASK, {**ANSWER, "tool_calls": []}, *OLD[3:], THANKS], 3, "assistant", Change.TOOL_CALLS),
        (
            [SYSTEM, ASK, {**ANSWER, "reasoning": None}, *OLD[3:], THANKS],
            3,
            "assistant",
            Change.REASONING_DROPPED,
        ),
        ([SYSTEM, ASK, {**ANSWER, "name": "x"}, *OLD[3:], THANKS], 3, "assistant", Change.FIELDS),
        ([{**SYSTEM, "name": "x"}, ASK, {**ANSWER, "content": "So."}, *OLD[3:]], 3, "assistant", Change.CONTENT),
        ([SYSTEM, THANKS, *OLD[1:], THANKS], 2, "user", Change.INSERTED),
        ([SYSTEM, *OLD[2:], THANKS], 2, "assistant", Change.REMOVED),
        ([SYSTEM, ASK, ANSWER], 4, "tool", Change.REMOVED),
        ([SYSTEM, ASK, ANSWER, ASK, THANKS], 4, "user", Change.REMOVED),
        ([SYSTEM, {**ASK, "content": "Summary."}, THANKS], 2, "user", Change.REPLACED),
    ],
)
def test_a_message_that_changed_is_named_with_the_kind_of_change(
    new: list[Message], message: int, role: str, change: Change
) -> None:
    assert parted(new) == Divergence(3, message, role, change)


def test_tools_that_changed_or_were_reordered_are_told_apart() -> None:
    one, two = {"function": {"name": "one"}}, {"function": {"name": "two"}}
    assert parted([*OLD, THANKS], tools=[two, one], old_tools=[one, two]) == Divergence(
        3, None, None, Change.TOOLS_REORDERED
    )
    assert parted([*OLD, THANKS], tools=[one], old_tools=[one, two]) == Divergence(3, None, None, Change.TOOLS_CHANGED)


def test_without_a_changed_message_it_is_the_answers_tokens_or_the_template() -> None:
    assert parted([*OLD, THANKS], at=18) == Divergence(18, None, None, Change.ANSWER_REWRITTEN)
    assert parted([*OLD, THANKS], at=17) == Divergence(17, None, None, Change.TEMPLATE)


CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}


@pytest.mark.parametrize(
    ("was", "is_now"),
    [
        ({"content": "Yes.", "alternatives": [{"content": "No."}]}, {"content": "Yes."}),
        ({"content": None, "tool_calls": [CALL]}, {"tool_calls": [CALL]}),
        ({"content": None, "tool_calls": [CALL]}, {"content": "", "tool_calls": [{**CALL, "id": "c2"}]}),
        (
            {"tool_calls": [CALL]},
            {"tool_calls": [{**CALL, "function": {"name": "look", "arguments": '{"at":1}'}}]},
        ),
        ({"content": "Yes."}, {"content": [{"type": "text", "text": "Yes."}]}),
        ({"content": "Yes."}, {"content": "Yes.", "refusal": None, "tool_calls": []}),
        ({"content": "Yes.", "reasoning": "So."}, {"content": "Yes.", "reasoning_content": "So."}),
    ],
)
def test_what_a_template_does_not_see_is_no_change_of_a_message(was: Message, is_now: Message) -> None:
    account = Account(30, 0, {Cause.DIVERGED: 2}, diverged_at=18)
    old, new = [SYSTEM, ASK, {"role": "assistant", **was}], [SYSTEM, ASK, {"role": "assistant", **is_now}, THANKS]
    assert divergence_of(account, (old, {}, 18), (new, {})) == Divergence(18, None, None, Change.ANSWER_REWRITTEN)


def test_within_the_answer_nothing_that_was_sent_before_it_can_be_the_change() -> None:
    reply: Message = {"role": "assistant", "content": "It is there.", "reasoning": "So."}
    old = [{**SYSTEM, "reasoning": "left out by the template"}, ASK, reply]

    def told(answer: Message, **parameters: Any) -> Divergence | None:
        account = Account(30, 0, {Cause.DIVERGED: 2}, diverged_at=18)
        return divergence_of(account, (old, {"tools": [1]}, 18), ([SYSTEM, ASK, answer, THANKS], parameters))

    assert told(reply, tools=[1, 2]) == Divergence(18, None, None, Change.ANSWER_REWRITTEN)
    assert told({**reply, "content": "It  is there."}, tools=[1, 2]) == Divergence(
        18, 3, "assistant", Change.WHITESPACE
    )
    dropped = told({"role": "assistant", "content": "It is there."})
    assert dropped == Divergence(18, 3, "assistant", Change.REASONING_DROPPED)


TOOLS = {"tools": [{"function": {"name": "one"}}]}


@pytest.mark.parametrize(
    ("old_parameters", "parameters", "change"),
    [
        ({"reasoning_effort": "low"}, {"reasoning_effort": "high"}, Change.PARAMETERS),
        ({}, {"response_format": {"type": "json_object"}}, Change.PARAMETERS),
        ({**TOOLS, "tool_choice": "none"}, TOOLS, Change.PARAMETERS),
        ({"tool_choice": "none"}, {}, Change.TEMPLATE),  # without tools a template does not get it
        ({"temperature": 0}, {"temperature": 1}, Change.TEMPLATE),
        ({"tools": None}, {"tools": []}, Change.TEMPLATE),
        ({**TOOLS, "reasoning_effort": "low"}, {}, Change.SEVERAL),
    ],
)
def test_parameters_count_that_a_template_can_read(
    old_parameters: Mapping[str, Any], parameters: Mapping[str, Any], change: Change
) -> None:
    account = Account(20, 0, {Cause.DIVERGED: 10}, diverged_at=3)
    told = divergence_of(account, (OLD, old_parameters, 18), ([*OLD, THANKS], parameters))
    assert told == Divergence(3, None, None, change)


def test_where_several_things_changed_none_of_them_is_named_for_certain() -> None:
    dated = [{**SYSTEM, "content": "You help. It is 11:02."}, *OLD[1:], THANKS]
    assert parted(dated, tools=[1], old_tools=[]) == Divergence(3, None, None, Change.SEVERAL)
    silent = [SYSTEM, ASK, {**ANSWER, "reasoning": None}, RESULT]
    assert parted([*silent, {**ASK, "content": "Look here."}]) == Divergence(3, None, None, Change.SEVERAL)
    assert parted([*silent]) == Divergence(3, None, None, Change.SEVERAL)
    assert parted([*silent, ASK, THANKS]) == Divergence(3, 3, "assistant", Change.REASONING_DROPPED)


def test_messages_that_are_known_to_be_the_same_are_not_looked_at() -> None:
    account = Account(20, 0, {Cause.DIVERGED: 10}, diverged_at=3)
    new = [{"role": "system", "content": "Never looked at."}, *OLD[1:], THANKS]
    told = divergence_of(account, (OLD, {}, 18), (new, {}), same_messages=1)
    assert told == Divergence(3, None, None, Change.TEMPLATE)


def test_a_message_that_moved_far_is_looked_for_no_further_than_is_quick() -> None:
    old = [{"role": "user", "content": str(number)} for number in range(2_000)]
    near, far = [{"role": "user", "content": "new"}] * 255, [{"role": "user", "content": "new"}] * 257
    account = Account(20, 0, {Cause.DIVERGED: 10}, diverged_at=3)
    told = [divergence_of(account, (old, {}, 18), ([old[0], *put_in, *old[1:]], {})) for put_in in (near, far)]
    assert told == [Divergence(3, 2, "user", Change.INSERTED), Divergence(3, 2, "user", Change.CONTENT)]


def test_a_completion_has_a_prompt_and_no_messages() -> None:
    account = Account(20, 0, {Cause.DIVERGED: 10}, diverged_at=3)
    assert divergence_of(account, ([], {"prompt": "a"}, 18), ([], {"prompt": "b"})) == Divergence(
        3, None, None, Change.PROMPT
    )


def test_nothing_of_a_text_is_in_what_is_told() -> None:
    told = repr(parted([{**SYSTEM, "content": "Secret words."}, *OLD[1:], THANKS]))
    assert "Secret" not in told
    assert "help" not in told


def test_what_destroys_prefixes_again_and_again_is_named_with_its_remedy() -> None:
    dated = Divergence(3, 1, "system", Change.NUMBERS)
    once = Divergence(9, 4, "user", Change.CONTENT)
    turns = [
        ExplainedTurn(1, 0.0, Account(50, 0, {Cause.FIRST_TURN: 50})),
        ExplainedTurn(2, 1.0, Account(60, 0, {Cause.DIVERGED: 47}, 3), dated),
        ExplainedTurn(3, 2.0, Account(60, 0, {Cause.DIVERGED: 48}, 3), dated),
        ExplainedTurn(4, 3.0, Account(60, 0, {Cause.DIVERGED: 5}, 9), once),
        ExplainedTurn(5, 4.0, Account(60, 0, {Cause.EXPIRED: 30})),
        ExplainedTurn(6, 5.0, Account(60, 0, {Cause.EXPIRED: 30})),
    ]
    found = findings_of(turns)
    assert [(each.what, each.message, each.role, list(each.turns), each.tokens) for each in found] == [
        (Change.NUMBERS, 1, "system", [2, 3], 95),
        (Cause.EXPIRED, None, None, [5, 6], 60),
    ]
    assert "date" in found[0].remedy


def test_every_change_has_a_remedy() -> None:
    assert set(Change) <= set(REMEDIES)


def test_the_remedy_of_what_expired_promises_nothing() -> None:
    assert "may" in REMEDIES[Cause.EXPIRED]
    assert "others wanted" not in REMEDIES[Cause.EXPIRED]


# From where, and what the engine said of it


def served_as(served: Served | None, **more: Any) -> Circumstances:
    return Circumstances(4, "one", 15.0, 0, served=served, **more)


def test_where_tokens_were_found_is_told_where_it_adds_up_to_what_was_found() -> None:
    found = Served(4, 8, 0)
    assert account_of(BEFORE, ran(range(20), cached=12, at=2, circumstances=served_as(found))).served == found
    assert account_of(BEFORE, ran(range(20), cached=8, at=2, circumstances=served_as(found))).served is None
    assert account_of(None, ran(range(20), cached=12, circumstances=served_as(found))).served == found


@pytest.mark.parametrize("cause", [Cause.EVICTED, Cause.EXPIRED, Cause.QUOTA, Cause.TIER_FAULT])
@pytest.mark.parametrize("at", [2.0, 17.0])
def test_the_engine_knows_why_what_it_had_is_gone(cause: Cause, at: float) -> None:
    now = ran(range(20), at=at, circumstances=served_as(Served(0, 0, 0, cause.value)))
    assert account_of(BEFORE, now).computed == {cause: 12, Cause.BLOCK_TAIL: 1, Cause.NEW: 7}


def test_a_fault_of_a_tier_is_told_though_the_engine_was_started_again() -> None:
    said = {
        reason: Circumstances(4, "two", 15.0, 0, served=Served(0, 0, 0, reason)) for reason in ("tier_fault", "quota")
    }
    lost = {reason: account_of(BEFORE, ran(range(20), at=2, circumstances=here)) for reason, here in said.items()}
    assert Cause.TIER_FAULT in lost["tier_fault"].computed
    assert Cause.ENGINE_RESTARTED in lost["quota"].computed


def test_the_same_messages_under_another_template_did_not_diverge() -> None:
    before = ran(range(10), [10, 11, 12], circumstances=served_as(None, template="a"))
    now = ran([*range(6), 99, *range(7, 20)], at=2, circumstances=served_as(None, template="b"))
    changed = account_of(before, now, history_came_again=True)
    assert changed.computed == {Cause.EVICTED: 4, Cause.BLOCK_TAIL: 2, Cause.TEMPLATE_CHANGED: 7, Cause.NEW: 7}
    assert changed.diverged_at is None
    assert Cause.DIVERGED in account_of(before, now).computed  # a message changed as well: the place is not certain
    same = ran([*range(6), 99, *range(7, 20)], at=2, circumstances=served_as(None, template="a"))
    assert Cause.DIVERGED in account_of(before, same, history_came_again=True).computed


def test_what_the_turn_before_had_too_is_counted() -> None:
    assert account_of(BEFORE, ran(range(20), cached=12, at=2)).repeated_tokens == 13
    assert account_of(BEFORE, ran([*range(6), 99, 100], at=2)).repeated_tokens == 6
    assert account_of(None, ran(range(20))).repeated_tokens == 0


def test_all_circumstances_are_read_as_they_were_written() -> None:
    told = Circumstances(
        4, "one", 15.0, 3, was_over=True, template="t", served=Served(1, 2, 3, "quota"), first_token_s=0.5
    )
    assert Circumstances.from_wire(told.to_wire()) == told
    assert Circumstances.from_wire([4, "one", 15.0, 0, True, False]).served is None
    assert Circumstances.from_wire(told.to_wire()[:-1]).first_token_s is None, "rows from before it was kept"


# What destroys prefixes

THAT_DAY, THAT_RUN = "Monday, 23 November 2026, 09:14 am", "3f2a9c1e-77aa-4d10-9f7e-0a1b2c3d4e5f"
SYSTEM_BEFORE = f"You help.\nIt is {THAT_DAY}. Call 17. Run {THAT_RUN}.\nBe brief."


@pytest.mark.parametrize(
    ("after", "change"),
    [
        (
            SYSTEM_BEFORE.replace(THAT_DAY, "Tuesday, 1 December 2026, 10:02 pm"),
            Change.NUMBERS,
        ),
        (SYSTEM_BEFORE.replace("Call 17", "Call 18"), Change.NUMBERS),
        (
            SYSTEM_BEFORE.replace(THAT_RUN, "90ab12cd-0011-4abc-8def-fedcba987654"),
            Change.NUMBERS,
        ),
        (SYSTEM_BEFORE.replace("Be brief", "Be long"), Change.CONTENT),
        (SYSTEM_BEFORE.replace("You help", "You may help"), Change.CONTENT),
    ],
)
def test_dates_counters_and_ids_are_told_from_other_changes(after: str, change: Change) -> None:
    assert changed_system(SYSTEM_BEFORE, after) is change


def test_a_date_in_a_long_text_is_found_and_no_text_is_so_long_that_comparing_it_holds_up_others() -> None:
    lines = [f"Rule {number}: be brief.\n" for number in range(100_000)]
    was = "".join(["It is 10:31.\n", *lines, "10:31"])
    assert changed_system(was, was.replace("10:31", "10:32")) is Change.NUMBERS
    all_of_it = "".join(f"Rule {number + 1}: be brief.\n" for number in range(100_000))
    assert changed_system("".join(lines), all_of_it) is Change.CONTENT
    few, renumbered = "".join(lines[:1000]), all_of_it[: sum(map(len, lines[1:1001]))]
    assert changed_system(few, renumbered) is Change.NUMBERS


def test_a_harness_line_that_changes_is_known_for_one() -> None:
    line = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch={};\n"
    was, is_now = line.format("fa690") + "You help.", line.format("0b1c2") + "You help."
    assert changed_system(was, is_now) is Change.HARNESS_LINE
    assert changed_system(was, is_now.replace("help", "wait")) is Change.CONTENT


def changed_system(was: str, is_now: str) -> Change:
    question = {"role": "user", "content": "Hi"}
    before: list[Message] = [{"role": "system", "content": was}, question, {"role": "assistant", "content": "Yes"}]
    now: list[Message] = [{"role": "system", "content": is_now}, question, before[2], question]
    account = Account(30, 0, {}, diverged_at=3)
    divergence = divergence_of(account, (before, {}, 12), (now, {}))
    assert divergence is not None
    assert (divergence.message, divergence.role) == (1, "system")
    return divergence.change


def test_reasoning_that_a_template_leaves_out_is_told_by_what_stands_behind_it() -> None:
    question: Message = {"role": "user", "content": "Hi"}
    answer: Message = {"role": "assistant", "content": "Yes, of course.", "reasoning": "Let me think."}
    old_ids = array("I", [*range(10), *range(500, 520), *range(10, 18)])  # prompt, reasoning, answer
    account = Account(30, 0, {}, diverged_at=10)

    def told(new_ids: Sequence[int]) -> Change:
        divergence = divergence_of(
            account,
            ([question, answer], {}, 10),
            ([question, answer, question], {}),
            token_ids=(old_ids, array("I", new_ids)),
        )
        assert divergence is not None
        return divergence.change

    assert told([*range(18)]) is Change.REASONING_LEFT_OUT
    assert told([*range(10), *range(700, 708)]) is Change.ANSWER_REWRITTEN


def test_reasoning_is_left_out_of_earlier_answers_too() -> None:
    said: list[Message] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "One", "reasoning": "Hm"},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "Two"},
    ]
    old_ids = array("I", [*range(5), 900, 901, 902, *range(5, 20)])
    account = Account(30, 0, {}, diverged_at=5)
    now = [*said, {"role": "user", "content": "Go on"}]
    left_out = divergence_of(account, (said, {}, 22), (now, {}), token_ids=(old_ids, array("I", range(30))))
    assert left_out == Divergence(5, None, None, Change.REASONING_LEFT_OUT)
    unlike = divergence_of(
        account, (said, {}, 22), (now, {}), token_ids=(old_ids, array("I", [*range(5), *range(50, 80)]))
    )
    assert unlike == Divergence(5, None, None, Change.TEMPLATE)
