"""The randomness of a step on the device: specdec.rng's uniforms and Gumbel noise, same words."""

import triton
import triton.language as tl

from specdec.kernels.philox import philox, uniform

ACCEPT, RESIDUAL, BONUS = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
COUPLED = tl.constexpr(0)


@triton.jit
def coin_of(keys, positions, sequence, node, copy, PURPOSE: tl.constexpr):
    """The uniforms of specdec.rng of some nodes of a step."""
    c1 = node.to(tl.uint32)
    none = c1 * 0
    c0 = none + (copy // 4).to(tl.uint32)
    c2 = none + tl.load(positions + sequence).to(tl.uint32)
    k0 = none + tl.load(keys + 2 * sequence).to(tl.uint32)
    k1 = none + tl.load(keys + 2 * sequence + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, none + PURPOSE, k0, k1)
    lane = copy % 4
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return uniform(word)


@triton.jit
def gumbel(word):
    """-log(-log u), u = ((word >> 8) + 1/2) / 2**24: float32, accurate at both ends."""
    odd = (word >> 8) * 2 + 1
    is_low = odd < 16777216
    far = (33554432 - odd).to(tl.float32) * 2.9802322387695312e-08  # 1 - u, exact where u > 1/2
    near = tl.where(is_low, 0.5, 1 - far)
    lost = 1 - near
    slope = far / tl.where(lost == 0, 1.0, lost)  # what rounding 1 - far took from it
    high = tl.where(lost == 0, far, -tl.log(near) * slope)
    low = -tl.log(tl.where(is_low, odd.to(tl.float32) * 2.9802322387695312e-08, 0.5))
    return -tl.log(tl.where(is_low, low, high))
