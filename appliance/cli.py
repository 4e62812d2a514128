"""The `holdfast` command: finds a sub-command, loads it, and says what became of it.

Rules:

- A room brings its commands through the entry-point group `holdfast.commands`, loaded only when one is called: `--help`
  imports no room, so its summaries stand here, and a test compares them with what the rooms say.
- What a program reads goes to stdout, and is JSON with `--json`, errors too (`{code, message, cause, remedy}`, and a
  status other than 0). Everything else goes to stderr.
- The exit status says whose fault it was; `EXIT_STATUS` is the whole list.
- No core dump holds what a command held: that is forbidden before a command is looked for.
- A secret comes over a file descriptor or is asked for on the terminal: never in an argument, never in the environment.
- The commands are clients of the admin API. Only `init`, `up`, `restore` and `doctor` open files themselves.
- A command that is suggested can be pasted as it stands: it names this program and this appliance.
- Text from elsewhere (a model's, a tenant's) reaches the terminal without its control characters.
"""

import dataclasses
import json
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import click

from appliance.errors import Fault, HoldfastError

if TYPE_CHECKING:
    from api.admin.client import AdminClient
    from appliance.settings import Settings

COMMAND = "holdfast"
ENTRY_POINT_GROUP = "holdfast.commands"

# In the order of `--help`: the order in which a newcomer meets them.
SUMMARIES: Mapping[str, str] = {
    "init": "Create an appliance: its keys, its database, its first administrator.",
    "up": "Start the appliance and say when it serves.",
    "down": "Stop the appliance, letting what runs finish.",
    "status": "Say which part is ready, which is not, and why.",
    "doctor": "Check this machine; works when nothing else does.",
    "logs": "Show what the gateway and the engine wrote down.",
    "unseal": "Open the vault with its passphrase.",
    "seal": "Close the vault: nothing is served until it is unsealed.",
    "tenant": "Create, set, list and shred tenants.",
    "key": "Create, list and revoke API keys; rotate encryption keys.",
    "session": "List, read and forget sessions.",
    "kv": "Show what is kept of sessions, why and until when.",
    "audit": "Read, check, prove and witness the audit log.",
    "prove": "Prove on the running system that it keeps its promises.",
    "backup": "Write the whole appliance to one file while it runs.",
    "restore": "Put an appliance back from a backup.",
    "bench": "Measure what keeping state is worth on this machine.",
}

EXIT_STATUS: Mapping[Fault, int] = {
    Fault.INTERNAL: 1,
    Fault.CALLER: 2,
    Fault.UNAUTHENTICATED: 3,
    Fault.DENIED: 4,
    Fault.MISSING: 5,
    Fault.CONFLICT: 6,
    Fault.LIMIT: 7,
    Fault.UNAVAILABLE: 8,
    Fault.ENVIRONMENT: 9,
}
EXIT_CHECK_FAILED = 10  # a check of `doctor` has the verdict FAIL
EXIT_INTERRUPTED = 130  # Ctrl-C

_MAX_SECRET_BYTES = 4096
_AnyFunction = TypeVar("_AnyFunction", bound=Callable[..., Any])


class CommandBroken(HoldfastError):
    """A room's commands cannot be loaded."""

    code: ClassVar[str] = "command_unavailable"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class NoTerminal(HoldfastError):
    """A question has to be asked and there is nobody to ask."""

    code: ClassVar[str] = "no_terminal"
    fault: ClassVar[Fault] = Fault.CALLER


class SecretUnusable(HoldfastError, ValueError):
    """A secret that was handed over is empty, too long, or cannot be read."""

    code: ClassVar[str] = "secret_unusable"
    fault: ClassVar[Fault] = Fault.CALLER


class NotConfirmed(HoldfastError):
    """A destructive command was not given the name of what it destroys."""

    code: ClassVar[str] = "not_confirmed"
    fault: ClassVar[Fault] = Fault.CALLER


class Console:
    """What a sub-command needs of the world: the settings, the appliance, and a voice.

    Attributes:
        json: results and errors are printed as JSON.
    """

    def __init__(self, *, as_json: bool = False, state_dir: Path | None = None) -> None:
        self.json = as_json
        self._named_state_dir = state_dir
        self._hinted_state_dir: Path | None = state_dir
        self._api_key_fd: int | None = None

    # Which appliance

    def choose_state_dir(self, state_dir: Path, *, hinted: bool = True) -> None:
        """Speak of the appliance in `state_dir` from here on; `hinted`: commands that are suggested name it."""
        self._named_state_dir = state_dir
        self._hinted_state_dir = state_dir if hinted else None

    @property
    def state_dir_was_named(self) -> bool:
        """Whether a flag or the environment named the state directory."""
        return self._named_state_dir is not None or "HOLDFAST_STATE_DIR" in os.environ

    @property
    def state_dir(self) -> Path:
        """Where the appliance that this command speaks of keeps its state; absolute."""
        from appliance.settings import default_state_dir

        named = self._named_state_dir or os.environ.get("HOLDFAST_STATE_DIR")
        return Path(named or default_state_dir(os.environ)).expanduser().absolute()

    @property
    def demonstration_dir(self) -> Path:
        """Where `holdfast up --demo` keeps its state when nobody names a place."""
        return self.state_dir.with_name(f"{self.state_dir.name}-demo")

    def settings(self, flags: Mapping[str, Any] | None = None) -> "Settings":
        """The appliance's settings, with what the command line said on top."""
        from appliance.settings import load_settings

        return load_settings(flags, state_dir=self.state_dir)

    def act_with_api_key(self, descriptor: int) -> None:
        """Speak to the admin API as the principal of the API key that is read from `descriptor`."""
        self._api_key_fd = descriptor

    def admin(self, *, deadline_s: float = 30.0) -> "AdminClient":
        """A client of the running appliance's admin API.

        Acts with the API key of `--api-key-fd`; where none is named the kernel vouches for the local user.

        Raises:
            SecretUnusable: the descriptor holds no API key.
        """
        from api.admin.client import AdminClient

        api_key, api_key_fd = None, self._api_key_fd
        if api_key_fd is not None:
            offered = self.secret("API key", api_key_fd, option="--api-key-fd")
            if not re.fullmatch(rb"[!-~]+", offered):
                raise SecretUnusable(
                    f"file descriptor {api_key_fd} holds no API key",
                    cause="an API key is one word of plain characters",
                    remedy="Write the key to the descriptor that --api-key-fd names, then close it",
                )
            api_key = offered.decode()
        if not self.state_dir_was_named and not self.state_dir.exists() and self.demonstration_dir.exists():
            where = shlex.quote(str(self.demonstration_dir))
            self.say(f"There is a demonstration: {_own_name()} --state-dir {where} …")
        return AdminClient(self.state_dir, api_key=api_key, deadline_s=deadline_s)

    def suggest(self, words: str) -> str:
        """The command to type for `words`, on the same appliance as this one."""
        return f"{self._as_typed()}{words}"

    def _as_typed(self) -> str:
        """How a command for this appliance begins, up to its first word."""
        named = self._hinted_state_dir
        where = f"--state-dir {shlex.quote(str(named))} " if named is not None else ""
        return f"{_own_name()} {where}"

    def typable(self, remedy: str) -> str:
        """A remedy whose commands, which know of no appliance, speak of this one."""
        return re.sub(f"`{COMMAND} (?!--state-dir )", lambda _: f"`{self._as_typed()}", remedy)

    # Speaking

    def result(self, value: object, text: str) -> None:
        """Print what was asked for: `value` as JSON for programs, else `text`."""
        click.echo(_json_text(value) if self.json else text)

    def say(self, text: str) -> None:
        """Tell the person at the terminal something that is not the result."""
        click.echo(text, err=True)

    def fail(self, error: HoldfastError) -> None:
        """Say what failed, why, and what to do next."""
        if self.json:
            click.echo(_json_text(error.record()))
            return
        click.echo(click.style(f"Error: {printable(error.message)}", fg="red", bold=True), err=True)
        if error.cause:
            click.echo(f"  Why:  {printable(error.cause)}", err=True)
        click.echo(f"  Next: {printable(self.typable(error.remedy))}", err=True)
        click.echo(f"  Code: {error.code}", err=True)

    # Asking

    def secret(self, question: str, descriptor: int | None, *, twice: bool = False, option: str) -> bytearray:
        """A secret from `descriptor` (up to its end, less one newline), else asked for on the terminal.

        Args:
            twice: have it typed again, for a secret that is being set.
            option: the flag that names the descriptor, for the error.

        Raises:
            NoTerminal: no descriptor was given and there is no terminal.
            SecretUnusable: nothing came, or too much, or the descriptor cannot be read.
        """
        if descriptor is not None:
            return _read_secret(descriptor, option)
        typed = self._ask_hidden(f"{question}: ", option)
        if twice and typed != self._ask_hidden("The same again: ", option):
            raise SecretUnusable(
                "the two entries differ", cause="what was typed twice is not the same", remedy="Run the command again"
            )
        if not typed:
            raise SecretUnusable("nothing was entered", cause="the entry was empty", remedy="Run the command again")
        return typed

    def confirm_name(self, what: str, name: str, given: str | None, *, option: str = "--yes") -> None:
        """Have a person repeat the `name` of what is about to be destroyed.

        Raises:
            NotConfirmed: something else was given.
            NoTerminal: nothing was given and there is nobody to ask.
        """
        if given is None:
            _require_terminal(f"{option} {name}")
            self.say(what)
            given = click.prompt(f"Type {name} to go on", default="", show_default=False, err=True)
        if given != name:
            raise NotConfirmed(
                "nothing was done",
                cause=f"the name given is not {name}",
                remedy=f"Give the name: {option} {name}",
            )

    def _ask_hidden(self, prompt: str, option: str) -> bytearray:
        import getpass

        _require_terminal(f"{option} N")
        return bytearray(getpass.getpass(prompt).encode("utf-8", "surrogateescape"))


# What rooms build their commands from


pass_console = click.make_pass_decorator(Console, ensure=True)


class Command(click.Command):
    """A command that also takes `--json` and `--state-dir` after its name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_common_options())


class Group(click.Group):
    """A group of commands that each take `--json` and `--state-dir`."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_common_options())


def passphrase_option(function: _AnyFunction) -> _AnyFunction:
    """Adds `--passphrase-fd`, an open descriptor that the passphrase is read from."""
    return click.option(
        "--passphrase-fd",
        type=click.IntRange(min=0),
        metavar="N",
        help="Read the passphrase from this open file descriptor instead of asking for it.",
    )(function)


def api_key_option(function: _AnyFunction) -> _AnyFunction:
    """Adds `--api-key-fd`, which has `Console.admin` act as the principal of an API key, not as the local user."""
    return click.option(
        "--api-key-fd",
        type=click.IntRange(min=0),
        metavar="N",
        expose_value=False,
        callback=_set_api_key_fd,
        help="Act as the principal of the API key read from this open file descriptor.",
    )(function)


# What is shown to people


def in_words(seconds: float) -> str:
    """A duration with its units, two of them at most: `3 min 12 s`."""
    whole = max(0, int(seconds))
    if seconds < 1:
        return f"{max(0, round(seconds * 1000))} ms"
    for size, unit, below, below_unit in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit} {rest} {below_unit}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def moment(epoch_s: float | None) -> str:
    """A moment in UTC, to the second; a dash for one that never comes."""
    if epoch_s is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(epoch_s))


def ago(epoch_s: float | None, now: float | None = None) -> str:
    """How long ago a moment was; a dash for none."""
    if epoch_s is None:
        return "-"
    return f"{in_words((time.time() if now is None else now) - epoch_s)} ago"


def size_in_words(size_bytes: float) -> str:
    """A size in binary units: `4.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def printable(text: str) -> str:
    """`text` without what a terminal would obey: control characters are shown as escapes, save newline and tab."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> str:
    """Columns as wide as their widest cell; `empty` when there are no rows."""
    cells = [[printable(str(cell)).replace("\n", " ") for cell in row] for row in rows]
    if not cells:
        return empty
    lines = [[heading.upper() for heading in headings], *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


# The command itself


class _Root(click.Group):
    """Every command of every room, none of them loaded before it is called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_common_options())

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        found = _entry_points()
        return [name for name in SUMMARIES if name in found] + sorted(found.keys() - SUMMARIES.keys())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        entry = _entry_points().get(cmd_name)
        if entry is None:
            return None
        try:
            command: click.Command = entry.load()
        except ImportError as error:
            raise CommandBroken(
                f"`holdfast {cmd_name}` cannot be loaded",
                cause=f"{type(error).__name__}: {error}",
                remedy="Install what is missing: `make run` does in a clone, and `holdfast doctor` names it",
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, SUMMARIES.get(name, "")) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _entry_points() and not name.startswith("-"):
            raise click.exceptions.NoSuchCommand(name, possibilities=self.list_commands(ctx), ctx=ctx)
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        """Run the command line and leave with its exit status."""
        words = list(sys.argv[1:] if args is None else args)
        console = Console(as_json="--json" in _before_double_dash(words))
        extra.update(standalone_mode=False, obj=console)
        extra.setdefault("prog_name", COMMAND)
        sys.exit(_run(console, lambda: super(_Root, self).main(words, *rest, **extra)))


def _run(console: Console, command: Callable[[], object]) -> int:
    """Run `command`; say what went wrong, and return the exit status."""
    try:
        status = command()
        sys.stdout.flush()
    except HoldfastError as error:
        console.fail(error)
        return EXIT_STATUS[error.fault]
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_STATUS[Fault.CALLER]
    except click.ClickException as error:
        console.fail(_usage_error(error))
        return EXIT_STATUS[Fault.CALLER]
    except (click.Abort, KeyboardInterrupt):
        console.say("\nInterrupted.")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout has seen enough; the interpreter must not fail on its last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        console.say(traceback.format_exc().rstrip())
        console.fail(_defect(error))
        return EXIT_STATUS[Fault.INTERNAL]
    return status if isinstance(status, int) else 0


class _UsageError(HoldfastError, ValueError):
    code: ClassVar[str] = "usage"
    fault: ClassVar[Fault] = Fault.CALLER


def _usage_error(error: click.ClickException) -> HoldfastError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context is not None else "holdfast"
    return _UsageError(
        "the command line is not understood",
        cause=error.format_message().rstrip("."),
        remedy=f"See `{path} --help`",
    )


def _defect(error: Exception) -> HoldfastError:
    return HoldfastError(
        "something went wrong that nobody thought of",
        cause=f"{type(error).__name__}: {error}",
        remedy="This is a defect: keep what is printed above, and run `holdfast doctor`",
    )


def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _common_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--json"],
            is_flag=True,
            expose_value=False,
            callback=_set_json,
            help="Print the result, or the error, as JSON.",
        ),
        click.Option(
            ["--state-dir"],
            type=click.Path(path_type=Path),
            metavar="DIR",
            expose_value=False,
            callback=_set_state_dir,
            help="Where the appliance keeps its state.  [default: $HOLDFAST_STATE_DIR, else ~/.local/state/holdfast]",
        ),
    ]


def _set_json(context: click.Context, _: click.Parameter, chosen: bool) -> None:
    if chosen:
        context.ensure_object(Console).json = True


def _set_state_dir(context: click.Context, _: click.Parameter, chosen: Path | None) -> None:
    if chosen is not None:
        context.ensure_object(Console).choose_state_dir(chosen)


def _set_api_key_fd(context: click.Context, _: click.Parameter, chosen: int | None) -> None:
    if chosen is not None:
        context.ensure_object(Console).act_with_api_key(chosen)


def _before_double_dash(words: Sequence[str]) -> Sequence[str]:
    return words[: words.index("--")] if "--" in words else words


def _require_terminal(instead: str) -> None:
    try:
        with Path("/dev/tty").open("rb"):
            return
    except OSError as error:
        raise NoTerminal(
            "there is no terminal to ask on",
            cause=f"/dev/tty cannot be opened: {error.strerror}",
            remedy=f"Give it on the command line: {instead}",
        ) from None


def _read_secret(descriptor: int, option: str) -> bytearray:
    try:
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            secret = bytearray(stream.read(_MAX_SECRET_BYTES + 1))
    except OSError as error:
        raise SecretUnusable(
            f"file descriptor {descriptor} cannot be read",
            cause=str(error.strerror),
            remedy=f"Open it for the command: `holdfast … {option} 3 3< FILE`",
        ) from None
    if secret.endswith(b"\n"):
        del secret[-1]
    if not 0 < len(secret) <= _MAX_SECRET_BYTES:
        raise SecretUnusable(
            f"file descriptor {descriptor} holds no usable secret",
            cause=f"it gave {len(secret)} bytes; allowed are 1 to {_MAX_SECRET_BYTES}",
            remedy=f"Write the secret to the descriptor that {option} names, then close it",
        )
    return secret


def _own_name() -> str:
    """What to type to run this program again: its name where the shell finds it, else its path."""
    from shutil import which

    called = Path(sys.argv[0])
    if called.name != COMMAND or not called.is_file():
        return COMMAND  # started as something else: by a test, or with `python -c`
    found = which(COMMAND)
    if found is not None and called.samefile(found):
        return COMMAND
    return shlex.quote(str(called))


def _json_text(value: object) -> str:
    return json.dumps(value, default=_jsonable, ensure_ascii=False, indent=2)


def _jsonable(value: object) -> object:
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


# At the end: the options above are needed to make it.


@click.group(cls=_Root, no_args_is_help=True)
@click.version_option(package_name="holdfast", message="%(version)s")
def holdfast() -> None:
    """Serve language-model agents and keep their state, where no network reaches.

    Start with `holdfast up --demo`, or `holdfast init` and then `holdfast up`. When something is wrong: `holdfast
    status`, `holdfast doctor`, `holdfast logs`.
    """


def main() -> NoReturn:
    """The `holdfast` script."""
    # Before anything else: the commands that hold a passphrase or a root key hold it in this process.
    from appliance.vault.process import forbid_core_dumps

    forbid_core_dumps()
    holdfast.main()
