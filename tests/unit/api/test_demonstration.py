"""What `make run` shows to a person: what to paste, and what keeping state is worth."""

import ast

from api.demonstration import conversation_table, pastes
from api.stateful_bench import Sample


def sample(prompt: int, cached: int, ttft_s: float) -> Sample:
    return Sample("", ttft_s, list(range(prompt)), [], cached, [])


def test_three_things_can_be_pasted_and_each_names_the_endpoint_the_key_and_the_model() -> None:
    text = pastes("http://127.0.0.1:8321/v1", "hf_secret", "holdfast-demo")
    titles = ["With curl:", "With the openai SDK (pip install openai):", "An agent loop:"]
    starts = [text.index(title) for title in titles]
    assert starts == sorted(starts)
    parts = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    for part in parts:
        assert "http://127.0.0.1:8321/v1" in part
        assert "hf_secret" in part
        assert "holdfast-demo" in part
        assert "{{" not in part
    for part in parts[1:]:
        ast.parse(part.partition(":\n")[2])


def test_the_table_has_a_row_a_turn_with_what_each_arm_prefilled_and_waited() -> None:
    table = conversation_table(
        {
            "stateless": [sample(2010, 0, 0.8), sample(2056, 0, 0.9)],
            "stateful": [sample(2010, 0, 0.7), sample(2056, 2016, 0.0123)],
        }
    )
    heading, first, second = table.splitlines()
    assert heading.split("  ")[0] == "TURN"
    for title in ("PROMPT TOKENS", "PREFILLED: STATELESS", "FIRST TOKEN: STATELESS"):
        assert title in heading
    assert first.split() == ["1", "2010", "2010", "2010", "800", "ms", "700", "ms"]
    assert second.split() == ["2", "2056", "2056", "40", "900", "ms", "12", "ms"]
