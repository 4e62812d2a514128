"""Settings: where they come from, and which of them go together."""

from pathlib import Path
from typing import Any

import pytest

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
