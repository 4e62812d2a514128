"""What `holdfast up` says while it waits, and what it goes on waiting for."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from api import commands, launch
from api.admin import types
from api.admin.client import ApplianceSilent, Refused
from api.launch import Gateway, NotReadyInTime, _Waiting, last_lines
from appliance.errors import HoldfastError

PID = 4711
AWAY = types.ErrorBody(
    code="store_unavailable", message="m", cause="connection refused", remedy="r", fault="unavailable"
)
STORE_AWAY = Refused(AWAY)


def test_what_is_waited_for_is_said_once_and_then_now_and_then_with_what_the_engine_says() -> None:
    said: list[str] = []
    clock = [0.0]
    waiting = _Waiting(said.append, lambda: "loading weights", now=lambda: clock[0])
    for second in range(25):
        clock[0] = float(second)
        waiting.for_parts(None)
    assert said == [
        "     0 s  the gateway starts",
        "    11 s  still: the gateway starts (loading weights)",
        "    22 s  still: the gateway starts (loading weights)",
    ]


def test_the_last_lines_are_those_of_this_start(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    assert last_lines(log, 2) == []
    log.write_text("before\n")
    began_at = log.stat().st_size
    with log.open("a") as file:
        file.write("one\ntwo\nthree\n")
    assert last_lines(log, 2, not_before=began_at) == ["two", "three"]
    assert last_lines(log, 9, not_before=began_at) == ["one", "two", "three"]
    log.write_text("")
    assert last_lines(log, 2, not_before=began_at) == []


class Child:
    """A gateway's process that does not end."""

    pid, returncode = PID, None

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def poll(self) -> None:
        return None


class Admin:
    """An admin socket that answers one after the other; the last again and again."""

    def __init__(self, answers: Sequence[types.Status | HoldfastError], *, ready: bool = False) -> None:
        self.answers = list(answers)
        self.asked = 0
        self._ready = ready

    def gateway_pid(self) -> int:
        return PID

    def status(self) -> types.Status:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, HoldfastError):
            raise answer
        return answer

    def ready(self) -> bool:
        return self._ready


class Clock:
    """The module `time`, for who only reads it and sleeps."""

    def __init__(self) -> None:
        self.at = 0.0

    def monotonic(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """A gateway whose process is none, and whose clock goes on by itself."""
    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setattr(launch, "time", Clock())
    return Gateway(tmp_path, {}, outlives=True)


def status() -> types.Status:
    told: dict[str, Any] = dict.fromkeys(types.Status.model_fields)
    told |= {"ready": True, "parts": [types.Part(name="engine", state="ready", detail="")]}
    return types.Status.model_construct(None, **told)


def test_a_refused_status_is_asked_for_again_until_it_is_told(gateway: Gateway) -> None:
    said: list[str] = []
    gateway._client = Admin([STORE_AWAY, STORE_AWAY, status()])  # type: ignore[assignment]
    assert gateway.wait_until_ready(said.append, 60.0) == status()
    assert said == [
        "     0 s  it runs, and does not tell how it is (store_unavailable: connection refused)",
    ]


def test_a_status_that_stays_refused_is_the_cause_at_the_deadline(gateway: Gateway) -> None:
    gateway._client = Admin([STORE_AWAY])  # type: ignore[assignment]
    with pytest.raises(NotReadyInTime, match="connection refused"):
        gateway.wait_until_ready(lambda _: None, 60.0)


def test_who_may_not_know_the_status_is_told_that_it_serves_and_asks_once(gateway: Gateway) -> None:
    denied = Refused(AWAY.model_copy(update={"code": "not_an_administrator", "fault": "denied"}))
    admin = Admin([denied], ready=True)
    gateway._client = admin  # type: ignore[assignment]
    assert gateway.wait_until_ready(lambda _: None, 60.0) is None
    assert gateway.ask() is denied
    assert admin.asked == 1


def test_in_the_foreground_a_status_that_is_refused_for_a_while_is_told_and_nothing_ends(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    looks = iter([False, False, False, False, True])
    silent = ApplianceSilent("s", cause="c", remedy="r")
    gateway._client = Admin([STORE_AWAY, silent, STORE_AWAY, status()])  # type: ignore[assignment]
    monkeypatch.setattr(Gateway, "wait", lambda *_: next(looks))
    monkeypatch.setattr(Gateway, "ended_well", True)
    monkeypatch.setattr(commands, "moment", lambda _: "now")

    class Screen:
        def say(self, text: str) -> None:
            said.append(text)

    commands._stay(Screen(), gateway, status())  # type: ignore[arg-type]
    away = "now  gateway: it runs, and does not tell how it is (store_unavailable: connection refused)"
    assert said == [away, "now  gateway: does not answer", away, "now  engine: ready", "Stopped, from elsewhere."]
