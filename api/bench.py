"""`holdfast bench stateful`: what keeping state is worth on this machine.

Rules:

- The benchmark runs on an appliance of its own, made for it and gone after it: nobody's work is in its way.
- Progress goes to stderr, the figures to stdout.
"""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from appliance.cli import EXIT_INTERRUPTED, Command, Console, Group, pass_console, table
from appliance.errors import Fault, HoldfastError

if TYPE_CHECKING:
    from api.stateful_bench import Sample, Target

RANDOM_MODEL = "random-140m"
_DEMO_MODEL = "demo"
_KEY_FILE = "demo-api-key"
_TAKEN_FROM_DEMO = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_KV_CACHE_BYTES = 1 << 30
_MAKING_DEADLINE_S = 300
_STOP_WITHIN_S = 50.0


class ModelNotMade(HoldfastError):
    """The randomly initialised model could not be made."""

    code: ClassVar[str] = "model_not_made"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


@click.group(cls=Group)
def bench() -> None:
    """Measure what keeping state is worth on this machine."""


@bench.command(cls=Command)
@click.option(
    "--model",
    default=_DEMO_MODEL,
    show_default=True,
    metavar="demo|random-140m|PATH",
    help="What to serve. random-140m: about 140 million random parameters, made when first asked for.",
)
@click.option("--turns", type=click.IntRange(min=2, max=50), default=50, show_default=True, help="Of the agent loop.")
@pass_console
@click.pass_context
def stateful(context: click.Context, console: Console, model: str, turns: int) -> None:
    """Run one agent loop three ways: stateless, with vLLM's own prefix caching, and stateful.

    Starts an appliance of its own, asks each turn three times, and compares the last 10 turns.
    """
    from api.launch import StopRequested, signals_as_requests
    from api.stateful_bench import run_loop, summary

    with signals_as_requests():
        try:
            with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as place:
                folder = _model_folder(console, model)
                with _own_appliance(console, Path(place) / "state", folder) as target:
                    console.say(f"{turns} turns, each asked stateless, vanilla and stateful:")
                    samples = asyncio.run(
                        run_loop(
                            target,
                            turns=turns,
                            margins=model != _DEMO_MODEL,
                            progress=lambda turn, latest: console.say(_progress_line(turn, turns, latest)),
                        )
                    )
                    figures = summary(samples, target)
        except StopRequested:
            console.say("Stopped; nothing was left running.")
            context.exit(EXIT_INTERRUPTED)
    console.result(figures, _figures_text(figures))


def _figures_text(figures: dict[str, Any]) -> str:
    rows = []
    for arm in ("stateless", "vanilla", "stateful"):
        figure = figures[arm]
        account = ", ".join(f"{count:g} {part}" for part, count in figure["account_per_turn"].items() if count)
        rows.append(
            (
                arm,
                f"{figure['prompt_tokens_per_turn']:.0f}",
                f"{figure['prefill_tokens_per_turn']:.1f}",
                f"{figure['ttft_p50_s'] * 1000:.1f} ms",
                f"{figure['ttft_p90_s'] * 1000:.1f} ms",
                account,
            )
        )
    about = f"{figures['model']}, blocks of {figures['block_size']} tokens"
    fewer, sooner = f"{figures['prefill_reduction']:.2%}", f"{figures['ttft_reduction']:.1%}"
    lines = [
        f"The last {figures['compared_turns']} of {figures['turns']} turns, {about}:",
        "",
        table(("arm", "prompt", "prefilled", "first token p50", "p90", "prefilled per turn: why"), rows, empty=""),
        "",
        f"Stateful prefills {fewer} fewer tokens than stateless, and the first token comes {sooner} sooner.",
    ]
    divergence = figures["first_divergence"]
    if divergence is None:
        lines.append("All three gave the same answers, token for token.")
    else:
        margin = divergence["logit_margin"]
        told = "" if margin is None else f", where the best token led by {margin:.3g} in logits"
        lines.append(
            f"The answers of {divergence['arm']} first differ in turn {divergence['turn'] + 1}, "
            f"token {divergence['token'] + 1}{told}."
        )
    return "\n".join(lines)


def _progress_line(turn: int, turns: int, latest: "dict[str, Sample]") -> str:
    told = "  ".join(f"{arm} {sample.prefilled} in {sample.ttft_s * 1000:.0f} ms" for arm, sample in latest.items())
    return f"  {turn + 1:2d}/{turns}  {told}"


@contextmanager
def _own_appliance(console: Console, state_dir: Path, model: Path | None) -> "Iterator[Target]":
    """An appliance that only the benchmark uses."""
    from api.demonstration import target_of
    from api.initialise import initialise
    from api.launch import Gateway
    from appliance.settings import load_settings

    console.say("Starting an appliance of its own")
    flags: dict[str, Any] = {"demo": True, "vault": {"seal": "key-file"}}
    settings = load_settings(flags, state_dir=state_dir)
    initialise(settings, passphrase=None, tenant_name="bench", demo_key_file=_KEY_FILE)
    environment = {
        "HOLDFAST_GATEWAY__PORT": "0",
        "HOLDFAST_ENGINE__KV_CACHE_BYTES": str(_KV_CACHE_BYTES),
    }
    if model is not None:
        environment["HOLDFAST_ENGINE__MODEL"] = json.dumps(str(model))
    gateway = Gateway(state_dir, environment, outlives=False)
    try:
        status = gateway.wait_until_ready(console.say, settings.engine.ready_timeout_s)
        if status is None:
            raise RuntimeError("who made an appliance is its administrator")
        yield target_of(settings, status, (state_dir / _KEY_FILE).read_text().strip())
    finally:
        gateway.stop(_STOP_WITHIN_S)


def _model_folder(console: Console, named: str) -> Path | None:
    """The folder of the model to serve; None: the demonstration model."""
    from api.commands import find_model

    if named == _DEMO_MODEL:
        return None
    if named != RANDOM_MODEL:
        return find_model(named, console.state_dir)
    folder = _cache_dir() / RANDOM_MODEL
    if not _is_current(folder):
        _make_random_model(console, folder)
    return folder


def _is_current(folder: Path) -> bool:
    """Whether a model was made there, with the tokenizer and template that the demonstration model has today."""
    from appliance.engine import demo

    committed = Path(demo.__file__).with_name("model")
    try:
        return all((folder / name).read_bytes() == (committed / name).read_bytes() for name in _TAKEN_FROM_DEMO)
    except FileNotFoundError:
        return False


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "holdfast"


def _make_random_model(console: Console, folder: Path) -> None:
    from appliance.engine.command_line import engine_python

    console.say(f"Making {folder}, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    python = console.settings().engine.python or engine_python()
    try:
        command = [str(python), "-m", "appliance.engine.demo.random_model", "--output", str(staged)]
        made = subprocess.run(command, capture_output=True, text=True, timeout=_MAKING_DEADLINE_S, check=False)
        if made.returncode != 0:
            raise ModelNotMade(
                "the random model was not made",
                cause=made.stderr.strip().splitlines()[-1] if made.stderr.strip() else f"status {made.returncode}",
                remedy="`holdfast doctor` checks the engine's environment",
            )
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
