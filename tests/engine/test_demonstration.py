"""The conversation that `make run` shows, counted with the demonstration model's own tokenizer."""

from pathlib import Path

from transformers import AutoTokenizer

from appliance.engine import demo
from appliance.engine.demo.agent_loop import AGENT_LONG_FROM, agent_history, agent_task_messages

MODEL = Path(demo.__file__).parent / "model"


def test_its_prompt_has_2000_tokens_from_the_first_turn() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    shown = [*agent_history(AGENT_LONG_FROM), *agent_task_messages(AGENT_LONG_FROM)]
    text = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
    assert len(tokenizer.encode(text, add_special_tokens=False)) >= 2000
