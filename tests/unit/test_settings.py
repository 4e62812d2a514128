"""Settings: where they come from, and which of them go together."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from appliance.engine.protocol import MAX_IDLE_TIMEOUT_S
from appliance.settings import Settings, SettingsError, load_settings

EVERYWHERE = "0.0.0.0"  # noqa: S104  (what is tested)
TLS = {"tls_certificate": "/c.pem", "tls_private_key": "/k.pem"}


def gateway(**values: Any) -> Settings:
    return load_settings({"gateway": values}, environment={}, state_dir=Path("/nowhere"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_on_loopback_there_may_be_tls_or_not(host: str) -> None:
    assert gateway(host=host).gateway.tls_certificate is None
    assert gateway(host=host, **TLS).gateway.tls_certificate == Path("/c.pem")


@pytest.mark.parametrize(
    "host", [EVERYWHERE, "::", "[::]", "192.168.1.7", "gateway.example", "localhost.example", "", "127.0.0.1.example"]
)
def test_beyond_loopback_there_is_tls_or_nothing(host: str) -> None:
    with pytest.raises(SettingsError, match="not a loopback address"):
        gateway(host=host)
    assert gateway(host=host, **TLS).gateway.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", EVERYWHERE])
@pytest.mark.parametrize("name", TLS)
def test_a_certificate_and_its_key_go_together(host: str, name: str) -> None:
    with pytest.raises(SettingsError, match="go together"):
        gateway(host=host, **{name: TLS[name]})


@pytest.mark.parametrize(
    ("disk_dir", "why"),
    [
        ("state", "only .*/state/tier is the tier's"),
        ("state/audit", "only .*/state/tier is the tier's"),
        ("state/run/engine", "only .*/state/tier is the tier's"),
        ("state/tier/../audit", "only .*/state/tier is the tier's"),
        ("link-to-state", "only .*/state/tier is the tier's"),
        (".", "with the state directory in it"),
        ("models", "with the model in it"),
        ("models/harbour", "with the model in it"),
    ],
)
def test_the_tier_is_not_put_where_something_else_of_the_appliances_lies(
    tmp_path: Path, disk_dir: str, why: str
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "link-to-state").symlink_to(tmp_path / "state")
    with pytest.raises(SettingsError, match="cannot be used") as refused:
        _tier(tmp_path, tmp_path / disk_dir)
    assert re.search(why, refused.value.cause)


@pytest.mark.parametrize("disk_dir", ["nvme", "state/tier", "state/tier/kv", "models/tier", "state-2"])
def test_a_folder_of_its_own_is_the_tiers(tmp_path: Path, disk_dir: str) -> None:
    assert _tier(tmp_path, tmp_path / disk_dir).tiers.disk_dir == tmp_path / disk_dir


def _tier(folder: Path, disk_dir: Path) -> Settings:
    tree = {"tiers": {"disk_dir": str(disk_dir)}, "engine": {"model": str(folder / "models" / "harbour")}}
    return load_settings(tree, environment={}, state_dir=folder / "state")


@pytest.mark.parametrize("name", ["idle_timeout_s", "idle_timeout_after_tool_use_s"])
@pytest.mark.parametrize("of", ["everybody", "a model", "a tenant"])
def test_no_idle_timeout_is_one_that_the_engine_refuses(name: str, of: str) -> None:
    def sessions(idle_timeout_s: float) -> Settings:
        tree = {
            "everybody": {name: idle_timeout_s},
            "a model": {f"{name}_by_model": {"big": idle_timeout_s}},
            "a tenant": {"tenants": {"bank": {name: idle_timeout_s}}},
        }
        return load_settings({"sessions": tree[of]}, environment={}, state_dir=Path("/nowhere"))

    for idle_timeout_s in (0.0, MAX_IDLE_TIMEOUT_S):
        sessions(idle_timeout_s)
    for idle_timeout_s in (-0.1, MAX_IDLE_TIMEOUT_S + 1, math.nan, math.inf):
        with pytest.raises(SettingsError, match="cannot be used"):
            sessions(idle_timeout_s)


def audit(**values: Any) -> Settings:
    return load_settings({"audit": values}, environment={}, state_dir=Path("/nowhere"))


def test_the_audit_log_is_kept_for_400_days() -> None:
    assert audit().audit.retention_days == 400
    assert audit(retention_days=183).audit.retention_override is None


@pytest.mark.parametrize("days", [7, 182])
def test_less_than_six_months_needs_somebodys_word_and_a_reason(days: int) -> None:
    with pytest.raises(SettingsError, match="six months") as refused:
        audit(retention_days=days)
    assert "2024/1689" in refused.value.cause
    for half in ({"by": "D. Officer"}, {"reason": "not a high-risk system"}, {"by": "", "reason": "x"}):
        with pytest.raises(SettingsError):
            audit(retention_days=days, retention_override=half)
    given = {"by": "D. Officer", "reason": "not a high-risk system"}
    assert audit(retention_days=days, retention_override=given).audit.retention_days == days


@pytest.mark.parametrize("days", [0, 6, -1, 1.5, "long"])
def test_a_retention_that_is_none_is_refused(days: object) -> None:
    with pytest.raises(SettingsError):
        audit(retention_days=days, retention_override={"by": "D. Officer", "reason": "none"})


def test_an_override_can_come_from_the_environment() -> None:
    environment = {
        "HOLDFAST_AUDIT__RETENTION_DAYS": "90",
        "HOLDFAST_AUDIT__RETENTION_OVERRIDE": '{ by = "D. Officer", reason = "not a high-risk system" }',
    }
    assert load_settings(environment=environment, state_dir=Path("/nowhere")).audit.retention_days == 90


def test_a_variable_with_one_underscore_too_few_is_told_and_any_other_of_that_name_left_alone() -> None:
    for variable, meant in (("GATEWAY_PORT", "GATEWAY__PORT"), ("ENGINE_MAX_MODEL_LEN", "ENGINE__MAX_MODEL_LEN")):
        with pytest.raises(SettingsError, match=f"HOLDFAST_{variable} is not a setting") as refused:
            load_settings({}, environment={f"HOLDFAST_{variable}": "1"}, state_dir=Path("/nowhere"))
        assert f"HOLDFAST_{meant}" in refused.value.remedy
    load_settings({}, environment={"HOLDFAST_ENGINE_DIR": "/x", "HOLDFAST_STATE_DIR": "/y"}, state_dir=Path("/nowhere"))
