"""What an event may hold is what the catalogue says of its class."""

import dataclasses
import re
import warnings

import pytest

from appliance.audit.entry import canonical
from appliance.audit.events import (
    CATALOGUE,
    GATEWAY_STOPPED,
    MAX_TEXT,
    OF_ANY_REQUEST,
    SYSTEM,
    TURN_ADMITTED,
    Event,
    EventClass,
    UndeclaredName,
    documentation,
)
from appliance.audit.siem import cef, ecs, leef
from tests.unit.audit.making import event


@pytest.mark.parametrize(
    ("counts", "details", "told"),
    [
        ({"prompt_bytes": 1, "promt_tokens": 2}, {}, "counts.promt_tokens"),
        ({}, {"prompt": "?"}, "details.prompt"),
        ({"b": 1, "a": 2}, {"c": "?"}, "counts.a, counts.b, details.c"),
    ],
)
def test_a_name_that_the_class_does_not_declare_is_refused_where_the_event_is_made(
    counts: dict[str, int], details: dict[str, str], told: str
) -> None:
    with pytest.raises(UndeclaredName, match=rf"turn\.admitted has no {told}: say in .*events\.py") as refused:
        dataclasses.replace(event(), counts=counts, details=details)
    assert isinstance(refused.value, ValueError)


def test_a_name_of_another_class_is_refused() -> None:
    assert "bytes" in {name for kind in CATALOGUE.values() for name in kind.counts}
    with pytest.raises(UndeclaredName, match=r"gateway\.stopped has no counts\.bytes"):
        Event(GATEWAY_STOPPED, SYSTEM, counts={"bytes": 1})


def test_where_the_appliance_runs_the_event_is_recorded_without_what_nobody_declared_and_says_so() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        happened = dataclasses.replace(
            event(), counts={"prompt_bytes": 7, "words": 3}, details={"key_id": "key_1", "prompt": "What is 2 + 2?"}
        )
    record = happened.record({})
    assert record["counts"] == {"prompt_bytes": 7}
    assert record["details"] == {"key_id": "key_1"}
    assert record["cut"] == ["counts.words", "details.prompt"]
    (warning,) = told
    assert "2 + 2" not in str(warning.message)


def test_whoever_makes_the_event_is_named() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        Event(GATEWAY_STOPPED, SYSTEM, counts={"bytes": 1})
    assert told[0].filename == __file__


def test_undeclared_names_are_bounded_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [f"{number:03d}\n" + "x" * 400 for number in range(500)]
        record = dataclasses.replace(event(), details=dict.fromkeys(names, "?")).record({})
    assert "details" not in record
    assert len(record["cut"]) == 17
    assert record["cut"][-1] == "details: 484 more"
    assert all(len(each) <= MAX_TEXT and each.isprintable() for each in record["cut"])


@pytest.mark.parametrize("kind", CATALOGUE.values(), ids=lambda kind: str(kind.action))
def test_all_that_a_class_may_have_is_recorded_in_bounds_and_documented(kind: EventClass) -> None:
    whole = Event(
        kind, SYSTEM, counts=dict.fromkeys(kind.counts, 2**63), details=dict.fromkeys(kind.details, "é" * 999)
    )
    record = whole.record({})
    assert record.get("counts", {}).keys() == kind.counts.keys()
    assert record.get("details", {}).keys() == kind.details.keys()
    assert record.get("cut", []) == sorted(f"details.{name}" for name in kind.details)
    assert len(canonical(record)) < 16 << 10
    page = documentation()
    for place, declared in (("counts", kind.counts), ("details", kind.details)):
        for name, meaning in declared.items():
            said_once = (name, meaning) in OF_ANY_REQUEST.items()
            assert f"`{place}.{name}`" if said_once else f"| `{kind.action}` | `{place}.{name}` | {meaning} |" in page
            assert meaning
            assert "|" not in meaning


def test_a_class_is_told_from_another_by_more_than_what_it_may_have() -> None:
    assert len({hash(kind) for kind in CATALOGUE.values()}) == len(CATALOGUE)
    assert TURN_ADMITTED in set(CATALOGUE.values())


def test_the_counts_that_the_formats_have_a_place_for_are_declared() -> None:
    held = [each.holds for each in (*cef.FIELDS, *leef.ATTRIBUTES)] + [holds for _, holds in ecs.FIELDS]
    placed = set(re.findall(r"`counts\.(\w+)`", " ".join(held)))
    assert placed == {"count", "duration_ms"}
    assert placed <= {name for kind in CATALOGUE.values() for name in kind.counts}
