"""The judgement of an answer: what a tier is shown to have had decides what a miss means, in both directions."""

from collections.abc import Mapping

import pytest

from api.proving.asking import Said
from api.proving.expectations import Bounds
from api.proving.judgement import Verdict, judged, shows

BLOCK = 32
NOTHING = Bounds(0, 0)
SYSTEM = Bounds(128, 160)
AT_MOST_SYSTEM = Bounds(0, 160)
EVERYTHING = Bounds(256, 320)


def said(tiers: Mapping[str, int] | None = None, *, cached: int | None = None) -> Said:
    """An answer to a prompt of 320 tokens, found in tiers."""
    tiers = tiers or {}
    told = {tier: tiers.get(tier, 0) for tier in ("device", "dram", "disk")} if cached is None else {}
    return Said("", "length", 320, sum(tiers.values()) if cached is None else cached, told, 0.0, None)


@pytest.mark.parametrize(
    ("found", "wanted", "tier", "verdict"),
    [
        # What must not be found.
        ({}, NOTHING, "dram", Verdict.PASS),
        ({}, NOTHING, "disk", Verdict.PASS),
        ({}, AT_MOST_SYSTEM, "dram", Verdict.PASS),
        ({"dram": 160}, AT_MOST_SYSTEM, "dram", Verdict.PASS),
        ({"dram": 32}, NOTHING, "dram", Verdict.FAIL),
        ({"device": 32}, NOTHING, "dram", Verdict.FAIL),
        ({"disk": 32}, NOTHING, "dram", Verdict.FAIL),
        ({"dram": 192}, AT_MOST_SYSTEM, "dram", Verdict.FAIL),
        ({"disk": 192}, SYSTEM, "disk", Verdict.FAIL),
        # What must be.
        ({"dram": 288}, EVERYTHING, "dram", Verdict.PASS),
        ({"device": 96, "dram": 192}, EVERYTHING, "dram", Verdict.PASS),
        ({"disk": 160}, SYSTEM, "disk", Verdict.PASS),
        ({}, EVERYTHING, "dram", Verdict.FAIL),
        ({}, SYSTEM, "disk", Verdict.FAIL),
        ({"dram": 96}, EVERYTHING, "dram", Verdict.FAIL),
        ({"disk": 288}, EVERYTHING, "dram", Verdict.FAIL),  # the tier in front of it had it, and did not give it
        ({"dram": 288}, EVERYTHING, "device", Verdict.FAIL),
        ({"device": 288}, EVERYTHING, "dram", Verdict.UNKNOWN),  # it was still there, so that the tier was not asked
        ({"dram": 288}, EVERYTHING, "disk", Verdict.UNKNOWN),
    ],
)
def test_where_the_tier_had_the_prompt_every_sharing_that_is_wrong_fails(
    found: Mapping[str, int], wanted: Bounds, tier: str, verdict: Verdict
) -> None:
    assert judged(said(found), wanted, tier, was_there=True)[0] is verdict


@pytest.mark.parametrize(
    ("found", "wanted", "verdict"),
    [
        ({}, NOTHING, Verdict.UNKNOWN),
        ({}, AT_MOST_SYSTEM, Verdict.UNKNOWN),
        ({}, EVERYTHING, Verdict.UNKNOWN),
        ({"dram": 96}, EVERYTHING, Verdict.UNKNOWN),
        ({"disk": 288}, EVERYTHING, Verdict.UNKNOWN),
        ({"dram": 288}, EVERYTHING, Verdict.PASS),
        ({"dram": 32}, NOTHING, Verdict.FAIL),
        ({"dram": 192}, SYSTEM, Verdict.FAIL),
    ],
)
def test_where_no_control_shows_that_it_had_only_what_was_found_counts(
    found: Mapping[str, int], wanted: Bounds, verdict: Verdict
) -> None:
    assert judged(said(found), wanted, "dram", was_there=False)[0] is verdict


def test_it_is_said_which_tier_gave_what_and_why_nothing_can_be_told() -> None:
    assert judged(said({"device": 32, "dram": 64}), NOTHING, "dram", was_there=True)[1] == (
        "96 tokens; 32 from device, 64 from dram"
    )
    assert "not shown to have had it" in judged(said(), NOTHING, "dram", was_there=False)[1]


def test_an_engine_that_does_not_tell_tiers_has_the_device_alone() -> None:
    assert judged(said(cached=288), EVERYTHING, "device", was_there=True)[0] is Verdict.PASS
    assert judged(said(cached=288), EVERYTHING, "dram", was_there=True)[0] is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("controls", "shown"),
    [
        (({"dram": 288}, {"dram": 288}), True),
        (({"device": 32, "dram": 256}, {"dram": 288}), True),
        (({"dram": 288}, {}), False),  # what was kept after the prompts was given up: so they may have been
        (({"dram": 288}, {"dram": 96}), False),
        (({"dram": 288}, {"device": 288}), False),
        (({"disk": 288}, {"dram": 288}), False),
    ],
)
def test_controls_show_what_a_tier_had_when_each_found_its_whole_prompt_there(
    controls: tuple[Mapping[str, int], ...], shown: bool
) -> None:
    assert shows([said(each) for each in controls], "dram", block_size=BLOCK) is shown
