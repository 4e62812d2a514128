"""Which word counts of how long a session's KV is kept: the tenant's, then the model's, then the appliance's."""

import pytest
from pydantic import ValidationError

from appliance.identity import Isolation, Tenant
from appliance.sessions.keeping import Keeping, keeping
from appliance.settings import SessionSettings, TenantRetention

BANK = Tenant(tenant_id="ten_1", name="Harbour Bank", idle_timeout_s=None, isolation=Isolation.SESSION, created_at=0.0)


def test_without_a_word_of_anybody_a_tool_call_is_waited_for_longer() -> None:
    kept = keeping(SessionSettings(), BANK, "model")
    assert kept == Keeping(15.0, 120.0)
    assert [kept.idle_timeout_after_s(stop) for stop in ("tool_use", "end_turn", "other")] == [120.0, 15.0, 15.0]


def test_a_model_and_a_tenant_have_their_own() -> None:
    settings = SessionSettings(
        idle_timeout_s_by_model={"big": 30.0},
        idle_timeout_after_tool_use_s_by_model={"big": 300.0},
        session_kv_cap=0.5,
        tenants={
            "Harbour Bank": TenantRetention(
                retention="strict", idle_timeout_after_tool_use_s=60.0, kv_share=0.25, kv_cap=0.75
            )
        },
    )
    assert keeping(settings, None, "big") == Keeping(30.0, 300.0, session_cap=0.5)
    assert keeping(settings, BANK, "big") == Keeping(30.0, 60.0, True, 0.25, 0.75, 0.5)


def test_shares_that_cannot_all_be_kept_are_refused() -> None:
    with pytest.raises(ValidationError, match="kv_share"):
        SessionSettings(tenants={"a": TenantRetention(kv_share=0.6), "b": TenantRetention(kv_share=0.6)})
