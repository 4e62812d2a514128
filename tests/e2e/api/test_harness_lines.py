"""A harness's changing line is taken out where the tenant allows it: told to the client, and in the audit log."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.stub import MODEL
from tests.e2e.api.conftest import Answer, Served, serving

LINE = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch={};"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as served:
        yield served


def ask(served: Served, call: str) -> Answer:
    system = f"{LINE.format(call)}\nYou help."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": LINE.format(call)}]
    body = json.dumps({"model": MODEL, "messages": messages}).encode()
    return served.send("POST", "/v1/chat/completions", body)


def test_it_stays_unless_the_tenant_allows_it_and_goes_alone_when_it_does(own: Served) -> None:
    kept = ask(own, "fa690")
    assert "x-holdfast-normalised" not in kept.headers
    assert "fa690" in own.engine_seen()["bodies"][-1]["messages"][0]["content"]

    tenant = own.admin.tenants().tenants[0]
    assert not tenant.takes_out_harness_lines
    assert own.admin.change_tenant(tenant.tenant_id, take_out_harness_lines=True).takes_out_harness_lines
    assert own.admin.tenants().tenants[0].takes_out_harness_lines
    answers = [ask(own, call) for call in ("0b1c2", "d3e4f")]
    assert [each.headers["x-holdfast-normalised"] for each in answers] == ["harness-lines=1"] * 2
    seen = [body["messages"] for body in own.engine_seen()["bodies"][-2:]]
    assert [said[0]["content"] for said in seen] == ["You help."] * 2
    assert [said[1]["content"] for said in seen] == [LINE.format(call) for call in ("0b1c2", "d3e4f")]  # a user's word

    changes = [
        entry.record["details"]
        for entry in own.admin.audit_entries(action="tenant.changed").entries
        if entry.record is not None
    ]
    assert changes == [{"setting": "take_out_harness_lines", "old": "off", "new": "on"}]
    own.admin.change_tenant(tenant.tenant_id, take_out_harness_lines=False)
    assert "x-holdfast-normalised" not in ask(own, "aaaaa").headers
