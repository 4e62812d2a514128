"""Runs every test, each in the environment that it needs, and ends with one line about all of them: `make test`.

Arguments are pytest's. A run goes on with the next environment when tests fail in one.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# What tests need decides where they run.
ENVIRONMENTS = {".venv": ("tests/unit", "tests/e2e"), ".venv-engine": ("tests/engine",)}
_INTERRUPTED = 130
_COUNTS = ("tests", "failures", "errors", "skipped")


def main() -> int:
    """0 when all tests passed; 1 when some did not; 130 when broken off."""
    started = time.monotonic()
    totals = dict.fromkeys(_COUNTS, 0)
    sound = True
    with tempfile.TemporaryDirectory(prefix="holdfast-tests-") as scratch:
        for environment, folders in ENVIRONMENTS.items():
            print(f"== {', '.join(folders)} in {environment}", flush=True)
            report = Path(scratch) / f"{environment}.xml"
            command = [str(ROOT / environment / "bin" / "python"), "-m", "pytest", f"--junitxml={report}"]
            with subprocess.Popen([*command, *folders, *sys.argv[1:]], cwd=ROOT) as process:
                try:
                    sound = process.wait() == 0 and sound
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
