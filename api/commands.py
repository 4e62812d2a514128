"""The commands that make, start, stop, watch and save a whole appliance.

Rules:

- `init` and `restore` work on an appliance that does not run, `up` starts one; the others speak to the admin API, and
  `logs` reads two files.
- A command that waits says what for, on stderr, while it waits.
- Nothing is overwritten, and what is replaced is kept and named.
"""

import json
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import click

from appliance.cli import (
    EXIT_INTERRUPTED,
    EXIT_STATUS,
    Command,
    Console,
    ago,
    api_key_option,
    in_words,
    moment,
    pass_console,
    passphrase_option,
    printable,
    size_in_words,
    table,
)
from appliance.errors import Fault, HoldfastError

if TYPE_CHECKING:
    from api.admin import types
    from api.launch import Gateway
    from appliance.audit.restores import Restore
    from appliance.settings import Settings

DEMO_KEY_FILE = "demo-api-key"
_MIN_PASSPHRASE = 8
_STOP_MARGIN_S = 20.0  # beyond the drain: the engine's own end
_LOOK_EVERY_S = 5.0
_FOLLOW_EVERY_S = 0.25
_LOGS = ("gateway", "engine")
_MAX_LINES = 100_000
_BACKUP_DEADLINE_S = 3600.0


class NotInitialised(HoldfastError):
    """There is no appliance in the state directory."""

    code: ClassVar[str] = "not_initialised"
    fault: ClassVar[Fault] = Fault.MISSING


class NotADemonstration(HoldfastError):
    """A demonstration was asked for where a real appliance is."""

    code: ClassVar[str] = "not_a_demonstration"
    fault: ClassVar[Fault] = Fault.CONFLICT


class ModelNotFound(HoldfastError):
    """No model of that name, and no folder of that path."""

    code: ClassVar[str] = "model_folder_not_found"
    fault: ClassVar[Fault] = Fault.MISSING


class PassphraseTooShort(HoldfastError, ValueError):
    """A new passphrase that would not hold."""

    code: ClassVar[str] = "passphrase_too_short"
    fault: ClassVar[Fault] = Fault.CALLER


class LogMissing(HoldfastError):
    """There is no log yet."""

    code: ClassVar[str] = "log_missing"
    fault: ClassVar[Fault] = Fault.MISSING


class FileInTheWay(HoldfastError, FileExistsError):
    """A file that would be written is there already."""

    code: ClassVar[str] = "file_in_the_way"
    fault: ClassVar[Fault] = Fault.CONFLICT


class CannotWrite(HoldfastError, OSError):
    """A file cannot be written."""

    code: ClassVar[str] = "cannot_write"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


# Making one


@click.command(cls=Command)
@click.option(
    "--seal",
    "seal_kind",
    type=click.Choice(["passphrase", "key-file"]),
    default="passphrase",
    show_default=True,
    help="How the root key is kept. key-file: in a file beside the database, for demonstrations only.",
)
@click.option("--tenant", "tenant_name", default="default", show_default=True, help="The name of the first tenant.")
@click.option(
    "--grant",
    "permissions",
    multiple=True,
    type=click.Choice(["transcript:read"]),
    help="transcript:read lets the first administrator read what was said in sessions.",
)
@passphrase_option
@pass_console
def init(
    console: Console,
    seal_kind: str,
    tenant_name: str,
    permissions: tuple[str, ...],
    passphrase_fd: int | None,
) -> None:
    """Create an appliance: its keys, its database, its first administrator.

    The administrator is the user who runs this. Nothing that exists is overwritten.
    """
    from api.initialise import initialise, refuse_to_overwrite

    refuse_to_overwrite(console.state_dir)
    passphrase: bytearray | None = None
    if seal_kind == "passphrase":
        passphrase = console.secret(
            "A passphrase for the new appliance", passphrase_fd, twice=True, option="--passphrase-fd"
        )
        _refuse_short(passphrase)
    settings = console.settings({"vault": {"seal": seal_kind}})
    made = initialise(settings, passphrase=passphrase, tenant_name=tenant_name, permissions=permissions)
    console.say(f"Created an appliance in {made.state_dir}.")
    if seal_kind == "passphrase":
        console.say(
            "Keep the passphrase: without it nobody can read what this appliance stores, and nobody can mend that."
        )
    else:
        _say_key_file(console, made.state_dir)
    rows = [
        ("settings", made.state_dir / "holdfast.toml"),
        ("tenant", f"{tenant_name} ({made.tenant_id})"),
        ("administrator", f"uid {made.administrator_uid}{', may read transcripts' if permissions else ''}"),
    ]
    console.result(made, "\n".join(f"  {name:<15}{value}" for name, value in rows))
    console.say(f"Next: {console.suggest('up')}")


def _say_key_file(console: Console, state_dir: Path) -> None:
    from api.roots import KEY_FILE

    console.say(f"For demonstrations only: whoever can read {state_dir / KEY_FILE} can read everything.")


def _refuse_short(passphrase: bytearray) -> None:
    if len(passphrase.decode("utf-8", "replace")) < _MIN_PASSPHRASE:
        raise PassphraseTooShort(
            "the passphrase is too short",
            cause=f"it has fewer than {_MIN_PASSPHRASE} characters, and whoever has the disk can try them all",
            remedy="Choose a longer one: five or six words are easy to keep and hard to guess",
        )


# Starting and stopping


@click.command(cls=Command)
@click.option(
    "--demo", is_flag=True, help="Show what it does: makes an appliance, with the demonstration model, if needed."
)
@click.option("--model", metavar="PATH_OR_NAME", help="A folder with a model, or the name of one in STATE/models.")
@click.option("--detach", is_flag=True, help="Return when it serves, and leave it running.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="How long to wait until it serves. [default: the setting engine.ready_timeout_s]",
)
@passphrase_option
@pass_console
@click.pass_context
def up(
    context: click.Context,
    console: Console,
    demo: bool,
    model: str | None,
    detach: bool,
    timeout_s: float | None,
    passphrase_fd: int | None,
) -> None:
    """Start the appliance and say when it serves.

    Without --model, and without the setting engine.model, it serves the demonstration model, which is for trying only.

    Stays in the foreground until Ctrl-C, which lets what runs finish and leaves with status 0 (130 when it was not
    serving yet). With --detach it returns when the appliance serves.

    What is sealed by a passphrase comes up sealed, and waits for `holdfast unseal`, unless --passphrase-fd is given.
    """
    from api.launch import Gateway, StopRequested, refuse_if_running, signals_as_requests

    if demo:
        _choose_demo(console)
    refuse_if_running(console.state_dir)
    if demo:
        _make_demo(console)
    _refuse_uninitialised(console)
    environment = {}
    if model is not None:
        environment["HOLDFAST_ENGINE__MODEL"] = json.dumps(str(find_model(model, console.state_dir)))
    settings = console.settings()
    if model is None:
        _warn_of_demonstration_model(console, settings)
    passphrase = None
    if passphrase_fd is not None:
        passphrase = console.secret("Passphrase", passphrase_fd, option="--passphrase-fd")
    serving = False
    with signals_as_requests():
        gateway: Gateway | None = None
        try:
            console.say(f"Starting the appliance in {console.state_dir}")
            gateway = Gateway(console.state_dir, environment, outlives=detach)
            status = _bring_up(console, gateway, settings, passphrase, timeout_s)
            serving = True
            _announce(console, settings, gateway, status, detached=detach)
            if not detach:
                _stay(console, gateway, status)
        except StopRequested:
            _stop(console, gateway, settings)
            if not serving:
                context.exit(EXIT_INTERRUPTED)
        except BaseException:
            if gateway is not None:
                gateway.stop(settings.gateway.drain_timeout_s + _STOP_MARGIN_S)
            raise


def _warn_of_demonstration_model(console: Console, settings: "Settings") -> None:
    engine = settings.engine
    if settings.demo or engine.model is not None or engine.socket is not None:
        return
    console.say(
        "Warning: no model was chosen, so this appliance serves the demonstration model, which is for trying only: its "
        "answers are of no use. Choose one with `holdfast up --model PATH`, or with engine.model in holdfast.toml."
    )


def _choose_demo(console: Console) -> None:
    if not console.state_dir_was_named:
        console.choose_state_dir(console.demonstration_dir)


def _make_demo(console: Console) -> None:
    from api.initialise import initialise, is_initialised

    if is_initialised(console.state_dir):
        if not console.settings().demo:
            raise NotADemonstration(
                f"the appliance in {console.state_dir} is no demonstration",
                cause="it was made by `holdfast init`, for real data",
                remedy="Start it without --demo, or name another place for the demonstration with --state-dir",
            )
        return
    console.say(f"Making an appliance for demonstrations in {console.state_dir}")
    settings = console.settings({"demo": True, "vault": {"seal": "key-file"}})
    initialise(
        settings, passphrase=None, tenant_name="demo", permissions=("transcript:read",), demo_key_file=DEMO_KEY_FILE
    )


def _refuse_uninitialised(console: Console) -> None:
    from api.initialise import is_initialised

    if is_initialised(console.state_dir):
        return
    raise NotInitialised(
        "there is no appliance here",
        cause=f"{console.state_dir} holds none",
        remedy=f"Create one with `{console.suggest('init')}`, or see what it does with `holdfast up --demo`",
    )


def find_model(named: str, state_dir: Path) -> Path:
    """The folder of a model, by its path or by its name in STATE/models.

    Raises:
        ModelNotFound: lists those that exist.
    """
    shelf = state_dir / "models"
    candidates = [Path(named).expanduser().absolute()]
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", named):
        candidates.append(shelf / named)
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    present = sorted(path.parent.name for path in shelf.glob("*/config.json"))
    raise ModelNotFound(
        f"there is no model {named!r}",
        cause=f"neither {' nor '.join(map(str, candidates))} is a folder with a config.json",
        remedy=f"In {shelf} there is: {', '.join(present) or 'nothing'}. Copy a model there, or give its path",
    )


def _bring_up(
    console: Console, gateway: "Gateway", settings: "Settings", passphrase: bytearray | None, timeout_s: float | None
) -> "types.Status | None":
    wait_s = timeout_s if timeout_s is not None else settings.engine.ready_timeout_s
    status = gateway.wait_until_ready(lambda text: console.say(printable(text)), wait_s)
    if status is not None and status.vault_sealed and passphrase is not None:
        try:
            console.admin(deadline_s=60).unseal(passphrase)
        finally:
            passphrase[:] = bytes(len(passphrase))
        status = gateway.wait_until_ready(lambda text: console.say(printable(text)), wait_s)
    return status


def _announce(
    console: Console, settings: "Settings", gateway: "Gateway", status: "types.Status | None", *, detached: bool
) -> None:
    from api.roots import read_seal
    from appliance.vault import seal_kind

    if seal_kind(read_seal(settings.state_dir)) == "key-file":
        _say_key_file(console, settings.state_dir)
    key_file = settings.state_dir / DEMO_KEY_FILE
    api_key = key_file.read_text().strip() if settings.demo and key_file.exists() else None
    rows = [] if status is None else [("endpoint", status.endpoint), ("model", status.model or "-")]
    if api_key is not None:
        rows.append(("API key", f"{api_key}  (of this demonstration; the same every time)"))
    rows += [("state", str(settings.state_dir)), ("process", str(gateway.pid))]
    text = "\n".join(f"  {name:<10}{value}" for name, value in rows)
    if status is None:
        head = "Holdfast serves. More than that it does not tell this user, who is no administrator of it."
        tail = f"How it is, it tells an administrator: {console.suggest('status')}, with --api-key-fd"
    elif status.vault_sealed:
        head = "The vault is sealed: requests are answered with 503."
        tail = f"Give the passphrase in another terminal: {console.suggest('unseal')}"
    else:
        head = "Holdfast serves."
        tail = f"How it is: {console.suggest('status')}"
    tail += f"\nStop it with {console.suggest('down')}" if detached else "\nCtrl-C stops it; what runs is let finish."
    console.result(
        {
            "endpoint": None if status is None else status.endpoint,
            "model": None if status is None else status.model,
            "sealed": status is not None and status.vault_sealed,
            "ready": status is None or status.ready,
            "pid": gateway.pid,
            "state_dir": settings.state_dir,
            "api_key": api_key,
            "detached": detached,
        },
        f"{head}\n{text}{_shown(console, settings, status, api_key)}",
    )
    console.say(tail)


def _shown(console: Console, settings: "Settings", status: "types.Status | None", api_key: str | None) -> str:
    """What a demonstration shows a person: that state is kept, measured now, and what to paste."""
    if console.json or api_key is None or status is None or not status.ready or status.model is None:
        return ""
    from api.demonstration import pastes, show_state_kept

    console.say("Running one agent conversation twice on the same engine: stateless, and through the gateway.")
    shown = show_state_kept(settings, status, api_key)
    return f"\n\n{pastes(status.endpoint, api_key, status.model)}\n\n{shown}"


def _stay(console: Console, gateway: "Gateway", status: "types.Status | None") -> None:
    """Watch the gateway until a signal comes (raised as `StopRequested`) or it ends; tell what changes meanwhile."""
    known = _states(gateway.ask() if status is None else status)
    while not (gateway.wait(_LOOK_EVERY_S) and gateway.ended_well):
        states = _states(gateway.ask())
        if states != known:
            for name in [name for name in states if states[name] != known.get(name)]:
                console.say(f"{moment(time.time())}  {name}: {printable(states[name])}")
            known = states
    console.say("Stopped, from elsewhere.")


def _states(seen: "types.Status | HoldfastError | None") -> dict[str, str]:
    """Of each part; of the gateway alone, where it tells no more."""
    from api.launch import untold

    if seen is None:
        return {"gateway": "does not answer"}
    if isinstance(seen, HoldfastError):
        return {"gateway": untold(seen)}
    return {part.name: _state(part) for part in seen.parts}


def _state(part: "types.Part") -> str:
    """What a part is in and why, without what changes all the time."""
    if part.state == "ready":
        return part.state
    why = "; ".join(each.what for each in part.troubles) or part.detail
    return f"{part.state}, {why}"


def _stop(console: Console, gateway: "Gateway | None", settings: "Settings") -> None:
    if gateway is None:
        return
    drain_s = settings.gateway.drain_timeout_s
    console.say(f"\nStopping: what runs has {drain_s:g} s to finish. Ctrl-C again ends it at once.")
    if gateway.stop(drain_s + _STOP_MARGIN_S):
        console.say("Stopped.")
    else:
        console.say("Ended without waiting. What clients had been answered is stored.")


@click.command(cls=Command)
@click.option(
    "--now", "at_once", is_flag=True, help="Do not wait for what runs. What clients were answered stays stored."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long to wait for its end. [default: the setting gateway.drain_timeout_s and 20 s more]",
)
@pass_console
def down(console: Console, at_once: bool, timeout_s: float | None) -> None:
    """Stop the appliance, letting what runs finish."""
    from api.launch import stop_running

    wait_s = timeout_s if timeout_s is not None else console.settings().gateway.drain_timeout_s + _STOP_MARGIN_S
    console.say(
        "Stopping the appliance" + (" at once." if at_once else f"; what runs is let finish (at most {wait_s:g} s).")
    )
    pid = stop_running(console.state_dir, timeout_s=wait_s, at_once=at_once)
    text = "It was not running." if pid is None else f"Stopped (it was process {pid})."
    console.result({"was_running": pid is not None, "pid": pid}, text)


# Watching


@click.command(cls=Command)
@api_key_option
@pass_console
@click.pass_context
def status(context: click.Context, console: Console) -> None:
    """Say which part is ready, which is not, and why.

    Exit status 0 when everything serves, 8 when something does not or nothing runs.
    """
    seen = console.admin(deadline_s=15).status()
    console.result(seen, console.typable(_status_text(seen)))
    if not seen.ready:
        for part in seen.parts:
            if part.state == "sealed":
                console.say(f"Next: {console.suggest('unseal')}")
            elif part.state != "ready" and part.name == "engine":
                console.say(f"Next: {console.suggest('logs engine')}")
        context.exit(EXIT_STATUS[Fault.UNAVAILABLE])


def _status_text(seen: "types.Status") -> str:
    verdict = "draining" if seen.draining else "ready" if seen.ready else "NOT READY"
    lines = [
        f"Holdfast {seen.versions.get('holdfast', '?')} is {verdict}{' (a demonstration)' if seen.demo else ''}.",
        "",
        f"endpoint  {seen.endpoint}",
        f"model     {printable(seen.model or '-')}",
        f"state     {seen.state_dir}",
        f"uptime    {in_words(seen.uptime_s)}, process {seen.pid}, {_turns(seen.running_turns)} running",
    ]
    if seen.sessions is not None:
        lines.append(f"sessions  {seen.sessions.total} stored, {seen.sessions.active_last_hour} used in the last hour")
    if seen.leases is not None:
        held = seen.leases
        expiry = "" if held.next_expiry_in_s is None else f"; the next ends in {in_words(held.next_expiry_in_s)}"
        lines.append(
            f"leases    {held.sessions} sessions hold {held.leased_blocks} of {held.total_blocks} blocks of "
            f"{held.block_size_tokens} tokens{expiry}"
        )
    if seen.tiers:
        lines.append(f"tiers     {', '.join(map(_tier, seen.tiers))}")
    if seen.engine_restarts is not None:
        isolated = "in namespaces of its own" if seen.engine_isolated else "NOT isolated"
        why = f" ({printable(seen.engine_isolation_detail)})" if seen.engine_isolation_detail else ""
        lines.append(f"engine    {isolated}{why}, started again {seen.engine_restarts} times")
    lines.append(f"versions  {', '.join(f'{name} {number}' for name, number in seen.versions.items())}")
    lines += ["", table(("part", "state", "detail"), [(p.name, p.state, p.detail) for p in seen.parts], empty="")]
    for part in seen.parts:
        for trouble in part.troubles:
            lines += ["", f"{part.name}: {printable(trouble.what)}", f"  Next: {printable(trouble.remedy)}"]
    if seen.settings_of_nobody:
        lines += ["", "These settings apply to nobody, for no tenant has the name (`holdfast tenant list`):"]
        lines += [f"  {printable(setting)}" for setting in seen.settings_of_nobody]
    lines += ["", f"Seen at {moment(seen.observed_at)}, {ago(seen.observed_at)}."]
    return "\n".join(lines)


def _tier(tier: "types.TierSeen") -> str:
    state = "" if tier.state == "ok" else f" {tier.state.upper()}"
    return f"{tier.tier}{state} {size_in_words(tier.used_bytes)} of {size_in_words(tier.capacity_bytes)}"


def _turns(count: int) -> str:
    return "1 turn" if count == 1 else f"{count} turns"


@click.command(cls=Command)
@click.argument("which", type=click.Choice(_LOGS), required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on with what is written from now on, until Ctrl-C.")
@click.option(
    "--lines",
    "-n",
    type=click.IntRange(0, _MAX_LINES),
    default=100,
    show_default=True,
    help="At most so many, the last.",
)
@pass_console
def logs(console: Console, which: str | None, follow: bool, lines: int) -> None:
    """Show what the gateway and the engine wrote down.

    Neither log holds what was said. With --json one object a line: {"log", "line"}.
    """
    chosen = [which] if which is not None else list(_LOGS)
    tails = {name: _Tail(console.state_dir / "log" / f"{name}.log") for name in chosen}
    if not any(tail.path.exists() for tail in tails.values()):
        raise LogMissing(
            "there is no log yet",
            cause=f"nothing was started in {console.state_dir}",
            remedy=f"`{console.suggest('up')}`, or name another state directory with --state-dir",
        )
    for name, tail in tails.items():
        last, truncated = tail.last(lines)
        if truncated:
            console.say(f"(the last {lines} lines of {tail.path}; --lines shows more)")
        for line in last:
            _print_line(console, name, line, prefixed=len(chosen) > 1)
    while follow:
        time.sleep(_FOLLOW_EVERY_S)
        for name, tail in tails.items():
            for line in tail.new():
                _print_line(console, name, line, prefixed=len(chosen) > 1)


def _print_line(console: Console, name: str, line: str, *, prefixed: bool) -> None:
    if console.json:
        click.echo(json.dumps({"log": name, "line": line}, ensure_ascii=False))
    else:
        click.echo(printable(f"{name:<8}{line}" if prefixed else line))


class _Tail:
    """The end of a log, and what is added to it; survives the log's being set aside for a new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._file_id: int | None = None
        self._partial = b""

    def last(self, count: int) -> tuple[list[str], bool]:
        """The last `count` lines, and whether there are more."""
        kept = deque(self.new(), maxlen=count + 1)
        truncated = len(kept) > count
        if truncated:
            kept.popleft()
        return list(kept), truncated

    def new(self) -> Iterator[str]:
        """Whole lines written since the last look."""
        try:
            log = self.path.open("rb")
        except FileNotFoundError:
            return
        with log:
            about = os.fstat(log.fileno())
            if about.st_ino != self._file_id or about.st_size < self._offset:
                self._file_id, self._offset, self._partial = about.st_ino, 0, b""
            log.seek(self._offset)
            for line in log:
                self._offset += len(line)
                if not line.endswith(b"\n"):
                    self._partial += line
                    return
                yield (self._partial + line).decode("utf-8", "replace").rstrip("\n")
                self._partial = b""


# Saving


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@api_key_option
@pass_console
def backup(console: Console, file: Path) -> None:
    """Write the whole appliance to one file while it runs.

    Rows stay encrypted and the root key sealed: to restore, the passphrase is needed. The key file of a
    demonstration is never included, and neither is the audit log.
    """
    from api.backups import verify_backup
    from api.private_files import new_private_file

    target = file.expanduser().absolute()
    if target.exists():
        raise FileInTheWay(
            f"{target} exists", cause="a backup never overwrites a file", remedy="Choose another name, or move it away"
        )
    console.say("Copying the database; the appliance goes on serving.")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with console.admin(deadline_s=_BACKUP_DEADLINE_S).backup() as pieces, new_private_file(partial) as into:
            into.writelines(pieces)
        manifest = verify_backup(partial)
        os.link(partial, target)  # unlike a rename, refuses what has come to be there meanwhile
    except FileExistsError:
        raise FileInTheWay(
            f"{target} exists", cause="it came to be while the backup was written", remedy="Choose another name"
        ) from None
    except HoldfastError:
        raise
    except OSError as error:
        raise CannotWrite(
            f"{target} was not written",
            cause=str(error.strerror),
            remedy="Choose a place with room that you may write to",
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    if manifest.seal == "key-file":
        console.say(
            "Not included: the key file root.key. Without it this backup cannot be read; keep it somewhere else."
        )
    else:
        console.say("To restore it the passphrase is needed. Sessions forgotten later are in this file still.")
    console.say(
        f"Not included: the audit log, of {manifest.log_entries} entries when the copy was made. A restore on this"
        f" machine goes on with it; for another machine keep a copy of {console.state_dir / 'audit'}."
    )
    console.result(
        {"file": target, "manifest": manifest},
        f"Wrote {target}: {len(manifest.files)} files, {size_in_words(manifest.size)}, every hash verified.",
    )


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--replace", metavar="NAME", help="The name of the state directory, to set the appliance that is in it aside."
)
@pass_console
def restore(console: Console, file: Path, replace: str | None) -> None:
    """Put an appliance back from a backup.

    The appliance must not run. Every hash is verified before anything is written. What was there is kept beside it,
    and its audit log goes on: that this was done is recorded in it at the next start.
    """
    from api.backups import restore_backup
    from api.launch import refuse_if_running

    state_dir = console.state_dir
    refuse_if_running(state_dir)
    if replace is not None:
        console.confirm_name("", state_dir.name, replace, option="--replace")
    console.say(f"Verifying {file}")
    restored = restore_backup(file.expanduser().absolute(), state_dir, replace=replace is not None)
    manifest = restored.manifest
    if restored.kept is not None:
        console.say(f"What was there is kept in {restored.kept}; remove it when you are sure.")
    console.say(_log_words(restored.restore, state_dir))
    if restored.key_file_missing:
        console.say(f"Its key file was never in the backup: put it at {state_dir / 'root.key'}, mode 0600.")
    if restored.settings_to_review is not None:
        console.say(
            f"Its settings are in {restored.settings_to_review} and are not used: nothing vouches for them. Review what"
            " names programs, sockets and addresses (engine.python, engine.model, engine.socket, store.url,"
            f" gateway.host), and copy what you want into {state_dir / 'holdfast.toml'}."
        )
    console.result(
        restored,
        f"Restored the appliance of {moment(manifest.created_at)} ({ago(manifest.created_at)}) into {state_dir}.",
    )
    console.say(f"Next: {console.suggest('up')}")


def _log_words(restore: "Restore", state_dir: Path) -> str:
    """What became of the audit log."""
    had = f"{restore.log_entries} entries under the key {restore.log_key or '(none yet)'}"
    if restore.log == "carried-over":
        return f"The audit log goes on, with its {had}. The next start records this restore in it."
    if restore.log == "set-aside":
        return (
            "The database in this backup has no key for the audit log that was here: a new log begins at the next"
            f" start, and its first entry names the former one, {had}. Keep that: it is whole in"
            f" {state_dir / restore.log_folder}. Its destinations were not taken over: `holdfast audit export add`."
        )
    return (
        "There was no audit log here, and a backup holds none: a new one begins at the next start, and its first entry"
        f" says so. When the backup was made there were {had}. To go on with those, put the newest copy of the folders"
        f" audit and siem into {state_dir} before that."
    )
