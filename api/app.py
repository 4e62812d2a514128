"""The data listener's application: the routes, behind the guard.

Rules:

- The two completion routes and the end of a session are called by the guard, which has matched their paths already: a
  turn pays for no second routing, no dependency injection and no response model. The other routes are FastAPI's.
- FastAPI's own pages (schema, documentation) do not exist: nothing answers that is not listed here.
"""

from fastapi import FastAPI
from starlette.routing import Route

from api.answers import App
from api.guard import Guard
from api.health import Health
from api.openai.models import LIST_PATH, Models
from api.openai.sessions import EndOfSession
from api.openai.turns import Endpoint, Turns
from api.openai.wire import read_chat, read_completion
from api.services import Services
from appliance.sessions import TurnKind

CHAT = Endpoint(
    TurnKind.CHAT,
    "/v1/chat/completions",
    "chatcmpl-",
    lambda body, hints, settings: read_chat(body, hints, max_messages=settings.max_messages),
)
COMPLETION = Endpoint(
    TurnKind.COMPLETION, "/v1/completions", "cmpl-", lambda body, hints, _: read_completion(body, hints)
)


def create_app(services: Services) -> App:
    """The application that the data listener serves."""
    models = Models(services)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.router.routes.extend(
        [
            Route(LIST_PATH.decode(), models, methods=["GET"]),
            Route(f"{LIST_PATH.decode()}/{{model:path}}", models, methods=["GET"]),
        ]
    )
    turns: dict[bytes, App] = {endpoint.path.encode(): Turns(services, endpoint) for endpoint in (CHAT, COMPLETION)}
    return Guard(
        app,
        Health(services, in_full=False),
        services,
        turns=turns,
        end_of_session=EndOfSession(services),
        routes={LIST_PATH: ("GET",)},
    )
