"""Making an appliance: whole or not at all, private, and saying what its settings are."""

import asyncio
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from api import initialise as initialising
from api.initialise import initialise, settings_text
from api.roots import PassphraseNeeded, open_root
from appliance.cli import holdfast
from appliance.identity import Identity, Permission, Role
from appliance.settings import Settings
from appliance.store import DatabaseKeys, Store
from appliance.vault import SealUnusable, Vault, WrongPassphrase

PASSPHRASE = "correct horse battery staple"


def run(state_dir: Path, *words: str, entered: str = PASSPHRASE) -> Result:
    reading, writing = os.pipe()
    os.write(writing, entered.encode())
    os.close(writing)
    try:
        return CliRunner().invoke(
            holdfast, ["--state-dir", str(state_dir), "init", *words, "--passphrase-fd", str(reading)]
        )
    finally:
        os.close(reading)


def demonstration(state_dir: Path) -> Settings:
    return Settings.model_validate({"state_dir": state_dir, "demo": True, "vault": {"seal": "key-file"}})


def test_everything_that_is_made_is_its_owners_alone(tmp_path: Path) -> None:
    assert run(tmp_path / "state").exit_code == 0
    made = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
    assert made.keys() >= {"holdfast.db", "holdfast.toml", "root.sealed"}
    assert "root.key" not in made
    assert set(made.values()) == {0o600}
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_whoever_makes_it_administers_it_and_reads_only_if_that_was_granted(tmp_path: Path) -> None:
    for folder, words, expected in (
        ("a", (), set()),
        ("b", ("--grant", "transcript:read"), {Permission.TRANSCRIPT_READ}),
    ):
        assert run(tmp_path / folder, *words).exit_code == 0
        store = Store.open(f"sqlite:///{tmp_path / folder / 'holdfast.db'}")
        vault = Vault(DatabaseKeys(store))
        vault.open(open_root(tmp_path / folder, PASSPHRASE.encode()))
        caller = asyncio.run(Identity(store, vault).caller_of_uid(os.getuid()))
        store.close()
        assert (caller.principal.role, caller.principal.tenant_id) == (Role.ADMIN, None)
        assert caller.principal.permissions == expected


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "precious").write_text("mine")
    outcome = run(tmp_path / "state", "--json")
    assert outcome.exit_code == 6
    assert json.loads(outcome.stdout)["code"] == "already_initialised"
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["precious"]


def test_an_empty_folder_is_a_place_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    assert run(tmp_path / "state").exit_code == 0


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(initialising, "_write", full)
    outcome = run(tmp_path / "state", "--json")
    assert outcome.exit_code == 9
    assert "No space left" in json.loads(outcome.stdout)["cause"]
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = run(tmp_path / "file" / "state", "--json")
    assert outcome.exit_code == 9
    assert str(tmp_path / "file") in json.loads(outcome.stdout)["cause"]


def test_a_short_passphrase_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    outcome = run(tmp_path / "state", "--json", entered="short")
    assert (outcome.exit_code, json.loads(outcome.stdout)["code"]) == (2, "passphrase_too_short")
    assert not (tmp_path / "state").exists()


def test_a_seal_opens_with_its_own_passphrase_only(tmp_path: Path) -> None:
    assert run(tmp_path).exit_code == 0
    with pytest.raises(WrongPassphrase):
        open_root(tmp_path, b"another passphrase")
    with pytest.raises(PassphraseNeeded):
        open_root(tmp_path, b"")
    with pytest.raises(SealUnusable, match="backup"):
        open_root(tmp_path / "elsewhere", b"")


def test_a_demonstration_has_its_key_file_and_one_api_key(tmp_path: Path) -> None:
    settings = demonstration(tmp_path / "demo")
    initialise(settings, passphrase=None, tenant_name="demo", demo_key_file="demo-api-key")
    key_file = tmp_path / "demo" / "demo-api-key"
    assert key_file.read_text().startswith("hf_")
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "demo" / "root.key").stat().st_mode & 0o777 == 0o600
    open_root(tmp_path / "demo", b"")


def test_the_secret_of_the_demonstrations_key_is_in_no_other_file(tmp_path: Path) -> None:
    initialise(demonstration(tmp_path / "demo"), passphrase=None, tenant_name="demo", demo_key_file="demo-api-key")
    secret = (tmp_path / "demo" / "demo-api-key").read_bytes().strip()
    holding = [path.name for path in (tmp_path / "demo").iterdir() if secret in path.read_bytes()]
    assert holding == ["demo-api-key"]


def test_the_settings_file_holds_every_setting_with_its_default(tmp_path: Path) -> None:
    settings = Settings.model_validate({"state_dir": tmp_path})
    text = settings_text(settings)
    assert tomllib.loads(text) == {
        "gateway": {},
        "vault": {"seal": "passphrase"},
        "store": {},
        "engine": {},
        "tiers": {},
        "sessions": {},
        "admission": {},
        "audit": {},
    }
    spelled = tomllib.loads(
        "\n".join(
            line.removeprefix("# ") if " = " in line else "" if line.startswith("#") else line
            for line in text.splitlines()
        )
    )
    defaults = settings.model_dump(mode="json", exclude={"state_dir"})
    assert spelled.keys() == defaults.keys()
    for section, values in defaults.items():
        if isinstance(values, dict):
            assert spelled[section].keys() == values.keys()
            for name, value in values.items():
                assert value is None or spelled[section][name] == value, (section, name)
