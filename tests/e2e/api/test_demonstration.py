"""What `make run` gives to paste is pasted: into a shell, and into Python."""

import shutil
import subprocess
import sys

import pytest

from api.demonstration import pastes
from benchmarks.stub import MODEL
from tests.e2e.api.conftest import DEADLINE_S, Served

SAID = "".join(f" word{number}" for number in range(14))


def pasted(served: Served) -> list[str]:
    """The three, without their titles: curl, the SDK, an agent loop."""
    text = pastes(served.base_url, served.api_key, MODEL)
    curl, _, rest = text.partition("\n\nWith the openai SDK")
    sdk, _, loop = rest.partition("\n\nAn agent loop")
    return [part.partition(":\n")[2].strip() for part in (curl, sdk, loop)]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_the_curl_line_is_answered(served: Served) -> None:
    done = subprocess.run(["sh", "-c", pasted(served)[0]], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert SAID in done.stdout


@pytest.mark.parametrize(("which", "answers"), [(1, 1), (2, 4)], ids=["the SDK", "an agent loop"])
def test_the_python_is_answered(served: Served, which: int, answers: int) -> None:
    program = pasted(served)[which]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=2 * DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(SAID) == answers
    if which == 2:
        assert done.stdout.count("| found again: ") == answers
        assert served.newest_session().turns == answers
