"""Runs every test, each in the environment that it needs, and ends with one line about all of them: `make test`.

Arguments are pytest's. A run goes on with the next parts when tests fail in one. What waits most of its time, for
processes that start and end, runs beside something else that does.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent


class Part(NamedTuple):
    """What one process of pytest runs."""

    environment: str
    what: tuple[str, ...]

    def __str__(self) -> str:
        return f"{' '.join(self.what)} in {self.environment}"


# What tests need decides where they run. A process of vLLM's has one engine: whoever makes its own has a process, too.
_ENGINES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/engine/tiers").glob("test_*.py"))
_WITHOUT_ENGINE = ("tests/e2e/api", "tests/e2e/siem")
# Beside each other: the parts of one entry.
RUNS: tuple[tuple[Part, ...], ...] = (
    (Part(".venv", ("tests/unit/audit",)), Part(".venv", ("tests/unit", "--ignore=tests/unit/audit"))),
    (Part(".venv", _WITHOUT_ENGINE), Part(".venv", ("tests/e2e", *(f"--ignore={path}" for path in _WITHOUT_ENGINE)))),
    (Part(".venv-engine", ("tests/engine", "--ignore=tests/engine/tiers")),),
    *((Part(".venv-engine", (path,)),) for path in _ENGINES),
)
_INTERRUPTED = 130
_NO_TESTS = 5
_COUNTS = ("tests", "failures", "errors", "skipped")


def main() -> int:
    """0 when all tests passed; 1 when some did not, or there were none; 130 when broken off."""
    started = time.monotonic()
    totals = dict.fromkeys(_COUNTS, 0)
    sound = True
    with tempfile.TemporaryDirectory(prefix="holdfast-tests-") as scratch:
        for number, parts in enumerate(RUNS):
            reports = [Path(scratch) / f"{number}.{place}.xml" for place in range(len(parts))]
            try:
                codes = _run(parts, reports)
            except KeyboardInterrupt:
                return _INTERRUPTED
            # Of the tests that arguments choose, a part may have none.
            sound = sound and all(code == 0 or (code == _NO_TESTS and bool(sys.argv[1:])) for code in codes)
            for report in reports:
                for name, count in _counted(report).items():
                    totals[name] += count
    bad = totals["failures"] + totals["errors"]
    passed = totals["tests"] - bad - totals["skipped"]
    good = sound and passed > 0 and not bad
    verdict = "All tests passed" if good else "NOT all tests passed"
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"== {verdict}: {passed} passed, {bad} failed, {totals['skipped']} skipped in {minutes} min {seconds} s")
    return 0 if good else 1


def _run(parts: Sequence[Part], reports: Sequence[Path]) -> list[int]:
    """What each process ended with. The first one's words are seen at once, those of the others when it has ended."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for part, report in zip(parts, reports, strict=True):
            print(f"== {part}{', beside it' if processes else ''}", flush=True)
            processes.append(_started(part, report, seen=not processes))
        return [process.wait() for process in processes]
    finally:
        # Where this is broken off, pytest was told too, and ends what its tests started before it leaves.
        for process in processes:
            process.wait()
        for part, report in zip(parts[1 : len(processes)], reports[1:], strict=False):
            print(f"== {part}", flush=True)
            sys.stdout.write(report.with_suffix(".log").read_text(errors="replace"))


def _started(part: Part, report: Path, *, seen: bool) -> "subprocess.Popen[bytes]":
    command = [str(ROOT / part.environment / "bin" / "python"), "-m", "pytest", f"--junitxml={report}"]
    command += [*part.what, *sys.argv[1:]]
    if seen:
        return subprocess.Popen(command, cwd=ROOT)
    with report.with_suffix(".log").open("wb") as told:
        # What it might ask, nobody would see.
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=told, stderr=told)


def _counted(report: Path) -> dict[str, int]:
    try:
        suites = ElementTree.parse(report).getroot().iter("testsuite")  # noqa: S314 - pytest wrote it
    except (OSError, ElementTree.ParseError):
        return dict.fromkeys(_COUNTS, 0)
    found = list(suites)
    return {name: sum(int(suite.get(name, "0")) for suite in found) for name in _COUNTS}


if __name__ == "__main__":
    sys.exit(main())
