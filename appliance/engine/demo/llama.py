"""A Llama-style decoder small enough to read at a glance and to train on two CPU cores.

Rules:

- Weights are a plain dict under the names that transformers and vLLM expect of `LlamaForCausalLM`: what is trained is
  what is served, without conversion.
- Embeddings are tied: the output matrix is the input matrix.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from safetensors.torch import load_file, save_file
from torch import Tensor

from appliance.engine.demo.tokenizer import END_TAG, MAX_TOKENS, PADDING, VOCABULARY_SIZE

_NORM_EPSILON = 1e-5
# Below this length the matrix of all scores is faster on a CPU than the fused kernel, backwards by twice.
_WRITTEN_OUT_UP_TO = 512

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a model. Attention heads share keys and values in groups of `heads / key_value_heads`."""

    hidden: int = 256
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    head_size: int = 32
    feed_forward: int = 640
    vocabulary: int = VOCABULARY_SIZE
    max_tokens: int = MAX_TOKENS
    rope_theta: float = 20_000.0


def initial_weights(shape: Shape, *, seed: int, deviation: float = 0.03, dtype: torch.dtype = torch.float32) -> Weights:
    """Random weights; those that write into the residual stream are scaled down by the depth (GPT-2, section 2.3)."""
    generator = torch.Generator().manual_seed(seed)
    into_stream = 1 / math.sqrt(2 * shape.layers)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * (deviation * scale)).to(dtype)

    queries, keys = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    weights = {"model.embed_tokens.weight": matrix(shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        name = f"model.layers.{layer}."
        weights[name + "input_layernorm.weight"] = torch.ones(shape.hidden, dtype=dtype)
        weights[name + "self_attn.q_proj.weight"] = matrix(queries, shape.hidden)
        weights[name + "self_attn.k_proj.weight"] = matrix(keys, shape.hidden)
        weights[name + "self_attn.v_proj.weight"] = matrix(keys, shape.hidden)
        weights[name + "self_attn.o_proj.weight"] = matrix(shape.hidden, queries, into_stream)
        weights[name + "post_attention_layernorm.weight"] = torch.ones(shape.hidden, dtype=dtype)
        weights[name + "mlp.gate_proj.weight"] = matrix(shape.feed_forward, shape.hidden)
        weights[name + "mlp.up_proj.weight"] = matrix(shape.feed_forward, shape.hidden)
        weights[name + "mlp.down_proj.weight"] = matrix(shape.hidden, shape.feed_forward, into_stream)
    weights["model.norm.weight"] = torch.ones(shape.hidden, dtype=dtype)
    return weights


def load_weights(folder: Path) -> Weights:
    """The weights that `save_model` wrote, to be trained on."""
    return {name: weight.float() for name, weight in load_file(str(folder / "model.safetensors")).items()}


def logits(weights: Weights, shape: Shape, tokens: Tensor, positions: Tensor) -> Tensor:
    """What follows each token: scores [batch, length, vocabulary] for `tokens` and `positions` [batch, length].

    Attention is causal over the whole row: pad on the right.
    """
    cosine, sine = _rotations(shape, positions)
    stream = F.embedding(tokens, weights["model.embed_tokens.weight"])
    for layer in range(shape.layers):
        name = f"model.layers.{layer}."
        stream = stream + _attention(
            weights, shape, name, _norm(weights, name + "input_layernorm", stream), cosine, sine
        )
        stream = stream + _feed_forward(weights, name, _norm(weights, name + "post_attention_layernorm", stream))
    return F.linear(_norm(weights, "model.norm", stream), weights["model.embed_tokens.weight"])


def save_model(weights: Weights, shape: Shape, folder: Path, token_ids: dict[str, int]) -> None:
    """Write `model.safetensors` (bfloat16), `config.json` and `generation_config.json`."""
    stored = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(stored, str(folder / "model.safetensors"), metadata={"format": "pt"})
    end, padding = token_ids[END_TAG], token_ids[PADDING]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_tokens,
        "rms_norm_eps": _NORM_EPSILON,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": shape.vocabulary,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": padding,
    }
    _write_json(folder / "config.json", config)
    # Greedy unless a request says otherwise: a small model spells worse when it is sampled.
    _write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": padding, "temperature": 0.0})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _norm(weights: Weights, name: str, stream: Tensor) -> Tensor:
    scale = weights[name + ".weight"]
    return F.rms_norm(stream, scale.shape, scale, _NORM_EPSILON)


def _attention(weights: Weights, shape: Shape, name: str, stream: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    batch, length, _ = stream.shape

    def heads(projection: str) -> Tensor:
        flat = F.linear(stream, weights[f"{name}self_attn.{projection}.weight"])
        return flat.view(batch, length, -1, shape.head_size).transpose(1, 2)

    queries, keys, values = (
        _rotate(heads("q_proj"), cosine, sine),
        _rotate(heads("k_proj"), cosine, sine),
        heads("v_proj"),
    )
    group = shape.heads // shape.key_value_heads
    mixed = _attend(queries, keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1))
    flat = mixed.transpose(1, 2).reshape(batch, length, -1)
    return F.linear(flat, weights[name + "self_attn.o_proj.weight"])


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    length = queries.shape[2]
    if length > _WRITTEN_OUT_UP_TO:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (queries @ keys.transpose(-1, -2)) / math.sqrt(queries.shape[-1])
    return torch.softmax(scores.masked_fill(later, -math.inf), dim=-1).to(values.dtype) @ values


def _feed_forward(weights: Weights, name: str, stream: Tensor) -> Tensor:
    gate = F.linear(stream, weights[name + "mlp.gate_proj.weight"])
    up = F.linear(stream, weights[name + "mlp.up_proj.weight"])
    return F.linear(F.silu(gate) * up, weights[name + "mlp.down_proj.weight"])


def _rotations(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of RoPE's angles (RoFormer, equation 34), each [batch, 1, length, head_size]."""
    exponents = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
    angles = positions[:, None, :, None].float() * shape.rope_theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return heads * cosine.to(heads.dtype) + turned * sine.to(heads.dtype)
