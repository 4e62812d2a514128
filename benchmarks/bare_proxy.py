"""The least that a FastAPI gateway can be, to compare with. `python -m benchmarks.bare_proxy ENGINE_SOCKET PORT`.

It reads the body as JSON, passes it on with aiohttp and streams the answer back: no key, no session, no store.
"""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse


def make_app(engine: str) -> FastAPI:
    """The proxy to the engine on the Unix socket `engine`."""
    sessions: dict[str, aiohttp.ClientSession] = {}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(engine, limit=0)) as session:
            sessions["engine"] = session
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body: Any = await request.json()
        response = await sessions["engine"].post("http://engine/v1/chat/completions", data=json.dumps(body))

        async def events() -> AsyncIterator[bytes]:
            async with response:
                async for part in response.content.iter_any():
                    yield part

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1]), port=int(sys.argv[2]), loop="uvloop", http="httptools", log_level="warning")
