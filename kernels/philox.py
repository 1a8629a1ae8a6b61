"""Philox4x32-10 in Triton: the words and uniforms of specdec.rng, bit for bit.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The key is a 64-bit seed; the
counter words are (word, node, position, purpose). The device functions are for other kernels;
philox_words and philox_uniforms launch them alone.
"""

import torch
import triton
import triton.language as tl

from specdec.kernels.configuration import Configuration

_BLOCK, _WARPS = 256, 4


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """uint32 counter and key words -> four uint32 words."""
    for _ in tl.static_range(10):
        a, b = c0, c2
        c0 = tl.umulhi(b, tl.full(b.shape, 0xCD9E8D57, tl.uint32)) ^ c1 ^ k0
        c2 = tl.umulhi(a, tl.full(a.shape, 0xD2511F53, tl.uint32)) ^ c3 ^ k1
        c1 = b * tl.full(b.shape, 0xCD9E8D57, tl.uint32)
        c3 = a * tl.full(a.shape, 0xD2511F53, tl.uint32)
        k0 += tl.full(k0.shape, 0x9E3779B9, tl.uint32)
        k1 += tl.full(k1.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """A uint32 word -> [0, 1): its upper 24 bits, exact in float32."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2**-24


@triton.jit
def log_uniform(word):
    """A uint32 word -> (0, 1) in float64, never 0 or 1: safe under logarithms."""
    return ((word >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08


@triton.jit
def _philox_kernel(counters, keys, words, uniforms, log_uniforms, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    c0 = tl.load(counters + at * 4, inside, other=0).to(tl.uint32)
    c1 = tl.load(counters + at * 4 + 1, inside, other=0).to(tl.uint32)
    c2 = tl.load(counters + at * 4 + 2, inside, other=0).to(tl.uint32)
    c3 = tl.load(counters + at * 4 + 3, inside, other=0).to(tl.uint32)
    k0 = tl.load(keys + at * 2, inside, other=0).to(tl.uint32)
    k1 = tl.load(keys + at * 2 + 1, inside, other=0).to(tl.uint32)
    c0, c1, c2, c3 = philox(c0, c1, c2, c3, k0, k1)
    _store(words, uniforms, log_uniforms, at * 4, c0, inside)
    _store(words, uniforms, log_uniforms, at * 4 + 1, c1, inside)
    _store(words, uniforms, log_uniforms, at * 4 + 2, c2, inside)
    _store(words, uniforms, log_uniforms, at * 4 + 3, c3, inside)


@triton.jit
def _store(words, uniforms, log_uniforms, at, word, inside):
    tl.store(words + at, word.to(tl.int64), inside)
    tl.store(uniforms + at, uniform(word), inside)
    tl.store(log_uniforms + at, log_uniform(word), inside)


def philox_words(
    counters: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n, 4) counters and (n, 2) keys, 32-bit values in int64 -> (n, 4) each: the words in int64,
    their uniforms in float32, their uniforms for logarithms in float64."""
    n = counters.shape[0]
    assert counters.shape == (n, 4), "expected (n, 4) counters"
    assert keys.shape == (n, 2), "expected (n, 2) keys"
    assert counters.dtype == keys.dtype == torch.int64, "expected int64"
    words = torch.empty((n, 4), dtype=torch.int64, device=counters.device)
    uniforms, log_uniforms = (
        torch.empty_like(words, dtype=kind) for kind in (torch.float32, torch.float64)
    )
    if n:
        _philox_kernel[(triton.cdiv(n, _BLOCK),)](
            counters.contiguous(), keys.contiguous(), words, uniforms, log_uniforms, n,
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return words, uniforms, log_uniforms


def configurations() -> list[Configuration]:
    """What the kernel of this file is compiled with, for the compile test and the report."""
    signature = {
        "counters": "*i64", "keys": "*i64", "words": "*i64", "uniforms": "*fp32",
        "log_uniforms": "*fp64", "n": "i32", "BLOCK": "constexpr",
    }  # fmt: skip
    pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    options = {"num_warps": 4}  # Triton's own choice, which the launch leaves to it
    return [
        Configuration("philox", _philox_kernel, signature, {"BLOCK": _BLOCK}, pointers, options)
    ]
