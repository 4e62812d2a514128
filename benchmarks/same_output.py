"""Is greedy output the same, and KV bit for bit, however it was computed? `python -m benchmarks.same_output`.

Runs in the engine's environment (`.venv-engine/bin/python`). Each row of the table is an engine in a process of its
own that answers the same prompts: in other chunks of prefill, with other requests in the batch. It is compared with the
first row of its model, type and number of threads; the first row of two threads with that of one. Within each process a
prompt is also asked twice (cold, then warm from the prefix cache), and prompt and answer are given together as a new
prompt under another salt: then KV that was decoded token by token is compared with KV of the same tokens that was
prefilled.

Reported: answers that are the same to the last token; the largest difference of a logit before answers part; bytes of
KV that are equal, and its largest difference as a share of the largest value; and how far the best token led the second
(`margin`, in logits) where answers parted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

DEMONSTRATION = Path(__file__).parent.parent / "appliance" / "engine" / "demo" / "model"
BLOCK = 32
PROMPTS = 3
PROMPT_TOKENS = 500
ANSWER_TOKENS = 64
TWO_THREADS = "two threads, not one"
_CHILD_S = 600.0


@dataclass(frozen=True, slots=True)
class Way:
    """One way of computing the same thing.

    Attributes:
        chunk: the most tokens of a step.
        others: other requests that arrive together with each prompt.
    """

    name: str
    model: str
    dtype: str = "bfloat16"
    threads: int = 1
    chunk: int = 2048
    others: int = 0
    prompts: int = PROMPTS


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two ways, over all prompts. `margins` are in logits, one for each pair of answers that parted."""

    same_answers: int
    answers: int
    max_logit: float
    margins: list[float]
    kv_equal_share: float
    kv_max_share: float


def ways(model: str, dtypes: Sequence[str], prompts: int) -> list[Way]:
    """What is compared: the first of each type and number of threads with that of one thread, the others with it."""
    listed = []
    for dtype in dtypes:
        listed += [
            Way("reference", model, dtype),
            Way(TWO_THREADS, model, dtype, threads=2),
            Way("chunks of 96", model, dtype, chunk=96),
            Way("with 3 others", model, dtype, others=3),
            Way("with 3 others", model, dtype, threads=2, others=3),
            Way("another process", model, dtype, threads=2),
            Way("chunks of 96", model, dtype, threads=2, chunk=96),
            Way("another process", model, dtype),
            Way("chunks of 256", model, dtype, chunk=256),
        ]
    return [replace(way, prompts=prompts) for way in listed]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or with `--json` the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="folders of models; the demonstration model by default")
    parser.add_argument("--type", default="bfloat16,float32")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        way, output = json.loads(options.child)
        _answer(Way(**way), Path(output))
        return 0
    rows = []
    for model in options.model or [str(DEMONSTRATION)]:
        with tempfile.TemporaryDirectory(prefix="same-output-") as scratch:
            references: dict[tuple[str, int], Path] = {}
            for number, way in enumerate(ways(model, options.type.split(","), options.prompts)):
                output = Path(scratch) / f"{number}.pt"
                _run(way, output)
                own = references.setdefault((way.dtype, way.threads), output)
                reference = references[way.dtype, 1] if way.name == TWO_THREADS else own
                row = {"model": Path(model).name, "type": way.dtype, "threads": way.threads, "way": way.name}
                row |= _compared(reference, output)
                rows.append(row)
                if not options.json:
                    sys.stdout.write(_line(row))
                    sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    return 0


def _run(way: Way, output: Path) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(way.threads),
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.same_output", "--child", json.dumps([asdict(way), str(output)])]
    subprocess.run(command, env=environment, check=True, timeout=_CHILD_S, stdout=subprocess.DEVNULL)


# In an engine's process


def _answer(way: Way, output: Path) -> None:
    import torch
    from vllm import LLM

    from vllm import SamplingParams  # isort: skip

    llm = LLM(
        model=way.model,
        dtype=way.dtype,
        block_size=BLOCK,
        max_model_len=1024,
        max_num_batched_tokens=way.chunk,
        max_num_seqs=8,
        num_gpu_blocks_override=400,
        enforce_eager=True,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
        enable_chunked_prefill=True,
        seed=0,
    )
    front: Any = llm.llm_engine
    core = front.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    manager = core.scheduler.kv_cache_manager

    def held(name: str, tokens: int) -> Any:
        """The KV of a running request's first tokens, whole blocks only."""
        internal = next(each for each in core.scheduler.requests if each.startswith(name))
        blocks = torch.tensor(manager.get_block_ids(internal)[0][: tokens // BLOCK])
        axis = [cache.shape.index(400) for cache in runner.kv_caches]
        return torch.stack(
            [cache.index_select(at, blocks).movedim(at, 0) for cache, at in zip(runner.kv_caches, axis, strict=True)], 1
        ).clone()

    def ask(name: str, prompt: list[int], salt: str, answer_tokens: int, others: int = 0) -> dict[str, Any]:
        for number in range(others):
            front.add_request(
                f"other-{name}-{number}",
                {"prompt_token_ids": _words(1000 + number, 150 + 90 * number), "cache_salt": f"{name}{number}"},
                SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True),
            )
        front.add_request(
            name,
            {"prompt_token_ids": prompt, "cache_salt": salt},
            SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True, logprobs=-1),
        )
        kv: Any = None
        done: Any = None
        while front.has_unfinished_requests():
            for step in front.step():
                if step.request_id == name and step.finished:
                    done = step
            if done is None and any(each.startswith(name) for each in core.scheduler.requests):
                request = next(r for n, r in core.scheduler.requests.items() if n.startswith(name))
                if request.num_computed_tokens >= len(prompt):
                    kv = held(name, request.num_computed_tokens)
        answer = done.outputs[0]
        logits = torch.tensor(
            [[step[token].logprob for token in range(len(step))] for step in answer.logprobs], dtype=torch.float64
        )
        return {"tokens": list(answer.token_ids), "logits": logits, "kv": kv, "cached": done.num_cached_tokens}

    asked = []
    for number in range(way.prompts):
        prompt = _words(number, PROMPT_TOKENS)
        cold = ask(f"cold{number}-", prompt, f"a{number}", ANSWER_TOKENS, way.others)
        warm = ask(f"warm{number}-", prompt, f"a{number}", ANSWER_TOKENS)
        assert warm["cached"] > 0
        # The last token of the answer has no KV yet, and one more is asked so that the new prompt's is held.
        again = ask(f"again{number}-", [*prompt, *cold["tokens"][:-1]], f"b{number}", 2)
        prompt_blocks = PROMPT_TOKENS // BLOCK
        asked.append(
            {
                "cold": {**cold, "kv": cold["kv"][:prompt_blocks]},
                "warm": {**warm, "kv": warm["kv"][:prompt_blocks]},
                "decoded": cold["kv"][prompt_blocks:],
                "prefilled": again["kv"][prompt_blocks : len(cold["kv"])],
            }
        )
    torch.save(asked, output)
    core.shutdown()


def _words(seed: int, length: int) -> list[int]:
    return [(seed * 7919 + position * (37 + seed % 11) + 11) % 1900 + 20 for position in range(length)]


# Comparing


def _compared(reference: Path, output: Path) -> dict[str, Any]:
    import torch

    before, after = torch.load(reference), torch.load(output)
    pairs = list(zip(before, after, strict=True))
    return {
        "against_reference": asdict(_difference([(one["cold"], two["cold"]) for one, two in pairs])),
        "warm_against_cold": asdict(_difference([(each["cold"], each["warm"]) for each in after])),
        "decoded_against_prefilled": dict(
            zip(
                ("kv_equal_share", "kv_max_share"),
                _kv_difference([(each["decoded"], each["prefilled"]) for each in after]),
                strict=True,
            )
        ),
    }


def _difference(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Difference:
    same, max_logit, margins = 0, 0.0, []
    for one, two in pairs:
        common = next(
            (at for at, (a, b) in enumerate(zip(one["tokens"], two["tokens"], strict=True)) if a != b),
            len(one["tokens"]),
        )
        compared = min(common + 1, len(one["tokens"]))  # where they part both still saw the same
        max_logit = max(max_logit, (one["logits"][:compared] - two["logits"][:compared]).abs().max().item())
        if common == len(one["tokens"]):
            same += 1
        else:
            best = one["logits"][common].topk(2).values
            margins.append((best[0] - best[1]).item())
    equal, largest = _kv_difference([(one["kv"], two["kv"]) for one, two in pairs])
    return Difference(same, len(pairs), max_logit, margins, equal, largest)


def _kv_difference(pairs: list[tuple[Any, Any]]) -> tuple[float, float]:
    equal = total = 0
    largest = 0.0
    for one, two in pairs:
        equal += (one == two).sum().item()
        total += one.numel()
        difference = (one.double() - two.double()).abs().max().item()
        largest = max(largest, difference / one.double().abs().max().item())
    return equal / total, largest


def _line(row: dict[str, Any]) -> str:
    def said(name: str) -> str:
        it = row[name]
        margins = ", ".join(f"{margin:.4f}" for margin in it["margins"])
        return (
            f"{it['same_answers']}/{it['answers']} same, logits {it['max_logit']:.2g}, "
            f"KV {100 * it['kv_equal_share']:.2f} % equal, {it['kv_max_share']:.1g}"
            + (f", margins {margins}" if margins else "")
        )

    decoded = row["decoded_against_prefilled"]
    return (
        f"{row['model']} {row['type']} {row['threads']} {row['way']}: {said('against_reference')}"
        f" | warm/cold {said('warm_against_cold')}"
        f" | decoded/prefilled KV {100 * decoded['kv_equal_share']:.2f} % equal, {decoded['kv_max_share']:.1g}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
