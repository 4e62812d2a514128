"""`prove isolation` on a real engine: it passes on the product, and fails on every one that was broken on purpose."""

from pathlib import Path

import pytest

from api.admin import types
from api.admin.client import AdminClient
from appliance.errors import HoldfastError
from benchmarks.running import make_appliance, running_gateway
from tests.e2e.api.conftest import until
from tests.e2e.proving.conftest import Prove

pytestmark = pytest.mark.timeout(600)

# Every session of every tenant has one salt.
CONSTANT_SALT = """
from dataclasses import replace
from appliance.sessions.registry import Registry
made = Registry._session
Registry._session = lambda self, *given: replace(made(self, *given), salt="constant")
"""
# The engine is told no salt at all.
NO_SALT = """
import api.openai.turns as turns
to_json = turns.to_json
turns.to_json = lambda body: to_json({name: value for name, value in body.items() if name != "cache_salt"})
"""
# Time goes by what the engine computes, a millisecond a token: a hit is faster by its length, whatever else runs.
WORK_IS_TIME = """
from dataclasses import replace
from api.proving import asking
said = asking._Answered.said
def in_work(self, began):
    told = said(self, began)
    return replace(told, first_token_s=(told.prompt_tokens - told.cached_tokens) / 1000)
asking._Answered.said = in_work
"""
# No request finds what another one left.
SALT_PER_REQUEST = """
import secrets
from dataclasses import replace
from appliance.sessions.registry import Registry
made = Registry._session
Registry._session = lambda self, *given: replace(made(self, *given), salt=secrets.token_hex(32))
"""
# What a user said counts as the system's.
PREFIX_TOO_LONG = """
from api.openai.prefixes import Prefix, Prefixes
from appliance.engine.protocol import token_digest
async def of(self, tenant_id, turn):
    token_ids = await self._rendered({"model": turn.model, "messages": turn.messages})
    return Prefix(len(token_ids), token_digest(token_ids))
Prefixes.of = of
"""
# What should be shared is not.
PREFIX_NOT_SHARED = """
from api.openai.prefixes import Prefixes
async def of(self, tenant_id, turn):
    return None
Prefixes.of = of
"""
# Log-probabilities that somebody asked for are given to everybody.
LOGPROBS_FOR_ALL = """
import api.openai.turns as turns
to_json = turns.to_json
turns.to_json = lambda body: to_json({**body, "logprobs": True, "top_logprobs": 1} if "messages" in body else body)
"""
# A salt is published.
SALT_IN_METRICS = """
from appliance.sessions.registry import Registry
import api.metrics as metrics
seen = []
made = Registry._session
def session(self, *given):
    seen.append(made(self, *given))
    return seen[-1]
Registry._session = session
exposition = metrics.Metrics.exposition
metrics.Metrics.exposition = lambda self: exposition(self) + "".join(each.salt for each in seen).encode()
"""


def failed(proof: types.IsolationProof) -> set[tuple[str, str]]:
    return {(check.mode, check.name) for check in proof.checks if check.verdict == "FAIL"}


def test_the_product_shares_what_was_chosen_and_nothing_else(prove: Prove) -> None:
    proof = prove("")
    assert failed(proof) == set()
    assert {(each.tier, each.verdict) for each in proof.checks if each.tier} == {
        ("device", "PASS"),
        ("dram", "NOT CONFIGURED"),
        ("disk", "NOT CONFIGURED"),
    }
    # The log of an engine that somebody else runs cannot be looked at, and so few times may not show a hit.
    unknown = {each.name.partition(":")[0] for each in proof.checks if each.verdict == "UNKNOWN"}
    assert "log of the engine" in unknown
    assert unknown <= {"log of the engine", "time to first token of another tenant's prompt"}
    assert proof.verdict == "UNKNOWN", "what cannot be told is no pass"


_TIMING = ("", "time to first token of another tenant's prompt")
# A prompt whose beginning has the tenant's salt is not another tenant's, whatever salt comes behind.
_CROSSING = {CONSTANT_SALT: ("tenant-prefix", "same tenant"), NO_SALT: ("tenant-prefix", "other tenant")}


@pytest.mark.parametrize("patch", _CROSSING, ids=["constant salt", "no salt"])
def test_one_salt_for_all_is_found(prove: Prove, patch: str) -> None:
    proof = prove(patch + WORK_IS_TIME)
    assert proof.verdict == "FAIL"
    for pair in ("same tenant", "other key", "other tenant"):
        assert ("session", pair) in failed(proof)
    assert {_CROSSING[patch], ("tenant", "other tenant"), _TIMING} <= failed(proof)


def test_a_salt_for_each_request_is_found_for_nothing_hits(prove: Prove) -> None:
    found = failed(prove(SALT_PER_REQUEST))
    for mode in ("session", "tenant-prefix", "tenant"):
        assert {(mode, "same session"), (mode, "sibling in the tree")} <= found
    assert ("tenant", "other key") in found
    assert ("session", "other tenant") not in found


# A prefix that is wrong, together with what has nothing to do with it: one proof finds both, and nothing else.
@pytest.mark.parametrize(
    ("patch", "sharing", "besides"),
    [
        (
            PREFIX_TOO_LONG + LOGPROBS_FOR_ALL,
            ("same tenant", "other key", "after forgetting"),
            "log-probabilities do not cross",
        ),
        (
            PREFIX_NOT_SHARED + SALT_IN_METRICS,
            ("same tenant", "other key"),
            "metrics of the gateway: no salt, key or word",
        ),
    ],
    ids=["prefix too long, log-probabilities for all", "prefix not shared, salt in metrics"],
)
def test_a_wrong_prefix_and_what_crosses_or_leaks_besides_are_found(
    prove: Prove, patch: str, sharing: tuple[str, ...], besides: str
) -> None:
    assert failed(prove(patch)) == {*(("tenant-prefix", pair) for pair in sharing), ("", besides)}


def test_a_proof_that_nobody_waits_for_is_broken_off_and_leaves_nothing(engine: Path, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    make_appliance(state_dir)
    with running_gateway(state_dir, engine):
        client = AdminClient(state_dir)
        with pytest.raises(HoldfastError, match="answer"):
            AdminClient(state_dir, deadline_s=3.0).prove_isolation(rounds=500)

        def recorded() -> list[str]:
            page = client.audit_entries(action="isolation.proved")
            return [str(each.record["reason"]) for each in page.entries if each.record is not None]

        until(lambda: recorded() == ["asker_gone"])
        assert [tenant.name for tenant in client.tenants().tenants] == ["tenant"]
