"""`DELETE /v1/sessions/{id}`: a client says that a session is over.

Rules:

- What the engine holds of it is let go at once, and of every session of its tree where it is the tree's first. What was
  said stays in the transcript: forgetting is an administrator's, or `holdfast session forget`.
- That it was said is recorded before anything is let go. A session that is over already is recorded no second time.
- A session of somebody else is as unknown as one that never was.
- A session that is over can go on: its next turn is computed anew.
"""

from typing import Final
from urllib.parse import unquote

from api import trail
from api.answers import REQUEST, Receive, Request, Scope, Send, answer_json
from api.engine_leases import release
from api.services import Services

ITEM_PREFIX: Final = b"/v1/sessions/"


class EndOfSession:
    """The route, as an ASGI application."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  (ASGI's signature)
        """Answer one request.

        Raises:
            HoldfastError: it is refused.
        """
        request: Request = scope[REQUEST]
        services = self._services
        admission = services.quotas.enter(request.known_caller())
        try:
            asked = unquote(scope["raw_path"].removeprefix(ITEM_PREFIX).decode("ascii"))
            ended = await services.sessions.ending(request.known_caller(), asked)
            said = [trail.session_ended(request, session_id=session_id) for session_id in ended.session_ids]
            await services.audit.record(trail.authenticated(request), *said)
            await services.sessions.end(ended)
            released = await release(services, ended.lease_labels)
        finally:
            admission.release()
        answer = {"id": asked, "object": "session", "ended": len(ended.session_ids), "released": released}
        await answer_json(send, 200, answer)
