"""The saved destinations: read as they were written, refused where anybody else changed them."""

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.audit.siem.destinations import Destination
from appliance.audit.siem.saved import CURSOR_SUFFIX, SavedTampered, load, save
from appliance.vault import RootKey, Vault, VaultSealed
from tests.unit.audit.making import Keys
from tests.unit.vault.keystore import MemoryKeys

FILES: dict[str, Any] = {name: Path(f"/etc/siem/{name}") for name in ("ca", "certificate", "private_key")}
ONE = Destination(name="soc", url="syslog+tls://siem.example", **FILES)
OTHER = Destination(name="other", url="relp+tls://elsewhere.example", **FILES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "destinations.json"


def test_what_was_saved_is_read_again(path: Path) -> None:
    assert load(path, Keys()) == (0, [])
    for version, saved in enumerate(([ONE, OTHER], [OTHER], []), 1):
        save(path, saved, version, Keys())
        assert load(path, Keys()) == (version, saved)


@pytest.mark.parametrize("name", list(ONE.record()))
def test_a_field_that_was_changed_outside_is_found(path: Path, name: str) -> None:
    save(path, [ONE], 1, Keys())
    said = json.loads(path.read_text())
    said["destinations"][0][name] = f"{said['destinations'][0][name]}x"
    path.write_text(json.dumps(said))
    with pytest.raises(SavedTampered, match="was changed outside"):
        load(path, Keys())


@pytest.mark.parametrize(
    "damage",
    [
        lambda said: said["destinations"].append(OTHER.record()),
        lambda said: said["destinations"].clear(),
        lambda said: said["destinations"][0].update(more=1),
        lambda said: said.update(version=2),
        lambda said: said.pop("version"),
        lambda said: said.update(tag="00" * 32),
        lambda said: said.update(key="00" * 16),
        lambda said: said.pop("tag"),
        lambda said: said.update(tag=1),
    ],
)
def test_whatever_else_is_changed_is_found(path: Path, damage: Any) -> None:
    save(path, [ONE], 1, Keys())
    said = json.loads(path.read_text())
    damage(said)
    path.write_text(json.dumps(said))
    with pytest.raises(SavedTampered):
        load(path, Keys())


def test_a_file_that_was_taken_away_is_missed(path: Path) -> None:
    save(path, [ONE], 1, Keys())
    path.with_name(f"soc{CURSOR_SUFFIX}").write_text("{}")
    path.unlink()
    with pytest.raises(SavedTampered, match="is gone"):
        load(path, Keys())


def test_only_the_vault_that_saved_them_reads_them_and_only_while_it_is_open(path: Path) -> None:
    keys = MemoryKeys()
    vault = Vault(keys)
    vault.open(RootKey(b"r" * 32))
    keys.add(vault.new_system_keys())
    save(path, [ONE], 1, vault)
    assert load(path, vault) == (1, [ONE])
    vault.seal()
    with pytest.raises(VaultSealed):
        load(path, vault)
    others = MemoryKeys()
    other = Vault(others)
    other.open(RootKey(b"r" * 32))
    others.add(other.new_system_keys())
    with pytest.raises(SavedTampered, match="a key that this appliance does not have"):
        load(path, other)
