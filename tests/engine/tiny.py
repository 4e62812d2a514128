"""A Llama of random weights, small enough to step in milliseconds, with a vocabulary of words `t0` to `t511`."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

VOCABULARY = 512
_HIDDEN = 64
_FEED_FORWARD = 128
_HEAD = 32


def write_tiny_model(folder: Path, *, window_tokens: int = 0, windowed: Sequence[bool] = (True, False)) -> Path:
    """Write the model's configuration, weights and tokenizer into `folder`.

    With `window_tokens` the layers that are `windowed` see so many tokens only, and vLLM keeps their KV apart.
    """
    configuration = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "num_hidden_layers": len(windowed),
        "num_attention_heads": _HIDDEN // _HEAD,
        "num_key_value_heads": _HIDDEN // _HEAD,
        "head_dim": _HEAD,
        "intermediate_size": _FEED_FORWARD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if window_tokens:
        layer_types = ["sliding_attention" if sees_a_window else "full_attention" for sees_a_window in windowed]
        configuration |= {"sliding_window": window_tokens, "layer_types": layer_types}
    (folder / "config.json").write_text(json.dumps(configuration))
    save_file(_weights(len(windowed)), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer(WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "chat_template": "t1"})
    )
    return folder


def _weights(layers: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(7)

    def drawn(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * scale).to(torch.bfloat16)

    def ones() -> torch.Tensor:
        return torch.ones(_HIDDEN, dtype=torch.bfloat16)

    weights = {"model.embed_tokens.weight": drawn(VOCABULARY, _HIDDEN, scale=1.0), "model.norm.weight": ones()}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{prefix}self_attn.{projection}.weight"] = drawn(_HIDDEN, _HIDDEN)
        weights[f"{prefix}mlp.gate_proj.weight"] = drawn(_FEED_FORWARD, _HIDDEN)
        weights[f"{prefix}mlp.up_proj.weight"] = drawn(_FEED_FORWARD, _HIDDEN)
        weights[f"{prefix}mlp.down_proj.weight"] = drawn(_HIDDEN, _FEED_FORWARD)
        weights[f"{prefix}input_layernorm.weight"] = ones()
        weights[f"{prefix}post_attention_layernorm.weight"] = ones()
    return weights
