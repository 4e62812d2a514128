"""What the engine room's tests share: a spec that runs a fake engine, and a look at what it left behind."""

import secrets
import sys
from pathlib import Path

import pytest

from appliance.engine.command_line import EngineSpec

# An interpreter that runs the cage with one of its functions replaced.
_SHIM = """#!{python}
import sys
from appliance.engine import cage

def refused(flags):
    raise PermissionError(1, "Operation not permitted", "unshare")

def not_as_root(flags):
    return False

cage.{function} = {replacement}
sys.exit(cage.main(sys.argv[sys.argv.index("appliance.engine.cage") + 1 :]))
"""


def _shim(folder: Path, function: str, replacement: str) -> Path:
    python = folder / "shim" / function / "python"
    python.parent.mkdir(parents=True)
    python.write_text(_SHIM.format(python=sys.executable, function=function, replacement=replacement))
    python.chmod(0o700)
    return python


@pytest.fixture
def spec(tmp_path: Path) -> EngineSpec:
    """An engine whose model is an empty one, run by this interpreter."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return EngineSpec(
        python=Path(sys.executable),
        model=model,
        served_name="model",
        run_dir=tmp_path / "run",
        log_path=tmp_path / "engine.log",
    )


@pytest.fixture
def python_without_namespaces(tmp_path: Path) -> Path:
    """An interpreter for the cage on a system that gives no namespaces."""
    return _shim(tmp_path, "_unshare", "refused")


@pytest.fixture
def python_in_user_namespace(tmp_path: Path) -> Path:
    """An interpreter for the cage that goes the way of an ordinary user, whoever runs the tests."""
    return _shim(tmp_path, "_unshared", "not_as_root")


@pytest.fixture
def mark() -> str:
    """A word that stands in the command line of each process of one engine, and in the names of its files."""
    return f"mark{secrets.token_hex(8)}"


def left_behind(mark: str) -> list[str]:
    """Processes, shared memory and temporary files that carry the mark."""
    left = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in command.read_bytes():
                left.append(str(command.parent))
        except OSError:
            continue
    left += [str(path) for path in Path("/dev/shm").glob(f"*{mark}*")]
    left += [str(path) for folder in ("", "holdfast-engine-*/") for path in Path("/tmp").glob(f"{folder}*{mark}*")]
    return left
