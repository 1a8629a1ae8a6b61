"""Drawing tokens from laws by one uniform each, and the largest of many scores."""

import numpy as np
import torch
from torch import Tensor

_BLOCK = 512
LARGE = 1 << 15  # from this vocabulary on two levels beat one, and passes beat calls


def sample(weights: Tensor, uniforms: Tensor) -> Tensor:
    """(B, V) unnormalised laws, (B,) uniforms -> (B,) tokens: the first with cumsum > u * total.

    A token of weight zero is never drawn: its cumulative sum equals its predecessor's, and at the
    upper end u * total < total keeps the search inside. Sums are in float64, but for those of the
    blocks of a large vocabulary, which are in the weights' dtype.
    """
    if weights.shape[1] >= LARGE:
        return _sample_blocks(weights, uniforms)
    sums = weights.cumsum(-1, dtype=torch.float64)
    return _first_above(sums, sums[:, -1:] * uniforms[:, None]).squeeze(1)


def _sample_blocks(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The same in one pass: finds the block by the blocks' sums, then the token inside it."""
    end = weights.shape[1]
    above = _block_sums(weights).cumsum(-1, dtype=torch.float64)
    wanted = above[:, -1:] * uniforms[:, None]
    block = _first_above(above, wanted)
    left = wanted - torch.where(block > 0, above.gather(1, (block - 1).clamp_min_(0)), 0.0)
    inside = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    # past the end the last weight repeats, and whoever is found there is the last token
    sums = weights.gather(1, inside.clamp_max_(end - 1)).cumsum(-1, dtype=torch.float64)
    # The block's sum was rounded: what is left may reach the sum of its parts, never pass it.
    left = torch.minimum(left, sums[:, -1:] * (1 - 2.0**-53))
    return inside.gather(1, _first_above(sums, left)).squeeze(1)


def largest(scores: Tensor) -> Tensor:
    """(R, V) -> (R,) the lowest index of each row's maximum; a NaN counts as the maximum."""
    V = scores.shape[1]
    whole = V - V % _BLOCK
    peaks: Tensor = scores[:, :whole].unflatten(1, (-1, _BLOCK)).amax(-1)  # quicker than argmax
    if whole < V:
        peaks = torch.cat((peaks, scores[:, whole:].amax(-1, keepdim=True)), 1)
    first = peaks.argmax(-1, keepdim=True) * _BLOCK
    # past the end the last score repeats, and the first of equal ones counts
    inside = (first + torch.arange(_BLOCK, device=scores.device)).clamp_max_(V - 1)
    return (first + scores.gather(1, inside).argmax(-1, keepdim=True)).squeeze(1)


def plus_log(noise: Tensor, law: Tensor) -> Tensor:
    """noise + log law, (B, V) each, in a tensor of its own."""
    if law.device.type != "cpu":
        return torch.log(law).add_(noise)
    found = torch.empty_like(noise)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.log(law.numpy(), out=found.numpy())  # more than twice as quick as torch's
    return found.add_(noise)


def _block_sums(weights: Tensor) -> Tensor:
    """(B, V) -> (B, blocks); the last block may be shorter."""
    whole = weights.shape[1] - weights.shape[1] % _BLOCK
    sums: Tensor = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole == weights.shape[1]:
        return sums
    return torch.cat((sums, weights[:, whole:].sum(-1, keepdim=True)), 1)


def _first_above(sums: Tensor, wanted: Tensor) -> Tensor:
    """(B, n) rising sums, (B, 1) -> (B, 1); inside even where NaN makes every comparison false."""
    return torch.searchsorted(sums, wanted, right=True).clamp_max_(sums.shape[1] - 1)
