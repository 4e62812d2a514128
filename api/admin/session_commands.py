"""`holdfast session`: what sessions there are, what was said in one, and making one be no more.

Rules:

- What was said is shown only by `session show`, to a principal that may read it.
- What a model or a client wrote reaches the terminal without its control characters.
- Forgetting asks for the session's id again.
"""

import json
import time
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import (
    Console,
    Group,
    ago,
    api_key_option,
    in_words,
    moment,
    pass_console,
    printable,
    table,
)

if TYPE_CHECKING:
    from api.admin import types


_IN_TIER = {"device": "on the device", "dram": "in DRAM", "disk": "on the disk"}


@click.group(cls=Group)
def session() -> None:
    """List, read and forget sessions."""


@session.command("list")
@click.option("--tenant", "tenant_name", help="Only this tenant's: a name or an id.")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="At most so many, last used first."
)
@api_key_option
@pass_console
def list_sessions(console: Console, tenant_name: str | None, limit: int) -> None:
    """List sessions, last used first. Shows nothing of what was said."""
    page = console.admin(deadline_s=120).sessions(tenant=tenant_name, limit=limit)
    now = time.time()
    rows = [
        (
            each.session_id,
            each.model,
            each.turns,
            each.prompt_tokens,
            each.cached_tokens,
            each.completion_tokens,
            ago(each.last_used_at, now),
        )
        for each in page.sessions
    ]
    headings = ("id", "model", "turns", "prompt tokens", "of them cached", "answer tokens", "last used")
    console.result(page, table(headings, rows, empty="There are no sessions."))
    if page.truncated:
        console.say(f"There are more: these are the {limit} last used (--limit).")


@session.command("show")
@click.argument("session_id")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=1000, show_default=True, help="At most so many turns, the newest."
)
@click.option("--before", type=click.IntRange(1), metavar="TURN", help="Only turns before this one.")
@api_key_option
@pass_console
def show_session(console: Console, session_id: str, limit: int, before: int | None) -> None:
    """Decrypt and print what was said in a session.

    The local administrator needs the permission transcript:read (`holdfast init --grant transcript:read`); a client's
    key reads its own sessions, and others' with that scope.
    """
    transcript = console.admin(deadline_s=120).transcript(session_id, before=before, limit=limit)
    console.result(transcript, _transcript_text(transcript))
    if transcript.truncated:
        first = transcript.turns[0].number
        console.say(f"There are more: `{console.suggest(f'session show {session_id} --before {first}')}`.")


@session.command("why")
@click.argument("session_id")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=1000, show_default=True, help="So many of its last turns."
)
@api_key_option
@pass_console
def explain_session(console: Console, session_id: str, limit: int) -> None:
    """Say why a session's prompts had to be computed, turn by turn, and what can be done about it.

    Shows no word of what was said. For each turn: the prompt's tokens, those that were found on the engine, and the
    others by why they had to be computed; and how long the first token took, of an answer that was streamed.
    """
    explanation = console.admin(deadline_s=120).why(session_id, limit=limit)
    console.result(explanation, _explanation_text(explanation))
    if explanation.truncated:
        console.say(f"There are more: these are its last {len(explanation.turns)} turns (--limit).")


@session.command("forget")
@click.argument("session_id")
@click.option("--yes", metavar="ID", help="The session's id again, instead of being asked for it.")
@api_key_option
@pass_console
def forget_session(console: Console, session_id: str, yes: str | None) -> None:
    """Destroy a session's key and rows, for good. Backups that were made before still hold it."""
    client = console.admin(deadline_s=120)
    found = client.session(session_id)
    turns = "1 turn" if found.turns == 1 else f"{found.turns} turns"
    console.confirm_name(
        f"{session_id}: {turns}, last used {ago(found.last_used_at)}. Nothing brings it back.", session_id, yes
    )
    forgotten = client.forget(session_id)
    if forgotten.erased:
        done = f"its key is destroyed and its {turns} are erased from the database files."
    else:
        done = (
            f"nobody can reach its {turns} any more. Its key may be in the database files still: the appliance erases"
            " it as soon as it can, also after a restart. `holdfast logs gateway` says what is in the way."
        )
    console.result(forgotten, f"Forgot {session_id}: {done}")
    if not forgotten.lease_released:
        console.say(
            "The engine could not be told; what it still holds cannot be reached any more and is overwritten in use."
        )


def _transcript_text(transcript: "types.Transcript") -> str:
    about = transcript.session
    lines = [
        f"Session     {about.session_id}",
        f"Client's id {printable(transcript.client_id) if transcript.client_id is not None else '-'}",
        f"Model       {printable(about.model)}",
        f"Began       {moment(about.created_at)} ({ago(about.created_at)}), last used {ago(about.last_used_at)}",
        f"Turns       {about.turns}",
        f"Tokens      {about.prompt_tokens} prompt ({about.cached_tokens} cached), {about.completion_tokens} answered",
    ]
    for turn in transcript.turns:
        lines += ["", _turn_heading(turn)]
        for message in turn.new_messages:
            lines += _message_lines(message)
        lines += _message_lines(turn.answer)
    return "\n".join(lines)


CAUSES_IN_WORDS = {
    "first_turn": "first turn",
    "new": "new",
    "diverged": "diverged",
    "block_tail": "end of a block",
    "model_changed": "other model",
    "engine_restarted": "engine restarted",
    "other_replica": "other replica",
    "ended": "session was over",
    "salt_changed": "tree forgotten",
    "concurrent": "turn before still ran",
    "expired": "expired",
    "evicted": "evicted",
    "quota": "over quota",
    "tier_fault": "tier fault",
    "template_changed": "other template",
    "unknown": "unknown",
}


def _kept_text(explanation: "types.Explanation") -> str:
    """`960 tokens on the device (lease, 12 s); 1280 tokens in DRAM (worth); worth 0.0831 hits/s`."""
    if explanation.kept is None:
        return "the engine could not be asked"
    kept = [
        f"{each.tokens} tokens {_IN_TIER[each.tier]} ({each.kept_for.replace('_', ' ')}"
        + ("" if each.ends_in_s is None else f", {in_words(max(0.0, each.ends_in_s))}")
        + ")"
        for each in explanation.kept
    ]
    worth = explanation.worth_hits_per_s
    return ("; ".join(kept) or "nothing") + (f"; worth {worth:.4f} hits/s" if kept and worth is not None else "")


def _explanation_text(explanation: "types.Explanation") -> str:
    about = explanation.session
    rows = [
        (
            turn.number,
            moment(turn.started_at),
            turn.prompt_tokens,
            turn.served_tokens,
            _from_where(turn.served_from),
            turn.prompt_tokens - turn.served_tokens,
            "-" if turn.first_token_s is None else round(1000 * turn.first_token_s),
            ", ".join(
                f"{tokens} {CAUSES_IN_WORDS.get(cause, cause)}" for cause, tokens in turn.computed_tokens.items()
            ),
            "" if turn.divergence is None else _where(turn.divergence),
        )
        for turn in explanation.turns
    ]
    headings = (
        "turn",
        "began",
        "prompt tokens",
        "found",
        "where",
        "computed",
        "first token, ms",
        "because",
        "parted from the turn before",
    )
    lines = [
        f"Session {about.session_id}",
        f"{about.turns} turns, {about.prompt_tokens} prompt tokens, {about.cached_tokens} of them found on the engine",
        f"Kept now: {_kept_text(explanation)}",
        "",
        table(headings, rows, empty="It has no turns."),
    ]
    for found in explanation.findings:
        place = _place(found.message, found.role)
        lines += [
            "",
            f"{found.what.replace('_', ' ')}{place}: {found.tokens} tokens in {len(found.turns)} turns",
            f"  {found.remedy}",
        ]
    return "\n".join(lines)


def _from_where(served_from: "dict[str, int] | None") -> str:
    if served_from is None:
        return "not known"
    return ", ".join(f"{tokens} {tier}" for tier, tokens in served_from.items() if tokens)


def _where(divergence: "types.Divergence") -> str:
    place = _place(divergence.message, divergence.role)
    return f"at token {divergence.token}{place}: {divergence.change.replace('_', ' ')}"


def _place(message: int | None, role: str | None) -> str:
    if message is not None:
        return f" in message {message} ({printable(role or 'no role')})"
    return "" if role is None else f" in a message of {printable(role)}"


def _turn_heading(turn: "types.TranscriptTurn") -> str:
    ended = turn.finish_reason or turn.state
    return (
        f"── turn {turn.number} ── {moment(turn.started_at)} ── {in_words(turn.ended_at - turn.started_at)} ── "
        f"{turn.prompt_tokens} prompt tokens, {turn.cached_tokens} cached, {turn.completion_tokens} answered ── "
        f"{printable(ended)}"
    )


def _message_lines(message: dict[str, Any]) -> list[str]:
    """One message, its role at the margin and what it says indented."""
    lines = [f"{printable(str(message.get('role', 'text')))}:"]
    said = message.get("content")
    if isinstance(said, str) and said:
        lines += _indented(said)
    elif said:
        lines += _indented(json.dumps(said, ensure_ascii=False))
    for call in message.get("tool_calls") or ():
        function = call.get("function", {}) if isinstance(call, dict) else {}
        lines += _indented(f"calls {function.get('name')}({function.get('arguments', '')})")
    return lines


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in printable(text).splitlines()]
