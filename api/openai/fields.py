"""Which request fields reach the engine, which the gateway acts on itself, and which never pass.

Rules:

- `passed` is the allow-list: nothing else of a client's request is in the engine's body.
- `handled` is acted on by the gateway; the engine sees what the gateway makes of it, or nothing.
- `denied` names the rest of what the engine would understand. A field of the engine's that is on no list fails
  `tests/engine/test_wire_contract.py`, so that a new one is decided on by a person.
- Only the standard library is imported: the test runs in the engine's environment.
"""

from dataclasses import dataclass
from typing import Final

MAX_STOPS: Final = 4
"""How many texts may end an answer: the engine takes no more, and OpenAI neither."""


@dataclass(frozen=True, slots=True)
class Fields:
    """The three lists of one endpoint. They do not overlap."""

    passed: frozenset[str]
    handled: frozenset[str]
    denied: frozenset[str]


# What a client may say of how tokens are chosen, on both endpoints.
_SAMPLING = frozenset(
    {
        "frequency_penalty",
        "ignore_eos",
        "logit_bias",
        "logprobs",
        "min_p",
        "min_tokens",
        "n",
        "presence_penalty",
        "repetition_penalty",
        "response_format",
        "seed",
        "stop",
        "stop_token_ids",
        "temperature",
        "top_k",
        "top_p",
    }
)

# Read by the gateway: what is asked, how it is answered, whose it is.
_HANDLED = frozenset(
    {
        "conversation",
        "model",
        "nvext",
        "previous_response_id",
        "prompt_cache_key",
        "return_token_ids",
        "stream",
        "stream_options",
    }
)

_DENIED = frozenset(
    {
        # Whose cache, which place in the queue, where KV goes: the gateway's alone.
        "cache_salt",
        "ec_transfer_params",
        "kv_transfer_params",
        "priority",
        "request_id",
        "session_id",
        "vllm_xargs",
        # What is put around the prompt, or cut from it.
        "add_special_tokens",
        "echo",
        "truncate_prompt_tokens",
        "truncation_side",
        # Media and tensors.
        "mm_payload",
        "return_mm_kwargs",
        # Grammars other than a JSON schema, and other control of decoding.
        "allowed_token_ids",
        "bad_words",
        "length_penalty",
        "repetition_detection",
        "structured_outputs",
        "thinking_token_budget",
        "use_beam_search",
        "watermarking",
        # What is shown of the engine's inside.
        "include_stop_str_in_output",
        "logprob_token_ids",
        "prompt_logprobs",
        "return_token_offsets",
        "return_tokens_as_token_ids",
        "routed_experts_prompt_start",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stream_interval",
        # Ignored by the engine.
        "user",
    }
)

CHAT = Fields(
    passed=_SAMPLING
    | {
        "max_completion_tokens",
        "max_tokens",
        "parallel_tool_calls",
        "reasoning_effort",
        "tool_choice",
        "tools",
        "top_logprobs",
    },
    handled=_HANDLED | {"messages"},
    denied=_DENIED
    | {
        "add_generation_prompt",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "documents",
        "include_reasoning",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "return_prompt_text",
    },
)

COMPLETION = Fields(
    passed=_SAMPLING | {"max_tokens"},
    handled=_HANDLED | {"prompt"},
    denied=_DENIED | {"prompt_embeds", "suffix"},
)
