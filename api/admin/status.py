"""The appliance at one moment: each part, what it is in and why.

Rules:

- What cannot be asked in time is unknown, never taken for well.
- Asking changes nothing and waits for nothing longer than `_DEADLINE_S`.
"""

import asyncio
import os
import platform
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import version

from sqlalchemy import func, select

from api.admin import types
from api.admin.views import export_view
from api.kv_watch import troubles
from api.roots import read_seal
from api.services import Services
from api.tenant_names import settings_of_nobody
from appliance.audit import AuditUnavailable
from appliance.audit.notes import VerifierKey
from appliance.audit.witnesses import View
from appliance.audit.witnessing import Witnessed, largest_witnessed
from appliance.engine.launcher import EngineProcess, EngineState
from appliance.errors import ErrorRecord, HoldfastError
from appliance.settings import SIX_MONTHS_DAYS
from appliance.store import tables
from appliance.vault import SealUnusable, seal_kind
from diagnostics.checks import engine_version

_DEADLINE_S = 3.0
_ACTIVE_S = 3600.0
_MIB = 1 << 20
_GIB = 1 << 30

_SERVING: frozenset[types.PartState] = frozenset({"ready", "degraded"})
_ENGINE_STATES: Mapping[EngineState, types.PartState] = {
    EngineState.STOPPED: "stopped",
    EngineState.STARTING: "starting",
    EngineState.READY: "starting",  # the process says so, and the watch has not seen it answer yet
    EngineState.RESTARTING: "degraded",
    EngineState.FAILED: "failed",
}


async def observe(services: Services) -> types.Status:
    """Look at every part now."""
    now = services.now()
    seal = _seal_kind(services)
    vault, audit = _vault(services, seal), await _audit(services)
    store, sessions = await _store(services, now)
    tiers = await _tiers(services)
    engine = _engine(services, tiers)
    process = services.engine_process
    models = services.watch.models
    return types.Status(
        ready=all(part.state in _SERVING for part in (vault, audit, store, engine)) and not services.lifecycle.draining,
        endpoint=services.lifecycle.endpoint,
        model=models[0].id if models else None,
        demo=services.settings.demo,
        seal=seal,
        pid=os.getpid(),
        started_at=services.lifecycle.started_at,
        observed_at=now,
        uptime_s=now - services.lifecycle.started_at,
        draining=services.lifecycle.draining,
        running_turns=len(services.lifecycle.turns),
        parts=[vault, audit, store, engine],
        engine_restarts=None if process is None else process.restarts,
        engine_isolated=None if process is None else process.isolated,
        engine_isolation_detail=None if process is None else process.isolation_detail or None,
        leases=await _leases(services),
        tiers=tiers,
        sessions=sessions,
        versions=versions(services.engine_process),
        state_dir=str(services.settings.state_dir),
        settings_of_nobody=await _settings_of_nobody(services),
    )


async def _settings_of_nobody(services: Services) -> list[str] | None:
    try:
        async with asyncio.timeout(_DEADLINE_S):
            return await settings_of_nobody(services)
    except (HoldfastError, TimeoutError):
        return None


def _seal_kind(services: Services) -> str:
    try:
        return seal_kind(read_seal(services.settings.state_dir))
    except SealUnusable:
        return "unknown"


def _vault(services: Services, seal: str) -> types.Part:
    if services.vault.sealed:
        return types.Part(name="vault", state="sealed", detail="requests get 503 until `holdfast unseal`")
    return types.Part(name="vault", state="ready", detail=f"open; its root key is sealed by a {seal}")


async def audit_status(services: Services) -> types.AuditStatus:
    """The audit log now.

    Raises:
        AuditUnavailable: there is no appender to ask, or it does not answer in time.
    """
    try:
        async with asyncio.timeout(_DEADLINE_S):
            said = await services.audit.status()
    except TimeoutError:
        raise AuditUnavailable(
            "it is not known how the audit log is",
            cause=f"its appender did not answer within {_DEADLINE_S:g} s",
            remedy="Ask again in a moment: it waits for its disk, or begins; `holdfast logs gateway` says more",
        ) from None
    audit, exports = services.audit, services.exports
    known, witnessed = await _witnessed(services, said["public_key"])
    error, unreadable = audit.error or said["error"], exports.unreadable
    retention = audit.retention
    oldest = retention.oldest
    checked = audit.checking.last
    return types.AuditStatus(
        size=said["size"],
        checkpoint_size=said["checkpoint_size"],
        checkpoint_age_s=said["checkpoint_age_s"],
        signs=said["signs"],
        public_key=said["public_key"] or None,
        witnessed_size=witnessed.size if witnessed is not None else 0 if known else None,
        witnessed_by=None if witnessed is None else witnessed.witness,
        witnessed_age_s=None if witnessed is None else services.now() - witnessed.time_s,
        retention_days=retention.days,
        retention_overridden=retention.days < SIX_MONTHS_DAYS,
        retention_held=retention.held or None,
        oldest_kept=None if oldest is None else oldest[0],
        oldest_kept_time_s=None if oldest is None else oldest[1] / 1e9,
        whole=_whole(services),
        checked_age_s=None if checked is None else time.monotonic() - checked.at,
        checked_size=0 if checked is None else checked.size,
        check_error=None if checked is None else _told(checked.error),
        exports=[] if unreadable is not None else [export_view(services, name) for name in exports.names],
        exports_error=_told(unreadable),
        witnesses=[_witness(view, services.now()) for view in services.witnesses.views()],
        alarm="; ".join(filter(None, (audit.alarms, services.witnesses.alarm))) or None,
        restored=audit.restored or None,
        directory=str(audit.directory),
        error=_told(error),
    )


def _whole(services: Services) -> bool | None:
    """Whether the log is what was written, as far as anything here says; None: it is not known."""
    audit = services.audit
    checked = audit.checking.last
    if audit.older == "log" or audit.retention.alarm:  # its end is gone, or its beginning
        return False
    if any(view.refused for view in services.witnesses.views()):
        return False
    if checked is None or not checked.looked_at:
        return None
    return checked.error is None


def _witness(view: View, now_s: float) -> types.AuditWitness:
    return types.AuditWitness(
        name=view.name,
        url=view.to,
        size=view.size,
        cosigned_age_s=None if view.cosigned_s is None else max(0.0, now_s - view.cosigned_s),
        silent_s=None if view.silent_since_s is None else max(0.0, now_s - view.silent_since_s),
        refused=view.refused or None,
        error=_told(view.error),
    )


def _told(error: ErrorRecord | None) -> types.AuditError | None:
    return None if error is None else types.AuditError.model_validate(error)


async def _witnessed(services: Services, public_key: str) -> tuple[bool, Witnessed | None]:
    """Whether it is known whom to believe, and what an accepted witness co-signed last."""
    try:
        accepted = await services.audit.accepted_witnesses()
        log_key = VerifierKey.parse(public_key)
    except (HoldfastError, OSError):
        return False, None
    return True, await asyncio.to_thread(largest_witnessed, services.audit.directory, log_key, accepted)


async def _audit(services: Services) -> types.Part:
    error = services.audit.error
    if error is not None:
        what = "nothing is admitted" if services.audit.is_unwritable else "what is recorded is not signed"
        told = types.Trouble(what=f"{what}: {error['cause']}", remedy=error["remedy"])
        return types.Part(name="audit", state="failed", detail=told.what, troubles=[told])
    try:
        said = await audit_status(services)
    except HoldfastError as failure:
        told = types.Trouble(what=f"{failure.message}: {failure.cause}", remedy=failure.remedy)
        return types.Part(name="audit", state="failed", detail=str(failure), troubles=[told])
    troubles = _audit_troubles(said)
    if said.error is None and (late := services.audit.checkpoint_trouble):
        remedy = "`holdfast logs gateway` says what the appender waits for"
        troubles.insert(0, types.Trouble(what=late, remedy=remedy))
    detail = _audit_detail(said)
    if said.error is not None:
        detail = f"no checkpoint can be made: {said.error.cause}"
    elif services.audit.checkpoint_trouble:
        detail = f"{services.audit.checkpoint_trouble}; {detail}"
    elif said.alarm is not None:
        detail = f"{said.alarm}; {detail}"
    # Never worse than degraded: whatever is in the way of a check or of a destination, the log goes on.
    return types.Part(name="audit", state="degraded" if troubles else "ready", detail=detail, troubles=troubles)


def _audit_troubles(said: types.AuditStatus) -> list[types.Trouble]:
    """What is wrong with a log that can be written: with its signing, with what is there, with each destination."""
    told = []
    if said.error is not None:
        told.append(types.Trouble(what=f"no checkpoint can be made: {said.error.cause}", remedy=said.error.remedy))
    if said.alarm is not None:
        remedy = (
            "`holdfast audit verify`, with --witness for each accepted one (`audit search --action audit.witnessed` "
            "names them), says what is wrong first; docs/audit.md, *What an alarm means*"
        )
        told.append(types.Trouble(what=said.alarm, remedy=remedy))
    if said.exports_error is not None:
        what = f"nothing is exported: {said.exports_error.cause}"
        told.append(types.Trouble(what=what, remedy=said.exports_error.remedy))
    for export in said.exports:
        if (error := export.error) is not None:
            what = f"the export to {export.name} fails: {error.message}: {error.cause}"
            told.append(types.Trouble(what=what, remedy=error.remedy))
    for witness in said.witnesses:
        if witness.refused is None and (error := witness.error) is not None:
            what = f"the witness {witness.name} is silent: {error.message}: {error.cause}"
            told.append(types.Trouble(what=what, remedy=error.remedy))
    return told


def _audit_detail(said: types.AuditStatus) -> str:
    """Whether the log is whole, how old its last checkpoint is and how far behind each destination is, in one line."""
    when = "not since the start" if said.checked_age_s is None else f"{_age(said.checked_age_s)} ago"
    found = {True: f"whole ({said.checked_size})", False: "NOT whole", None: "not known whether whole"}[said.whole]
    checkpoint = "no checkpoint yet"
    if said.checkpoint_age_s is not None:
        checkpoint = f"last checkpoint {_age(said.checkpoint_age_s)} old, of {said.checkpoint_size} entries"
    told = [f"{said.size} entries, {found}, checked {when}", checkpoint]
    if said.witnessed_age_s is not None:
        ago = _age(said.witnessed_age_s)
        told.append(f"co-signed by {said.witnessed_by} {ago} ago, {said.witnessed_size} entries")
    for each in said.witnesses:
        last = "it never did" if each.cosigned_age_s is None else f"last {_age(each.cosigned_age_s)} ago"
        if each.refused is None and each.silent_s is not None:
            told.append(f"witness {each.name} has co-signed nothing for {_age(each.silent_s)} ({last})")
    if said.restored is not None:
        told.append(f"the database was put back {said.restored}")
    for export in said.exports:
        behind = f"{export.lag_entries} entries, {_age(export.lag_s)} behind"
        state = behind if export.lag_entries else "has everything"
        told.append(f"{export.name} {state}" + ("" if export.error is None else f" ({export.error.cause})"))
    if said.exports_error is not None:
        told.append(f"nothing is exported: {said.exports_error.cause}")
    return "; ".join(told)


def _age(seconds: float) -> str:
    """A duration in the one unit that says enough."""
    for unit, size_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


async def _store(services: Services, now: float) -> tuple[types.Part, types.SessionCounts | None]:
    sessions = tables.sessions
    active_now = func.count().filter(sessions.c.last_used_at > now - _ACTIVE_S)
    query = select(func.count(), active_now).select_from(sessions)
    try:
        async with asyncio.timeout(_DEADLINE_S):
            total, active = await services.store.read(lambda db: db.execute(query).one())
    except (HoldfastError, TimeoutError) as error:
        told = str(error) or f"it did not answer within {_DEADLINE_S:g} s"
        return types.Part(name="store", state="failed", detail=told), None
    part = types.Part(name="store", state="ready", detail=_store_detail(services))
    return part, types.SessionCounts(total=total, active_last_hour=active)


def _store_detail(services: Services) -> str:
    if services.store.dialect != "sqlite":
        return f"{services.store.dialect}, {services.store.place}"
    folder = services.settings.state_dir
    try:
        size = sum(path.stat().st_size for path in folder.glob("holdfast.db*"))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"SQLite; its size is not known: {error.strerror}"
    return f"SQLite, {size / _MIB:.1f} MiB; {free / _GIB:.1f} GiB free on its disk"


def _engine(services: Services, tiers: list[types.TierSeen]) -> types.Part:
    wrong = "; ".join(f"KV in {tier.tier}: {tier.detail}" for tier in tiers if tier.detail)
    if services.watch.ready and wrong:
        return types.Part(name="engine", state="degraded", detail=f"{wrong}; {services.watch.detail}")
    if services.watch.ready:
        return types.Part(name="engine", state="ready", detail=services.watch.detail)
    process = services.engine_process
    state: types.PartState = "unknown" if process is None else _ENGINE_STATES[process.state]
    return types.Part(name="engine", state=state, detail=services.watch.detail)


def versions(process: EngineProcess | None) -> dict[str, str]:
    """What runs here: Holdfast, Python, and the engine that this gateway starts."""
    known = {"holdfast": version("holdfast"), "python": platform.python_version()}
    engine = None if process is None else engine_version(process.spec.python)
    return known | ({} if engine is None else {"vllm": engine})


async def _tiers(services: Services) -> list[types.TierSeen]:
    seen = await services.kv.look()
    if seen is None:
        return []
    wrong = troubles(seen.picture)
    return [
        types.TierSeen.model_validate(
            {
                "tier": tier.tier,
                "state": tier.state,
                "capacity_bytes": tier.capacity_blocks * tier.block_bytes,
                "used_bytes": tier.used_blocks * tier.block_bytes,
                "detail": wrong.get(tier.tier, ""),
            }
        )
        for tier in seen.picture.tiers
    ]


async def _leases(services: Services) -> types.Leases | None:
    if not services.watch.ready:
        return None
    try:
        async with asyncio.timeout(_DEADLINE_S):
            report = await services.engine.leases(every=True)
    except (HoldfastError, TimeoutError):
        return None
    running = [lease for lease in report.leases if lease.expires_in_s > 0]
    return types.Leases(
        sessions=len(running),
        leased_blocks=min(sum(lease.blocks for lease in running), report.leased_blocks),  # some are shared
        free_blocks=report.free_blocks,
        total_blocks=report.total_blocks,
        block_size_tokens=report.block_size,
        next_expiry_in_s=report.next_expiry_in_s,
        expired_total=report.expired_total,
        reclaimed_blocks_total=report.reclaimed_blocks_total,
    )
