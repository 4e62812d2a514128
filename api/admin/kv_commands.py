"""`holdfast kv`: what is kept of sessions, in which tier, what it is worth and until when; and what that saves.

Rules:

- Every number has its unit, and every picture its age.
- What needs somebody stands first; of a table, what is looked for first stands left: a terminal may have no more room.
- `top` draws anew on a terminal; anywhere else, and with `--json`, each picture follows the one before. Ctrl-C ends it.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING

import click

from api.admin.session_commands import CAUSES_IN_WORDS
from appliance.cli import (
    Console,
    Group,
    ago,
    api_key_option,
    in_words,
    moment,
    pass_console,
    printable,
    size_in_words,
    table,
)

if TYPE_CHECKING:
    from api.admin import types

_HOME_AND_CLEAR = "\x1b[H\x1b[J"
_ID_SHOWN = 12
_WHY = "Why: in use (by a request), lease (for the time beside it), share (its tenant's), worth (until room is wanted)"


@click.group(cls=Group)
def kv() -> None:
    """Show what is kept of sessions, why and until when."""


_sessions_option = click.option(
    "--sessions",
    "most_sessions",
    type=click.IntRange(0, 1000),
    default=20,
    show_default=True,
    help="Show at most so many sessions, those that keep most.",
)


@kv.command("status")
@_sessions_option
@api_key_option
@pass_console
def show_status(console: Console, most_sessions: int) -> None:
    """Show each tier, tenant and session: what is kept, what it is worth, until when, and what was found."""
    status = console.admin().kv(sessions=most_sessions)
    console.result(status, status_text(status))


@kv.command("top")
@_sessions_option
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.5, 3600),
    default=2.0,
    show_default=True,
    help="Seconds from one picture to the next.",
)
@click.option("--count", "pictures", type=click.IntRange(min=1), help="End after so many pictures.  [default: never]")
@api_key_option
@pass_console
def watch_status(console: Console, most_sessions: int, interval_s: float, pictures: int | None) -> None:
    """Show the same again and again until Ctrl-C; with --json, one picture a line."""
    client = console.admin()
    redraw = sys.stdout.isatty() and not console.json
    try:
        for number in count(1):
            status = client.kv(sessions=most_sessions)
            if console.json:
                click.echo(json.dumps(status.model_dump(mode="json")))
            elif redraw:
                click.echo(_HOME_AND_CLEAR + _that_fits(status_text(status)), nl=False)
            else:
                click.echo(("\n" if number > 1 else "") + status_text(status))
            if number == pictures:
                break
            time.sleep(interval_s)
    except KeyboardInterrupt:
        pass  # what is on the screen stays there
    if redraw:
        click.echo()


@kv.command("dashboard")
@pass_console
def print_dashboard(console: Console) -> None:
    """Print the dashboard that Grafana imports, as JSON."""
    from api.dashboards import kv_dashboard

    text = kv_dashboard()
    console.result(json.loads(text), text.rstrip())


def status_text(status: "types.KvStatus") -> str:
    """A picture as people read it."""
    age = f"seen {in_words(status.age_s)} before" if status.age_s is not None else "the engine did not answer"
    since = f"the gateway counts for {in_words(status.observed_at - status.counted_since)}"
    lines = [f"At {moment(status.observed_at)}, {age}; {since}"]
    if status.age_s is None:
        lines.append("What it keeps is not known now: `holdfast status` says why")
    lines += [f"{tier.tier} {tier.state.upper()}: {printable(tier.detail)}" for tier in status.tiers if tier.detail]
    if status.tiers:
        lines += ["", _tiers_table(status), *_kept_lines(status)]
    lines += ["", *_found_lines(status), "", _tenants_table(status)]
    if status.tiers:
        lines += ["", *([_WHY] if status.sessions else []), _sessions_table(status)]
        more = max(tier.sessions for tier in status.tiers) - len(status.sessions)
        if more > 0:
            lines.append(f"At least {more:,} sessions more keep something (--sessions).")
    behind = [*_disk_lines(status.disk), *_recall_lines(status.recall), *_canary_lines(status.canary)]
    if behind:
        lines += ["", *behind]
    return "\n".join(lines)


def _tiers_table(status: "types.KvStatus") -> str:
    rows = [
        (
            tier.tier,
            tier.state,
            f"{tier.used_blocks:,} ({_share(tier.used_blocks, tier.capacity_blocks)})",
            f"{tier.leased_blocks:,} ({_share(tier.leased_blocks, tier.capacity_blocks)})"
            if tier.tier == "device"
            else "-",
            f"{tier.free_blocks:,} ({_share(tier.free_blocks, tier.capacity_blocks)})",
            f"{tier.sessions:,}",
            f"{tier.capacity_blocks:,} blocks, {size_in_words(tier.capacity_bytes)}",
            f"{tier.found_tokens:,} tokens ({_share(tier.found_tokens, status.prompt_tokens)})",
        )
        for tier in status.tiers
    ]
    headings = (
        "tier",
        "state",
        "used, blocks",
        "of them leased",
        "free, blocks",
        "sessions",
        "capacity",
        "found there of prompts",
    )
    return table(headings, rows, empty="")


def _kept_lines(status: "types.KvStatus") -> list[str]:
    kept = (
        f"On the device: {status.kept_sessions:,} sessions, {status.leased_sessions:,} of them with a lease that runs"
    )
    if status.worths_hits_per_s:
        lowest, middle, highest = status.worths_hits_per_s
        kept += f"; worth {lowest:.4f} to {highest:.4f} hits/s, half above {middle:.4f}"
    rate = "not known yet"
    if status.reclaimed_blocks_per_s is not None and status.reclaimed_over_s is not None:
        rate = f"{status.reclaimed_blocks_per_s:.1f} blocks/s over the last {in_words(status.reclaimed_over_s)}"
    reclaimed = f"Reclaimed for others: {rate}; since the engine began {status.reclaimed_blocks_total:,} blocks"
    reclaimed += f"; {status.expired_leases_total:,} leases ran out"
    if status.ignored_leases_total:
        reclaimed += f"; {status.ignored_leases_total:,} malformed leases were ignored"
    return [kept, reclaimed]


def _disk_lines(disk: "types.KvDisk | None") -> list[str]:
    if disk is None:
        return []
    left = f"{disk.evicted_blocks_total:,} evicted, {disk.expired_blocks_total:,} expired"
    moved = f"{disk.stored_blocks_total:,} blocks written, {disk.loaded_blocks_total:,} read, {left}"
    lines = [f"On the disk: {moved}; {size_in_words(disk.waiting_bytes)} wait to be written"]
    not_stored = {cause: count for cause, count in disk.not_stored_total.items() if count}
    faults = {cause: count for cause, count in disk.faults_total.items() if count}
    if not_stored:
        lines.append(f"Not written: {', '.join(f'{n:,} blocks, {_IN_WORDS[why]}' for why, n in not_stored.items())}")
    if faults:
        lines.append(f"Could not be read: {', '.join(f'{n:,} blocks, {_IN_WORDS[why]}' for why, n in faults.items())}")
    if disk.last_error is not None and disk.last_error_age_s is not None:
        lines.append(f"Last error of the disk: {printable(disk.last_error)}, {in_words(disk.last_error_age_s)} before")
    return lines


def _recall_lines(recall: "types.KvRecall | None") -> list[str]:
    if recall is None:
        return []
    read, used, in_vain = recall.recalled_blocks_total, recall.used_blocks_total, recall.in_vain_blocks_total
    came = f"{used:,} used, {in_vain:,} in vain, {read - used - in_vain:,} in DRAM still"
    paused = f"; paused for {in_words(recall.paused_for_s)}, the disk is slow" if recall.paused_for_s else ""
    return [f"Recalled ahead: {read:,} blocks, of them {came}{paused}"]


_IN_WORDS = {
    "slow": "the disk is too slow",
    "error": "the disk has an error",
    "no_key": "there is no key for them",
    "too_large": "there is no room",
    "quota": "their tenant or their session has its quota, or others have theirs",
    "off": "the tier is off",
    "damaged": "damaged",
    "lost": "their file is gone",
}


def _canary_lines(canary: "types.KvCanary | None") -> list[str]:
    if canary is None:
        return []
    verdict = "DIFFERS: nothing is restored any more" if canary.quarantined else "agrees"
    said = "nothing was compared yet"
    if canary.compared_age_s is not None:
        worst = "no number" if canary.worst_error is None else f"{100 * canary.worst_error:.2g} %"
        said = f"{verdict}; {canary.compared_blocks_total:,} blocks compared, largest error {worst}"
        said += f", the last {in_words(canary.compared_age_s)} before"
    elif canary.quarantined:
        said = f"{verdict}; it was found by an engine before this one"
    dropped = canary.dropped_samples_total
    unused = f"; {dropped} times what was noted went uncompared" if dropped else ""
    return [f"Restored against computed: {said}{unused}"]


def _found_lines(status: "types.KvStatus") -> list[str]:
    prompt = status.prompt_tokens
    if not prompt:
        return ["No turn was written down yet."]
    found = ", ".join(f"{_share(tokens, prompt)} {tier}" for tier, tokens in status.found_tokens.items() if tokens)
    return [
        f"Prompts: {prompt:,} tokens in {status.turns:,} turns",
        f"Replicated: {_share(status.repeated_tokens, prompt)} of them had been sent with the turn before, too",
        f"Found: {found or 'nothing'}",
        f"Computed: {_causes(status.computed_tokens, prompt) or 'nothing'}",
        f"First token, warm: {_times(status.warm)}",
        f"First token, cold: {_times(status.cold)}",
    ]


def _tenants_table(status: "types.KvStatus") -> str:
    rows = [
        (
            each.tenant_id,
            f"{each.kept_sessions:,} ({each.leased_sessions:,} leased)",
            *(_blocks_of(each, tier.tier) for tier in status.tiers),
            _worths(each.worths_hits_per_s),
            f"{each.reclaimed_blocks_total:,}",
            _share(sum(each.found_tokens.values()), each.prompt_tokens),
            _share(each.repeated_tokens, each.prompt_tokens),
            _causes(each.computed_tokens, each.prompt_tokens) or "-",
            _quantiles(each.warm),
            _quantiles(each.cold),
            f"{each.turns:,}",
            f"{each.prompt_tokens:,}",
        )
        for each in status.tenants
    ]
    headings = (
        "tenant",
        "sessions",
        *(f"{tier.tier}, blocks" for tier in status.tiers),
        "worth, hits/s",
        "reclaimed, blocks",
        "found",
        "replicated",
        "computed",
        "warm, P50/P90/P99",
        "cold, P50/P90/P99",
        "turns",
        "prompt tokens",
    )
    return table(headings, rows, empty="No tenant keeps anything.")


def _worths(worths: Sequence[float]) -> str:
    """`0.0001 to 0.9000`."""
    return f"{worths[0]:.4f} to {worths[-1]:.4f}" if worths else "-"


def _blocks_of(tenant: "types.KvTenant", tier: str) -> str:
    """`120 (share 200, cap 400)`: blocks, with the quota if there is one."""
    kept = next((each for each in tenant.kept if each.tier == tier), None)
    if kept is None:
        return "-"
    quota = [f"share {kept.share_blocks:,}"] if kept.share_blocks else []
    quota += [f"cap {kept.cap_blocks:,}"] if kept.cap_blocks is not None else []
    return f"{kept.blocks:,} ({', '.join(quota)})" if quota else f"{kept.blocks:,}"


def _sessions_table(status: "types.KvStatus") -> str:
    now = status.observed_at
    rows = []
    for each in status.sessions:
        last = each.last_turn
        rows.append(
            (
                each.session_id or "not known",
                _beginning(each.tenant_id),
                *(_held_in(each, tier.tier) for tier in status.tiers),
                "in use" if each.worth_hits_per_s is None else f"{each.worth_hits_per_s:.4f}",
                "-" if last is None else ago(last.ended_at, now),
                "-" if last is None else _share(sum(last.found_tokens.values()), last.prompt_tokens),
                "-" if last is None else _causes(last.computed_tokens, None),
                "-" if last is None or last.first_token_s is None else round(1000 * last.first_token_s),
            )
        )
    kept = [f"{tier.tier}, tokens" for tier in status.tiers]
    headings = (
        *("session", "tenant", *kept, "worth, hits/s"),
        *("last turn", "found", "computed, tokens", "first token, ms"),
    )
    return table(headings, rows, empty="No session keeps anything.")


def _beginning(tenant_id: str | None) -> str:
    """Enough of an id to find its tenant in the table above."""
    if tenant_id is None:
        return "-"
    return tenant_id if len(tenant_id) <= _ID_SHOWN else f"{tenant_id[:_ID_SHOWN]}…"


def _held_in(session: "types.KvSession", tier: str) -> str:
    """`960 (lease, 12 s)`: tokens, why they are kept, and for how long at most."""
    held = next((each for each in session.kept if each.tier == tier), None)
    if held is None:
        return "-"
    left = "" if held.ends_in_s is None else f", {in_words(max(0.0, held.ends_in_s))}"
    return f"{held.tokens:,} ({held.kept_for.replace('_', ' ')}{left})"


def _causes(tokens_by_cause: Mapping[str, int], of: int | None) -> str:
    ranked = sorted(tokens_by_cause.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{f'{tokens:,}' if of is None else _share(tokens, of)} {CAUSES_IN_WORDS.get(cause, cause)}"
        for cause, tokens in ranked
        if tokens
    )


def _times(times: "types.FirstTokens | None") -> str:
    if times is None:
        return "no streamed turn yet"
    quantiles = f"P50 {_seconds(times.p50_s)}, P90 {_seconds(times.p90_s)}, P99 {_seconds(times.p99_s)}"
    return f"{quantiles} ({times.turns:,} turns since {moment(times.since)})"


def _quantiles(times: "types.FirstTokens | None") -> str:
    return "-" if times is None else " / ".join(map(_seconds, (times.p50_s, times.p90_s, times.p99_s)))


def _seconds(seconds: float) -> str:
    """As `in_words`, and below ten seconds with a tenth: that is much of a time to a first token."""
    return f"{seconds:.1f} s" if 1 <= seconds < 10 else in_words(seconds)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _that_fits(text: str) -> str:
    """The lines and columns that the terminal has room for; what is cut off is said."""
    columns, rows = shutil.get_terminal_size()
    lines = [line if len(line) <= columns else f"{line[: columns - 1]}…" for line in text.splitlines()]
    if len(lines) < rows:
        return "\n".join(lines)
    return "\n".join([*lines[: rows - 2], f"… {len(lines) - rows + 2} lines more"[:columns]])
