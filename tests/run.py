"""Runs every test, each in the environment that it needs, and ends with one line about all of them: `make test`.

Arguments are pytest's. A run goes on with the next part when tests fail in one.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# What tests need decides where they run. A process of vLLM's has one engine: whoever makes its own has a process, too.
_ENGINES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/engine/tiers").glob("test_*.py"))
RUNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (".venv", ("tests/unit", "tests/e2e")),
    (".venv-engine", ("tests/engine", "--ignore=tests/engine/tiers")),
    *((".venv-engine", (path,)) for path in _ENGINES),
)
_INTERRUPTED = 130
_NO_TESTS = 5
_COUNTS = ("tests", "failures", "errors", "skipped")


def main() -> int:
    """0 when all tests passed; 1 when some did not; 130 when broken off."""
    started = time.monotonic()
    totals = dict.fromkeys(_COUNTS, 0)
    sound = True
    with tempfile.TemporaryDirectory(prefix="holdfast-tests-") as scratch:
        for number, (environment, what) in enumerate(RUNS):
            print(f"== {' '.join(what)} in {environment}", flush=True)
            report = Path(scratch) / f"{number}.xml"
            command = [str(ROOT / environment / "bin" / "python"), "-m", "pytest", f"--junitxml={report}"]
            with subprocess.Popen([*command, *what, *sys.argv[1:]], cwd=ROOT) as process:
                try:
                    code = process.wait()
                    # Of the tests that arguments choose, a part may have none.
                    sound = sound and (code == 0 or (code == _NO_TESTS and bool(sys.argv[1:])))
                except KeyboardInterrupt:
                    # pytest was told too, and ends what its tests started before it leaves.
                    process.wait()
                    return _INTERRUPTED
            for name, count in _counted(report).items():
                totals[name] += count
    bad = totals["failures"] + totals["errors"]
    passed = totals["tests"] - bad - totals["skipped"]
    verdict = "All tests passed" if sound and not bad else "NOT all tests passed"
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"== {verdict}: {passed} passed, {bad} failed, {totals['skipped']} skipped in {minutes} min {seconds} s")
    return 0 if sound and not bad else 1


def _counted(report: Path) -> dict[str, int]:
    try:
        suites = ElementTree.parse(report).getroot().iter("testsuite")  # noqa: S314 - pytest wrote it
    except (OSError, ElementTree.ParseError):
        return dict.fromkeys(_COUNTS, 0)
    found = list(suites)
    return {name: sum(int(suite.get(name, "0")) for suite in found) for name in _COUNTS}


if __name__ == "__main__":
    sys.exit(main())
