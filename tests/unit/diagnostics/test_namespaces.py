"""Whether a process may have namespaces of its own: found out by trying, and said with the switch that refuses them."""

import os
from pathlib import Path

import pytest

from diagnostics import checks, namespaces
from diagnostics.checks import Verdict
from tests.unit.diagnostics.test_checks import subject

# What stands before the probe: a libc that refuses, and a file system that does. For an ordinary user, whoever runs it.
_FAKE = """
import builtins, ctypes, errno, io, os
class Libc:
    def unshare(self, flags):
        ctypes.set_errno({unshare})
        return -1 if {unshare} else 0
    def mount(self, *_):
        ctypes.set_errno({mount})
        return -1 if {mount} else 0
def opened(name, mode="r"):
    if {identity} and name.endswith("setgroups"):
        raise OSError({identity}, os.strerror({identity}), name)
    return io.StringIO()
ctypes.CDLL = lambda *_, **__: Libc()
builtins.open = opened
os.geteuid = lambda: 1000
"""
_EPERM, _ENOSPC = 1, 28


@pytest.mark.parametrize(
    ("fails", "why"),
    [
        ({}, None),
        ({"unshare": _EPERM}, "unshare: Operation not permitted"),
        ({"unshare": _ENOSPC}, "unshare: No space left on device"),  # user.max_user_namespaces is used up
        ({"identity": _EPERM}, "setgroups: Operation not permitted"),  # Ubuntu 24.04
        ({"mount": _EPERM}, "mount: Operation not permitted"),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else "",
)
def test_where_the_way_into_namespaces_ends_is_said(
    fails: dict[str, int], why: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = _FAKE.format(**{"unshare": 0, "identity": 0, "mount": 0, **fails})
    monkeypatch.setattr(namespaces, "_PROBE", f"{fake}{namespaces._PROBE}")
    assert namespaces.refused() == why
    finding = checks.check_namespaces(subject(tmp_path))
    assert finding.verdict is (Verdict.PASS if why is None else Verdict.WARN)
    assert finding.cause.startswith(why or "")
    required = checks.check_namespaces(subject(tmp_path, engine={"isolation": "required"}))
    assert required.verdict is (Verdict.PASS if why is None else Verdict.FAIL)


@pytest.mark.parametrize(
    ("switches", "command"),
    [
        ({"kernel/apparmor_restrict_unprivileged_userns": "1"}, "kernel.apparmor_restrict_unprivileged_userns=0"),
        ({"kernel/unprivileged_userns_clone": "0"}, "kernel.unprivileged_userns_clone=1"),
        ({"user/max_user_namespaces": "0"}, "user.max_user_namespaces=10000"),
    ],
    ids=["Ubuntu", "Debian", "any"],
)
def test_the_switch_that_refuses_is_named_with_the_command_that_turns_it(
    switches: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    fine = {
        "kernel/apparmor_restrict_unprivileged_userns": "0",
        "kernel/unprivileged_userns_clone": "1",
        "user/max_user_namespaces": "96365",
    }
    for name, value in (fine | switches).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    assert namespaces.remedy(tmp_path) == f"Allow unprivileged user namespaces: sudo sysctl -w {command}"


def test_where_no_switch_refuses_none_is_named(tmp_path: Path) -> None:
    assert "sysctl" not in namespaces.remedy(tmp_path)
