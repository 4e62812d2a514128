"""The commands that make model folders."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.engine.demo import random_model, train
from appliance.engine.demo.llama import Shape, initial_weights
from appliance.engine.demo.tokenizer import MAX_TOKENS, VOCABULARY_SIZE

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
SMALL = replace(random_model.SHAPE, hidden=64, layers=2, heads=2, key_value_heads=1, feed_forward=96)


def _tensors(folder: Path) -> dict[str, Any]:
    """The header of a safetensors file: a length, then JSON."""
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__")
    return header


def test_the_committed_model_is_small_and_made_for_long_contexts(model_folder: Path) -> None:
    assert {path.name for path in model_folder.iterdir()} == FILES
    assert (model_folder / "model.safetensors").stat().st_size <= 8_000_000
    config = json.loads((model_folder / "config.json").read_text())
    assert config["max_position_embeddings"] >= 8192
    assert config["head_dim"] in (32, 64)
    assert config["tie_word_embeddings"]
    assert config["vocab_size"] == VOCABULARY_SIZE
    assert {tensor["dtype"] for tensor in _tensors(model_folder).values()} == {"BF16"}


def test_one_command_makes_a_whole_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made" / "here"
    assert train.main(["--output", str(folder), "--seconds", "0.5", "--threads", "1", "--cases", "1"]) == 0
    assert {path.name for path in folder.iterdir()} == FILES
    assert set(_tensors(folder)) == set(initial_weights(Shape(), seed=1))
    progress = capsys.readouterr()
    assert "recall" in progress.err
    assert not progress.out


def test_a_rebuilt_tokenizer_is_the_committed_one(model_folder: Path, tmp_path: Path) -> None:
    train.write_tokenizer(tmp_path, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (model_folder / name).read_bytes()


def test_a_seed_makes_the_same_random_model_and_another_seed_another(tmp_path: Path) -> None:
    made = [
        (
            random_model.write_random_model(tmp_path / str(index), seed=seed, shape=SMALL) / "model.safetensors"
        ).read_bytes()
        for index, seed in enumerate((3, 3, 4))
    ]
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_the_model_for_measurements_has_about_140_million_parameters() -> None:
    shape = random_model.SHAPE
    attention = shape.hidden * shape.head_size * 2 * (shape.heads + shape.key_value_heads)
    layer = attention + 3 * shape.hidden * shape.feed_forward
    parameters = shape.vocabulary * shape.hidden + shape.layers * layer
    assert 135e6 < parameters < 145e6
    assert shape.head_size == 64
    assert shape.max_tokens == MAX_TOKENS
