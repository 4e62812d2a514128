"""The admin API's route to proofs. Who may call it stands in `routes.RULES`.

Rule: what a proof found is recorded before it is shown; that it was asked for, before it begins. Who
hangs up ends the proof, and what it made is removed.
"""

import time
from typing import ClassVar

from fastapi import Request

from api.admin import types
from api.admin.asking import AskerOf, Endpoints, ServicesOf, while_there
from api.proving.isolation import Check, prove_isolation, verdict_of
from api.proving.judgement import Verdict
from appliance.audit import Outcome
from appliance.audit.events import ISOLATION_PROVED
from appliance.errors import Fault, HoldfastError


class ProofRunning(HoldfastError):
    """Another proof runs: the two would disturb each other."""

    code: ClassVar[str] = "proof_running"
    fault: ClassVar[Fault] = Fault.CONFLICT


async def _prove_isolation(
    asked: types.IsolationProofAsked, request: Request, services: ServicesOf, asker: AskerOf
) -> types.IsolationProof:
    proving = request.app.state.proving
    if proving.locked():
        raise ProofRunning(
            "a proof runs already", cause="two at once would disturb each other", remedy="Ask again when it is over"
        )
    async with proving:
        began = time.monotonic()
        try:
            checks = await while_there(request, prove_isolation(services, asker.named, rounds=asked.rounds))
        except HoldfastError as error:
            await asker.did(ISOLATION_PROVED, ("system", ""), outcome=Outcome.FAILURE, reason=error.code)
            raise
        verdict = verdict_of(checks)
        details = {"verdict": verdict.value, "failed": ", ".join(_name(each) for each in checks if _failed(each))}
        outcome = Outcome.SUCCESS if verdict is Verdict.PASS else Outcome.FAILURE
        await asker.did(ISOLATION_PROVED, ("system", ""), outcome=outcome, details=details)
    return types.IsolationProof(
        verdict=verdict.value,
        checks=[
            types.ProofCheck(
                name=each.name,
                mode=each.mode,
                tier=each.tier,
                verdict=each.verdict.value,
                expected=each.expected,
                found=each.found,
            )
            for each in checks
        ],
        took_s=time.monotonic() - began,
    )


def _failed(check: Check) -> bool:
    return check.verdict is Verdict.FAIL


def _name(check: Check) -> str:
    return " ".join(part for part in (check.mode, check.tier, check.name) if part)


ENDPOINTS: Endpoints = {("POST", "/v1/prove/isolation"): (_prove_isolation, types.IsolationProof)}
