"""What an appliance is set to is told by key, old and new value, without a secret; and what of it is weak."""

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.audit.configuration import (
    ABSENT,
    Configuration,
    Model,
    changes,
    digest,
    effective,
    fingerprint,
    last_start,
    recorded,
    remember,
    weaknesses,
    without_secrets,
)
from appliance.audit.events import MAX_TEXT, Event
from appliance.settings import Settings, load_settings
from appliance.vault import RootKey, TamperedValue, Vault
from tests.unit.vault.keystore import MemoryKeys

MODEL = Model("small", "/models/small", "ab" * 32)
TLS = {"tls_certificate": "/c.pem", "tls_private_key": "/k.pem"}
WITNESS = {"url": "https://witness.example:8443", "vkey": "witness.example+00000000+AAAA", "ca": "/ca.pem"}
STRONG: dict[str, Any] = {
    "gateway": TLS,
    "vault": {"plaintext_swap": "refuse"},
    "engine": {"isolation": "required"},
    "audit": {"witness": {"other-node": WITNESS}},
}


def _opened_vault() -> Vault:
    keys = MemoryKeys()
    vault = Vault(keys)
    vault.open(RootKey(b"r" * 32))
    keys.add(vault.new_system_keys())
    return vault


def _settings(**sections: Any) -> Settings:
    return load_settings(sections, environment={}, state_dir=Path("/state"))


def _configured(model: Model = MODEL, **sections: Any) -> Configuration:
    return Configuration(effective(_settings(**sections)), model)


def _told(events: list[Event]) -> dict[str, dict[str, str]]:
    return {event.target[1]: dict(event.details) for event in events}


def test_every_setting_is_there_by_the_path_of_its_key() -> None:
    said = effective(_settings(sessions={"idle_timeout_s_by_model": {"small": 3.5}}))
    assert said["gateway.port"] == "8321"
    assert said["gateway.allowed_hosts"] == '["localhost","127.0.0.1","[::1]"]'
    assert said["gateway.tls_certificate"] == "null"
    assert said["sessions.idle_timeout_s_by_model.small"] == "3.5"
    assert said["state_dir"] == '"/state"'
    assert digest(said) == digest(dict(reversed(said.items())))
    assert digest(said) != digest(effective(_settings()))


def test_a_change_is_told_with_both_values_and_nothing_else_is() -> None:
    before, now = _configured(), _configured(gateway={"port": 9000}, sessions={"idle_timeout_s_by_model": {"m": 1.0}})
    assert _told(changes(before, now, {})) == {
        "gateway.port": {"old": "8321", "new": "9000"},
        "sessions.idle_timeout_s_by_model": {"old": "{}", "new": ABSENT},
        "sessions.idle_timeout_s_by_model.m": {"old": ABSENT, "new": "1.0"},
    }
    assert changes(now, now, {}) == []


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("gateway.tls_certificate", {**STRONG, "gateway": {}}),
        ("gateway.host", {**STRONG, "gateway": {"host": "192.168.1.7", **TLS}}),
        ("vault.plaintext_swap", {**STRONG, "vault": {"plaintext_swap": "warn"}}),
        ("vault.seal", {**STRONG, "vault": {"plaintext_swap": "refuse", "seal": "key-file"}}),
        ("engine.isolation", {**STRONG, "engine": {"isolation": "where-allowed"}}),
        ("engine.socket", {**STRONG, "engine": {"isolation": "required", "socket": "/engine.sock"}}),
        (
            "audit.retention_days",
            {
                **STRONG,
                "audit": {**STRONG["audit"], "retention_days": 90, "retention_override": {"by": "me", "reason": "m"}},
            },
        ),
        ("audit.witness", {**STRONG, "audit": {}}),
        ("demo", {**STRONG, "demo": True}),
    ],
)
def test_a_setting_that_weakens_security_is_named_as_such(key: str, sections: dict[str, Any]) -> None:
    assert weaknesses(_settings(**STRONG)) == {}
    weak = weaknesses(_settings(**sections))
    assert weak.keys() == {key}
    told = _told(changes(_configured(**STRONG), _configured(**sections), weak))
    assert told[key]["weakens"] == weak[key]
    assert all("weakens" not in details for other, details in told.items() if other != key)
    back = _told(changes(_configured(**sections), _configured(**STRONG), weaknesses(_settings(**STRONG))))
    assert "weakens" not in back[key]
    assert recorded(_configured(**sections), weak, why="").details["weak"] == key


def test_no_secret_of_an_address_is_told_and_what_guards_the_way_is() -> None:
    url = "postgresql://holdfast:s3cret@db.example/holdfast?sslmode=verify-full&sslpassword=t0psecret"
    said = without_secrets(url)
    assert "s3cret" not in said
    assert "t0psecret" not in said
    assert "sslmode=verify-full" in said
    other = url.replace("verify-full", "disable").replace("s3cret", "other")
    (event,) = changes(_configured(store={"url": url}), _configured(store={"url": other}), {})
    assert "disable" in event.details["new"]
    assert "other" not in str(event.record({}))
    assert without_secrets("no address") == "an address that cannot be read"


def test_another_model_is_told_and_long_values_are_cut() -> None:
    now = Model("small", "/models/" + "x" * 500, "cd" * 32)
    (event,) = changes(_configured(), _configured(now), {})
    record = event.record({})
    assert record["action"] == "model.changed"
    assert record["details"]["old_fingerprint"] == "ab" * 32
    assert len(record["details"]["new_path"]) == MAX_TEXT
    assert record["cut"] == ["details.new_path"]


def test_the_fingerprint_of_a_model_says_whether_it_is_the_same(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "part").mkdir(parents=True)
    (model / "config.json").write_text('{"a": 1}')
    (model / "part" / "weights").write_bytes(bytes(3 << 20))
    first = fingerprint(model)
    assert len(first) == 64
    for path, at in ((model / "config.json", 2), (model / "part" / "weights", 5), (model / "part" / "weights", -5)):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)
        assert fingerprint(model) != first
        content[at] ^= 1
        path.write_bytes(content)
    assert fingerprint(model) == first
    (model / "config.json").rename(model / "other.json")
    assert fingerprint(model) != first
    assert fingerprint(tmp_path / "nowhere") == ""


def test_what_a_start_was_set_to_is_kept_sealed(tmp_path: Path) -> None:
    vault = _opened_vault()
    assert last_start(tmp_path, vault) is None
    now = _configured(store={"url": "postgresql://holdfast:s3cret@db.example/holdfast"})
    remember(tmp_path, vault, now)
    assert last_start(tmp_path, vault) == now
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o077 == 0
    sealed = path.read_bytes()
    assert b"gateway" not in sealed
    assert b"s3cret" not in json.dumps(dict(now.settings)).encode()
    for at in range(len(sealed)):
        path.write_bytes(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :])
        with pytest.raises(TamperedValue):
            last_start(tmp_path, vault)
    path.write_bytes(sealed)
    with pytest.raises(TamperedValue):
        last_start(tmp_path, _opened_vault())
