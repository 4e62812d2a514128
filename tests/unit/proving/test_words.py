"""What a proof says of words in events, metrics and logs: it passes what it looked at, and nothing else."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api.proving import isolation
from api.proving.added import GrowingLog
from api.proving.judgement import Verdict
from appliance.audit.search import Findings

WORD = "5ec4e7"


class Services:
    """A gateway whose log has a word of before, and nothing that was asked for anywhere."""

    def __init__(self, state_dir: Path) -> None:
        self.log = state_dir / "log"
        self.log.mkdir()
        for name in ("gateway.log", "engine.log"):
            (self.log / name).write_text(WORD)
        self.settings = SimpleNamespace(state_dir=state_dir)
        self.said = {"metrics of the gateway": "m 1", "metrics of the engine": "m 1", "report of leases": "m 1"}
        self.metrics = SimpleNamespace(exposition=lambda: self.said["metrics of the gateway"].encode())
        self.engine = SimpleNamespace(metrics=self._metrics, leases=self._leases)
        self.audit, self.vault = SimpleNamespace(directory=state_dir), None
        self.found = Findings(found=[event({"action": "turn.admitted"})])

    async def _metrics(self) -> str:
        return self.said["metrics of the engine"]

    async def _leases(self, *, every: bool = False) -> Any:
        """Those of everybody have to be asked for."""
        leases = [{"session": self.said["report of leases"]}] if every else []
        return SimpleNamespace(to_wire=lambda: {"leases": leases})

    def now(self) -> float:
        return 0.0


class Proof(isolation._Proof):
    """Asks for nothing, and looks for one word."""

    async def _asked_for(self) -> list[tuple[str, str]]:
        return [("a word of a prompt", WORD)]

    async def _needles(self) -> list[tuple[str, str]]:
        return []


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Services:
    services = Services(tmp_path)
    monkeypatch.setattr(isolation, "create_app", lambda _: None)
    monkeypatch.setattr(isolation, "LogReader", lambda _: None)
    monkeypatch.setattr(isolation, "search", lambda *_: services.found)
    return services


@pytest.fixture
def proof(services: Services) -> Iterator[Proof]:
    proof = Proof(services, None)  # type: ignore[arg-type]
    proof._logs = {name: GrowingLog(services.log / f"{name}.log") for name in ("gateway", "engine")}
    yield proof
    for log in proof._logs.values():
        log.close()


def event(record: dict[str, Any] | None) -> Any:
    return SimpleNamespace(record=record)


async def verdicts(proof: Proof) -> dict[str, Verdict]:
    return {check.name.partition(":")[0]: check.verdict for check in await proof.words()}


async def test_what_has_no_word_passes(proof: Proof) -> None:
    assert set((await verdicts(proof)).values()) == {Verdict.PASS}


@pytest.mark.parametrize("name", ["metrics of the gateway", "metrics of the engine", "report of leases"])
async def test_a_word_in_one_of_them_fails_that_one_alone(services: Services, proof: Proof, name: str) -> None:
    services.said[name] += f' {{kind="{WORD}"}}'
    found = await verdicts(proof)
    assert found == {each: Verdict.FAIL if each == name else Verdict.PASS for each in found}


@pytest.mark.parametrize("name", ["metrics of the gateway", "metrics of the engine"])
async def test_metrics_that_are_empty_are_no_pass(services: Services, proof: Proof, name: str) -> None:
    services.said[name] = ""
    assert (await verdicts(proof))[name] is Verdict.UNKNOWN


async def test_a_word_is_found_behind_megabytes_and_in_a_log_that_was_turned_over(
    services: Services, proof: Proof
) -> None:
    with (services.log / "gateway.log").open("a") as log:
        log.write(WORD + "x" * (5 << 20))
    (services.log / "engine.log").replace(services.log / "engine.log.1")
    with (services.log / "engine.log.1").open("a") as log:
        log.write(WORD)
    (services.log / "engine.log").touch()
    found = await verdicts(proof)
    assert {name for name, verdict in found.items() if verdict is Verdict.FAIL} == {
        "log of the gateway",
        "log of the engine",
    }


async def test_a_log_that_is_gone_is_no_pass(services: Services, proof: Proof) -> None:
    (services.log / "engine.log").unlink()
    assert (await verdicts(proof))["log of the engine"] is Verdict.UNKNOWN


@pytest.mark.parametrize(
    "found",
    [
        Findings(),
        Findings(found=[event({})], go_on_before=7),
        Findings(found=[event({}), event(None)]),
    ],
    ids=["none", "more than are looked at", "one that does not open"],
)
async def test_events_that_were_not_looked_at_are_no_pass(services: Services, proof: Proof, found: Findings) -> None:
    services.found = found
    assert (await verdicts(proof))["events"] is Verdict.UNKNOWN
    services.found.found.append(event({"reason": WORD}))
    assert (await verdicts(proof))["events"] is Verdict.FAIL
