"""The table of metrics in docs/kv.md, as tests read it."""

import re
from pathlib import Path
from typing import NamedTuple

_ROW = re.compile(r"^\| (`holdfast_.*?) \| (.*?) ?\| (.*?) ?\| (.*) \|$", re.MULTILINE)


class Documented(NamedTuple):
    """What the table says of one metric: its labels, and its like in vLLM."""

    labels: frozenset[str]
    in_vllm: frozenset[str]


def documented_metrics() -> dict[str, Documented]:
    """By the name that stands on the page."""
    page = (Path(__file__).parents[1] / "docs" / "kv.md").read_text("utf-8")
    metrics: dict[str, Documented] = {}
    for names, labels, _, in_vllm in _ROW.findall(page):
        plain = re.sub(r"\(.*?\)", "", labels)
        of = Documented(frozenset(re.findall(r"\w+", plain)), frozenset(re.findall(r"`(vllm:\w+)", in_vllm)))
        metrics |= dict.fromkeys(re.findall(r"`(holdfast_\w+)`", names), of)
    return metrics
