"""Whose turn is this: identification, salts and transcripts."""

from appliance.sessions.archive import (
    EXPLAINED_TURNS,
    NO_TURN,
    TRANSCRIPT_TURNS,
    Archive,
    Explanation,
    SessionSummary,
    Transcript,
    TranscriptForbidden,
    TranscriptTurn,
    UnknownSession,
)
from appliance.sessions.deltas import TranscriptBroken
from appliance.sessions.endings import Forgotten, Sessions
from appliance.sessions.ledger import LastTurn, Ledger, Quantiles, Sums, TurnOf
from appliance.sessions.live import Session
from appliance.sessions.misses import Account, Cause, Served
from appliance.sessions.registry import SessionForgotten, TenantShredded, UnknownResponse
from appliance.sessions.shredding import ShreddedTenant, Shredding
from appliance.sessions.throwaways import Throwaways
from appliance.sessions.turn import Message, Origin, Outcome, SessionHints, Turn, TurnKind, TurnState

__all__ = [
    "EXPLAINED_TURNS",
    "NO_TURN",
    "TRANSCRIPT_TURNS",
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
    "ShreddedTenant",
    "Shredding",
    "Sums",
    "TenantShredded",
    "Throwaways",
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
