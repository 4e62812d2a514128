"""Makes a Llama of about 140 million random weights, for measurements only: it costs what a small real model costs.

    .venv-engine/bin/python -m appliance.engine.demo.random_model --output DIR

Rules:

- The same tokenizer and chat template as the demonstration model: token counts of the two can be compared.
- A seed gives the same weights everywhere. What it says means nothing.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer

from appliance.engine.demo.llama import Shape, initial_weights, save_model

COMMITTED_MODEL: Final = Path(__file__).with_name("model")
SHAPE: Final = Shape(
    hidden=1024, layers=11, heads=16, key_value_heads=8, head_size=64, feed_forward=3072, rope_theta=100_000.0
)
# Wide enough that the likeliest token leads the second by more than the rounding of bfloat16: greedy decoding should
# depend on the weights and not on how a kernel groups its sums.
_DEVIATION: Final = 0.05


def write_random_model(folder: Path, *, seed: int = 1, shape: Shape = SHAPE) -> Path:
    """Write a model folder that vLLM can serve; takes seconds and about 280 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(COMMITTED_MODEL / name, folder / name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights = initial_weights(shape, seed=seed, deviation=_DEVIATION, dtype=torch.bfloat16)
    save_model(weights, shape, folder, tokenizer.get_vocab())
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a model folder."""
    parser = argparse.ArgumentParser(description="Make a model of random weights, for measurements only.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; made if it is missing")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    folder = write_random_model(options.output, seed=options.seed)
    size = (folder / "model.safetensors").stat().st_size
    sys.stderr.write(f"{folder}: {size / 1e6:.0f} MB of weights\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
