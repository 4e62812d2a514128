"""No process that holds a passphrase or a key leaves its memory in a core dump."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

_ALLOWED = resource.getrlimit(resource.RLIMIT_CORE)[1]
# One byte: no dump at all, a pipe's neither (core(5)); none, where whoever started the tests allows none.
FORBIDDEN = (1, 1) if _ALLOWED else (0, 0)
_HOLDFAST = Path(sys.executable).with_name("holdfast")
_PR_GET_DUMPABLE = 3
_SAYS_BOTH = """
import ctypes, resource, sys
try:
    {call}
except BaseException as error:
    print(type(error).__name__)
print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl({get}, 0, 0, 0, 0))
"""
_SERVE = """
    import api.server
    from appliance.settings import load_settings
    api.server.plaintext_swap_devices = lambda: {devices}
    def reached(place): raise InterruptedError
    api.server._only_gateway = reached
    settings = load_settings({{"vault": {{"plaintext_swap": "refuse"}}}}, environment={{}})
    api.server.serve(settings)
"""
_AUDIT = """
    from appliance.audit import appender
    from appliance.audit.siem import exporter
    def reached(*_, **__): raise InterruptedError
    appender.open_log = exporter._stand_aside = reached
    sys.argv = ['', '/nonexistent', '/nonexistent']
    {process}.main()
"""


def _allow_cores() -> None:
    """In a child: what is forbidden later was not forbidden by whoever started it."""
    resource.setrlimit(resource.RLIMIT_CORE, (_ALLOWED, _ALLOWED))


def _said(call: str) -> list[str]:
    code = _SAYS_BOTH.format(call=call.strip(), get=_PR_GET_DUMPABLE)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, preexec_fn=_allow_cores
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("command", ["init", "up", "restore", "unseal"])
def test_a_command_forbids_its_cores_before_it_takes_a_passphrase(command: str) -> None:
    said = _said(f"import appliance.cli; sys.argv = ['holdfast', {command!r}, '--help']; appliance.cli.main()")
    assert said[-1] == f"{FORBIDDEN} 0"


def test_while_a_passphrase_is_read_no_core_can_be_dumped(tmp_path: Path) -> None:
    given, giving = os.pipe()
    command = [str(_HOLDFAST), "--state-dir", str(tmp_path / "state"), "init", "--passphrase-fd", str(given)]
    with subprocess.Popen(
        command, pass_fds=[given], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=_allow_cores
    ) as process:
        os.close(given)
        try:
            # Nothing was given yet, so it cannot end: it forbids its cores now, or never.
            deadline = time.monotonic() + 30
            while resource.prlimit(process.pid, resource.RLIMIT_CORE) != FORBIDDEN:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            with contextlib.suppress(OSError):
                os.close(giving)
            process.kill()


def test_the_gateway_forbids_its_cores_before_it_touches_its_state() -> None:
    assert _said(_SERVE.format(devices=[])) == ["InterruptedError", f"{FORBIDDEN} 0"]


def test_the_gateway_refuses_plaintext_swap_when_it_is_told_to() -> None:
    assert _said(_SERVE.format(devices=["sdz9"]))[0] == "PlaintextSwap"


@pytest.mark.parametrize("process", ["appender", "exporter"])
def test_the_audit_log_s_processes_forbid_their_cores_before_they_open_anything(process: str) -> None:
    assert _said(_AUDIT.format(process=process)) == ["InterruptedError", f"{FORBIDDEN} 0"]
