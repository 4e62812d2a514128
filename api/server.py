"""The gateway process: puts the parts together, listens, and ends in good order.

Rules:

- One gateway for a state directory: `run/lock` is held from before the store is opened until the process ends.
- Two listeners in one loop: the data listener (TCP; TLS unless it is on loopback) and the admin socket, which only the
  appliance's user can reach and whose peers the kernel names.
- It accepts connections before the engine is there: what is not ready is said, not waited for.
- SIGTERM and SIGINT drain: nothing new is admitted, what runs may finish until `gateway.drain_timeout_s`, the rest is
  ended with an error event and kept as interrupted. A second signal ends it at once. Then the engine is stopped.
- No core dump holds its memory; swap in plaintext is told or refused, as the settings say.
"""

import asyncio
import contextlib
import fcntl
import gc
import logging
import math
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import uvloop

from api import trail
from api.admin.peers import PeerCredentialsProtocol
from api.admin.routes import admin_app
from api.admin.status import versions
from api.answers import App, Receive, Scope, Send
from api.app import create_app
from api.backups import BACKUP_PREFIX
from api.configuration import tell_configuration
from api.engine_leases import keep_releasing
from api.engine_watch import EngineWatch
from api.founding import tell_founding
from api.health import Health
from api.kv_counts import EngineCounts
from api.kv_metrics import KvCollector
from api.kv_watch import KvWatch, quarantined
from api.listener import bounded_by
from api.marking import keep_marks
from api.metrics import Metrics
from api.openai.errors import Draining
from api.replica import replica_of
from api.retaining import keep_retention
from api.roots import open_root, read_seal
from api.services import Lifecycle, Services
from api.serving import CannotListen, Server, listen_tcp
from api.shredding import keep_finishing
from api.starting import record_start
from api.tenant_names import tell_settings_of_nobody
from api.tier_keys import key_of, strict_labels
from api.turn_ends import TurnEnds
from api.waiting import WaitingRoom
from appliance.audit import AuditUnavailable, Event, NodeAudit
from appliance.audit.events import (
    ENGINE_LOST,
    ENGINE_READY,
    GATEWAY_STOPPED,
    KV_QUARANTINED,
    SYSTEM,
    Outcome,
)
from appliance.audit.siem.exports import Exports
from appliance.audit.witnesses import Witnesses, witnesses_of
from appliance.engine.client import EngineClient
from appliance.engine.command_line import SOCKET_NAME, EngineSpec, engine_python
from appliance.engine.launcher import EngineFailed, EngineProcess
from appliance.engine.picture import KvPicture
from appliance.engine.template import template_fingerprint
from appliance.engine.tier_keys import KeyChannel
from appliance.errors import Fault, HoldfastError
from appliance.identity import Identity, Quotas
from appliance.randomness import DrawnAhead
from appliance.sessions import Ledger, Sessions, Shredding, Throwaways
from appliance.settings import TIER_DIR, Settings
from appliance.store import DatabaseKeys, Store, StoreEmpty
from appliance.vault import Vault, seal_kind
from appliance.vault.process import forbid_core_dumps, plaintext_swap_devices, swap_warning

DATABASE = "holdfast.db"
ENGINE_DIR = Path("run") / "engine"
_DEMO_MODEL = Path(__file__).parent.parent / "appliance" / "engine" / "demo" / "model"
_DEMO_MODEL_NAME = "holdfast-demo"
_DEMO_TOOL_CALLS = "hermes"  # how the demonstration model writes a tool call
_INTERRUPTED_S = 5.0  # for broken-off turns to be committed and told
_LOOK_EVERY_S = 0.02
_RECORD_AGAIN_S = 5.0  # what the audit log did not take
_ADMIN_UNREAD_S = 120.0  # an answer to the admin socket may lie unread: a backup goes to a disk that may be slow
# What is thrown away here is hardly ever in a circle: the collector comes a 30th as often as by default, and looks at
# everything a 300th as often.
_COLLECT_AFTER = (20_000, 20, 50)
_LOG = logging.getLogger("holdfast.gateway")


class StateInUse(HoldfastError):
    """Another gateway has the state directory."""

    code: ClassVar[str] = "state_in_use"
    fault: ClassVar[Fault] = Fault.CONFLICT


def serve(settings: Settings) -> None:
    """Run the gateway until it is told to stop. Blocks.

    Raises:
        HoldfastError: it cannot start; says what is in the way.
    """
    forbid_core_dumps()
    warning = _swap_warning(settings)
    if warning is not None:
        _LOG.warning("%s", warning)
    with _only_gateway(settings.state_dir / "run"), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


def _swap_warning(settings: Settings) -> str | None:
    """What to tell an operator about swap, as it is now: it can be turned on while the gateway runs.

    Raises:
        PlaintextSwap: there is some in plaintext, and the settings refuse it.
    """
    return swap_warning(settings.vault.plaintext_swap, plaintext_swap_devices())


async def _serve(settings: Settings) -> None:
    async with _services(settings) as services:
        data = listen_tcp(settings.gateway.host, settings.gateway.port, "gateway.host and gateway.port")
        with data, _admin_socket(settings.state_dir / "run") as admin:
            services.lifecycle.endpoint = _endpoint(settings, data)
            await _run(services, data, admin)


async def _run(services: Services, data: socket.socket, admin: socket.socket) -> None:
    stop = _Stop()
    gateway = services.settings.gateway

    def refused(source: str, error: HoldfastError) -> None:
        services.audit.count(trail.unreadable(source, error))

    servers = [
        Server(
            create_app(services),
            bounded_by(gateway.max_header_bytes, gateway.unread_timeout_s, refused),
            certificate=gateway.tls_certificate,
            private_key=gateway.tls_private_key,
            tell_refused=refused,
        ),
        Server(
            _with_liveness(services),
            bounded_by(gateway.max_header_bytes, _ADMIN_UNREAD_S, refused, PeerCredentialsProtocol),
        ),
    ]
    async with asyncio.TaskGroup() as tasks:
        await services.audit.start()
        services.exports.start()
        removed: list[str] = []
        with contextlib.suppress(HoldfastError):  # the next proof, or the next start, does it
            removed = await services.throwaways.remove_all()  # which a proof left that was cut off
        starting = tasks.create_task(record_start(services, removed))
        recording = tasks.create_task(_record_engine(services))
        alarming = tasks.create_task(_record_quarantines(services))
        marking = tasks.create_task(keep_marks(services))
        retaining = tasks.create_task(keep_retention(services))
        checking = tasks.create_task(_keep_checking(services))
        comparing = tasks.create_task(tell_configuration(services))
        founding = tasks.create_task(tell_founding(services))
        witnessing = tasks.create_task(services.witnesses.run())
        naming = tasks.create_task(tell_settings_of_nobody(services))
        watch = tasks.create_task(services.watch.run())
        looking = tasks.create_task(services.kv.run())
        erasing = tasks.create_task(services.store.erasures.run())
        releasing = tasks.create_task(keep_releasing(services))
        shredding = tasks.create_task(keep_finishing(services))
        serving = [
            tasks.create_task(server.serve(sockets=[listener]))
            for server, listener in zip(servers, (data, admin), strict=True)
        ]
        for server in servers:
            await server.listening.wait()
        if services.engine_process is not None:
            with contextlib.suppress(EngineFailed):  # which says why in its status
                await services.engine_process.start()
        _LOG.info("accepting connections on %s", services.lifecycle.endpoint)
        # What was made while starting stays until the end: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT_AFTER)
        await stop.asked.wait()
        await _drain(services, stop)
        watch.cancel()
        looking.cancel()
        services.waiting.close()
        erasing.cancel()
        releasing.cancel()
        shredding.cancel()
        starting.cancel()
        recording.cancel()
        alarming.cancel()
        marking.cancel()
        retaining.cancel()
        checking.cancel()
        comparing.cancel()
        founding.cancel()
        naming.cancel()
        if services.engine_process is not None:
            await services.engine_process.stop()
        for server in servers:
            server.should_exit = True
        await asyncio.wait(serving)
        last = None
        with contextlib.suppress(AuditUnavailable):
            last = await services.audit.record(Event(GATEWAY_STOPPED, SYSTEM), privileged=True)
        await services.exports.stop(None if last is None else last + 1)
        await services.audit.stop()
        await services.witnesses.catch_up()
        witnessing.cancel()


async def _keep_checking(services: Services) -> None:
    """Have the audit log verified, once what is in it is signed."""
    await services.audit.opened.wait()
    await services.audit.checking.run()


async def _record_engine(services: Services) -> None:
    """What the engine begins and ceases to serve, as the watch saw it, in its order."""
    while True:
        models = await services.lifecycle.engine_changes.get()
        event = Event(ENGINE_READY if models else ENGINE_LOST, SYSTEM, target=("model", ", ".join(models)))
        await _record_in_the_end(services, event)


async def _record_quarantines(services: Services) -> None:
    """That what came back from a tier was wrong."""
    while True:
        await _record_in_the_end(services, _quarantine(await services.kv.quarantines.get()))


async def _record_in_the_end(services: Services, event: Event) -> None:
    """Try until it is recorded, of the reserve too: it happened, whether the log can be written now or not."""
    while True:
        try:
            await services.audit.record(event, privileged=True)
            return
        except HoldfastError:
            await asyncio.sleep(_RECORD_AGAIN_S)


def _quarantine(picture: KvPicture) -> Event:
    canary = picture.canary
    worst = None if canary is None else canary.worst_error
    return Event(
        KV_QUARANTINED,
        SYSTEM,
        Outcome.FAILURE,
        target=("tier", ", ".join(quarantined(picture))),
        counts={"compared_blocks": 0 if canary is None else canary.compared_blocks_total},
        details={"worst_error": "no number" if worst is None else f"{worst:.3g}"},
    )


async def _drain(services: Services, stop: "_Stop") -> None:
    lifecycle = services.lifecycle
    lifecycle.draining = True
    _LOG.info("stopping: %d turns run", len(lifecycle.turns))
    urgent = asyncio.create_task(stop.urgent.wait())
    await _until(lambda: not lifecycle.turns or urgent.done(), services.settings.gateway.drain_timeout_s)
    urgent.cancel()
    for turn in list(lifecycle.turns):
        turn.interrupt(
            Draining(
                "the gateway is stopping",
                cause="the turn was not over when it had to end; what was generated is kept",
                remedy="Send the request again in a moment",
            )
        )
    await _until(lambda: not lifecycle.turns, _INTERRUPTED_S)


async def _until(condition: Callable[[], bool], at_most_s: float) -> None:
    deadline = time.monotonic() + at_most_s
    while not condition() and time.monotonic() < deadline:  # noqa: ASYNC110  (two kinds of end, and no hurry)
        await asyncio.sleep(_LOOK_EVERY_S)


class _Stop:
    """The two signals that end the gateway: once in good order, twice at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.urgent = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        (self.urgent if self.asked.is_set() else self.asked).set()


# The parts


@contextlib.asynccontextmanager
async def _services(settings: Settings) -> AsyncIterator[Services]:
    """Every part, and its end."""
    # The root key was sealed when the database was made: one without keys is another one, or was emptied.
    store = Store.open(settings.store.url or f"sqlite:///{settings.state_dir / DATABASE}", create=False)
    keys = DatabaseKeys(store)
    vault = Vault(keys)
    engine: EngineClient | None = None
    turn_ends: TurnEnds | None = None
    try:
        if keys.root_id() is None:
            raise StoreEmpty(store.place, "it has no keys")
        if seal_kind(read_seal(settings.state_dir)) == "key-file":
            vault.open(open_root(settings.state_dir, b""))
        elsewhere = settings.engine.socket
        spec = _engine_spec(settings) if elsewhere is None else None
        engine = EngineClient(
            elsewhere or settings.state_dir / ENGINE_DIR / SOCKET_NAME,
            connections=settings.gateway.max_streams + 16,
            silence_timeout_s=settings.gateway.request_timeout_s,
        )
        sessions = Sessions(
            store,
            vault,
            settings.sessions,
            block_size=None if spec is None else spec.block_size,
            random_bytes=DrawnAhead(),
        )
        identity = Identity(store, vault)
        answer = key_of(sessions, partial(strict_labels, settings.sessions, identity, vault))
        process = None if spec is None else _engine_process(spec, engine, KeyChannel(answer), settings)
        turn_ends = TurnEnds(engine)
        watch = EngineWatch(
            engine,
            reason=lambda: "" if process is None else process.detail,
            state=lambda: None if process is None else process.state,
            on_change=lambda models: lifecycle.engine_changes.put_nowait([model.id for model in models]),
        )
        metrics, ledger = Metrics(), Ledger()
        lifecycle = Lifecycle(started_at=time.time())
        waiting = WaitingRoom(
            engine, settings.admission, sequences=_sequences(settings), waited=metrics.waited_s.observe
        )
        audit = NodeAudit(
            settings.state_dir, vault, versions=versions(process), retention_days=settings.audit.retention_days
        )
        exports = Exports(settings.state_dir, audit.directory, size=audit.size, keys=vault)
        audit.retention.needed_from = exports.needed_from
        services = Services(
            settings=settings,
            vault=vault,
            store=store,
            audit=audit,
            exports=exports,
            witnesses=Witnesses(audit.directory, witnesses_of(settings.audit.witness), audit),
            identity=identity,
            quotas=Quotas(store),
            sessions=sessions,
            throwaways=Throwaways(store, vault),
            shredding=Shredding(store, vault, identity, sessions),
            engine=engine,
            turn_ends=turn_ends,
            engine_process=process,
            watch=watch,
            kv=KvWatch(engine, watch, EngineCounts(ledger.tenant_of)),
            template=None if spec is None else await asyncio.to_thread(template_fingerprint, spec.model),
            replica=await asyncio.to_thread(replica_of, settings.state_dir),
            waiting=waiting,
            metrics=metrics,
            lifecycle=lifecycle,
            ledger=ledger,
        )
        _observe(services)
        yield services
    finally:
        if turn_ends is not None:
            await turn_ends.close()
        if engine is not None:
            await engine.close()
        await asyncio.to_thread(store.close)
        vault.seal()


def _sequences(settings: Settings) -> int:
    """How many the engine runs at once; of one that somebody else runs only what was said is known."""
    engine = settings.engine
    known = engine.socket is None or "max_num_seqs" in engine.model_fields_set
    return engine.max_num_seqs if known else settings.gateway.max_streams


def _observe(services: Services) -> None:
    metrics, lifecycle = services.metrics, services.lifecycle
    metrics.observe("holdfast_turns_running", "Turns that run now.", lambda: float(len(lifecycle.turns)))
    metrics.observe("holdfast_turns_waiting", "Turns that wait for the engine.", lambda: services.waiting.waiting)
    metrics.observe("holdfast_vault_sealed", "1 while the vault is sealed.", lambda: float(services.vault.sealed))
    metrics.observe("holdfast_engine_ready", "1 while the engine answers.", lambda: float(services.watch.ready))
    metrics.observe_each(
        "holdfast_engine_info",
        "1 for each model that the engine serves.",
        lambda: [((model.id,), 1.0) for model in services.watch.models],
        labels=("model_name",),
    )
    metrics.observe(
        "holdfast_audit_failing",
        "1 while the audit log cannot be written or signed.",
        lambda: float(services.audit.error is not None),
    )
    metrics.observe(
        "holdfast_audit_checkpoint_age_seconds",
        "How old the audit log's newest checkpoint is; not a number while there is none.",
        lambda: math.nan if (age_s := services.audit.checkpoint_age_s) is None else age_s,
    )
    metrics.observe(
        "holdfast_audit_alarm",
        "1 while the audit log was found changed, it or the database is an older copy or that cannot be told, entries "
        "are missing, its last check came to nothing, or a witness refuses it.",
        lambda: float(bool(services.audit.alarms or services.witnesses.alarm)),
    )
    metrics.observe(
        "holdfast_store_waiting_writes", "Change sets that wait to be written.", lambda: services.store.waiting_writes
    )
    metrics.collect_from(KvCollector(services.kv.fresh, services.kv.counts.totals, services.ledger.tenant_of))
    exports = services.exports
    metrics.observe_each(
        "holdfast_audit_export_lag_entries",
        "Entries of the audit log that a destination was not sent yet.",
        lambda: [((view.name,), view.lag_entries) for view in exports.views()],
    )
    metrics.observe_each(
        "holdfast_audit_export_lag_seconds",
        "How old the oldest entry is that a destination was not sent yet.",
        lambda: [((view.name,), view.lag_s) for view in exports.views()],
    )
    metrics.observe_each(
        "holdfast_audit_export_failing",
        "1 while something is in a destination's way: it takes nothing, or the exporter or this node cannot send.",
        lambda: [((view.name,), float(view.error is not None)) for view in exports.views()],
    )
    metrics.observe_each(
        "holdfast_audit_export_error",
        "1 while something is in a destination's way, by the code of the error that says what.",
        lambda: [((view.name, view.error["code"]), 1.0) for view in exports.views() if view.error is not None],
        labels=("destination", "code"),
    )
    witnesses, now = services.witnesses, services.now
    metrics.observe_each(
        "holdfast_audit_witness_age_seconds",
        "How long ago a witness co-signed; of one that never did there is none.",
        lambda: [((each.name,), now() - each.cosigned_s) for each in witnesses.views() if each.cosigned_s is not None],
        labels=("witness",),
    )
    metrics.observe_each(
        "holdfast_audit_witness_refusing",
        "1 while a witness says that this log was cut off, put back to an old copy, or written anew.",
        lambda: [((each.name,), float(bool(each.refused))) for each in witnesses.views()],
        labels=("witness",),
    )
    process = services.engine_process
    if process is not None:
        metrics.observe_count(
            "holdfast_engine_restarts_total", "How often the engine was started again.", lambda: process.restarts
        )


def _engine_process(spec: EngineSpec, engine: EngineClient, keys: KeyChannel, settings: Settings) -> EngineProcess:
    return EngineProcess(spec, engine, keys=keys, may_start=partial(_swap_warning, settings))


def _engine_spec(settings: Settings) -> EngineSpec:
    model = settings.engine.model
    engine = settings.engine
    if model is None and engine.served_name is None:
        engine = engine.model_copy(update={"served_name": _DEMO_MODEL_NAME})
    parser = engine.tool_call_parser or (_DEMO_TOOL_CALLS if model is None else None)
    return EngineSpec.from_settings(
        engine,
        python=engine.python or engine_python(),
        model=_DEMO_MODEL if model is None else model,
        run_dir=settings.state_dir / ENGINE_DIR,
        log_path=settings.state_dir / "log" / "engine.log",
        hidden_dir=settings.state_dir,
        tool_call_parser=parser,
        tiers=settings.tiers,
        disk_dir=settings.state_dir / TIER_DIR,
    )


# Listening


def _with_liveness(services: Services) -> App:
    """The admin listener's application: that the gateway lives is told to anybody, all else is the admin API's."""
    admin, health = admin_app(services), Health(services, in_full=True)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        alive = scope.get("method") in ("GET", "HEAD") and scope.get("raw_path") == b"/healthz"
        await (health if alive else admin)(scope, receive, send)

    return app


@contextlib.contextmanager
def _admin_socket(run_dir: Path) -> Iterator[socket.socket]:
    """The admin socket, bound by a descriptor of its directory: its path may be longer than `sockaddr_un` allows."""
    directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = f"/proc/self/fd/{directory}/admin.sock"
        with contextlib.suppress(FileNotFoundError):
            os.unlink("admin.sock", dir_fd=directory)  # of a gateway that was killed: the lock says that it is gone
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            mask = os.umask(0o177)
            try:
                listener.bind(path)
            except OSError as error:
                raise CannotListen(
                    f"the admin socket cannot be made in {run_dir}",
                    cause=error.strerror or str(error),
                    remedy="Choose a state directory on a file system that can hold sockets",
                ) from None
            finally:
                os.umask(mask)
            yield listener
        with contextlib.suppress(FileNotFoundError):
            os.unlink("admin.sock", dir_fd=directory)
    finally:
        os.close(directory)


def _endpoint(settings: Settings, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "http" if settings.gateway.tls_certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1"


@contextlib.contextmanager
def _only_gateway(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a state directory."""
    try:
        run_dir.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotListen(
            f"{run_dir} cannot be written",
            cause=error.strerror or str(error),
            remedy="Create the appliance with `holdfast init`, or run this as its user",
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StateInUse(
            "the appliance is running already",
            cause=f"another gateway has {run_dir.parent}",
            remedy="`holdfast status` tells how it is, `holdfast down` stops it",
        ) from None
    try:
        for leftover in run_dir.glob(f"{BACKUP_PREFIX}*"):  # a copy of the database, of a gateway that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)
