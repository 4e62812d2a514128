"""What `holdfast up --demo` shows: that state is kept, and what to paste to try it.

Rule: what is shown was measured just now, on the appliance that is being shown.
"""

import asyncio
from typing import TYPE_CHECKING

from api.stateful_bench import Sample, Target, run_loop
from appliance.cli import table
from appliance.engine.client import EngineClient
from appliance.engine.command_line import SOCKET_NAME
from appliance.engine.demo.agent_loop import AGENT_LONG_FROM

if TYPE_CHECKING:
    from api.admin import types
    from appliance.settings import Settings

_SHOWN_TURNS = 6
_CURL = """\
curl {endpoint}/chat/completions \\
  -H 'Authorization: Bearer {api_key}' -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "temperature": 0,
       "messages": [{{"role": "user", "content": "Hello! My name is Anna."}}]}}'"""
_SDK = """\
from openai import OpenAI
client = OpenAI(base_url="{endpoint}", api_key="{api_key}")
answer = client.chat.completions.create(
    model="{model}", messages=[{{"role": "user", "content": "What is the capital of France?"}}], temperature=0)
print(answer.choices[0].message.content)"""
_LOOP = """\
from openai import OpenAI
client = OpenAI(base_url="{endpoint}", api_key="{api_key}")
messages = []
for line in ("Hello! My name is Anna.", "What is 2 plus 3?", "What is the capital of France?", "What is my name?"):
    messages.append({{"role": "user", "content": line}})
    answer = client.chat.completions.create(model="{model}", messages=messages, temperature=0)
    messages.append(answer.choices[0].message)
    usage = answer.usage
    print(answer.choices[0].message.content, "| found again:",
          usage.prompt_tokens_details.cached_tokens, "of", usage.prompt_tokens, "tokens")"""


def show_state_kept(settings: "Settings", status: "types.Status", api_key: str) -> str:
    """Run the beginning of an agent's conversation, stateless and stateful, and return both as a table.

    Raises:
        BenchFailed: a turn was not answered.
    """
    target = target_of(settings, status, api_key)
    loop = run_loop(target, arms=("stateless", "stateful"), first=AGENT_LONG_FROM, turns=_SHOWN_TURNS)
    return conversation_table(asyncio.run(loop))


def target_of(settings: "Settings", status: "types.Status", api_key: str) -> Target:
    """The running appliance, as what measures it sees it."""
    socket = settings.engine.socket or settings.state_dir / "run" / "engine" / SOCKET_NAME
    return Target(status.endpoint, api_key, EngineClient(socket), status.model or "", settings.engine.block_size)


def conversation_table(samples: dict[str, list[Sample]]) -> str:
    """Tokens prefilled and time to first token of each turn, stateless beside stateful."""
    rows = [
        (
            turn,
            len(stateful.prompt_ids),
            stateless.prefilled,
            stateful.prefilled,
            f"{stateless.ttft_s * 1000:.0f} ms",
            f"{stateful.ttft_s * 1000:.0f} ms",
        )
        for turn, (stateless, stateful) in enumerate(
            zip(samples["stateless"], samples["stateful"], strict=True), start=1
        )
    ]
    headings = ("turn", "prompt tokens", "prefilled: stateless", "stateful", "first token: stateless", "stateful")
    return table(headings, rows, empty="")


def pastes(endpoint: str, api_key: str, model: str) -> str:
    """Three things to paste: curl, the openai SDK, an agent loop."""
    parts = (("With curl:", _CURL), ("With the openai SDK (pip install openai):", _SDK), ("An agent loop:", _LOOP))
    return "\n\n".join(
        f"{title}\n\n{text.format(endpoint=endpoint, api_key=api_key, model=model)}" for title, text in parts
    )
