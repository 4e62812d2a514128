"""Serves a model folder through vLLM, in a process of its own: one engine to a process, and the tests have another.

Reads batches of requests from standard input and writes the answers to standard output, a JSON array a line.
"""

import json
import os
import sys
from itertools import groupby
from typing import IO, Any

BLOCK = 32  # tokens


def main(model: str) -> None:
    """Answer until standard input ends. What the engine itself prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from vllm import LLM

    llm = LLM(
        model=model,
        block_size=BLOCK,
        enforce_eager=True,
        enable_prefix_caching=True,
        max_num_seqs=32,
        max_model_len=8192,
        seed=0,
        disable_log_stats=True,
    )
    _answer_lines(llm, sys.stdin, answers)


def _answer_lines(llm: Any, requests: IO[str], answers: IO[str]) -> None:
    for line in requests:
        answered = []
        for _, together in groupby(json.loads(line), key=lambda request: json.dumps(request["tools"])):
            answered += _answer_together(llm, list(together))
        answers.write(json.dumps(answered) + "\n")
        answers.flush()


def _answer_together(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    tools = requests[0]["tools"] or None
    # As the server does when tools are offered, so that their tags reach the parser.
    sampling = SamplingParams(temperature=0.0, max_tokens=requests[0]["max_tokens"], skip_special_tokens=not tools)
    outputs = llm.chat([request["messages"] for request in requests], sampling, use_tqdm=False, tools=tools)
    return [
        {
            **_parsed(llm, output.outputs[0].text, tools),
            "prompt_token_ids": list(output.prompt_token_ids),
            "token_ids": list(output.outputs[0].token_ids),
            "cached_tokens": output.num_cached_tokens,
            "finish_reason": output.outputs[0].finish_reason,
        }
        for output in outputs
    ]


def _parsed(llm: Any, text: str, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    if not tools:
        return {"content": text, "tool_calls": []}
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    request = ChatCompletionRequest(messages=[], model="demo", tools=tools)
    parser = ToolParserManager.get_tool_parser("hermes")(llm.get_tokenizer(), request.tools)
    found = parser.extract_tool_calls(text, request)
    return {"content": found.content, "tool_calls": [call.model_dump() for call in found.tool_calls]}


if __name__ == "__main__":
    main(sys.argv[1])
