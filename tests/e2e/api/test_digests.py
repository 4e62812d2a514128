"""A tenant may have keyed digests of its texts in the audit log, and check a text that it has against one."""

import json
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest

from api.admin import types
from api.admin.client import AdminClient, Refused
from benchmarks.stub import MODEL
from tests.e2e.api.conftest import Served, serving
from tests.e2e.cli.test_audit_commands import run_holdfast

ASKED = [{"role": "user", "content": "Grüße"}]


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("digests")) as it:
        yield it


def _tenant(served: Served) -> types.Tenant:
    (tenant,) = served.admin.tenants().tenants
    return tenant


def _choose(served: Served, choice: str) -> None:
    done = run_holdfast(served, "tenant", "set", "tenant", "--audit-digests", choice)
    assert done.returncode == 0, done.stderr


def _details(served: Served, action: str) -> dict[str, Any]:
    (entry,) = served.admin.audit_entries(action=action, limit=1).entries
    assert entry.record is not None
    return entry.record.get("details", {})  # type: ignore[no-any-return]


def _digest(served: Served, of: str, text: str) -> str:
    done = run_holdfast(served, "audit", "digest", "tenant", "--of", of, secret=text)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_digests_are_off_until_chosen_and_then_those_of_the_exact_texts(own: Served) -> None:
    assert not _tenant(own).audit_digests
    own.ask("Grüße")
    assert _details(own, "turn.admitted").keys() == {"key_id"}
    assert _details(own, "turn.completed") == {}
    _choose(own, "on")
    assert _tenant(own).audit_digests
    changed = _details(own, "tenant.changed")
    assert changed == {"setting": "audit_digests", "old": "off", "new": "on"}
    for stream in (False, True):
        answer = own.ask("Grüße", stream=stream)
        text = "".join(
            event["choices"][0]["delta"].get("content") or ""
            for event in (answer.events if stream else ())
            if event != "[DONE]" and event["choices"]
        )
        text = text if stream else answer.json["choices"][0]["message"]["content"]
        prompt_digest, answer_digest = _details(own, "turn.admitted")["prompt_digest"], None
        answer_digest = _details(own, "turn.completed")["answer_digest"]
        assert prompt_digest == _digest(own, "messages", json.dumps(ASKED, indent=2))
        assert answer_digest == _digest(own, "answer", text)
        assert answer_digest != _digest(own, "answer", text + "\n")
        assert answer_digest != _digest(own, "prompt", text)
    assert _details(own, "audit.read") is not None
    _choose(own, "off")
    own.ask("Grüße")
    assert "prompt_digest" not in _details(own, "turn.admitted")


def test_a_completions_prompt_and_a_long_one_have_theirs(own: Served) -> None:
    _choose(own, "on")
    for prompt in ("Once upon a time", "word " * 50_000):
        body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 3}).encode()
        # The long one is admitted, and the engine finds it too long.
        assert own.send("POST", "/v1/completions", body).status in (200, 400)
        assert _details(own, "turn.admitted")["prompt_digest"] == _digest(own, "prompt", prompt)


def test_who_may_choose_and_who_may_check(own: Served) -> None:
    tenant = _tenant(own)
    other = own.new_key(tenant="other", principal="chief")
    client = AdminClient(own.state_dir, api_key=other.secret)
    for asked in (
        lambda: client.change_tenant(tenant.tenant_id, audit_digests=True),
        lambda: client.audit_digest(tenant="tenant", text="prompt", sha256="0" * 64),
    ):
        with pytest.raises(Refused) as refused:
            asked()
        assert refused.value.code == "admin_denied"
    chief = own.admin.create_key(tenant="other", principal="head", role="admin")
    mine = AdminClient(own.state_dir, api_key=chief.secret)
    for asked in (
        lambda: mine.change_tenant(tenant.tenant_id, audit_digests=True),
        lambda: mine.audit_digest(tenant="tenant", text="prompt", sha256="0" * 64),
    ):
        with pytest.raises(Refused) as refused:
            asked()
        assert refused.value.code == "admin_not_found"
    assert mine.change_tenant(chief.key.tenant_id or "", audit_digests=True).audit_digests
    assert mine.audit_digest(tenant="other", text="prompt", sha256="0" * 64).tenant_id == chief.key.tenant_id
    assert not next(each for each in own.admin.tenants().tenants if each.name == "tenant").audit_digests
    with pytest.raises(Refused, match="no tenant"):
        own.admin.change_tenant("tenant", audit_digests=True)  # a name would stand in the log
    unknown = run_holdfast(own, "tenant", "set", "nobody", "--audit-digests", "on")
    assert unknown.returncode != 0
    assert "there is no tenant" in unknown.stderr


@pytest.mark.parametrize(("chosen", "forged"), [("on", "off"), ("on", None), (None, "on")])
def test_a_choice_that_was_changed_in_the_database_by_hand_is_refused(
    own: Served, chosen: str | None, forged: str | None
) -> None:
    if chosen is not None:
        _choose(own, chosen)
    with sqlite3.connect(own.state_dir / "holdfast.db") as db:
        db.execute("UPDATE tenants SET audit_digests = ?", (forged,))
    listed = own.admin.tenants()
    assert listed.tenants == []
    (damaged,) = listed.damaged
    assert "changed" in damaged.why or "encrypted" in damaged.why
    assert own.ask("hello").status == 500
