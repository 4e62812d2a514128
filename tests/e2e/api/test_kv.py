"""What is kept, as an administrator sees it: the admin API, the metrics' page, the dashboard over it, the commands."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from api.dashboards import kv_dashboard
from tests.e2e.api.conftest import Served
from tests.metrics_table import documented_metrics

_METRIC = re.compile(r"holdfast_[a-z0-9_]+")


def holdfast(served: Served, *words: str) -> str:
    command = [str(Path(sys.executable).parent / "holdfast"), "--state-dir", str(served.state_dir), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def metrics_page(served: Served) -> str:
    with served.admin._connected(10.0) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = b""
        while part := connection.recv(1 << 16):
            received += part
    return received.decode().replace("\r\n", "\n").partition("\n\n")[2]


def test_the_picture_has_what_the_engine_keeps_and_what_the_gateway_counted(served: Served) -> None:
    with served.sdk() as client:
        list(client.chat.completions.create(model="stub", messages=[{"role": "user", "content": "hi"}], stream=True))
    status = served.admin.kv()
    (tier,) = status.tiers
    assert (tier.tier, tier.capacity_blocks, tier.used_blocks, tier.capacity_bytes) == ("device", 100, 40, 409_600)
    assert (status.kept_sessions, status.reclaimed_blocks_total, status.worths_hits_per_s) == (1, 7, [0.25] * 3)
    assert tier.sessions == 1
    (session,) = status.sessions
    assert session.session_id is None  # the stub names one that this gateway never had
    assert [(each.tier, each.tokens, each.kept_for, each.ends_in_s) for each in session.kept] == [
        ("device", 960, "lease", 12.5)
    ]
    assert status.turns >= 1
    times = status.warm or status.cold
    assert times is not None
    assert 0 < times.p50_s <= times.p99_s
    assert {each.tenant_id for each in status.tenants} >= {served.admin.tenants().tenants[0].tenant_id}
    ours = next(each for each in status.tenants if each.tenant_id == served.admin.tenants().tenants[0].tenant_id)
    assert [(each.tier, each.blocks, each.share_blocks, each.cap_blocks) for each in ours.kept] == [
        ("device", 0, 0, None)
    ]
    others = next(each for each in status.tenants if each.tenant_id == "other")  # whom the stub names
    assert (others.kept_sessions, others.leased_sessions, others.worths_hits_per_s) == (1, 1, [0.25] * 3)
    assert (others.reclaimed_blocks_total, others.expired_leases_total) == (4, 2)
    assert served.admin.kv(sessions=0).sessions == []


def labels_on(page: str) -> dict[str, set[str]]:
    """By the names on the page, `_bucket` too: the labels of each metric. One that has no series now has none."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        is_counter = family.type == "counter"
        labels = found.setdefault(f"{family.name}_total" if is_counter else family.name, set())
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                found.setdefault(sample.name, set()).update(sample.labels)
            elif not sample.name.endswith("_created"):
                labels.update(sample.labels)
    return {name: labels for name, labels in found.items() if not name.endswith("_created")}


def test_the_table_in_the_documentation_is_that_of_the_page(served: Served) -> None:
    served.ask("hi " * 40)
    on_page = labels_on(metrics_page(served))
    documented = documented_metrics()
    only_of_an_engine_that_the_gateway_started = {"holdfast_engine_restarts_total"}
    assert {name for name in on_page if not name.endswith("_bucket")} == (
        documented.keys() - only_of_an_engine_that_the_gateway_started
    )
    told = {name for name, labels in on_page.items() if labels and name in documented}
    assert {name: on_page[name] for name in told} == {name: documented[name].labels for name in told}
    assert {"holdfast_engine_info", "holdfast_served_prompt_tokens_total"} <= told


def test_every_metric_and_every_label_that_a_panel_asks_for_is_on_the_page(served: Served) -> None:
    served.ask("hi " * 40)
    on_page = labels_on(metrics_page(served))
    dashboard: Any = json.loads(kv_dashboard())
    (tenants,) = (each for each in dashboard["templating"]["list"] if each["name"] == "tenant")
    assert tenants["query"]["query"] == "label_values(holdfast_prompt_tokens_total, tenant)"
    asked: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression, where = target["expr"], f"{panel['title']}: {target['expr']}"
            names = _METRIC.findall(expression)
            assert names, where
            assert set(names) <= on_page.keys(), where
            labels = set[str]().union(*(on_page[name] for name in names))
            matched = set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", expression))
            grouped = [set(re.findall(r"\w+", each)) for each in re.findall(r"by \(([^)]*)\)", expression)]
            assert matched.union(*grouped) <= labels, where
            shown = grouped[0] - {"le"} if grouped else set() if "sum(" in expression else labels
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= shown, where
            asked |= set(names)
    assert len(asked) > 15


def test_what_the_panels_show_has_a_unit_a_description_and_a_place() -> None:
    dashboard: Any = json.loads(kv_dashboard())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert max(x for x, _ in taken) < 24


def test_no_series_has_a_name_a_label_or_a_salt(served: Served) -> None:
    served.ask("hi", session="quarterly-report")
    page = metrics_page(served)
    seen = served.engine_seen()["bodies"][-1]
    lease = seen["kv_transfer_params"]["holdfast"]
    for secret in (seen["cache_salt"], lease["session"], lease["tenant"], "quarterly-report", "somebody"):
        assert secret not in page


def test_the_commands_show_it(served: Served) -> None:
    text = holdfast(served, "kv", "status")
    assert "100 blocks, 400.0 KiB" in text
    assert "960 (lease, 12 s)" in text
    pictures = holdfast(served, "kv", "top", "--json", "--count", "2", "--interval", "0.5").splitlines()
    assert [json.loads(line)["tiers"][0]["tier"] for line in pictures] == ["device", "device"]
    again = holdfast(served, "kv", "top", "--count", "2", "--interval", "0.5")
    assert again.count("OF THEM LEASED") == 2
    assert "\x1b" not in again
    assert json.loads(holdfast(served, "kv", "dashboard"))["uid"] == "holdfast-kv"
