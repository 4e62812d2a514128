"""What the rooms' values look like on the admin socket, and the other way round.

Rule: a view shows what is asked for and nothing besides: who may ask, `routes` decides.
"""

from collections.abc import Sequence
from dataclasses import asdict

from api.admin import types
from api.services import Services
from appliance.engine.picture import SessionPicture
from appliance.identity import ApiKey, Permission, Principal, Scopes, Tenant
from appliance.sessions import Explanation, SessionSummary, Transcript
from appliance.sessions.keeping import keeping


def tenant_view(services: Services, tenant: Tenant) -> types.Tenant:
    """A tenant, and what is in force for it with the model that is served."""
    models = services.watch.models
    model = models[0].id if models else None
    kept = keeping(services.settings.sessions, tenant, model or "")
    return types.Tenant(
        tenant_id=tenant.tenant_id,
        name=tenant.name,
        idle_timeout_s=tenant.idle_timeout_s,
        isolation=tenant.isolation.value,
        audit_digests=tenant.audit_digests,
        takes_out_harness_lines=tenant.takes_out_harness_lines,
        keeping=types.TenantKeeping(
            model=model,
            retention="strict" if kept.strict else "soft",
            idle_timeout_s=kept.idle_timeout_s,
            idle_timeout_after_tool_use_s=kept.idle_timeout_after_tool_use_s,
            kv_share=kept.tenant_share,
            kv_cap=kept.tenant_cap,
            session_kv_cap=kept.session_cap,
        ),
        created_at=tenant.created_at,
    )


async def key_views(services: Services, keys: Sequence[ApiKey]) -> list[types.Key]:
    """Keys with the names and the roles of whose they are."""
    whose_keys = {key.tenant_id for key in keys}
    found = await services.identity.tenants({each for each in whose_keys if each is not None})
    tenants = {tenant.tenant_id: tenant for tenant in found}
    keys = [key for key in keys if key.tenant_id is None or key.tenant_id in tenants]  # a proof's may be gone by now
    principals: dict[str, Principal] = {}
    for tenant in [*tenants.values(), *([None] if None in whose_keys else [])]:
        principals |= {each.principal_id: each for each in await services.identity.principals(tenant)}
    whose = [(key, principals.get(key.principal_id)) for key in keys]
    return [
        types.Key(
            key_id=key.key_id,
            tenant_id=key.tenant_id,
            tenant=None if key.tenant_id is None else tenants[key.tenant_id].name,
            principal_id=key.principal_id,
            principal=None if principal is None else principal.name,
            role=None if principal is None else principal.role.value,
            label=key.label,
            limits=limits_view(key.scopes),
            created_at=key.created_at,
            expires_at=key.expires_at,
            revoked_at=key.revoked_at,
        )
        for key, principal in whose
    ]


def export_view(services: Services, name: str) -> types.AuditExport:
    """A destination of the audit log. Raises as `Exports.destination`."""
    view = asdict(services.exports.view(name))
    return types.AuditExport.model_validate({**view, "url": services.exports.destination(name).url})


def limits_view(scopes: Scopes) -> types.Limits:
    """What an API key may do, as it is told."""
    return types.Limits(
        models=None if scopes.models is None else sorted(scopes.models),
        requests_per_minute=scopes.requests_per_minute,
        concurrent_requests=scopes.concurrent_requests,
        tokens_per_day=scopes.tokens_per_day,
        permissions=[permission.value for permission in scopes.permissions],
    )


def scopes(limits: types.Limits) -> Scopes:
    """What an API key may do, as it was asked for."""
    return Scopes(
        models=None if limits.models is None else frozenset(limits.models),
        requests_per_minute=limits.requests_per_minute,
        concurrent_requests=limits.concurrent_requests,
        tokens_per_day=limits.tokens_per_day,
        permissions=frozenset(Permission(permission) for permission in limits.permissions),
    )


def session_view(summary: SessionSummary) -> types.Session:
    """What may be known of a session without reading it."""
    return types.Session(
        session_id=summary.session_id,
        tenant_id=summary.tenant_id,
        principal_id=summary.principal_id,
        tree_id=summary.tree_id,
        parent_session_id=summary.parent_session_id,
        model=summary.model,
        origin=summary.origin.value,
        turns=summary.turns,
        prompt_tokens=summary.prompt_tokens,
        cached_tokens=summary.cached_tokens,
        completion_tokens=summary.completion_tokens,
        created_at=summary.created_at,
        last_used_at=summary.last_used_at,
    )


def explanation_view(explanation: Explanation, kept: SessionPicture | None) -> types.Explanation:
    """Why a session's prompts had to be computed; `kept` of it: as `kept_of_session`."""
    return types.Explanation(
        session=session_view(explanation.session),
        kept=None if kept is None else [types.KvHeld.model_validate(asdict(each)) for each in kept.held],
        worth_hits_per_s=None if kept is None else kept.worth_hits_per_s,
        turns=[
            types.ExplainedTurn(
                number=turn.number,
                started_at=turn.started_at,
                prompt_tokens=turn.account.prompt_tokens,
                served_tokens=turn.account.served_tokens,
                computed_tokens={cause.value: tokens for cause, tokens in turn.account.computed.items()},
                served_from=None if (served := turn.account.served) is None else served.by_tier(),
                first_token_s=turn.first_token_s,
                divergence=None
                if (where := turn.divergence) is None
                else types.Divergence(token=where.token, message=where.message, role=where.role, change=where.change),
            )
            for turn in explanation.turns
        ],
        findings=[
            types.Finding(
                what=found.what,
                message=found.message,
                role=found.role,
                turns=list(found.turns),
                tokens=found.tokens,
                remedy=found.remedy,
            )
            for found in explanation.findings
        ],
        truncated=explanation.truncated,
    )


def transcript_view(transcript: Transcript) -> types.Transcript:
    """What was said in a session."""
    return types.Transcript(
        session=session_view(transcript.session),
        client_id=transcript.client_id,
        turns=[
            types.TranscriptTurn(
                number=turn.number,
                response_id=turn.response_id,
                model=turn.model,
                state=turn.state.value,
                new_messages=[dict(message) for message in turn.new_messages],
                answer=dict(turn.answer),
                parameters=turn.parameters,
                prompt_token_ids=turn.prompt_token_ids,
                completion_token_ids=turn.completion_token_ids,
                prompt_tokens=turn.prompt_tokens,
                cached_tokens=turn.cached_tokens,
                completion_tokens=turn.completion_tokens,
                finish_reason=turn.finish_reason,
                started_at=turn.started_at,
                ended_at=turn.ended_at,
            )
            for turn in transcript.turns
        ],
        truncated=transcript.truncated,
    )
