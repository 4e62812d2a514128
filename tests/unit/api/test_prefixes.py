"""What a chat's tools and system messages are in tokens: never more than is certain, and never told across tenants."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from api.openai import prefixes
from api.openai.prefixes import Prefix, Prefixes
from appliance.engine.client import EngineClient
from appliance.engine.protocol import token_digest
from appliance.sessions import SessionHints, Turn, TurnKind

pytestmark = pytest.mark.anyio

SYSTEM = {"role": "system", "content": "terse"}
HELLO = {"role": "user", "content": "hello"}


class Renderer:
    """An engine that renders a letter as a token, and the tools before everything; or answers what a test says."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answer: bytes | None = None
        self.was_asked = asyncio.Event()
        self.holds = asyncio.Event()
        self.holds.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.asked.append(body)
                self.was_asked.set()
                await self.holds.wait()
                said = self.answer or json.dumps({"token_ids": rendered(body)}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))


def rendered(body: dict[str, Any]) -> list[int]:
    tools = json.dumps(body["tools"]) if "tools" in body else ""
    return list((tools + "".join(f"<{each['role']}>{each['content']}" for each in body["messages"])).encode())


@pytest.fixture
async def renderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Renderer]:
    monkeypatch.chdir(tmp_path)
    made = Renderer()
    async with await asyncio.start_unix_server(made.serve, "engine.sock"):
        yield made


@pytest.fixture
async def of_an_engine(renderer: Renderer, tmp_path: Path) -> AsyncIterator[Prefixes]:
    async with EngineClient(tmp_path / "engine.sock") as engine:
        yield Prefixes(engine)


def chat(*messages: dict[str, str], **parameters: Any) -> Turn:
    return Turn(TurnKind.CHAT, "demo", messages, parameters, SessionHints())


def _prefix(text: str) -> Prefix:
    return Prefix(len(text), token_digest(list(text.encode())))


async def test_the_prefix_ends_where_the_users_message_begins_to_differ(of_an_engine: Prefixes) -> None:
    assert await of_an_engine.of("ten_1", chat(SYSTEM, HELLO)) == _prefix("<system>terse<user>")


async def test_tools_are_of_the_prefix_and_what_follows_the_system_messages_is_not(of_an_engine: Prefixes) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert await of_an_engine.of("ten_1", chat(HELLO, tools=tools)) == _prefix(json.dumps(tools) + "<user>")
    again = {"role": "system", "content": "said later"}
    assert await of_an_engine.of("ten_1", chat(SYSTEM, HELLO, again)) == _prefix("<system>terse<user>")


async def test_a_users_words_are_never_rendered_for_it(of_an_engine: Prefixes, renderer: Renderer) -> None:
    await of_an_engine.of("ten_1", chat(SYSTEM, {"role": "user", "content": "xylophone"}))
    assert renderer.asked
    assert "xylophone" not in json.dumps(renderer.asked)


async def test_a_chat_without_tools_and_system_messages_has_none(of_an_engine: Prefixes, renderer: Renderer) -> None:
    assert await of_an_engine.of("ten_1", chat(HELLO, SYSTEM)) is None
    plain = Turn(TurnKind.COMPLETION, "demo", (SYSTEM,), {}, SessionHints())
    assert await of_an_engine.of("ten_1", plain) is None
    assert renderer.asked == []


async def test_it_is_asked_for_once_by_a_tenant_and_again_by_another(
    of_an_engine: Prefixes, renderer: Renderer
) -> None:
    for said in ("one", "two"):
        await of_an_engine.of("ten_1", chat(SYSTEM, {"role": "user", "content": said}))
    assert len(renderer.asked) == 2, "two stand-ins, once"
    await of_an_engine.of("ten_2", chat(SYSTEM, HELLO))
    assert len(renderer.asked) == 4, "whether another tenant asked before is not to be told by the time it takes"


async def test_turns_at_the_same_time_wait_for_one_question(of_an_engine: Prefixes, renderer: Renderer) -> None:
    found = await asyncio.gather(*(of_an_engine.of("ten_1", chat(SYSTEM, HELLO)) for _ in range(5)))
    assert len(set(found)) == 1
    assert len(renderer.asked) == 2


async def test_whoever_leaves_while_it_is_asked_for_spoils_it_for_nobody(
    of_an_engine: Prefixes, renderer: Renderer
) -> None:
    renderer.holds.clear()
    first = asyncio.create_task(of_an_engine.of("ten_1", chat(SYSTEM, HELLO)))
    second = asyncio.create_task(of_an_engine.of("ten_1", chat(SYSTEM, HELLO)))
    await renderer.was_asked.wait()
    first.cancel()
    renderer.holds.set()
    assert await second == _prefix("<system>terse<user>")


@pytest.mark.parametrize(
    "answer",
    [b"no json", b"{}", b"[]", b'{"token_ids": null}', b'{"token_ids": [1, "2"]}', b'{"token_ids": [true]}'],
)
async def test_what_cannot_be_understood_shares_nothing_and_is_asked_again(
    of_an_engine: Prefixes, renderer: Renderer, answer: bytes
) -> None:
    renderer.answer = answer
    assert await of_an_engine.of("ten_1", chat(SYSTEM, HELLO)) is None
    renderer.answer = None
    assert await of_an_engine.of("ten_1", chat(SYSTEM, HELLO)) == _prefix("<system>terse<user>")


async def test_a_template_that_begins_with_the_users_message_shares_nothing(
    of_an_engine: Prefixes, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "rendered", lambda body: list(body["messages"][-1]["content"].encode()))
    assert await of_an_engine.of("ten_1", chat(SYSTEM, HELLO)) is None


async def test_an_engine_that_is_not_there_shares_nothing(tmp_path: Path) -> None:
    async with EngineClient(tmp_path / "nobody.sock") as engine:
        assert await Prefixes(engine).of("ten_1", chat(SYSTEM, HELLO)) is None


async def test_what_is_remembered_is_bounded_and_the_oldest_goes_first(
    of_an_engine: Prefixes, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "_KNOWN", 2)
    one, two, three = (chat({"role": "system", "content": name}, HELLO) for name in ("one", "two", "three"))
    for turn in (one, two, one, three):
        await of_an_engine.of("ten_1", turn)
    asked = len(renderer.asked)
    await of_an_engine.of("ten_1", one)
    assert len(renderer.asked) == asked, "used again since"
    await of_an_engine.of("ten_1", two)
    assert len(renderer.asked) == asked + 2
