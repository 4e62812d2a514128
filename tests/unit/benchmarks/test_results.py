"""README's table of results: every figure beside its bar, and what could not be measured said so."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.results import MS, PERCENT, Benchmark, Figure, Measured, machine, table, taken

MADE_UP = Benchmark(
    "made-up",
    "A made-up one",
    "made_up",
    (
        Figure("sooner", PERCENT, lambda printed: float(printed["sooner"]), least=0.9),
        Figure("added", MS, lambda printed: float(printed["added"]), most=2),
    ),
)


def printed(**figures: float) -> bytes:
    return json.dumps(figures).encode()


def test_a_figure_stands_with_its_unit_beside_its_bar_and_a_miss_is_said() -> None:
    lines = table([taken(MADE_UP, printed(sooner=0.912, added=2.01), 1)]).splitlines()
    assert lines[2] == "| **A made-up one** (`.venv/bin/python -m benchmarks.made_up`) | | |"
    assert lines[3] == "| sooner | 91.2 % | at least 90.0 % |"
    assert lines[4] == "| added | 2.01 ms, **missed** | at most 2.00 ms |"


def test_how_much_later_than_vanilla_a_first_token_comes_is_told_as_it_is_too_and_held_to_nothing() -> None:
    (larger,) = [each for each in results.BENCHMARKS if each.name == "stateful-140m"]
    arm = {"ttft_p50_s": 0.1, "account_per_turn": {"lost": 0.0}}
    said = {"prefill_reduction": 0.98, "ttft_reduction": 0.9, "ttft_over_vanilla_p50_s": 0.006}
    lines = table([taken(larger, json.dumps({**said, "stateful": arm, "vanilla": arm}).encode(), 0)]).splitlines()
    assert lines[-2].startswith(
        "| first token later than vanilla vLLM's of the same turn, less 5.0 % of it | 1.00 ms |"
    )
    assert lines[-1] == "| first token later than vanilla vLLM's of the same turn | 6.00 ms |  |"


@pytest.mark.parametrize(
    ("said", "status", "why"),
    [(b"", -9, "ended with -9"), (b"no JSON", 1, "ended with 1"), (b'{"sooner": 1}', 0, "KeyError: 'added'")],
)
def test_what_could_not_be_measured_is_a_line_that_says_why(said: bytes, status: int, why: str) -> None:
    measured = taken(MADE_UP, said, status)
    assert not measured.holds
    line = table([measured]).splitlines()[-1]
    assert line.startswith("| not measured | ")
    assert why in line


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, measured: Measured) -> int:
    monkeypatch.setattr(results, "BENCHMARKS", (MADE_UP,))
    monkeypatch.setattr(results, "measure", lambda *_, **__: measured)
    return results.main(arguments)


@pytest.mark.parametrize(
    ("measured", "arguments", "status"),
    [
        (Measured(MADE_UP, (0.95, 1.0)), ["--check"], 0),
        (Measured(MADE_UP, (0.95, 3.0)), ["--check"], 1),
        (Measured(MADE_UP, (0.95, 3.0)), [], 0),
        (Measured(MADE_UP, failure="it broke"), [], 1),
    ],
)
def test_a_miss_is_a_failure_where_it_is_asked_for_and_what_was_not_measured_always(
    monkeypatch: pytest.MonkeyPatch, measured: Measured, arguments: list[str], status: int
) -> None:
    assert run(monkeypatch, *arguments, measured=measured) == status


def test_the_table_says_what_machine_it_was_and_that_a_short_run_is_for_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--short", measured=Measured(MADE_UP, (0.95, 1.0)))
    assert capsys.readouterr().out.startswith(f"{machine()}, a fraction of the work: these figures are for nobody:\n")


def test_an_environment_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    nowhere = dataclasses.replace(MADE_UP, environment=".venv-engine")
    assert results.measure(nowhere, short=True).failure == "there is no .venv-engine: `make test` installs it"


def test_a_benchmark_is_run_and_its_figures_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    results.main(["--only", "disk", "--short", "--json"])
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    (disk,) = record["benchmarks"]
    assert (disk["name"], disk["failure"], record["short"]) == ("disk", None, True)
    assert all(each["value"] > 0 for each in disk["figures"])
    assert [each["bar"] for each in disk["figures"]] == ["at least 80.0 %"] * 2 + ["at most 1.00 cores"] * 2


def page(*rows: str) -> str:
    return "\n".join(("Before.", results.TABLE_BEGINS, *rows, results.TABLE_ENDS, "After."))


def test_what_was_measured_goes_into_the_page_and_what_was_not_stays_as_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other, new = (dataclasses.replace(MADE_UP, title=title) for title in ("Another one", "A new one"))
    monkeypatch.setattr(results, "BENCHMARKS", (MADE_UP, other, new))
    first = results.with_results(page(), [Measured(MADE_UP, (0.95, 1.0)), Measured(other, (0.96, 1.0))])
    second = results.with_results(first, [Measured(MADE_UP, (0.97, 1.0))])
    assert second.startswith("Before.\n")
    assert second.endswith("After.")
    assert [line.split(" | ")[:2] for line in second.splitlines() if line.startswith("| ")] == [
        ["|", "measured"],
        ["| **A made-up one** (`.venv/bin/python -m benchmarks.made_up`)", "| |"],
        ["| sooner", "97.0 %"],
        ["| added", "1.00 ms"],
        ["| **Another one** (`.venv/bin/python -m benchmarks.made_up`)", "| |"],
        ["| sooner", "96.0 %"],
        ["| added", "1.00 ms"],
        ["| **A new one** (`.venv/bin/python -m benchmarks.made_up`)", "| |"],
        ["| not measured", "yet"],
    ]


def test_what_was_measured_on_another_machine_than_the_rest_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(MADE_UP, title="Another one")
    both = [Measured(MADE_UP, (0.95, 1.0)), Measured(other, (0.96, 1.0))]
    monkeypatch.setattr(results, "BENCHMARKS", (MADE_UP, other))
    monkeypatch.setattr(results, "machine", lambda: "one machine")
    first = results.with_results(page(), both)
    assert (first.count("machine"), first.count("one machine:\n\n| | measured")) == (1, 1)
    monkeypatch.setattr(results, "machine", lambda: "another machine")
    second = results.with_results(first, both[:1])
    assert "one machine:\n\n| | measured" in second
    where = second.index("| on another machine: | | |\n| sooner | 95.0 %")
    assert second.index("A made-up one") < where < second.index("Another one")
    assert second.count("| on ") == 1
    assert results.with_results(second, both[:1]) == second
    third = results.with_results(second, both)
    assert (third.count("machine"), third.count("another machine:\n\n| | measured")) == (1, 1)
    monkeypatch.setattr(results, "machine", lambda: "one machine")
    assert results.with_results(second, both[:1]) == first


def test_a_page_without_a_place_for_the_table_is_left_alone() -> None:
    with pytest.raises(ValueError, match="no place"):
        results.with_results("Before.\nAfter.", [])


def test_what_is_replayed_is_found_beside_the_repository_or_where_it_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(results, "REPOSITORY", tmp_path / "repository")
    simulator, traces = tmp_path / results.SIMULATOR, tmp_path / results.TRACES
    assert results.replayed_from(None, None) == ([], list(results.REPLAYED))
    simulator.parent.mkdir(parents=True)
    simulator.touch()
    assert results.replayed_from(None, None) == (["--simulator", str(simulator)], ["--traces", "FOLDER"])
    traces.mkdir(parents=True)
    assert results.replayed_from(None, None) == (["--simulator", str(simulator), "--traces", str(traces)], [])
    said = results.replayed_from(Path("/there/simulator.py"), None)
    assert said == (["--simulator", "/there/simulator.py", "--traces", str(traces)], [])


def test_without_what_is_replayed_the_option_is_named_and_all_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "repository" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "repository" / ".venv" / "bin" / "python").symlink_to("/bin/false")
    monkeypatch.setattr(results, "REPOSITORY", tmp_path / "repository")
    needy, other = dataclasses.replace(MADE_UP, name="needy", replays=True), MADE_UP
    monkeypatch.setattr(results, "BENCHMARKS", (needy, other))
    assert results.main(["--json", "--traces", str(tmp_path)]) == 1
    said = capsys.readouterr()
    first, second = json.loads(said.out)["benchmarks"]
    assert first["failure"] == "it needs --simulator FILE"
    assert second["failure"].startswith("it ended with 1"), "it was run"
    assert "needy: not measured: it needs --simulator FILE\n" in said.err


def test_readme_has_every_benchmark_and_each_of_its_figures_beside_its_bar() -> None:
    _, begins, rest = results.README.read_text().partition(results.TABLE_BEGINS)
    assert begins
    stands: dict[str, list[tuple[str, str]]] = {}
    for line in rest.partition(results.TABLE_ENDS)[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| **"):
            figures = stands.setdefault(line, [])
        elif stands and line and not line.startswith(results.ELSEWHERE):
            figures.append((cells[0], cells[2]))
    assert list(stands) == [results._head(each) for each in results.BENCHMARKS], "run it with --readme"
    for each, figures in zip(results.BENCHMARKS, stands.values(), strict=True):
        assert figures in ([("not measured", "")], [(figure.what, figure.bar) for figure in each.figures])
