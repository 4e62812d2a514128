"""What a turn's rows hold, sealed: of its session, of itself, and of where its history can be found again.

Rules:

- Nothing is written here: `Registry.record` commits a turn's changes together, or none of them.
- A turn is kept as what it adds to the turn before it: see `deltas`.
"""

from typing import Any, NamedTuple

from pydantic_core import from_json, to_json
from sqlalchemy import Text, bindparam, delete, exists, insert, literal, select, update

from appliance.sessions.deltas import Tip, encode_request, encode_token_ids, message_chain, said_messages, token_array
from appliance.sessions.history import shared_length
from appliance.sessions.live import Live
from appliance.sessions.misses import Account, Circumstances, Divergence, Ran, account_of, divergence_of, shared_tokens
from appliance.sessions.turn import Outcome, Turn
from appliance.store import Change, RowCipher, key_changes, tables
from appliance.vault import KeyPurpose, KeyRecord


class WrittenTurn(NamedTuple):
    """A turn's changes; what the next one is to be a difference from; what became of its prompt's tokens."""

    changes: list[Change]
    tip: Tip
    account: Account


def first_changes(
    rows: RowCipher,
    live: Live,
    turn: Turn,
    outcome: Outcome,
    *,
    key: KeyRecord,
    client_id_lookup: bytes | None,
    last: bool,
) -> list[Change]:
    """What makes a session, with its first turn."""
    row = {
        "session_id": live.session_id,
        "tenant_id": live.tenant_id,
        "principal_id": live.principal_id,
        "tree_id": live.tree_id,
        "parent_session_id": live.parent_session_id,
        "client_id_lookup": client_id_lookup,
        "client_id": live.client_id or "",
        "model": turn.model,
        "origin": live.origin.value,
        "created_at": outcome.started_at,
        "row_version": 1,
        **_totals(outcome, number=1, last=last),
    }
    sealed = rows.seal(tables.sessions, row, scope=live.session_id, purpose=KeyPurpose.SESSION)
    return [
        *key_changes([key]),
        Change(_INSERT_TREE, {"b_tree_id": live.tree_id, "b_tenant_id": live.tenant_id}),
        Change(_INSERT_SESSION, sealed),
    ]


def next_changes(live: Live, outcome: Outcome, number: int, *, last: bool) -> list[Change]:
    """What a session gains with a later turn."""
    named = {f"b_{name}": value for name, value in _totals(outcome, number=number, last=last).items()}
    return [Change(_UPDATE_SESSION, {"b_session_id": live.session_id, **named})]


def _totals(outcome: Outcome, *, number: int, last: bool) -> dict[str, Any]:
    return {
        "turns": number,
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens or 0,
        "completion_tokens": outcome.completion_tokens,
        "last_used_at": outcome.ended_at,
        "over_at": outcome.ended_at if last else None,
    }


def write_turn(
    rows: RowCipher,
    turn_id: str,
    live: Live,
    turn: Turn,
    outcome: Outcome,
    number: int,
    *,
    link: bytes | None,
    tip: Tip | None,
    circumstances: Circumstances,
) -> WrittenTurn:
    """The turn itself.

    Args:
        link: its history is found by, answer and all; None: it has none.
        tip: the session's turn before it, if that is at hand.
    """
    parameters = to_json(turn.parameters)
    prompt_length = len(outcome.prompt_token_ids)
    ids = token_array(outcome.prompt_token_ids, outcome.completion_token_ids)
    shared_ids = 0 if tip is None else shared_tokens(tip.ran.token_ids, ids)
    ran = Ran(
        turn.model,
        ids,
        outcome.prompt_tokens,
        outcome.cached_tokens,
        outcome.started_at,
        outcome.ended_at,
        circumstances,
    )
    said = said_messages([*turn.messages, outcome.answer])
    chain = message_chain(said)
    shared = min(shared_length(tip.chain, chain), len(turn.messages)) if tip is not None else 0
    account = account_of(
        None if tip is None else tip.ran,
        ran,
        shared=shared_ids,
        first=number == 1,
        history_came_again=tip is not None and shared == len(tip.chain),
    )
    row = {
        "turn_id": turn_id,
        "session_id": live.session_id,
        "tenant_id": live.tenant_id,
        "number": number,
        "response_id": outcome.response_id,
        "model": turn.model,
        "state": outcome.state.value,
        "request": encode_request(tip, shared, turn.messages, parameters, circumstances),
        "response": to_json(outcome.answer),
        "token_ids": encode_token_ids(tip, shared_ids, ids, prompt_length),
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens or 0,
        "completion_tokens": outcome.completion_tokens,
        "finish_reason": outcome.finish_reason,
        "started_at": outcome.started_at,
        "ended_at": outcome.ended_at,
        "row_version": 1,
    }
    changes = [Change(_INSERT_TURN, rows.seal(tables.turns, row, scope=live.session_id, purpose=KeyPurpose.SESSION))]
    if link is not None:
        at = {"tenant_id": live.tenant_id, "link": link}
        changes.append(Change(_DELETE_LINK, {f"b_{name}": value for name, value in at.items()}))
        changes.append(Change(_INSERT_LINK, {**at, "session_id": live.session_id, "turn_number": number}))
    return WrittenTurn(changes, Tip(number, chain, parameters, ran, said), account)


def divergence_between(before: Tip, now: Tip, account: Account) -> Divergence | None:
    """What is at the place where a turn parted from the one before; None: it did not. Long messages take their time."""
    *messages, _ = now.messages()
    return divergence_of(
        account,
        (before.messages(), from_json(before.parameters), before.ran.prompt_tokens),
        (messages, from_json(now.parameters)),
        same_messages=min(shared_length(before.chain, now.chain), len(messages)),
        token_ids=(before.token_ids, now.token_ids[: now.ran.prompt_tokens]),
    )


_INSERT_TREE = insert(tables.trees).from_select(
    ["tree_id", "tenant_id", "epoch"],
    select(bindparam("b_tree_id", type_=Text), bindparam("b_tenant_id", type_=Text), literal(0)).where(
        ~exists().where(tables.trees.c.tree_id == bindparam("b_tree_id", type_=Text))
    ),
)  # a child's first turn may be over before its parent's
_INSERT_SESSION = insert(tables.sessions)
_INSERT_TURN = insert(tables.turns)
_INSERT_LINK = insert(tables.chain)
_DELETE_LINK = delete(tables.chain).where(
    tables.chain.c.tenant_id == bindparam("b_tenant_id"), tables.chain.c.link == bindparam("b_link")
)
_UPDATE_SESSION = (
    update(tables.sessions)
    .where(tables.sessions.c.session_id == bindparam("b_session_id"))
    .values(
        turns=bindparam("b_turns"),
        prompt_tokens=tables.sessions.c.prompt_tokens + bindparam("b_prompt_tokens"),
        cached_tokens=tables.sessions.c.cached_tokens + bindparam("b_cached_tokens"),
        completion_tokens=tables.sessions.c.completion_tokens + bindparam("b_completion_tokens"),
        last_used_at=bindparam("b_last_used_at"),
        over_at=bindparam("b_over_at"),
    )
)
