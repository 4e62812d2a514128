"""Whose turn is this: identification, salts and transcripts."""

from appliance.sessions.archive import (
    Archive,
    SessionSummary,
    Transcript,
    TranscriptForbidden,
    TranscriptTurn,
    UnknownSession,
)
from appliance.sessions.deltas import TranscriptBroken
from appliance.sessions.registry import Forgotten, Session, SessionForgotten, Sessions, UnknownResponse
from appliance.sessions.turn import Message, Origin, Outcome, SessionHints, Turn, TurnKind, TurnState

__all__ = [
    "Archive",
    "Forgotten",
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
