"""How much of a chat's prompt is its tools and system messages, in tokens: what a tenant may choose to share.

The engine renders them twice, each time before another user's message, and what both begin with is theirs.

Rules:

- No more than is certain: on any failure nothing is shared, and the next request asks again. The engine compares the
  tokens with those of the prompt that it is really given (`SharedPrefix.digest`), and shares nothing where they differ.
- What one tenant asked for before says nothing to another: the memory is kept apart by tenant, so that its time is too.
- What is remembered is bounded, and holds no text: a keyed hash of what was rendered, a count and a digest.
"""

import asyncio
import hashlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from pydantic_core import from_json, to_json

from appliance.engine.client import EngineClient
from appliance.engine.protocol import token_digest
from appliance.errors import HoldfastError
from appliance.sessions import Message, Turn, TurnKind

RENDER_PATH: Final = "/v1/chat/completions/render"
_SYSTEM_ROLES: Final = frozenset({"system", "developer"})
# What a chat template is given besides the messages.
_TEMPLATE_PARAMETERS: Final = ("parallel_tool_calls", "reasoning_effort", "response_format", "tool_choice", "tools")
_STAND_INS: Final = ("A", "7 b")  # users' messages that begin with different tokens
_KNOWN: Final = 4096
_DEADLINE_S: Final = 5.0


class Prefix(NamedTuple):
    """The first `tokens` tokens of a prompt, and the digest of them that the engine compares."""

    tokens: int
    digest: str


class Prefixes:
    """The prefixes of the chats that an engine is asked for."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._key = os.urandom(32)
        self._numbers = itertools.count()
        self._known: OrderedDict[bytes, asyncio.Task[Prefix | None]] = OrderedDict()

    async def of(self, tenant_id: str, turn: Turn) -> Prefix | None:
        """The prefix of a turn; None: it has none, or it could not be found out in time."""
        if turn.kind is not TurnKind.CHAT:
            return None
        system = list(itertools.takewhile(lambda message: message["role"] in _SYSTEM_ROLES, turn.messages))
        if not system and "tools" not in turn.parameters:
            return None
        said = {name: turn.parameters[name] for name in _TEMPLATE_PARAMETERS if name in turn.parameters}
        key = hashlib.blake2b(to_json([tenant_id, turn.model, system, said]), key=self._key, digest_size=32).digest()
        finding = self._known.get(key)
        if finding is None:
            finding = asyncio.get_running_loop().create_task(self._find(turn.model, system, said))
            self._known[key] = finding
            if len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        found = await asyncio.shield(finding)
        if found is None and self._known.get(key) is finding:
            del self._known[key]
        return found

    async def _find(self, model: str, system: Sequence[Message], said: Mapping[str, Any]) -> Prefix | None:
        try:
            first, second = await asyncio.gather(
                *(self._rendered({**said, "model": model, "messages": [*system, _user(text)]}) for text in _STAND_INS)
            )
        except (HoldfastError, ValueError, TypeError, KeyError):
            return None
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
        return Prefix(same, token_digest(first[:same])) if same else None

    async def _rendered(self, body: Mapping[str, Any]) -> list[int]:
        request_id = f"render-{next(self._numbers)}"
        _, answer = await self._engine.call(RENDER_PATH, to_json(body), request_id=request_id, deadline_s=_DEADLINE_S)
        token_ids = from_json(answer)["token_ids"]
        if not isinstance(token_ids, list) or not all(type(each) is int for each in token_ids):
            raise TypeError("token ids are whole numbers")
        return token_ids


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
