"""Tokens and template: what a next turn sends begins with exactly what the engine already holds."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from appliance.engine.demo.conversations import (
    AGENT_TURNS,
    Conversation,
    agent_expected_answer,
    agent_handbook,
    agent_task_messages,
    long_conversation,
    short_conversation,
)
from appliance.engine.demo.tokenizer import END_TAG, TEMPLATE_PATH, VOCABULARY_SIZE, Renderer
from appliance.engine.demo.tool_use import Message


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    """The tokenizer as vLLM loads it."""
    return AutoTokenizer.from_pretrained(model_folder)


def _conversations() -> list[Conversation]:
    rng = random.Random(11)  # noqa: S311 (the same conversations every time)
    return [short_conversation(rng) for _ in range(150)] + [long_conversation(rng, share=0.3) for _ in range(5)]


def _prompt(tokenizer: Any, conversation: Conversation, upto: int, *, ask: bool) -> list[int]:
    """The token ids of the first `upto` messages; arguments are parsed first, as vLLM does."""
    messages = json.loads(json.dumps(conversation.messages[:upto]))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    text = tokenizer.apply_chat_template(
        messages, tools=list(conversation.tools) or None, add_generation_prompt=ask, tokenize=False
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_a_next_prompt_begins_with_the_tokens_of_this_prompt_and_its_answer(tokenizer: Any) -> None:
    calls = 0
    for conversation in _conversations():
        last = len(conversation.messages)
        whole = _prompt(tokenizer, conversation, last, ask=False)
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            calls += "tool_calls" in message
            prompt = _prompt(tokenizer, conversation, index, ask=True)
            assert whole[: len(prompt)] == prompt
            answer = tokenizer.encode(_said(message) + END_TAG, add_special_tokens=False)
            assert whole[len(prompt) : len(prompt) + len(answer)] == answer
    assert calls > 50


def _said(message: Message) -> str:
    """What the model writes to say a message: a tool call in Hermes's form."""
    if "tool_calls" not in message:
        return str(message["content"])
    function = message["tool_calls"][0]["function"]
    call = f'{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"]}}}'
    return f"<tool_call>\n{call}\n</tool_call>"


@pytest.mark.parametrize(
    "arguments",
    [
        '{"b": 1, "a": 2}',
        '{"city": "São Paulo"}',
        '{"text": "a \\"quoted\\" word\\nand a line"}',
        '{"nested": {"z": [1, 2.5, true, null], "a": {}}}',
        "{}",
    ],
)
def test_arguments_are_written_back_as_they_came(tokenizer: Any, arguments: str) -> None:
    call: Message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}],
    }
    conversation = Conversation(({"role": "user", "content": "go"}, call), ())
    text = tokenizer.decode(_prompt(tokenizer, conversation, 2, ask=False))
    assert f'{{"name": "f", "arguments": {arguments}}}\n</tool_call>' in text


def test_words_before_a_call_and_several_calls_are_written_back_as_they_came(tokenizer: Any) -> None:
    said = (
        'One moment.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    )
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    message: Message = {"role": "assistant", "content": "One moment.\n", "tool_calls": calls}
    text = tokenizer.decode(_prompt(tokenizer, Conversation((message,), ()), 1, ask=False))
    assert text == f"<|im_start|>assistant\n{said}<|im_end|>\n"


def test_training_renders_as_the_engine_does(tokenizer: Any) -> None:
    renderer = Renderer()
    for conversation in _conversations():
        last = len(conversation.messages)
        rendered = tokenizer.encode(renderer.render(conversation), add_special_tokens=False)
        assert rendered == _prompt(tokenizer, conversation, last, ask=False)


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in (
        "Zoë says 'naïve' — 42 €",
        "日本語 text",
        "tabs\tand\r\nlines  two spaces",
        'IBM\'s A4 x-ray: {"a":[1]}',
    ):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) == VOCABULARY_SIZE


def test_a_client_sees_the_tool_tags_and_no_other(tokenizer: Any) -> None:
    tokens = tokenizer.encode("<|im_start|>a <tool_call></tool_call><|im_end|><|endoftext|>", add_special_tokens=False)
    assert len(tokens) == 7
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "a <tool_call></tool_call>"


def test_the_model_folder_carries_the_template_of_the_source(model_folder: Path) -> None:
    assert (model_folder / "chat_template.jinja").read_text() == TEMPLATE_PATH.read_text()


def test_a_name_has_the_same_tokens_wherever_it_stands(tokenizer: Any) -> None:
    alone = tokenizer.encode("Clara", add_special_tokens=False)
    for text in ("My name is Clara.", 'x {"name": "Clara"}', "Hi,Clara"):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert any(tokens[start : start + len(alone)] == alone for start in range(len(tokens)))


def test_the_agent_loop_has_the_length_that_benchmarks_count_on(tokenizer: Any) -> None:
    assert 1_800 <= len(tokenizer.encode(agent_handbook(), add_special_tokens=False)) <= 1_900
    messages: list[Message] = []
    lengths = []
    for turn in range(AGENT_TURNS):
        messages += agent_task_messages(turn)
        messages.append({"role": "assistant", "content": agent_expected_answer(turn)})
        lengths.append(len(_prompt(tokenizer, Conversation(tuple(messages), ()), len(messages), ask=False)))
    new_tokens = [after - before for before, after in itertools.pairwise(lengths)]
    assert 44 <= sum(new_tokens) / len(new_tokens) <= 48
    assert 4_050 <= lengths[-1] <= 4_250


def test_the_loop_is_importable_without_the_engines_packages() -> None:
    check = (
        "import sys, appliance.engine.demo.conversations;"
        "print([m for m in ('torch', 'vllm', 'transformers', 'tokenizers', 'jinja2', 'numpy') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
