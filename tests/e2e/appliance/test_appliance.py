"""The product as its users meet it: the openai SDK on a real appliance with real vLLM."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any, cast

import openai
import pytest
from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageParam, ChatCompletionToolUnionParam

from api.demonstration import pastes
from tests.e2e.appliance.conftest import IDLE_TIMEOUT_S, Appliance

BLOCK = 32
pytestmark = pytest.mark.timeout(300)


def _model(appliance: Appliance) -> str:
    (model,) = appliance.client().models.list().data
    return model.id


def test_what_make_run_ends_with_is_all_that_one_needs_and_shows_that_state_is_kept(appliance: Appliance) -> None:
    status = appliance.run("status")
    head, _, rest = appliance.shown.partition("\n\n")
    assert head.startswith("Holdfast serves.\n")
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in head.splitlines()[1:])
    assert rows["endpoint"] == status["endpoint"]
    assert rows["model"] == status["model"] == _model(appliance)
    assert rows["API key"].endswith("(of this demonstration; the same every time)")
    assert (rows["state"], rows["process"]) == (str(appliance.state_dir), str(status["pid"]))
    what_to_paste = pastes(appliance.endpoint, appliance.api_key, status["model"])
    assert rest.startswith(f"{what_to_paste}\n\n")
    heading, *turns = rest.removeprefix(what_to_paste).strip().splitlines()
    assert heading.split("  ")[0] == "TURN"
    prompts, stateless, stateful = zip(*(map(int, line.split()[1:4]) for line in turns), strict=True)
    assert stateless == prompts, "without state all of it is computed, every time"
    assert stateful[0] == prompts[0]
    for turn in range(1, len(turns)):
        assert stateful[turn] <= prompts[turn] - (prompts[turn - 1] // BLOCK - 1) * BLOCK, f"turn {turn + 1}"
    for said in (
        f"whoever can read {appliance.state_dir / 'root.key'} can read everything",
        "Running one agent conversation twice on the same engine",
        "How it is: ",
        "Stop it with ",
    ):
        assert said in appliance.said


def test_an_unmodified_client_is_stateful_and_only_new_tokens_are_prefilled(appliance: Appliance) -> None:
    client, model = appliance.client(), _model(appliance)
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "You are a helpful assistant. " * 12},
        {"role": "user", "content": "Hello! My name is Anna."},
    ]
    known = 0
    for turn in range(4):
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)
        usage = answer.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens
        assert cached is not None
        if turn:
            # All that was computed before is there, but for the block that was not full.
            assert cached >= (known // BLOCK) * BLOCK - BLOCK
        known = usage.prompt_tokens
        text = answer.choices[0].message.content
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Thank you. What is my name?"}]


def test_the_agent_loop_that_the_demonstration_gives_to_paste_is_answered_rightly(appliance: Appliance) -> None:
    loop = pastes(appliance.endpoint, appliance.api_key, _model(appliance)).partition("An agent loop:\n\n")[2]
    done = subprocess.run([sys.executable, "-c", loop], capture_output=True, text=True, timeout=120, check=True)
    said, found = zip(*(line.split(" | found again: ") for line in done.stdout.splitlines()), strict=True)
    assert "Anna" in said[0]
    assert said[1:] == ("2 plus 3 is 5.", "The capital of France is Paris.", "Your name is Anna.")
    assert int(found[-1].split()[0]) >= 2 * BLOCK, "it shows that state is kept"


def test_an_agent_keeps_a_name_calls_a_tool_and_uses_its_result(appliance: Appliance) -> None:
    client, model = appliance.client(), _model(appliance)
    tools: list[ChatCompletionToolUnionParam] = [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Get the current weather for a city",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
    ]
    messages: list[ChatCompletionMessageParam] = []
    cached: list[int] = []

    def ask(message: ChatCompletionMessageParam) -> ChatCompletionMessage:
        messages.append(message)
        answer = client.chat.completions.create(model=model, messages=messages, tools=tools, temperature=0)
        said = answer.choices[0].message
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        messages.append(cast("ChatCompletionMessageParam", said.model_dump(exclude_none=True)))
        return said

    assert ask({"role": "user", "content": "My name is Clara."}).content == "Nice to meet you, Clara!"
    called = ask({"role": "user", "content": "What is the weather in Oslo?"})
    assert called.tool_calls is not None
    (call,) = called.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    result = json.dumps({"temperature": 12, "sky": "cloudy"})
    said = ask({"role": "tool", "tool_call_id": call.id, "content": result})
    assert said.content == "For Oslo I found: temperature 12, sky cloudy."
    assert ask({"role": "user", "content": "What is my name?"}).content == "Your name is Clara."
    assert cached == sorted(cached), "a longer conversation finds more of itself"
    assert cached[-1] >= 2 * BLOCK


def test_a_stream_says_the_same_as_an_answer_in_one_piece(appliance: Appliance) -> None:
    client, model = appliance.client(), _model(appliance)
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello!"}]
    whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)
    chunks = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in chunks:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens if whole.usage else 0


def test_a_transcript_is_decrypted_for_who_may_and_no_word_of_it_is_in_the_database_files(appliance: Appliance) -> None:
    client, model = appliance.client(), _model(appliance)
    response = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": "Remember the word Quetzalcoatlus, please."}],
        max_tokens=8,
        extra_headers={"X-Session-ID": "a-very-private-name"},
    )
    assert response.headers["x-session-id"] == "a-very-private-name"
    assert response.headers["x-request-id"]
    session_id = appliance.run("session", "list")["sessions"][0]["session_id"]
    shown = appliance.run("session", "show", session_id)
    assert shown["client_id"] == "a-very-private-name"
    assert "Quetzalcoatlus" in shown["turns"][0]["new_messages"][0]["content"]
    files = appliance.files()
    for word in (b"Quetzalcoatlus", b"a-very-private-name", appliance.api_key.encode()):
        assert word not in files


def test_another_principal_with_the_same_prompt_hits_nothing(appliance: Appliance) -> None:
    model = _model(appliance)
    created = appliance.run("key", "create", "--tenant", "demo", "--principal", "stranger")
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "These are the words that nobody else may profit from. " * 10},
        {"role": "user", "content": "Hello!"},
    ]

    def cached(client: openai.OpenAI) -> int:
        usage = client.chat.completions.create(model=model, messages=messages, max_tokens=4).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens > 3 * BLOCK
        return usage.prompt_tokens_details.cached_tokens or 0

    session = {"X-Session-ID": "shared-name"}
    mine = appliance.client().with_options(default_headers=session)
    theirs = appliance.client(created["secret"]).with_options(default_headers=session)
    assert cached(mine) == 0
    assert cached(mine) > 0
    assert cached(theirs) == 0


def test_why_a_prompt_was_computed_is_told_to_the_token_and_with_a_remedy(appliance: Appliance) -> None:
    model = _model(appliance)
    session = {"X-Session-ID": "dated"}
    ask = appliance.client().with_options(default_headers=session).chat.completions.create
    history: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello! " * 40}]
    told: list[dict[str, int]] = []
    for minute in (31, 31, 32, 33):
        system: ChatCompletionMessageParam = {"role": "system", "content": f"It is 10:{minute}. You are helpful. " * 4}
        answer = ask(model=model, messages=[system, *history], temperature=0, max_tokens=16)
        assert answer.usage is not None
        details = answer.usage.model_dump()["prompt_tokens_details"]
        told.append(details["computed_tokens"])
        assert details["cached_tokens"] + sum(told[-1].values()) == answer.usage.prompt_tokens
        said = answer.choices[0].message.content
        history += [{"role": "assistant", "content": said}, {"role": "user", "content": "Thank you."}]
    (newest, *_) = appliance.run("session", "list")["sessions"]
    why = appliance.run("session", "why", newest["session_id"])
    (kept,) = why["kept"]
    assert (kept["tier"], kept["kept_for"] in ("lease", "worth")) == ("device", True)
    assert kept["tokens"] == kept["blocks"] * BLOCK > 3 * BLOCK
    assert [turn["computed_tokens"] for turn in why["turns"]] == told
    assert list(told[0]) == ["first_turn"]
    assert set(told[1]) <= {"new", "block_tail", "diverged"}
    assert told[2]["diverged"] > 3 * BLOCK
    assert [turn["divergence"] and turn["divergence"]["change"] for turn in why["turns"][2:]] == ["numbers", "numbers"]
    (finding,) = [each for each in why["findings"] if each["what"] == "numbers"]
    assert (finding["message"], finding["role"], finding["turns"]) == (1, "system", [3, 4])
    assert "date" in finding["remedy"]


def test_a_session_that_its_client_ended_gives_its_room_at_once(appliance: Appliance) -> None:
    model = _model(appliance)
    client = appliance.client().with_options(default_headers={"X-Session-ID": "ended"})
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Goodbye! " * 80}]

    def details(**headers: str) -> dict[str, object]:
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=4, extra_headers=headers)
        assert answer.usage is not None
        found: dict[str, object] = answer.usage.model_dump()["prompt_tokens_details"]
        return found

    details()
    assert details()["cached_tokens"]
    details(**{"X-Session-End": "true"})
    after = details()
    assert not after["cached_tokens"]
    assert "ended" in cast("dict[str, int]", after["computed_tokens"])


def test_a_session_is_leased_after_its_turn_and_loses_its_rank_at_the_timeout(appliance: Appliance) -> None:
    client, model = appliance.client(), _model(appliance)
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello! " * 60}], max_tokens=4)
    leases = appliance.run("status")["leases"]
    assert leases["sessions"] >= 1
    assert leases["leased_blocks"] >= 1
    assert leases["next_expiry_in_s"] <= IDLE_TIMEOUT_S
    appliance.wait_until(lambda status: status["leases"] and status["leases"]["leased_blocks"] == 0, 30)


def test_a_forgotten_session_cannot_be_read_and_its_cache_not_be_reached(appliance: Appliance) -> None:
    client, model = appliance.client(), _model(appliance)
    ask = client.with_options(default_headers={"X-Session-ID": "to-forget"}).chat.completions.create
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello! " * 80}]
    ask(model=model, messages=messages, max_tokens=4)
    session_id = appliance.run("session", "list")["sessions"][0]["session_id"]
    assert appliance.run("session", "forget", session_id, "--yes", session_id)["session_id"] == session_id
    assert appliance.run("session", "show", session_id, check=False)["code"] == "session_not_found"
    usage = ask(model=model, messages=messages, max_tokens=4).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert not usage.prompt_tokens_details.cached_tokens


def test_the_sdk_raises_what_its_users_expect(appliance: Appliance) -> None:
    client, model = appliance.client(), _model(appliance)
    hello: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello!"}]
    with pytest.raises(openai.AuthenticationError):
        appliance.client("hf_wrong").chat.completions.create(model=model, messages=hello)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=hello)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "word " * 40_000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=hello, temperature=99)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "a\\"},
        {"type": "string", "pattern": "\\p{L}+"},
        {"type": "string", "pattern": "(?<=a)b"},
        {"type": "strange"},
        {"type": "integer", "multipleOf": 5},
        {"type": "integer", "maximum": 1 << 63},
        {"type": "array", "items": [{"type": "string"}]},
        {"type": "object", "patternProperties": []},
        {"$ref": "#/$defs/missing", "$defs": {}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    ],
    ids=json.dumps,
)
def test_a_schema_that_nothing_can_be_held_to_is_the_client_s_error(appliance: Appliance, schema: Any) -> None:
    client, model = appliance.client(), _model(appliance)
    hello: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello!"}]

    def ask(schema: Any) -> str:
        described = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        asked: Any = {"messages": hello, "response_format": described, "max_tokens": 64}
        answer = client.chat.completions.create(model=model, **asked)
        return answer.choices[0].message.content or ""

    with pytest.raises(openai.BadRequestError) as refused:
        ask(schema)
    assert refused.value.code in ("invalid_request", "engine_refused")
    assert json.loads(ask({"enum": ["yes", "no"]})) in ("yes", "no")


def test_the_engine_is_reached_by_its_socket_only(appliance: Appliance) -> None:
    socket = next((appliance.state_dir / "run").rglob("engine.sock"))
    assert socket.parent.stat().st_mode & 0o077 == 0
    status = appliance.run("status")
    assert status["engine_isolated"] is True
    # Its metrics and its tokenizer are nowhere on the data listener.
    for path in ("/metrics", "/tokenize", "/version", "/holdfast/leases", "/health"):
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(appliance.endpoint).netloc, timeout=10)
        connection.request("GET", path, headers={"Authorization": f"Bearer {appliance.api_key}"})
        assert connection.getresponse().status == 404, path
        connection.close()


def test_the_engine_sees_neither_keys_nor_the_admin_socket_and_is_refused_there(
    appliance: Appliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = _engine_processes(appliance)
    assert processes
    for pid in processes:
        seen = Path(f"/proc/{pid}/root", appliance.state_dir.relative_to("/"))
        assert [path.name for path in seen.iterdir()] == ["run"]
        assert [path.name for path in (seen / "run").iterdir()] == ["engine"]
        assert os.listdir(f"/proc/{pid}/cwd/..") == ["engine"]  # noqa: PTH208 (a Path would drop the dots)
    monkeypatch.setenv("HOLDFAST_ENGINE_DIR", str((appliance.state_dir / "run" / "engine").resolve()))
    assert appliance.run("session", "list", check=False)["code"] == "admin_peer_unknown"


def test_an_engine_that_is_killed_ends_the_stream_well_and_the_session_survives(appliance: Appliance) -> None:
    client, model = appliance.client(), _model(appliance)
    headers = {"X-Session-ID": "survivor"}
    hello: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello! My name is Otto."}]
    ask = client.with_options(default_headers=headers).chat.completions.create
    ask(model=model, messages=hello, max_tokens=8)
    stream = ask(model=model, messages=hello, max_tokens=2000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    for pid in _engine_processes(appliance):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine"):
        for _ in stream:
            pass
    appliance.wait_until(lambda status: status.get("ready") and (status["engine_restarts"] or 0) >= 1, 100)
    assert ask(model=model, messages=hello, max_tokens=8).choices[0].message.content
    session_id = appliance.run("session", "list")["sessions"][0]["session_id"]
    states = [turn["state"] for turn in appliance.run("session", "show", session_id)["turns"]]
    assert states == ["complete", "interrupted", "complete"]


def _engine_processes(appliance: Appliance) -> list[int]:
    """The processes of vLLM under this appliance's gateway."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            command = process.joinpath("cmdline").read_bytes()
            engine = process.joinpath("cwd").readlink() == appliance.state_dir / "run" / "engine"
        except OSError:
            continue
        if engine and b"vllm" in command and b"cage" not in command:
            found.append(int(process.name))
    assert found, "no engine process"
    return found
