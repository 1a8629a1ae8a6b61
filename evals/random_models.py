"""Models of published shapes with random weights: they cost what the real ones do and say nothing.

Dimensions are those of the models' own config.json.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
_SHAPES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama-3.2-1b": (LlamaConfig, LlamaForCausalLM, {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE,
    }),
    "qwen3-0.6b": (Qwen3Config, Qwen3ForCausalLM, {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }),
    "llama-3-8b": (LlamaConfig, LlamaForCausalLM, {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }),
}  # fmt: skip
NAMES = tuple(_SHAPES)


def shape(name: str, **changes: Any) -> tuple[type, Any]:
    """The class of a model and its config; changes: of the config. It has no end token."""
    config_class, model_class, dimensions = _SHAPES[name]
    ends = {"eos_token_id": None, "bos_token_id": None}
    return model_class, config_class(**{**dimensions, **changes, **ends})


def random_model(
    name: str, dtype: torch.dtype, device: str = "cpu", *, seed: int = 0, **changes: Any
) -> Any:
    """A model of this shape, in evaluation mode; the same seed makes the same weights."""
    model_class, config = shape(name, **changes)
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            model = model_class(config)
        finally:
            torch.set_default_dtype(before)
    return model.to(device).eval()


def random_prompts(vocab_size: int, count: int, tokens: int, *, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens."""
    draw = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = torch.randint(
        0, vocab_size, (count, tokens), generator=draw
    ).tolist()
    return prompts
