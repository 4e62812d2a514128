"""The dashboard, held to Grafana's own models of what it imports."""

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from api.dashboards import kv_dashboard

_ABSENT: Final = object()


def _read_by_grafana(dashboard: Any) -> Any:
    register_default_plugins()  # the models of each kind of panel and of Prometheus's queries
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


def _not_understood(written: Any, read: Any, place: str = "dashboard") -> Iterator[str]:
    """The places of what is written, and not read back as it is."""
    if isinstance(written, dict) and isinstance(read, dict):
        for name, value in written.items():
            yield from _not_understood(value, read.get(name, _ABSENT), f"{place}.{name}")
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for index, (value, back) in enumerate(zip(written, read, strict=True)):
            yield from _not_understood(value, back, f"{place}[{index}]")
    elif written != read:
        yield place


def test_grafana_understands_every_field() -> None:
    dashboard = json.loads(kv_dashboard())
    assert list(_not_understood(dashboard, _read_by_grafana(dashboard))) == []


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ((), "timezones"),
        (("templating", "list", 1), "multiple"),
        (("panels", 1, "gridPos"), "width"),
        (("panels", 1, "options"), "textmode"),
        (("panels", 1, "targets", 0), "expression"),
        (("panels", 1, "fieldConfig", "defaults"), "units"),
    ],
)
def test_a_field_that_grafana_does_not_know_is_found(place: tuple[str | int, ...], name: str) -> None:
    dashboard = part = json.loads(kv_dashboard())
    for step in place:
        part = part[step]
    part[name] = "1"
    (found,) = _not_understood(dashboard, _read_by_grafana(dashboard))
    assert found.endswith(f".{name}")
