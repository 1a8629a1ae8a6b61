"""Counter-based randomness: every number is a function of (seed, purpose, position, node, word).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The key is the
request's 64-bit seed; the counter words are (word, node, position, purpose). Noise of a step is
keyed by the number of tokens committed when the step began, which grows every step, so nothing is
ever drawn twice; only the purpose `coupled` is keyed by absolute position.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.errors import InvalidArgumentError

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_SEED_TAG = 0x73706563  # keeps derived seeds apart from every purpose


class Purpose(IntEnum):
    """The last counter word: what a number decides."""

    COUPLED = 0  # plain sampling and the gumbel rule; position is absolute
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    BONUS = 4


def philox_numpy(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """(..., 4) counters and (..., 2) keys -> (..., 4) words."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    words = _rounds(c0, c1, c2, c3, key[..., 0].astype(np.uint64), key[..., 1].astype(np.uint64))
    return np.stack(words, axis=-1).astype(np.uint32)


def _rounds(
    c0: NDArray[np.uint64], c1: NDArray[np.uint64], c2: NDArray[np.uint64],
    c3: NDArray[np.uint64], k0: NDArray[np.uint64], k1: NDArray[np.uint64],
) -> tuple[NDArray[np.uint64], ...]:  # fmt: skip
    """The ten rounds on 32-bit values held in 64-bit words."""
    shift, low = np.uint64(32), np.uint64(_LOW)
    m0, m1, w0, w1 = (np.uint64(x) for x in (_M0, _M1, _W0, _W1))
    for _ in range(10):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + w0) & low, (k1 + w1) & low
    return c0, c1, c2, c3


def philox_torch(counter: Tensor, key: Tensor) -> Tensor:
    """philox_numpy on int64 tensors that hold 32-bit values; the same bits."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # a signed product wraps, and its high word comes out right under the mask
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c2 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, ((p0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """32-bit words -> [0, 1): their upper 24 bits, exact in float32."""
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def log_uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """32-bit words -> (0, 1) in float64, never 0 or 1: safe under logarithms."""
    return ((words >> np.uint64(8)).astype(np.float64) + 0.5) * 2.0**-24


def split_seed(seed: int) -> tuple[int, int]:
    """A 64-bit seed as (low, high) key words."""
    if not 0 <= seed < 1 << 64:
        raise InvalidArgumentError(f"seed={seed}: expected 0 to 2**64 - 1")
    return seed & _LOW, seed >> 32


def derive_seed(seed: int, row: int, sample: int) -> int:
    """The seed of sample `sample` of row `row`; row = sample = 0 is the seed itself."""
    key = np.array(split_seed(seed), dtype=np.uint32)
    if row == sample == 0:
        return seed
    counter = np.array([row, sample, 0, _SEED_TAG], dtype=np.uint32)
    words = philox_numpy(counter, key)
    return int(words[0]) | int(words[1]) << 32


@dataclass(frozen=True, slots=True, eq=False)
class StepNoise:
    """The uniforms of one step, each (B, rows) float32 in [0, 1); row 0 is the root, row i + 1
    node i of the tree."""

    draft: Tensor  # draws node i
    accept: Tensor  # accepts node i
    residual: Tensor  # draws the token that replaces a rejected child of this row
    bonus: Tensor  # draws the token that follows this row when everything was accepted


class Noise(ABC):
    """Where random numbers come from."""

    @abstractmethod
    def step(
        self, seeds: Sequence[int], positions: Sequence[int], rows: int, device: torch.device
    ) -> StepNoise:
        """One step's uniforms; positions: tokens committed when the step began, per sequence."""

    @abstractmethod
    def gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device
    ) -> Tensor:
        """(R, vocab) standard Gumbel noise of absolute positions, one row per (seed, position)."""


class PhiloxNoise(Noise):
    """Production noise; stateless, so order and batching change nothing."""

    def step(
        self, seeds: Sequence[int], positions: Sequence[int], rows: int, device: torch.device
    ) -> StepNoise:
        purposes = (Purpose.DRAFT, Purpose.ACCEPT, Purpose.RESIDUAL, Purpose.BONUS)
        keys = np.array([split_seed(s) for s in seeds], dtype=np.uint64)  # (B, 2)
        shape = (len(purposes), len(seeds), rows)
        node = np.broadcast_to(np.arange(rows, dtype=np.uint64), shape)
        where = np.broadcast_to(np.array(positions, dtype=np.uint64)[:, None], shape)
        purpose = np.broadcast_to(np.array(purposes, dtype=np.uint64)[:, None, None], shape)
        words = _rounds(
            np.zeros(shape, dtype=np.uint64), node, where, purpose, keys[:, :1], keys[:, 1:]
        )
        return StepNoise(*torch.from_numpy(uniform(words[0])).to(device).unbind(0))

    def gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device
    ) -> Tensor:
        keys = np.array([split_seed(s) for s in seeds], dtype=np.uint64)
        blocks = -(-vocab // 4)
        shape = (len(seeds), blocks)
        word = np.broadcast_to(np.arange(blocks, dtype=np.uint64), shape)
        where = np.broadcast_to(np.array(positions, dtype=np.uint64)[:, None], shape)
        zero = np.zeros(shape, dtype=np.uint64)
        words = _rounds(word, zero, where, zero + int(Purpose.COUPLED), keys[:, :1], keys[:, 1:])
        u = log_uniform(np.stack(words, axis=-1).reshape(len(seeds), blocks * 4)[:, :vocab])
        return torch.from_numpy((-np.log(-np.log(u))).astype(np.float32)).to(device)


class RecordedNoise(Noise):
    """Noise that a test wrote down: uniforms by (purpose, sequence), Gumbel rows by position."""

    def __init__(
        self,
        uniforms: Mapping[Purpose, Tensor] | None = None,
        gumbel_rows: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._uniforms, self._gumbel = dict(uniforms or {}), dict(gumbel_rows or {})

    def step(
        self, seeds: Sequence[int], positions: Sequence[int], rows: int, device: torch.device
    ) -> StepNoise:
        del positions
        order = (Purpose.DRAFT, Purpose.ACCEPT, Purpose.RESIDUAL, Purpose.BONUS)
        for purpose in order:
            held = self._uniforms.get(purpose)
            if held is None or held.shape[0] != len(seeds) or held.shape[1] < rows:
                raise InvalidArgumentError(f"no {rows} recorded uniforms for {purpose.name}")
        return StepNoise(*(self._uniforms[p][:, :rows].float().to(device) for p in order))

    def gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device
    ) -> Tensor:
        del seeds, vocab
        missing = [p for p in positions if p not in self._gumbel]
        if missing:
            raise InvalidArgumentError(f"no recorded Gumbel noise for position {missing[0]}")
        return torch.stack([self._gumbel[p] for p in positions]).to(device)
