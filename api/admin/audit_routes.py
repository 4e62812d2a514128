"""The admin API's routes to the audit log. Who may call them stands in `routes.RULES`.

Rule: reading the log is an event in it before anything is shown.
"""

import asyncio
import dataclasses
from pathlib import Path
from typing import Annotated

from fastapi import Query

from api.admin import status, types
from api.admin.asking import AskerOf, Endpoints, ServicesOf, chosen_tenant, unknown
from api.services import Services
from appliance.audit.digests import Text, keyed_digest
from appliance.audit.events import AUDIT_READ, AUDIT_WITNESSED, CATALOGUE
from appliance.audit.notes import Checkpoint, VerifierKey
from appliance.audit.reading import LogReader
from appliance.audit.search import Found, look_at, search
from appliance.audit.search import Query as AuditQuery
from appliance.audit.signing import public_key
from appliance.audit.tree import leaf_hash
from appliance.audit.witness import read_request
from appliance.audit.witnessing import last_seen, make_request, take_reply


async def _audit_status(services: ServicesOf) -> types.AuditStatus:
    return await status.audit_status(services)


async def _audit_entries(
    services: ServicesOf,
    asker: AskerOf,
    since: float | None = None,
    until: float | None = None,
    tenant: str | None = None,
    action: str | None = None,
    actor: str | None = None,
    session: str | None = None,
    outcome: str | None = None,
    before: int | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> types.AuditPage:
    query = AuditQuery(
        since_ns=None if since is None else int(since * 1e9),
        until_ns=None if until is None else int(until * 1e9),
        scope=tenant,
        action=action,
        actor=actor,
        session=session,
        outcome=outcome,
        before=before,
        limit=limit,
    )
    given = {name: str(value) for name, value in dataclasses.asdict(query).items() if value is not None}
    await asker.did(AUDIT_READ, ("audit", ""), details=given)
    found = await asyncio.to_thread(lambda: search(LogReader(services.audit.directory), services.vault, query))
    return types.AuditPage(
        entries=[_audit_view(each) for each in found.found],
        go_on_before=found.go_on_before,
        oldest_kept=found.oldest,
    )


async def _audit_entry(sequence: int, services: ServicesOf, asker: AskerOf) -> types.AuditEntry:
    await asker.did(AUDIT_READ, ("entry", str(sequence)))
    return await asyncio.to_thread(_look_up, services, sequence)


def _look_up(services: Services, sequence: int) -> types.AuditEntry:
    log = LogReader(services.audit.directory)
    return _audit_view(look_at(log.entry(sequence), log.frame(sequence).sealed, services.vault))


async def _audit_digest(asked: types.AuditDigestAsked, services: ServicesOf, asker: AskerOf) -> types.AuditDigest:
    tenant = await chosen_tenant(services, asker.named, asked.tenant)
    if tenant is None:
        raise unknown("tenant", asked.tenant, "tenant list")
    await asker.did(AUDIT_READ, ("digest", tenant.tenant_id), details={"text": asked.text})
    digest = keyed_digest(services.vault, tenant.tenant_id, Text(asked.text), bytes.fromhex(asked.sha256))
    return types.AuditDigest(tenant_id=tenant.tenant_id, digest=digest)


async def _audit_witness_request(
    services: ServicesOf, witness: str | None = None, old_size: int | None = None
) -> types.AuditWitnessAsked:
    await services.audit.checkpoint()
    return await asyncio.to_thread(_ask_witness, services.audit.directory, witness, old_size)


def _ask_witness(directory: Path, witness: str | None, old_size: int | None) -> types.AuditWitnessAsked:
    if old_size is None:
        old_size = 0 if witness is None else last_seen(directory, VerifierKey.parse(witness))
    asked = make_request(directory, old_size=old_size)
    size = Checkpoint.parse(read_request(asked).note.partition("\n\n")[0] + "\n").size
    return types.AuditWitnessAsked(request=asked.decode(), size=size, public_key=str(public_key(directory)))


async def _audit_witness_reply(
    came: types.AuditWitnessReply, services: ServicesOf, asker: AskerOf
) -> types.AuditWitnessed:
    directory = services.audit.directory
    witness = VerifierKey.parse(came.witness)
    seen = await asyncio.to_thread(
        take_reply, directory, came.request.encode(), came.reply.encode(), public_key(directory), witness
    )
    await asker.did(AUDIT_WITNESSED, ("witness", str(witness)), details={"size": str(seen.size)})
    return types.AuditWitnessed(witness=witness.name, size=seen.size)


def _audit_view(found: Found) -> types.AuditEntry:
    entry = found.entry
    known = CATALOGUE.get(entry.event_class)
    return types.AuditEntry(
        sequence=entry.sequence,
        time_s=entry.wall_ns / 1e9,
        action=f"class {entry.event_class}" if known is None else known.action,
        leaf_hash=leaf_hash(entry.pack()).hex(),
        record=found.record,
        salt=found.salt.hex() or None,
        why_not=found.why_not or None,
    )


ENDPOINTS: Endpoints = {
    ("GET", "/v1/audit"): (_audit_status, types.AuditStatus),
    ("GET", "/v1/audit/entries"): (_audit_entries, types.AuditPage),
    ("GET", "/v1/audit/entries/{sequence}"): (_audit_entry, types.AuditEntry),
    ("POST", "/v1/audit/digest"): (_audit_digest, types.AuditDigest),
    ("GET", "/v1/audit/witness"): (_audit_witness_request, types.AuditWitnessAsked),
    ("POST", "/v1/audit/witness"): (_audit_witness_reply, types.AuditWitnessed),
}
