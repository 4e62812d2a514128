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
from api.kv_watch import troubles
from api.roots import read_seal
from api.services import Services
from api.tenant_names import settings_of_nobody
from appliance.audit import AuditUnavailable
from appliance.audit.notes import VerifierKey
from appliance.audit.witnessing import largest_witnessed
from appliance.engine.launcher import EngineProcess, EngineState
from appliance.errors import HoldfastError
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
    error = services.audit.error or said["error"]
    retention = services.audit.retention
    oldest = retention.oldest
    checked = services.audit.checking.last
    return types.AuditStatus(
        size=said["size"],
        checkpoint_size=said["checkpoint_size"],
        checkpoint_age_s=said["checkpoint_age_s"],
        signs=said["signs"],
        public_key=said["public_key"] or None,
        witnessed_size=await _witnessed(services, said["public_key"]),
        retention_days=retention.days,
        retention_overridden=retention.days < SIX_MONTHS_DAYS,
        retention_held=retention.held or None,
        oldest_kept=None if oldest is None else oldest[0],
        oldest_kept_time_s=None if oldest is None else oldest[1] / 1e9,
        checked_age_s=None if checked is None else time.monotonic() - checked.at,
        checked_size=0 if checked is None else checked.size,
        alarm=services.audit.alarms or None,
        restored=services.audit.restored or None,
        directory=str(services.audit.directory),
        error=None if error is None else types.AuditError.model_validate(error),
    )


async def _witnessed(services: Services, public_key: str) -> int | None:
    """How many entries an accepted witness co-signed; None: it is not known whom to believe."""
    try:
        accepted = await services.audit.accepted_witnesses()
        log_key = VerifierKey.parse(public_key)
    except (HoldfastError, OSError):
        return None
    return await asyncio.to_thread(largest_witnessed, services.audit.directory, log_key, accepted)


async def _audit(services: Services) -> types.Part:
    error = services.audit.error
    if error is not None:
        return types.Part(name="audit", state="failed", detail=f"nothing is admitted: {error['cause']}")
    try:
        said = await audit_status(services)
    except HoldfastError as failure:
        return types.Part(name="audit", state="failed", detail=str(failure))
    age = "none yet" if said.checkpoint_age_s is None else f"{said.checkpoint_age_s:.0f} s old"
    detail = f"{said.size} entries; last checkpoint {age}, of {said.checkpoint_size} entries"
    if said.restored is not None:
        detail += f"; the database was put back {said.restored}"
    for export in services.exports.views():
        behind = f"{export.lag_entries} entries, {export.lag_s:.0f} s behind"
        state = behind if export.lag_entries else "has everything"
        detail += f"; {export.name} {state}" + ("" if export.error is None else f" ({export.error['cause']})")
    if (unreadable := services.exports.unreadable) is not None:
        detail += f"; nothing is exported: {unreadable['cause']}"
    if trouble := services.audit.checkpoint_trouble:
        return types.Part(name="audit", state="degraded", detail=f"{trouble}; {detail}")
    if said.alarm is not None:
        return types.Part(name="audit", state="degraded", detail=f"{said.alarm}; {detail}")
    return types.Part(name="audit", state="ready" if unreadable is None else "degraded", detail=detail)


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
