"""The admin API's routes to the audit log. Who may call them stands in `routes.RULES`.

Rule: reading the log is an event in it before anything is shown.
"""

import asyncio
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import Query
from fastapi.responses import StreamingResponse

from api import trail
from api.admin import status, types
from api.admin.asking import AskerOf, Endpoints, ServicesOf, chosen_tenant, unknown, with_first
from api.admin.views import export_view
from api.services import Services
from appliance.audit import Outcome
from appliance.audit.digests import Text, keyed_digest
from appliance.audit.events import (
    AUDIT_EXPORTED,
    AUDIT_READ,
    AUDIT_WITNESSED,
    CATALOGUE,
    EXPORT_ADDED,
    EXPORT_REMOVED,
    EXPORT_TESTED,
    OLDER_COPY_ACKNOWLEDGED,
)
from appliance.audit.notes import Checkpoint, VerifierKey
from appliance.audit.reading import LogReader
from appliance.audit.search import Found, look_at, search
from appliance.audit.search import Query as AuditQuery
from appliance.audit.siem.destinations import FORMATS, Destination
from appliance.audit.siem.excerpt import excerpt
from appliance.audit.signing import public_key
from appliance.audit.tree import leaf_hash
from appliance.audit.witness import read_request
from appliance.audit.witnessing import last_seen, make_request
from appliance.errors import HoldfastError


async def _audit_status(services: ServicesOf) -> types.AuditStatus:
    return await status.audit_status(services)


async def _acknowledge_older_copy(services: ServicesOf, asker: AskerOf) -> types.OlderCopyAcknowledged:
    audit = services.audit
    # First: a mark that is made meanwhile and comes behind the event must not carry the alarm on.
    which, audit.older = audit.older, ""
    if not which:
        return types.OlderCopyAcknowledged(acknowledged=None)
    try:
        await asker.did(OLDER_COPY_ACKNOWLEDGED, ("copy", which))
    except BaseException:
        audit.older = which
        raise
    return types.OlderCopyAcknowledged(acknowledged=which)


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
    read = partial(asker.did, AUDIT_READ, ("audit", ""), details=given)
    await services.audit.size()  # what cannot be asked now could not be recorded
    try:
        found = await asyncio.to_thread(lambda: search(LogReader(services.audit.directory), services.vault, query))
    except HoldfastError as error:
        await read(outcome=trail.outcome_of(error), reason=error.code)
        raise
    await read(counts=_counts(found.found))
    return types.AuditPage(
        entries=[_audit_view(each) for each in found.found],
        go_on_before=found.go_on_before,
        oldest_kept=found.oldest,
    )


async def _audit_entry(sequence: int, services: ServicesOf, asker: AskerOf) -> types.AuditEntry:
    read = partial(asker.did, AUDIT_READ, ("entry", str(sequence)))
    await services.audit.size()
    try:
        found = await asyncio.to_thread(_look_up, services, sequence)
    except HoldfastError as error:
        await read(outcome=trail.outcome_of(error), reason=error.code)
        raise
    await read(counts=_counts([found]))
    return _audit_view(found)


def _look_up(services: Services, sequence: int) -> Found:
    log = LogReader(services.audit.directory)
    return look_at(log.entry(sequence), log.frame(sequence).sealed, services.vault)


def _counts(shown: Sequence[Found]) -> dict[str, int]:
    """How many entries are shown, and of how many of them what they say."""
    return {"entries": len(shown), "records": sum(each.record is not None for each in shown)}


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
    witness = VerifierKey.parse(came.witness)
    seen, counts, details = await services.audit.keep_cosignature(
        came.request.encode(), came.reply.encode(), witness, anew=True
    )
    await asker.did(AUDIT_WITNESSED, ("witness", str(witness)), counts=counts, details=details)
    return types.AuditWitnessed(witness=witness.name, size=seen.size)


async def _audit_exports(services: ServicesOf) -> types.AuditExports:
    exports = services.exports
    return types.AuditExports(
        destinations=[export_view(services, name) for name in exports.names], exporter_pid=exports.pid
    )


async def _add_audit_export(new: types.NewAuditExport, services: ServicesOf, asker: AskerOf) -> types.AuditExport:
    given = new.model_dump(exclude={"first"})
    target, details = ("destination", new.name), {"format": new.format}
    first = await services.audit.size() if new.first is None else new.first
    try:
        destination = Destination.read(given)
        details["url"] = new.url  # one that was refused may hold a password
        await services.exports.add(
            destination, first=first, admitted=lambda: asker.did(EXPORT_ADDED, target, details=details)
        )
    except HoldfastError as error:
        await asker.did(EXPORT_ADDED, target, outcome=Outcome.FAILURE, reason=error.code, details=details)
        raise
    return export_view(services, new.name)


async def _try_audit_export(destination: str, services: ServicesOf, asker: AskerOf) -> types.AuditExport:
    target = ("destination", destination)
    try:
        await services.exports.try_out(services.exports.destination(destination))
    except HoldfastError as error:
        await asker.did(EXPORT_TESTED, target, outcome=Outcome.FAILURE, reason=error.code)
        raise
    await asker.did(EXPORT_TESTED, target)
    return export_view(services, destination)


async def _remove_audit_export(destination: str, services: ServicesOf, asker: AskerOf) -> types.AuditExport:
    last = export_view(services, destination)
    target, details = ("destination", destination), {"url": last.url, "delivered": str(last.delivered)}
    # Before it is done: that nothing goes there any more is the last that goes there, if it is connected.
    await asker.did(EXPORT_REMOVED, target, details=details)
    await services.exports.remove(destination)
    return last


async def _audit_excerpt(
    services: ServicesOf,
    asker: AskerOf,
    first: Annotated[int, Query(ge=0)] = 0,
    end: Annotated[int | None, Query(ge=1)] = None,
) -> StreamingResponse:
    published = int((await services.audit.checkpoint())["checkpoint_size"])
    end = published if end is None else min(end, published)
    details, counts = {"first": str(first), "end": str(end)}, {"entries": max(0, end - first)}
    await asker.did(AUDIT_EXPORTED, ("audit", ""), counts=counts, details=details)
    lines = excerpt(services.audit.directory, FORMATS["ocsf"], services.vault, first=first, end=end)
    # As with a backup: what fails at once is an error, and not half a file.
    begin = await anext(lines)
    cut_off = partial(asker.was_cut_off, AUDIT_EXPORTED, ("audit", ""))
    return StreamingResponse(with_first(begin, lines, cut_off=cut_off), media_type="application/x-ndjson")


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
    ("POST", "/v1/audit/acknowledge"): (_acknowledge_older_copy, types.OlderCopyAcknowledged),
    ("GET", "/v1/audit/entries"): (_audit_entries, types.AuditPage),
    ("GET", "/v1/audit/entries/{sequence}"): (_audit_entry, types.AuditEntry),
    ("POST", "/v1/audit/digest"): (_audit_digest, types.AuditDigest),
    ("GET", "/v1/audit/exports"): (_audit_exports, types.AuditExports),
    ("POST", "/v1/audit/exports"): (_add_audit_export, types.AuditExport),
    ("POST", "/v1/audit/exports/{destination}/test"): (_try_audit_export, types.AuditExport),
    ("POST", "/v1/audit/exports/{destination}/remove"): (_remove_audit_export, types.AuditExport),
    ("GET", "/v1/audit/excerpt"): (_audit_excerpt, None),
    ("GET", "/v1/audit/witness"): (_audit_witness_request, types.AuditWitnessAsked),
    ("POST", "/v1/audit/witness"): (_audit_witness_reply, types.AuditWitnessed),
}
