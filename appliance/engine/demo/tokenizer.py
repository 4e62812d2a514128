"""The demonstration model's tokenizer and chat template.

Rules:

- Byte-level BPE: any text round-trips, and 512 tokens suffice for a model whose embedding has to stay small.
- Digits and capitalised words are cut off before merging: a name has the same tokens wherever it stands, so that the
  model can copy it.
- The template only appends: the prompt of the next turn begins with exactly the tokens of this prompt and of the answer
  to it, so that the engine's prefix cache serves all of them. Nothing is trimmed, reordered or dropped; a tool call is
  written as the model writes it, key order included.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from appliance.engine.demo.conversations import Conversation
from appliance.engine.demo.tool_use import Message, Tool

VOCABULARY_SIZE: Final = 2048
START_TAG: Final = "<|im_start|>"
END_TAG: Final = "<|im_end|>"
PADDING: Final = "<|endoftext|>"
MAX_TOKENS: Final = 8192
TEMPLATE_PATH: Final = Path(__file__).with_name("chat_template.jinja")

# Special tokens vanish from the text that a client sees; the engine's tool parser needs to see the tool tags.
_SPECIAL: Final = (PADDING, START_TAG, END_TAG)
_TOOL_TAGS: Final = ("<tool_call>", "</tool_call>")
# The trainer does not know the tags as such: left in the text, they would be learnt once more, letter by letter.
_TAG: Final = re.compile("|".join(re.escape(tag) for tag in (*_SPECIAL, *_TOOL_TAGS)))
_PIECES: Final = r"[A-Z][a-z]+|[0-9]| ?[a-z]+| ?[^A-Za-z0-9\s]+|\s|[A-Z]"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of `VOCABULARY_SIZE` tokens from rendered conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tags = [AddedToken(tag, special=True, normalized=False) for tag in (*_SPECIAL, *_TOOL_TAGS)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=tags,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in _TAG.split(text)), trainer)
    # The trainer takes special tokens only; read back, the tool tags are tokens of one piece that stay in the text.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in _TOOL_TAGS])
    return Tokenizer.from_str(tokenizer.to_str())


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, as transformers and vLLM read them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_TAG,
        "pad_token": PADDING,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE_PATH.read_text(encoding="utf-8"), encoding="utf-8")


class Renderer:
    """Renders conversations through the chat template, as the engine does, without importing the engine."""

    def __init__(self) -> None:
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701 (prompts are not HTML)
        environment.filters["tojson"] = _to_json
        self._template = environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))

    def render(self, conversation: Conversation) -> str:
        """The whole conversation as text."""
        return self.prompt(conversation.messages, conversation.tools, add_generation_prompt=False)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool], *, add_generation_prompt: bool = True) -> str:
        """The text that the model continues."""
        parsed = [_with_parsed_arguments(message) for message in messages]
        offered = list(tools) or None
        return str(self._template.render(messages=parsed, tools=offered, add_generation_prompt=add_generation_prompt))


def _with_parsed_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        calls.append({**call, "function": {**function, "arguments": json.loads(function["arguments"])}})
    return {**message, "tool_calls": calls}


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
