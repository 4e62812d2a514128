"""How a witness is asked over TLS: as whom, whom it believes, and what a witness cannot do to who asks."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
from aiohttp import web

from appliance.audit.asking import Answer, WitnessAt, WitnessUnreachable, poster
from appliance.audit.notes import Algorithm, SigningKey
from appliance.audit.witness import MAX_REPLY_BYTES
from tests.rsyslog import Pki

pytestmark = pytest.mark.anyio

VKEY = str(SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE).verifier())
REQUEST = b"old 0\n\nnote\n"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@contextlib.asynccontextmanager
async def serving(pki: Pki, handler: Handler, *, server: str = "server") -> AsyncIterator[WitnessAt]:
    """A witness that asks for our certificate and answers `/w1/add-checkpoint` with `handler`; where it is."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(pki.folder / "ca.pem"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(pki.folder / f"{server}.pem", pki.folder / f"{server}.key")
    application = web.Application()
    application.router.add_post("/w1/add-checkpoint", handler)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        yield at(pki, port)
    finally:
        await runner.cleanup()


def at(pki: Pki, port: int) -> WitnessAt:
    file = pki.folder.joinpath
    url = f"https://127.0.0.1:{port}/w1/"
    return WitnessAt("w", url, VKEY, str(file("ca.pem")), str(file("client.pem")), str(file("client.key")))


async def honest(request: web.Request) -> web.StreamResponse:
    assert await request.read() == REQUEST
    return web.Response(status=409, body=b"7\n", content_type="text/x.tlog.size")


async def test_a_witness_is_asked_at_its_prefix_and_sees_our_certificate(pki: Pki) -> None:
    async with serving(pki, honest) as there:
        assert await poster(there)(REQUEST) == Answer(409, b"7\n")


@pytest.mark.parametrize(
    ("different", "told"),
    [
        ({"ca": "other-ca.pem"}, "certificate does not hold"),
        ({"server_name": "other.example"}, "certificate does not hold"),
        ({"certificate": "stranger.pem", "private_key": "stranger.key"}, ""),
        ({"certificate": None, "private_key": None}, ""),
        ({"ca": "nothing.pem"}, "No such file"),
        ({"private_key": "server.key"}, "key values mismatch"),
    ],
)
async def test_who_is_not_known_to_both_is_not_spoken_with(
    pki: Pki, different: dict[str, str | None], told: str
) -> None:
    files = {
        name: value if value is None or name == "server_name" else str(pki.folder / value)
        for name, value in different.items()
    }
    async with serving(pki, honest) as there:
        with pytest.raises(WitnessUnreachable) as caught:
            await poster(replace(there, **files))(REQUEST)  # type: ignore[arg-type]
    assert told.lower() in caught.value.cause.lower().replace("_", " ")


@pytest.mark.parametrize("length", [MAX_REPLY_BYTES + 1, 64 << 20])
async def test_an_answer_that_is_too_long_is_not_read_to_its_end(pki: Pki, length: int) -> None:
    async def floods(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(0, length, 1 << 14):
                await answer.write(b"x" * (1 << 14))
            await answer.write(b"x")
        return answer

    async with serving(pki, floods) as there:
        with pytest.raises(WitnessUnreachable, match="more than"):
            await poster(there)(REQUEST)


async def test_a_redirect_is_not_followed(pki: Pki) -> None:
    async def elsewhere(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect("https://127.0.0.1:1/add-checkpoint")

    async with serving(pki, elsewhere) as there:
        with pytest.raises(WitnessUnreachable, match="redirect"):
            await poster(there)(REQUEST)


async def test_a_witness_that_never_comes_to_an_end_is_given_up(pki: Pki) -> None:
    async def begins(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b"x")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return answer

    async with serving(pki, begins) as there:
        with pytest.raises(WitnessUnreachable, match="did not answer within"):
            await poster(there, deadline_s=0.5)(REQUEST)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,  # the kernel accepts, and nobody speaks TLS
        pytest.raises(WitnessUnreachable, match="did not answer within"),
    ):
        await poster(at(pki, silent.getsockname()[1]), deadline_s=0.5)(REQUEST)


async def test_nobody_there_is_told(pki: Pki) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(WitnessUnreachable, match="refused"):
        await poster(at(pki, port))(REQUEST)
