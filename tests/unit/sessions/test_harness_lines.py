"""Known lines of a harness's own accounting: taken out whole, and nothing else with them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.sessions.harness_lines import take_out_harness_lines, without_harness_lines

LINE = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (LINE, ""),
        (f"{LINE}\nYou help.", "You help."),
        (f"You help.\n{LINE}\r\nBe brief.", "You help.\nBe brief."),
        (f"{LINE}\n{LINE}\nYou help.", "You help."),
    ],
)
def test_the_whole_line_goes_and_its_end(text: str, left: str) -> None:
    without, lines = without_harness_lines(text)
    assert without == left
    assert lines == text.count(LINE)


@pytest.mark.parametrize("text", [f"Say {LINE}", f" {LINE}", "x-anthropic-other: 1\nYou help.", LINE.upper(), ""])
def test_what_only_looks_like_one_stays(text: str) -> None:
    assert without_harness_lines(text) == (text, 0)


@given(st.lists(st.sampled_from(["a", "", LINE, "x-anthropic", "b c"])))
def test_every_other_line_stays_as_it_was(lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    assert without_harness_lines(text)[0] == "".join(f"{line}\n" for line in lines if line != LINE)


def test_only_what_a_system_says_is_looked_at() -> None:
    theirs = [{"role": role, "content": f"{LINE}\nhello"} for role in ("user", "assistant", "tool")]
    kept, lines = take_out_harness_lines(theirs)
    assert lines == 0
    assert kept is theirs
    for role in ("system", "developer"):
        kept, lines = take_out_harness_lines([{"role": role, "content": f"{LINE}\nhello", "name": "n"}, theirs[0]])
        assert (kept, lines) == ([{"role": role, "content": "hello", "name": "n"}, theirs[0]], 1)


def test_a_part_that_is_nothing_else_is_left_out() -> None:
    parts = [{"type": "text", "text": LINE}, {"type": "text", "text": f"{LINE}\nYou help."}, {"type": "image_url"}]
    kept, lines = take_out_harness_lines([{"role": "system", "content": parts}])
    assert lines == 2
    assert kept == [{"role": "system", "content": [{"type": "text", "text": "You help."}, {"type": "image_url"}]}]
