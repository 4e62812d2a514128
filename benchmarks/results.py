"""README's table of results. `.venv/bin/python -m benchmarks.results [--only NAME]… [--json] [--short] [--check]
[--simulator FILE --traces FOLDER] [--readme]`.

Runs every benchmark that is held to a bar, one after another, each in the environment that it needs, and prints what
came of them as a table in Markdown, or with `--json` as one object. It takes about half an hour; what else the machine
does meanwhile is in the figures.

Rules:

- A bar that a figure stands beside is the benchmark's own. A figure that is told for its own sake has none.
- What could not be measured is a line that says why, never one that is missing.
- `--short` asks each benchmark for a fraction of its work, to see that it runs: its figures are for nobody.

`--simulator` and `--traces` are what `retention` replays, which is not in this repository: what is not given is looked
for beside it, as `shared/tools/kvsim.py` and `shared/data/agent-traces`. `--readme` puts what was measured into
README's table, and leaves what was not as it stands there, with the machine that it was measured on. `--check` leaves
with 1 when a figure misses its bar; when one could not be measured it is 1 in any case.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks import audit, disk_tier, engine_bars, gateway_overhead, retention, siem, stateful, streams

REPOSITORY: Final = Path(__file__).parent.parent
README: Final = REPOSITORY / "README.md"
TABLE_BEGINS: Final = "<!-- from here on: python -m benchmarks.results --readme -->\n"
TABLE_ENDS: Final = "<!-- up to here -->\n"
REPLAYED: Final = ("--simulator", "FILE", "--traces", "FOLDER")
SIMULATOR: Final = Path("shared", "tools", "kvsim.py")  # beside the repository
TRACES: Final = Path("shared", "data", "agent-traces")
ELSEWHERE: Final = "| on "
_HEADINGS: Final = ("| | measured | bar |", "|---|---|---|")
_DEADLINE_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Unit:
    """How numbers of a kind are written.

    Attributes:
        text: the format of one.
        times: what it is multiplied with first.
    """

    text: str
    times: float = 1.0

    def of(self, value: float) -> str:
        """A number with its unit."""
        return self.text.format(self.times * value)


PERCENT: Final = Unit("{:.1f} %", 100)
PERCENT_2: Final = Unit("{:.2f} %", 100)
TIMES: Final = Unit("{:.1f} times")
TIMES_2: Final = Unit("{:.2f} times")
MS: Final = Unit("{:.2f} ms")
S_IN_MS: Final = Unit("{:.2f} ms", 1000)
S: Final = Unit("{:.2f} s")
MORE_MB: Final = Unit("{:.1f} MB")
MB: Final = Unit("{:.1f} MB", 1e-6)
COUNT: Final = Unit("{:,.0f}")
PER_S: Final = Unit("{:,.0f}/s")
BYTES: Final = Unit("{:,.0f} bytes")
CORES: Final = Unit("{:.2f} cores")


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table.

    Attributes:
        read: takes it from what the benchmark printed.
        least, most: its bar, one of the two; none: it is told for its own sake.
    """

    what: str
    unit: Unit
    read: Callable[[Any], float]
    least: float | None = None
    most: float | None = None

    @property
    def bar(self) -> str:
        """What it is held to."""
        if self.least is not None:
            return f"at least {self.unit.of(self.least)}"
        return f"at most {self.unit.of(self.most)}" if self.most is not None else ""

    def holds(self, value: float) -> bool:
        """Whether a value reaches the bar."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark, and what is taken from it.

    Attributes:
        title: what it says something about.
        arguments: in any case; `short`: for a fraction of its work.
        environment: the folder of the environment that it needs.
        replays: it needs `REPLAYED`, too.
    """

    name: str
    title: str
    module: str
    figures: Sequence[Figure]
    arguments: Sequence[str] = ()
    short: Sequence[str] = ()
    environment: str = ".venv"
    replays: bool = False

    @property
    def command(self) -> str:
        """What a person types for it alone."""
        replayed = REPLAYED if self.replays else ()
        return " ".join(
            (f"{self.environment}/bin/python", "-m", f"benchmarks.{self.module}", *self.arguments, *replayed)
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a benchmark: a value for each of its figures, or why there is none."""

    benchmark: Benchmark
    values: Sequence[float] = ()
    failure: str = ""

    @property
    def holds(self) -> bool:
        """Whether every figure reaches its bar."""
        figures = self.benchmark.figures
        return not self.failure and all(each.holds(value) for each, value in zip(figures, self.values, strict=True))


# What is taken from each


def _at(*path: str) -> Callable[[Any], float]:
    """Reads the number at a path of names."""

    def read(printed: Any) -> float:
        for name in path:
            printed = printed[name]
        return float(printed)

    return read


def _same_turns(printed: Any) -> float:
    parted = printed["first_divergence"]
    return 1.0 if parted is None else float(parted["turn"] / printed["turns"])


def _lost(printed: Any) -> float:
    stateful_lost, vanilla_lost = (printed[arm]["account_per_turn"]["lost"] for arm in ("stateful", "vanilla"))
    return float(stateful_lost - vanilla_lost)


def _later_s(printed: Any) -> float:
    return float(printed["ttft_over_vanilla_p50_s"] - stateful.TTFT_NOISE * printed["vanilla"]["ttft_p50_s"])


_PROMPTNESS: Final = (
    Figure("time to first token less than stateless", PERCENT, _at("ttft_reduction"), least=stateful.TTFT_REDUCTION),
    Figure(
        f"first token later than vanilla vLLM's of the same turn, less {PERCENT.of(stateful.TTFT_NOISE)} of it",
        S_IN_MS,
        _later_s,
        most=stateful.TTFT_ADDED_S,
    ),
    Figure("first token later than vanilla vLLM's of the same turn", S_IN_MS, _at("ttft_over_vanilla_p50_s")),
)
_STATEFUL: Final = (
    Figure(
        "prefilled tokens fewer than stateless", PERCENT, _at("prefill_reduction"), least=stateful.PREFILL_REDUCTION
    ),
    Figure("tokens a turn that vanilla vLLM finds again and it does not", COUNT, _lost, most=0),
    *_PROMPTNESS,
)


def _added_ms(name: str) -> Callable[[Any], float]:
    return _at("added", name)


def _tier(arm: str, figure: str) -> Callable[[Any], float]:
    """How many times less a server with tiers takes than vanilla vLLM."""

    def read(printed: Any) -> float:
        taken = {each["arm"]: each[figure] for each in printed}
        return float(taken["vanilla"] / max(taken[arm], 1e-9))

    return read


def _more_than_vanilla(printed: Any) -> float:
    computed = {each["arm"]: each["computed_tokens"] for each in printed}
    return float(computed["leases"] - computed["vanilla"])


_MOST_TIMES: Final = 1 + engine_bars.MOST_LONGER


def _step(move: str, arm: str = "paced") -> Callable[[Any], float]:
    """A decode step beside one in which nothing moves."""
    return _at(move, arm, "step")


def _retention() -> Iterator[Figure]:
    for part, of in (("bars", ""), ("others", f"{retention.OTHERS} made sessions, ")):
        for setting, least in retention.LEAST_DISTANCE.items():
            yield Figure(f"{of}{setting}: in tokens recomputed", PERCENT, _at(part, setting, "distance"), least=least)
        for setting, least in retention.LEAST_DISTANCE_IN_LOADS.items():
            yield Figure(
                f"{of}{setting}: in loads from DRAM", PERCENT, _at(part, setting, "distance_in_loads"), least=least
            )
        yield Figure(
            f"{of}tokens recomputed more than by LRU, in the worst run", PERCENT, _worst(part, "recomputed"), most=0
        )
        yield Figure(
            f"{of}waiting more than with LRU, in the worst run",
            PERCENT,
            _worst(part, "waited"),
            most=retention.MOST_MORE_WAITING,
        )


def _worst(part: str, what: str) -> Callable[[Any], float]:
    return lambda printed: max(float(figures[f"{what}_more_worst"]) for figures in printed[part].values())


def _reclaimed(printed: Any) -> float:
    """Of the blocks that were new: what the next step wants is reclaimed in the one before, for each request."""
    decode = printed["decode"]
    return float(decode["reclaimed_blocks"] / (decode["new_blocks"] - decode["running"]))


def _errors(printed: Any) -> float:
    return float(sum(target["errors"] for target in printed["targets"].values()))


def _ratio(one: str, other: str) -> Callable[[Any], float]:
    return lambda printed: float(printed["figures"][one] / printed["figures"][other])


def _verified(printed: Any) -> float:
    figures = printed["figures"]
    return float(
        max(figures["verified_per_s"] / audit.VERIFIED_PER_S, figures["share_of_hashing"] / audit.SHARE_OF_HASHING)
    )


def _more_memory_mb(printed: Any) -> float:
    return float(printed["figures"]["verify_rss_whole_mb"] - printed["figures"]["verify_rss_tenth_mb"])


BENCHMARKS: Final = (
    Benchmark(
        "stateful",
        "What keeping state is worth: the last ten turns of an agent loop of 50, demonstration model",
        "stateful",
        (
            # What is promised of times is so of the larger model: to this one the gateway's few milliseconds are many.
            *(replace(figure, least=None, most=None) if figure in _PROMPTNESS else figure for figure in _STATEFUL),
            Figure("turns before an answer differs between the arms", PERCENT, _same_turns, least=1),
        ),
        arguments=("--model", "demo"),
        short=("--turns", "12"),
    ),
    Benchmark(
        "stateful-140m",
        "The same, on a random model of 140 million parameters",
        "stateful",
        _STATEFUL,
        arguments=("--model", "random-140m"),
        short=("--turns", "12"),
    ),
    Benchmark(
        "tiers",
        "When the device holds a third of what six agents need: turns after each one's first, against vanilla vLLM",
        "tiers",
        (
            Figure("leases, no tiers: tokens computed beyond vanilla's", COUNT, _more_than_vanilla, most=0),
            Figure(
                "DRAM for all: fewer tokens computed",
                TIMES,
                _tier("dram", "computed_tokens"),
                least=engine_bars.FEWER_TOKENS,
            ),
            Figure(
                "DRAM for all: first token sooner, median", TIMES, _tier("dram", "ttft_p50_s"), least=engine_bars.SOONER
            ),
            Figure(
                "DRAM for half, the encrypted disk behind it: fewer tokens computed",
                TIMES,
                _tier("dram+disk", "computed_tokens"),
                least=engine_bars.FEWER_TOKENS,
            ),
        ),
        short=("--agents", "3", "--turns", "2"),
        environment=".venv-engine",
    ),
    Benchmark(
        "recall",
        "What it is worth to have read KV from the disk before its request comes",
        "recall",
        (
            Figure("first token sooner, median", TIMES, _at("sooner"), least=engine_bars.NO_LATER),
            Figure("recalled blocks that were used", PERCENT, _at("used_share"), least=1),
        ),
        short=("--agents", "2", "--tokens", "512"),
        environment=".venv-engine",
    ),
    Benchmark(
        "leases",
        "What retention costs the engine at 10,000 idle sessions",
        "leases",
        (
            Figure(
                "policy, account and connector, of a decode step",
                PERCENT_2,
                _at("decode", "demo_share"),
                most=engine_bars.MOST_SHARE,
            ),
            Figure("new blocks meanwhile that were reclaimed from an idle session", PERCENT, _reclaimed, least=1),
            Figure(
                "an idle session's memory on the device, of 3,200 tokens",
                BYTES,
                _at("memory", "bytes_per_session"),
                most=engine_bars.MOST_BYTES,
            ),
            Figure(
                "first token of 80 % of a pool that is wholly leased, later than on an empty one",
                PERCENT,
                _at("first_token", "slower"),
                most=engine_bars.MOST_SLOWER,
            ),
        ),
        environment=".venv-engine",
    ),
    Benchmark(
        "demotion",
        "What a decode step takes while KV leaves the device, or is released, against one in which nothing does",
        "demotion",
        (
            Figure("a session of 3,200 tokens is copied to DRAM", TIMES_2, _step("demotion"), most=_MOST_TIMES),
            Figure("its longest step", TIMES_2, _at("demotion", "paced", "longest")),
            Figure("the longest if it were copied at once", TIMES_2, _step("demotion", "at_once")),
            Figure("138,000 tokens in DRAM are released and overwritten", TIMES_2, _step("release"), most=_MOST_TIMES),
            Figure("the release's own call, of a step", TIMES_2, _at("release", "paced", "call")),
            Figure("the call if they were overwritten at once", TIMES_2, _at("release", "at_once", "call")),
        ),
        short=("--model", "demo", "--rounds", "1", "--released-tokens", "16000"),
        environment=".venv-engine",
    ),
    Benchmark(
        "retention",
        "What is kept when the device holds a quarter of what 16 agents need: the way from LRU to an oracle, replayed",
        "retention",
        tuple(_retention()),
        arguments=("--only", "bars", "--only", "others"),
        environment=".venv-engine",
        replays=True,
    ),
    Benchmark(
        "disk",
        "What encryption costs the tier on disk",
        "disk_tier",
        (
            Figure("bytes/s written, of those without encryption", PERCENT, _at("write", "share"), least=disk_tier.BAR),
            Figure("bytes/s read, of those without encryption", PERCENT, _at("read", "share"), least=disk_tier.BAR),
            Figure("processor, writing", CORES, _at("write", "cores"), most=disk_tier.CORES_BAR),
            Figure("processor, reading", CORES, _at("read", "cores"), most=disk_tier.CORES_BAR),
        ),
        short=("--gib", "0.05", "--rounds", "1"),
    ),
    Benchmark(
        "gateway",
        "What the gateway adds to a streamed chat completion, everything on, at 50 requests/s over an engine's stub",
        "gateway_overhead",
        (
            *(
                Figure(
                    f"to the {end}, {share}",
                    MS,
                    _added_ms(name),
                    most=gateway_overhead.ADDED_P99_MS if share == "p99" else gateway_overhead.ADDED_MEDIAN_MS,
                )
                for end, share, name in (
                    ("first byte", "median", "first_p50_ms"),
                    ("first byte", "p99", "first_p99_ms"),
                    ("durable end", "median", "end_p50_ms"),
                    ("durable end", "p99", "end_p99_ms"),
                )
            ),
            Figure(
                "requests/s on one core, of a bare FastAPI proxy's",
                PERCENT,
                _at("share_of_bare"),
                least=gateway_overhead.SHARE_OF_BARE,
            ),
            Figure("start to accepting connections", S, _at("gateway_start_s"), most=gateway_overhead.START_S),
            Figure("resident memory", MB, _at("gateway_rss_bytes"), most=gateway_overhead.RESIDENT_BYTES),
            Figure("errors", COUNT, _errors, most=0),
        ),
        short=("--rounds", "1", "--seconds", "1"),
    ),
    Benchmark(
        "streams",
        "200 streams at a time for 60 s",
        "streams",
        (
            Figure("errors", COUNT, _at("errors"), most=0),
            Figure("memory grown after second 10", MB, _at("rss_growth_bytes"), most=streams.GROWTH_BYTES),
        ),
        short=("--streams", "20", "--seconds", "12"),
    ),
    Benchmark(
        "audit",
        "The audit log",
        "audit",
        (
            Figure(
                f"durable appends, {audit.WRITERS} writers",
                PER_S,
                _at("figures", "many_per_s"),
                least=audit.APPENDS_PER_S,
            ),
            Figure("the same, p99", MS, _at("figures", "many_p99_ms"), most=audit.APPEND_P99_MS),
            Figure(
                "the same, times the log with one sync a record",
                TIMES,
                _ratio("many_per_s", "sync_each_per_s"),
                least=audit.TIMES_OF_SINGLE_SYNCS,
            ),
            Figure("the same, times a bare sync a record", TIMES, _ratio("many_per_s", "bare_sync_per_s")),
            Figure(
                f"the same on a disk that takes {audit.SLOW_SYNC_MS:g} ms for it",
                TIMES,
                _ratio("slow_many_per_s", "slow_bare_sync_per_s"),
                least=audit.TIMES_OF_SINGLE_SYNCS,
            ),
            Figure(
                "one writer, times a record appended and one fsync",
                TIMES,
                _ratio("one_p50_ms", "append_fsync_p50_ms"),
                most=audit.ONE_WRITER_TIMES,
            ),
            Figure("one writer, times a bare sync", TIMES, _ratio("one_p50_ms", "bare_sync_p50_ms")),
            Figure(
                f"the same on a disk that takes {audit.SLOW_SYNC_MS:g} ms for it",
                TIMES,
                _ratio("slow_one_p50_ms", "slow_bare_sync_p50_ms"),
                most=audit.ONE_WRITER_TIMES,
            ),
            Figure(
                f"an admission's record adds to a request at {audit.ADMISSIONS_PER_S:g}/s, median",
                MS,
                _at("figures", "admission_added_ms"),
                most=audit.ADMISSION_MS,
            ),
            Figure("entries of a log that is verified", COUNT, _at("figures", "verified_entries")),
            Figure("verified, by the processor's time", PER_S, _at("figures", "verified_per_s")),
            Figure(
                "the same, of what hashing the same bytes alone reaches", PERCENT, _at("figures", "share_of_hashing")
            ),
            Figure(
                f"whichever is nearer to its bar, {audit.VERIFIED_PER_S:,.0f}/s or {audit.SHARE_OF_HASHING:.0%}",
                TIMES,
                _verified,
                least=1,
            ),
            Figure("memory more than for a tenth of them", MORE_MB, _more_memory_mb, most=audit.MORE_MEMORY_MB),
            Figure("a proof in 80 million entries", BYTES, _at("figures", "proof_bytes"), most=audit.PROOF_BYTES),
            Figure("checking it", MS, _at("figures", "proof_check_ms"), most=audit.PROOF_CHECK_MS),
        ),
        arguments=("--entries", "10000000"),
        short=("--seconds", "0.5", "--entries", "20000"),
    ),
    Benchmark(
        "siem",
        "The way to a SIEM: a local rsyslog over TLS",
        "siem",
        (
            Figure("appended and sent", PER_S, _at("figures", "appended_per_s"), least=siem.LEAST_PER_S),
            Figure("behind, at most", S, _at("figures", "lag_most_s"), most=siem.LAG_S),
            Figure("the last line written after", S, _at("figures", "last_line_after_s"), most=siem.LAG_S),
            Figure("catching up", PER_S, _at("figures", "caught_up_per_s"), least=siem.LEAST_PER_S),
            Figure(
                "added to a request meanwhile, p99", MS, _at("figures", "request_added_p99_ms"), most=siem.ADDED_P99_MS
            ),
        ),
        short=("--seconds", "1", "--events", "5000"),
    ),
)


# Measuring


def replayed_from(simulator: Path | None, traces: Path | None) -> tuple[list[str], list[str]]:
    """What a benchmark that replays is called with, of what was given or is beside the repository; what it lacks."""
    found: list[str] = []
    lacking: list[str] = []
    of_simulator, of_traces = REPLAYED[:2], REPLAYED[2:]
    for (option, what), given, usual in ((of_simulator, simulator, SIMULATOR), (of_traces, traces, TRACES)):
        path = REPOSITORY.absolute().parent / usual if given is None else given.absolute()
        if given is None and not path.exists():
            lacking += [option, what]
        else:
            found += [option, str(path)]
    return found, lacking


def measure(
    benchmark: Benchmark, *, short: bool, replayed: Sequence[str] = (), lacking: Sequence[str] = ()
) -> Measured:
    """Run a benchmark and take its figures; what it says of its progress goes to stderr.

    Args:
        replayed, lacking: of what one that replays needs; see `replayed_from`.
    """
    interpreter = REPOSITORY / benchmark.environment / "bin" / "python"
    if not interpreter.exists():
        return Measured(benchmark, failure=f"there is no {benchmark.environment}: `make test` installs it")
    if benchmark.replays and lacking:
        return Measured(benchmark, failure=f"it needs {' '.join(lacking)}")
    command = [str(interpreter), "-m", f"benchmarks.{benchmark.module}", *benchmark.arguments, "--json"]
    command += replayed if benchmark.replays else ()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [*command, *(benchmark.short if short else ())], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE
    ) as process:
        try:
            printed, _ = process.communicate(timeout=_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # at which it ends what it started
            return Measured(benchmark, failure=f"it was not done after {_DEADLINE_S:,.0f} s")
        except KeyboardInterrupt:
            process.wait()  # it was told too
            raise
        except SystemExit:
            process.send_signal(signal.SIGINT)
            raise
    return taken(benchmark, printed, process.returncode)


def taken(benchmark: Benchmark, printed: bytes, status: int) -> Measured:
    """The figures in what a benchmark printed before it ended with `status`; a miss is a status too."""
    try:
        said = json.loads(printed)
        return Measured(benchmark, [figure.read(said) for figure in benchmark.figures])
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        return Measured(benchmark, failure=f"it ended with {status} ({type(error).__name__}: {error})")


def machine() -> str:
    """What this machine is, in a few words."""
    model = next((line for line in _lines_of("/proc/cpuinfo") if line.startswith("model name")), "an unknown processor")
    memory = next(line for line in _lines_of("/proc/meminfo") if line.startswith("MemTotal"))
    gib = int(memory.split()[1]) / (1 << 20)
    cores = len(os.sched_getaffinity(0))
    processor = model.partition(":")[2].strip() or model
    return (
        f"{cores} cores of {processor}, {gib:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"
    )


def _lines_of(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


# Telling


def table(measured: Iterable[Measured]) -> str:
    """The table, in Markdown."""
    return "\n".join((*_HEADINGS, *(line for each in measured for line in (_head(each.benchmark), *_lines(each)))))


def _head(benchmark: Benchmark) -> str:
    return f"| **{benchmark.title}** (`{benchmark.command}`) | | |"


def _lines(measured: Measured) -> Iterator[str]:
    if measured.failure:
        yield f"| not measured | {measured.failure} | |"
        return
    for figure, value in zip(measured.benchmark.figures, measured.values, strict=True):
        missed = "" if figure.holds(value) else ", **missed**"
        yield f"| {figure.what} | {figure.unit.of(value)}{missed} | {figure.bar} |"


def with_results(page: str, measured: Iterable[Measured]) -> str:
    """A page with what was measured in its table, and of the other benchmarks what stood there.

    The machine that the table names is that of what stays; what was measured on another one says so.

    Raises:
        ValueError: the page has no place for the table.
    """
    before, begins, rest = page.partition(TABLE_BEGINS)
    stood, ends, after = rest.partition(TABLE_ENDS)
    if not begins or not ends:
        raise ValueError("the page has no place for a table")
    new = {_head(each.benchmark): list(_lines(each)) for each in measured}
    kept: dict[str, list[str]] = {}
    old = ""
    for line in stood.splitlines():
        if line.startswith("| **"):
            old = "" if line in new else line
        elif old:
            kept.setdefault(old, []).append(line)
    nothing = ["| not measured | yet | |"]
    heads = list(map(_head, BENCHMARKS))
    here = machine()
    of_table = stood.partition(":\n")[0].strip() if any(kept.get(head, nothing) != nothing for head in heads) else here
    on_another = [] if of_table == here else [f"{ELSEWHERE}{here}: | | |"]
    parts = kept | {head: [*on_another, *lines] for head, lines in new.items()}
    rows = (row for head in heads for row in (head, *parts.get(head, nothing)))
    return "\n".join((f"{before}{begins}{of_table}:\n", *_HEADINGS, *rows, f"{ends}{after}"))


def record(measured: Sequence[Measured], *, short: bool) -> dict[str, Any]:
    """The same as an object. Values are in the benchmark's own unit, `shown` has it."""
    return {
        "machine": machine(),
        "short": short,
        "benchmarks": [
            {
                "name": each.benchmark.name,
                "command": each.benchmark.command,
                "failure": each.failure or None,
                "figures": [
                    {
                        "what": figure.what,
                        "value": value,
                        "shown": figure.unit.of(value),
                        "bar": figure.bar,
                        "held": figure.holds(value),
                    }
                    for figure, value in zip(each.benchmark.figures, each.values, strict=False)
                ],
            }
            for each in measured
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [each.name for each in BENCHMARKS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--short", action="store_true", help="a fraction of the work, to see that it runs")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a figure misses its bar")
    parser.add_argument("--simulator", type=Path, metavar="FILE", help="what `retention` replays with: kvsim.py")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="what it replays")
    parser.add_argument("--readme", action="store_true", help="put the table in README")
    given = parser.parse_args(arguments)
    if given.readme and given.short:
        parser.error("README has no figures of a fraction of the work")
    replayed, lacking = replayed_from(given.simulator, given.traces)
    measured = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for benchmark in BENCHMARKS:
        if given.only is None or benchmark.name in given.only:
            print(f"{benchmark.name}: {benchmark.command}", file=sys.stderr, flush=True)
            measured.append(measure(benchmark, short=given.short, replayed=replayed, lacking=lacking))
            if measured[-1].failure:
                print(f"{benchmark.name}: not measured: {measured[-1].failure}", file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps(record(measured, short=given.short), indent=2))
    else:
        short = ", a fraction of the work: these figures are for nobody" if given.short else ""
        print(f"{machine()}{short}:\n\n{table(measured)}")
    if given.readme:
        README.write_text(with_results(README.read_text(), measured))
    failed = any(each.failure for each in measured)
    return int(failed or (given.check and not all(each.holds for each in measured)))


if __name__ == "__main__":
    sys.exit(main())
