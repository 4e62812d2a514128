"""What a request says of its session: in a header, else in its body.

Rules:

- A header wins over a body field, and the headers are looked for in one order: ours, then those that agent harnesses
  send already.
- An id is 1 to 256 printable ASCII characters without spaces. One that is not is an error: to leave it out silently
  would file the turn under another session.
- An agent's id is put under its session's (`session/agent`), so that two agents of one session are two sessions of one
  tree.
"""

import re
from collections.abc import Mapping
from typing import Any

from api.openai.errors import RequestError
from appliance.sessions import Origin, SessionHints

_ID = re.compile(r"[\x21-\x7e]{1,256}")
_NONE = SessionHints()

_CLAUDE_SESSION = b"x-claude-code-session-id"
_CLAUDE_AGENT = b"x-claude-code-agent-id"
_CLAUDE_PARENT = b"x-claude-code-parent-agent-id"
_SESSION_HEADERS = (b"x-session-id", b"x-dynamo-session-id", _CLAUDE_SESSION, b"session-id")
_PARENT_HEADERS = (b"x-parent-session-id", b"x-dynamo-parent-session-id")

_END_HEADER = b"x-session-end"
_DYNAMO_END_HEADER = b"x-dynamo-session-final"

HEADERS = frozenset(
    {*_SESSION_HEADERS, _CLAUDE_AGENT, _CLAUDE_PARENT, *_PARENT_HEADERS, _END_HEADER, _DYNAMO_END_HEADER}
)


def read_hints(headers: Mapping[bytes, bytes], body: Mapping[str, Any]) -> SessionHints:
    """What the headers and the body say.

    Raises:
        RequestError: an id is too long, or has characters that an id cannot have.
    """
    for name in _SESSION_HEADERS:
        if name in headers:
            return _of_header(name, headers)
    previous = body.get("previous_response_id")
    if previous is not None:
        return SessionHints(previous_response_id=_checked("previous_response_id", previous), origin=Origin.BODY)
    conversation = body.get("conversation")
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    if conversation is not None:
        return SessionHints(_checked("conversation", conversation), _parent(headers), origin=Origin.BODY)
    key = body.get("prompt_cache_key")
    if key is not None:
        return SessionHints(_checked("prompt_cache_key", key), _parent(headers), origin=Origin.BODY)
    return _NONE


def ends_session(headers: Mapping[bytes, bytes]) -> bool:
    """Whether this call is its session's last. A harness's header is advice: what it says otherwise counts as no.

    Raises:
        RequestError: our header says neither.
    """
    if _END_HEADER not in headers:
        return headers.get(_DYNAMO_END_HEADER, b"").lower() == b"true"
    said = headers[_END_HEADER].lower()
    if said not in (b"true", b"false"):
        raise RequestError(
            "X-Session-End cannot be understood",
            cause="it is neither `true` nor `false`",
            remedy="Send `X-Session-End: true` with the last call of a session, or leave it out",
            param="x-session-end",
        )
    return said == b"true"


def named_session(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The id of the session that the headers name; None where they name none, or none that can be one."""
    try:
        named = read_hints(headers, {}).client_id
    except RequestError:
        return None
    return None if named is None else named.encode("ascii")


def _of_header(name: bytes, headers: Mapping[bytes, bytes]) -> SessionHints:
    session = _header(name, headers)
    agent = _header(_CLAUDE_AGENT, headers) if name == _CLAUDE_SESSION and _CLAUDE_AGENT in headers else None
    if agent is None:
        return SessionHints(session, _parent(headers), origin=Origin.HEADER)
    parent = f"{session}/{_header(_CLAUDE_PARENT, headers)}" if _CLAUDE_PARENT in headers else session
    return SessionHints(f"{session}/{agent}", parent, origin=Origin.HEADER)


def _parent(headers: Mapping[bytes, bytes]) -> str | None:
    return next((_header(name, headers) for name in _PARENT_HEADERS if name in headers), None)


def _header(name: bytes, headers: Mapping[bytes, bytes]) -> str:
    return _checked(name.decode(), headers[name].decode("latin-1"))


def _checked(param: str, value: Any) -> str:
    if not isinstance(value, str) or _ID.fullmatch(value) is None:
        raise RequestError(
            f"{param} cannot be used",
            cause="an id has 1 to 256 printable ASCII characters and no spaces",
            remedy="Send an id of that form, or none",
            param=param,
        )
    return value
