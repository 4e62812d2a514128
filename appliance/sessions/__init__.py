"""Whose turn is this: identification, salts and transcripts."""

from appliance.sessions.archive import (
    EXPLAINED_TURNS,
    Archive,
    Explanation,
    SessionSummary,
    Transcript,
    TranscriptForbidden,
    TranscriptTurn,
    UnknownSession,
)
from appliance.sessions.deltas import TranscriptBroken
from appliance.sessions.ledger import LastTurn, Ledger, Quantiles, Sums, TurnOf
from appliance.sessions.misses import Account, Cause, Served
from appliance.sessions.registry import Forgotten, Session, SessionForgotten, Sessions, UnknownResponse
from appliance.sessions.turn import Message, Origin, Outcome, SessionHints, Turn, TurnKind, TurnState

__all__ = [
    "EXPLAINED_TURNS",
    "Account",
    "Archive",
    "Cause",
    "Explanation",
    "Forgotten",
    "LastTurn",
    "Ledger",
    "Message",
    "Origin",
    "Outcome",
    "Quantiles",
    "Served",
    "Session",
    "SessionForgotten",
    "SessionHints",
    "SessionSummary",
    "Sessions",
    "Sums",
    "Transcript",
    "TranscriptBroken",
    "TranscriptForbidden",
    "TranscriptTurn",
    "Turn",
    "TurnKind",
    "TurnOf",
    "TurnState",
    "UnknownResponse",
    "UnknownSession",
]
