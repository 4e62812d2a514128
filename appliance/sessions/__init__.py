"""Whose turn is this: identification, salts and transcripts."""

from appliance.sessions.deltas import TranscriptBroken
from appliance.sessions.registry import (
    Session,
    SessionForgotten,
    Sessions,
    SessionSummary,
    Transcript,
    TranscriptForbidden,
    TranscriptTurn,
    UnknownResponse,
    UnknownSession,
)
from appliance.sessions.turn import Message, Origin, Outcome, SessionHints, Turn, TurnKind, TurnState

__all__ = [
    "Message",
    "Origin",
    "Outcome",
    "Session",
    "SessionForgotten",
    "SessionHints",
    "SessionSummary",
    "Sessions",
    "Transcript",
    "TranscriptBroken",
    "TranscriptForbidden",
    "TranscriptTurn",
    "Turn",
    "TurnKind",
    "TurnState",
    "UnknownResponse",
    "UnknownSession",
]
