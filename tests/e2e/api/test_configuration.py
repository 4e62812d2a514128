"""What a gateway is set to, otherwise than at its last start, is in the audit log by key, old and new value."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.running import make_appliance, running_gateway, running_stub
from tests.e2e.api.conftest import Served, until

OVERRIDE = {
    "HOLDFAST_AUDIT__RETENTION_DAYS": "100",
    "HOLDFAST_AUDIT__RETENTION_OVERRIDE": '{ by = "me", reason = "mine" }',
}


class _Start(NamedTuple):
    """What one start recorded.

    Attributes:
        settings: the digest that the event of the start carries.
        told: what it recorded of settings, by action and key.
    """

    settings: str
    told: dict[tuple[str, str], dict[str, Any]]


class _Appliance:
    """An appliance that is started again and again."""

    def __init__(self, place: Path) -> None:
        self.state_dir = place / "state"
        self.kept = self.state_dir / "audit/last-start"
        self._engine = place / "engine.sock"
        self._api_key = make_appliance(self.state_dir)

    def start(self, **environment: str) -> _Start:
        before = self.kept.read_bytes() if self.kept.exists() else b""
        chosen = {"HOLDFAST_GATEWAY__PORT": "0", **environment}
        with (
            running_stub(self._engine),
            running_gateway(self.state_dir, self._engine, environment=chosen) as gateway,
        ):
            served = Served(self.state_dir, self._engine, gateway, self._api_key)
            until(lambda: self.kept.exists() and self.kept.read_bytes() != before)
            entries = served.admin.audit_entries(limit=1000).entries
            started = next(entry for entry in entries if entry.action == "gateway.started")
            assert started.record is not None
            told = {}
            for entry in entries:
                record = entry.record or {}
                if entry.sequence > started.sequence and entry.action.split(".")[0] in ("config", "model"):
                    told[entry.action, record["target"]["id"]] = record
            return _Start(started.record["details"]["settings"], told)


@pytest.fixture
def appliance(tmp_path: Path) -> _Appliance:
    return _Appliance(tmp_path)


def test_the_first_start_records_the_digest_and_a_second_one_nothing(appliance: _Appliance) -> None:
    first = appliance.start()
    assert first.told.keys() == {("config.recorded", "")}
    record = first.told["config.recorded", ""]
    assert record["details"]["digest"] == first.settings
    assert "reason" not in record
    weak = record["details"]["weak"].split(", ")
    assert weak == [
        "audit.witness",
        "engine.isolation",
        "engine.socket",
        "gateway.tls_certificate",
        "vault.plaintext_swap",
        "vault.seal",
    ]
    assert appliance.start() == (first.settings, {})


def test_what_is_set_otherwise_is_told_and_what_weakens_is_named(appliance: _Appliance) -> None:
    first = appliance.start()
    second = appliance.start(HOLDFAST_GATEWAY__MAX_STREAMS="77", **OVERRIDE)
    assert second.settings != first.settings
    assert second.told.keys() == {
        ("config.changed", "gateway.max_streams"),
        ("config.changed", "audit.retention_days"),
        ("config.changed", "audit.retention_override"),
        ("config.changed", "audit.retention_override.by"),
        ("config.changed", "audit.retention_override.reason"),
    }
    assert second.told["config.changed", "gateway.max_streams"]["details"] == {"old": "1024", "new": "77"}
    weakened = second.told["config.changed", "audit.retention_days"]["details"]
    assert weakened == {"old": "400", "new": "100", "weakens": "the audit log is kept for less than six months"}
    third = appliance.start()
    assert third.settings == first.settings
    assert third.told["config.changed", "audit.retention_days"]["details"] == {"old": "100", "new": "400"}


def test_another_engine_is_told(appliance: _Appliance) -> None:
    appliance.start()
    appliance._engine = appliance._engine.with_name("other.sock")
    told = appliance.start().told
    assert told["model.changed", ""]["details"]["old_path"].endswith("engine.sock")
    assert told["model.changed", ""]["details"]["new_path"].endswith("other.sock")
    assert "weakens" in told["config.changed", "engine.socket"]["details"]


@pytest.mark.parametrize("harm", ["deleted", "changed"])
def test_what_was_known_of_the_last_start_may_be_lost_and_not_forged(appliance: _Appliance, harm: str) -> None:
    appliance.start()
    if harm == "deleted":
        appliance.kept.unlink()
    else:
        content = bytearray(appliance.kept.read_bytes())
        content[-20] ^= 1
        appliance.kept.write_bytes(content)
    (record,) = appliance.start(**OVERRIDE).told.values()
    assert record["action"] == "config.recorded"
    assert "audit.retention_days" in record["details"]["weak"]
    if harm == "changed":
        assert (record["outcome"], record["reason"]) == ("failure", "value_tampered")


def test_an_older_copy_of_what_was_known_shows_in_the_digests(appliance: _Appliance) -> None:
    """Who has the strong settings' record replaced by that of an earlier, weak start leaves two starts that differ."""
    weak = appliance.start(**OVERRIDE)
    older = appliance.kept.read_bytes()
    strong = appliance.start()
    appliance.kept.write_bytes(older)
    again = appliance.start(**OVERRIDE)
    assert again.told == {}
    assert again.settings == weak.settings != strong.settings
