"""The larger functions that a rewritten forward graph calls."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rotary(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary position embedding: x * cos + rotate_half(x) * sin, the sign folded into sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def rms_norm(x: Tensor, doubled_weight: Tensor, size: int, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, as the layer norm of [x, -x].

    That vector has mean zero and x's mean square for its variance, and torch's layer norm is one
    fused kernel where its rms_norm is seven: half the time at the sizes that decoding runs.
    """
    both = torch.cat((x, -x), -1)
    return torch.layer_norm(both, (2 * size,), doubled_weight, None, eps)[..., :size]


def qkv_attention(
    step: Any, call: Any, heads: int, kv_heads: int, qkv: Tensor, cos: Tensor, signed_sin: Tensor
) -> Tensor:
    """Rotary embedding and attention straight from the merged projection.

    qkv: (1, R, (H + 2K) * D); cos, signed_sin: (R, 1, D). Returns (1, R, H, D).
    """
    rows = qkv.shape[1]
    x = qkv.view(rows, heads + 2 * kv_heads, -1)
    rotated = rotary(x[:, : heads + kv_heads], cos, signed_sin)
    values = x[:, heads + kv_heads :]
    out: Tensor = step.attend(call, rotated[:, :heads], rotated[:, heads:], values, None)
    return out[None]


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, doubled_norm: Tensor | None, eps: float,
    gated: bool, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """[rms norm ->] linear [+ bias], then either + residual or, gated, silu(first half) * second.

    What jit.linear.make_linear compiles, on torch's own operators.
    """
    if doubled_norm is not None:
        x = rms_norm(x, doubled_norm, x.shape[-1], eps)
    y = F.linear(x, weight, bias)
    if gated:
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up
    return y if residual is None else residual + y
