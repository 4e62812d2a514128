"""That what docs/kv.md calls a metric of vLLM's is one, by the name under which a Prometheus finds it."""

import re
from pathlib import Path

import vllm

from tests.metrics_table import documented_metrics

_NAME = re.compile(r'"(vllm:\w+)"')
_WHERE = ("v1/metrics", "v1/kv_offload", "distributed/kv_transfer/kv_connector/v1/offloading")


def test_the_metrics_of_vllm_that_ours_are_beside_are_there() -> None:
    package = Path(vllm.__file__).parent
    sources = [path.read_text("utf-8") for where in _WHERE for path in (package / where).rglob("*.py")]
    theirs = {name for source in sources for name in _NAME.findall(source)}
    named = {name for metric in documented_metrics().values() for name in metric.in_vllm}
    assert len(named) > 10
    assert {name for name in named if name.removesuffix("_total") not in theirs} == set()
