"""The model under test, answering through a real vLLM: the committed one, or a rebuilt one.

HOLDFAST_DEMO_MODEL=DIR .venv-engine/bin/python -m pytest tests/engine/demo
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from appliance.engine.demo.tool_use import Message, Tool

REPOSITORY = Path(__file__).parents[3]
COMMITTED = REPOSITORY / "appliance/engine/demo/model"


@dataclass(frozen=True)
class Answer:
    """What the engine made of one request."""

    content: str | None
    tool_calls: list[dict[str, Any]]
    prompt_token_ids: list[int]
    token_ids: list[int]
    cached_tokens: int
    finish_reason: str

    @property
    def message(self) -> Message:
        """The assistant's message as an OpenAI client puts it into its next request."""
        message: Message = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


class ServedModel:
    """A model folder behind vLLM."""

    def __init__(self, model: Path, log: Path) -> None:
        environment = {**os.environ, "VLLM_PLUGINS": "", "OMP_NUM_THREADS": "2"}
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engine.demo.served_model", str(model)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=REPOSITORY,
                env=environment,
                text=True,
            )
        self._log = log

    def ask(self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, max_tokens: int = 512) -> Answer:
        """One answer."""
        return self.ask_all([(messages, tools)], max_tokens=max_tokens)[0]

    def ask_all(
        self, requests: Sequence[tuple[Sequence[Message], Sequence[Tool]]], *, max_tokens: int = 512
    ) -> list[Answer]:
        """Many answers; requests that offer the same tools run together."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        batch = [
            {"messages": list(messages), "tools": list(tools), "max_tokens": max_tokens} for messages, tools in requests
        ]
        self._process.stdin.write(json.dumps(batch) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            pytest.fail("the engine ended:\n" + self._log.read_text()[-4000:])
        return [Answer(**answer) for answer in json.loads(line)]

    def close(self) -> None:
        """End the process; its standard input ends, and it follows."""
        self._process.communicate(timeout=30)


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The folder under test."""
    return Path(os.environ.get("HOLDFAST_DEMO_MODEL", COMMITTED)).resolve()


@pytest.fixture(scope="session")
def served(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """The model under test behind vLLM."""
    model = ServedModel(model_folder, tmp_path_factory.mktemp("engine") / "engine.log")
    yield model
    model.close()
