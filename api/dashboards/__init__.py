"""Dashboards for Grafana, as it imports them: `kv.json` shows what is kept of sessions, and what that saves."""

from importlib.resources import files


def kv_dashboard() -> str:
    """The dashboard of `holdfast kv dashboard`, as JSON."""
    return (files(__name__) / "kv.json").read_text("utf-8")
