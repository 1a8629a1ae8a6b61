"""Temperature, top-k, top-p and min-p without a sort, and the law they leave."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SORTED = 1024  # candidates that are sorted at once in the search for a nucleus
_SAMPLE = 512
_MARGIN = 16  # sampled candidates on either side of the place where the boundary is expected


@dataclass(frozen=True, slots=True)
class Truncation:
    """Temperature, top-k, top-p and min-p, in this order, as transformers' warpers define them.

    Exact: top-k keeps all ties of the k-th score. Top-p keeps every token as likely as the least
    likely one that it must keep: transformers cuts such a tie where its sort happens to put it.
    No host synchronisation on an accelerator.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def changes_nothing(self) -> bool:
        return self == Truncation()

    def scores(self, scores: Tensor) -> Tensor:
        """(n, V) float32 -> the same with what is cut off at -inf; the input is left alone."""
        if self.changes_nothing:
            return scores
        scores = scores / self.temperature
        if self.top_k:
            drop_below_(scores, k_largest(scores, self.top_k)[:, -1:], float("-inf"))
        for cutoff in self._cutoffs():
            p = torch.softmax(scores, -1)
            scores.masked_fill_(p < cutoff(p), float("-inf"))
        return scores

    def law(self, logits: Tensor) -> Tensor:
        """(n, V) logits -> (n, V) probabilities in float32; the input is left alone."""
        if self.temperature == 1 and not self.top_k:
            p = torch.softmax(logits, -1, dtype=torch.float32)
        else:
            # One buffer for all that follows: a fresh one costs more than a pass over it.
            is_float = logits.dtype == torch.float32
            p = logits / self.temperature if is_float else logits.float().div_(self.temperature)
            if self.top_k:
                drop_below_(p, k_largest(p, self.top_k)[:, -1:], float("-inf"))
            p = _softmax_(p)
        for cutoff in self._cutoffs():
            drop_below_(p, cutoff(p), 0.0)
            p.div_(p.sum(-1, keepdim=True))
        return p

    def _cutoffs(self) -> Iterable["_TopP | _MinP"]:
        if self.top_p < 1:
            yield _TopP(self.top_p, self.top_k)
        if self.min_p > 0:
            yield _MinP(self.min_p)


@dataclass(frozen=True, slots=True)
class _TopP:
    top_p: float
    support: int  # tokens that can have a probability, ties aside; 0: all

    def __call__(self, p: Tensor) -> Tensor:
        if 0 < self.support < p.shape[1]:
            return _cutoff_among(k_largest(p, self.support), self.top_p)
        return nucleus_cutoff(p, self.top_p)


@dataclass(frozen=True, slots=True)
class _MinP:
    min_p: float

    def __call__(self, p: Tensor) -> Tensor:
        return self.min_p * p.amax(-1, keepdim=True)


def drop_below_(values: Tensor, least: Tensor, fill: float) -> None:
    """Sets what is below least (n, 1) to fill, in place; NaN stays."""
    if values.device.type != "cpu":
        values.masked_fill_(values < least, fill)
        return
    # A mask of the whole takes ten times as long as this loop over rows.
    for row, value in zip(values.unbind(0), least.flatten().numpy(), strict=True):
        torch.threshold_(row, float(np.nextafter(value, np.float32("-inf"))), fill)


def k_largest(values: Tensor, k: int) -> Tensor:
    """(n, V) -> (n, k) the k largest of each row, falling; all of them where k > V.

    The k blocks with the largest maxima hold them: a value above the k-th largest maximum lies in
    one of fewer than k blocks, and the k maxima themselves fill what is left.
    """
    n, V = values.shape
    size = max(1, isqrt(V // k))  # the fewest values to look at: V / size maxima, k * size found
    blocks = V // size
    if size < 4:
        return values.topk(min(k, V)).values
    body = values[:, : blocks * size].unflatten(1, (blocks, size))
    best = body.amax(-1).topk(k, sorted=False).indices
    found = body.gather(1, best[:, :, None].expand(n, k, size)).flatten(1)
    return torch.cat((found, values[:, blocks * size :]), 1).topk(k).values


def nucleus_cutoff(p: Tensor, top_p: float) -> Tensor:
    """(n, V) laws -> (n, 1) the least probability that top-p keeps.

    It is the smallest v whose {p <= v} weighs more than 1 - top_p, compared in float32 like
    transformers' TopPLogitsWarper; the largest probability where there is none. Holtzman et al.
    2020, 1904.09751.
    """
    tail = float(np.float32(1 - top_p))
    if p.device.type != "cpu":
        return _bisect(p, tail)
    cutoffs = [_select(row, tail) for row in p.detach().numpy()]
    return torch.tensor(cutoffs, dtype=p.dtype)[:, None]


def _cutoff_among(largest: Tensor, top_p: float) -> Tensor:
    """The cutoff of laws whose mass lies on these values (n, k), falling, and ties of the last."""
    above = largest.cumsum(-1, dtype=torch.float64) - largest
    kept = (1 - above).float() > float(np.float32(1 - top_p))
    return largest.gather(1, (kept.sum(-1, keepdim=True) - 1).clamp_min_(0))


def _bisect(p: Tensor, tail: float) -> Tensor:
    """Bisection over the bits of the cutoff: the same number of passes for every law."""
    high = p.amax(-1, keepdim=True).view(torch.int32)
    low = torch.zeros_like(high)
    for _ in range(31):
        middle = (low + high) // 2
        below = torch.where(p <= middle.view(torch.float32), p, 0.0)
        enough = below.sum(-1, keepdim=True, dtype=torch.float64).float() > tail
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, torch.minimum(middle + 1, high))
    return high.view(torch.float32)


def _select(row: NDArray[np.float32], tail: float) -> float:
    """The same by quickselect on one row: masses below the candidates are summed, not sorted."""
    below, left = 0.0, row
    if np.isnan(row[0]):
        return 0.0  # softmax spreads a NaN over its row; keep it, the acceptance rule reports it
    while left.size > _SORTED:
        low, high = _bracket(left, below, tail)
        under = left < low
        under_mass = below + float(np.multiply(left, under).sum(dtype=np.float64))
        if np.float32(under_mass) > tail:
            left = np.compress(under, left)
        elif low == high:
            ties = int(np.count_nonzero(left == low))
            below, left = under_mass + ties * float(low), np.compress(left > low, left)
            if np.float32(below) > tail or left.size == 0:
                return float(low)
        else:
            inner = np.compress((left >= low) & (left < high), left)
            inner_mass = under_mass + float(inner.sum(dtype=np.float64))
            if np.float32(inner_mass) > tail:
                below, left = under_mass, inner
            else:
                below, left = inner_mass, np.compress(left >= high, left)
    left = np.sort(left)
    enough = (below + left.cumsum(dtype=np.float64)).astype(np.float32) > tail
    return float(left[enough.argmax() if enough.any() else -1])


def _bracket(left: NDArray[np.float32], below: float, tail: float) -> tuple[np.float32, np.float32]:
    """Two of the values, low <= high, between which a sample expects the boundary."""
    sample = np.sort(left[:: left.size // _SAMPLE])
    masses = below + sample.cumsum(dtype=np.float64) * (left.size / sample.size)
    at = int(np.searchsorted(masses, tail))
    low = sample[max(min(at, sample.size) - _MARGIN, 0)]
    return low, sample[min(at + _MARGIN, sample.size - 1)]


def _softmax_(values: Tensor) -> Tensor:
    """Softmax over the last dimension; in place on the CPU, whose kernel goes row by row."""
    if values.device.type != "cpu":
        return torch.softmax(values, -1)
    return torch.softmax(values, -1, out=values)
