"""Counter-based randomness: every number is a function of (seed, purpose, position, node, word).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The key is the
request's 64-bit seed; the counter words are (word, node, position, purpose). Noise of a step is
keyed by the number of tokens committed when the step began, which grows every step, so nothing is
ever drawn twice; only the purpose `coupled` is keyed by absolute position.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.errors import InvalidArgumentError

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_MULTIPLIERS = np.array((_M0, _M1), np.uint64)
_STEPS = np.arange(10, dtype=np.uint32)[:, None] * np.array((_W0, _W1), np.uint32)  # (10, 2)
_LOW_HALF = 0 if sys.byteorder == "little" else 1
_CACHED = 1 << 16  # numbers made at once, so that what they are made from stays in the cache
_SEED_TAG = 0x73706563  # keeps derived seeds apart from every purpose


class Purpose(IntEnum):
    """The last counter word: what a number decides."""

    COUPLED = 0  # plain sampling and the gumbel rule; position is absolute
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    BONUS = 4


_STEP_PURPOSES = (Purpose.DRAFT, Purpose.ACCEPT, Purpose.RESIDUAL, Purpose.BONUS)


def philox_numpy(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """(..., 4) counters and (..., 2) keys -> (..., 4) words."""
    lanes = np.broadcast_shapes(counter.shape[:-1], key.shape[:-1])
    counters = np.broadcast_to(counter, (*lanes, 4)).reshape(-1, 4).T
    keys = np.broadcast_to(key, (*lanes, 2)).reshape(-1, 2).T
    even, odd = _rounds(np.array(counters[0::2], np.uint32), counters[1::2], keys)
    words = np.empty((even.shape[1], 4), np.uint32)
    words[:, 0::2], words[:, 1::2] = even.T, odd.T
    return words.reshape(*lanes, 4)


def _rounds(
    even: NDArray[np.uint32], odd: NDArray[np.uint32], key: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Counter words 0 and 2 in `even`, which is overwritten, 1 and 3 in `odd`; (2, ..., n) each.

    Pairs side by side make a round three numpy calls. The halves of the 64-bit products are read in
    place, from two buffers in turn, since a round still reads the low half of the one before.
    """
    ones = (1,) * (even.ndim - 1)
    keys = key + _STEPS.reshape(10, 2, *ones)  # (10, 2, ...); wraps around, as it should
    multipliers = _MULTIPLIERS.reshape(2, *ones)
    products = np.empty((2, *even.shape), np.uint64)
    halves = products.view(np.uint32)[:, ::-1]  # word 0 goes on with the product of word 2
    low, high = halves[..., _LOW_HALF::2], halves[..., 1 - _LOW_HALF :: 2]
    for i in range(10):
        side = i & 1
        np.multiply(even, multipliers, out=products[side])
        np.bitwise_xor(high[side], odd, out=even)
        np.bitwise_xor(even, keys[i], out=even)
        odd = low[side]
    return even, odd


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


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """32-bit words -> [0, 1): their upper 24 bits, exact in float32."""
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def log_uniform(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """32-bit words -> (0, 1) in float64, never 0 or 1: safe under logarithms."""
    return ((words >> np.uint32(8)).astype(np.float64) + 0.5) * 2.0**-24


def uniform_torch(words: Tensor) -> Tensor:
    """uniform on int64 tensors; the same bits."""
    return (words >> 8).float() * 2.0**-24


def log_uniform_torch(words: Tensor) -> Tensor:
    """log_uniform on int64 tensors; the same bits."""
    return ((words >> 8).double() + 0.5) * 2.0**-24


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
    """The uniforms of one step, float32 in [0, 1); row 0 is the root, row i + 1 node i of the
    tree."""

    draft: Tensor  # (B, rows) draws node i
    accept: Tensor  # (B, rows, copies) accepts node i, once per proposal that names it
    residual: Tensor  # (B, rows) draws the token that replaces the rejected children of this row
    bonus: Tensor  # (B, rows) draws the token that follows this row when everything was accepted


class Noise(ABC):
    """Where random numbers come from."""

    @abstractmethod
    def step(
        self, seeds: Sequence[int], positions: Sequence[int], rows: int, device: torch.device,
        copies: int = 1,
    ) -> StepNoise:  # fmt: skip
        """One step's uniforms; positions: tokens committed when the step began, per sequence;
        copies: accept coins per row, TreeBatch.copies."""

    @abstractmethod
    def gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device
    ) -> Tensor:
        """(R, vocab) standard Gumbel noise of absolute positions, one row per (seed, position)."""

    def draft_gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], rows: Sequence[int], vocab: int,
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        """(R, vocab) standard Gumbel noise that draws the children of a row of a tree without
        replacement, one row per (seed, tokens committed when the step began, row)."""
        del seeds, positions, rows, vocab, device
        raise InvalidArgumentError(f"{type(self).__name__} has no Gumbel noise for drafts")


class PhiloxNoise(Noise):
    """Production noise: pure functions of their arguments, so order and batching change nothing."""

    def __init__(self) -> None:
        # proposer and verifier ask for the same step
        self._steps = lru_cache(maxsize=4)(self._make_step)
        self._ahead = lru_cache(maxsize=256)(_uniforms_ahead)

    def step(
        self, seeds: Sequence[int], positions: Sequence[int], rows: int, device: torch.device,
        copies: int = 1,
    ) -> StepNoise:  # fmt: skip
        return self._steps(tuple(seeds), tuple(positions), rows, copies, device)

    def _make_step(
        self, seeds: tuple[int, ...], positions: tuple[int, ...], rows: int, copies: int,
        device: torch.device,
    ) -> StepNoise:  # fmt: skip
        if rows <= _AHEAD_ROWS and len(seeds) <= _AHEAD_SEEDS:
            where = zip(seeds, positions, strict=True)
            ahead = [self._ahead(s, p // _AHEAD, rows)[:, p % _AHEAD] for s, p in where]
            uniforms = np.stack(ahead, axis=1)
        else:
            uniforms = _step_uniforms(seeds, positions, rows)
        draft, accept, residual, bonus = torch.from_numpy(uniforms).to(device).unbind(0)
        coins = accept[..., None]
        if copies > 1:
            words = _accept_copies(_keys(seeds), positions, rows, copies)
            coins = torch.from_numpy(words).to(device)
        return StepNoise(draft, coins, residual, bonus)

    def gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device
    ) -> Tensor:
        nodes = (0,) * len(seeds)
        return torch.from_numpy(_gumbel(seeds, positions, nodes, Purpose.COUPLED, vocab)).to(device)

    def draft_gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], rows: Sequence[int], vocab: int,
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        return torch.from_numpy(_gumbel(seeds, positions, rows, Purpose.DRAFT, vocab)).to(device)


def _gumbel(
    seeds: Sequence[int], positions: Sequence[int], nodes: Sequence[int], purpose: Purpose,
    vocab: int,
) -> NDArray[np.float32]:  # fmt: skip
    noise = np.empty((len(seeds), vocab), np.float32)
    some = max(1, _CACHED // vocab)
    for first in range(0, len(seeds), some):
        part = slice(first, first + some)
        noise[part] = _gumbel_rows(seeds[part], positions[part], nodes[part], purpose, vocab)
    return noise


def _gumbel_rows(
    seeds: Sequence[int], positions: Sequence[int], nodes: Sequence[int], purpose: Purpose,
    vocab: int,
) -> NDArray[np.float64]:  # fmt: skip
    R, blocks = len(seeds), -(-vocab // 4)
    even = np.empty((2, R, blocks), np.uint32)
    even[0] = np.arange(blocks, dtype=np.uint32)
    even[1] = np.array(positions, np.uint32)[:, None]
    odd = np.empty((2, R, 1), np.uint32)
    odd[0], odd[1] = np.array(nodes, np.uint32)[:, None], int(purpose)
    even, odd = _rounds(even, odd, _keys(seeds).reshape(2, R, 1))
    words = np.empty((R, blocks, 4), np.uint32)
    words[..., 0::2], words[..., 1::2] = even.transpose(1, 2, 0), odd.transpose(1, 2, 0)
    noise = log_uniform(words.reshape(R, blocks * 4)[:, :vocab])
    for _ in range(2):  # -log(-log(u)), in place
        np.negative(np.log(noise, out=noise), out=noise)
    return noise


# Sixteen positions cost numpy what one does: thirty calls on a few numbers each; so do many
# requests, of which each has numbers of its own.
_AHEAD, _AHEAD_ROWS, _AHEAD_SEEDS = 16, 32, 8


def _uniforms_ahead(seed: int, block: int, rows: int) -> NDArray[np.float32]:
    """(purposes, positions, rows): the uniforms of one block of positions of one request."""
    first = block * _AHEAD
    return _step_uniforms((seed,) * _AHEAD, range(first, first + _AHEAD), rows)


def _step_uniforms(
    seeds: Sequence[int], positions: Sequence[int], rows: int
) -> NDArray[np.float32]:
    """(purposes, B, rows)."""
    odd = _step_counters(len(seeds), rows)
    even = np.zeros(odd.shape, np.uint32)
    even[1] = np.array(positions, np.uint32)[:, None]
    even, _ = _rounds(even, odd, _keys(seeds).reshape(2, 1, len(seeds), 1))
    return uniform(even[0])


def _accept_copies(
    keys: NDArray[np.uint32], positions: Sequence[int], rows: int, copies: int
) -> NDArray[np.float32]:
    """(B, rows, copies): copy c is output word c % 4 of block c // 4, so the first is the one of a
    step without copies."""
    counters = np.empty((len(positions), rows, -(-copies // 4), 4), np.uint32)
    counters[..., 0] = np.arange(counters.shape[2])
    counters[..., 1] = np.arange(rows)[:, None]
    counters[..., 2] = np.array(positions)[:, None, None]
    counters[..., 3] = int(Purpose.ACCEPT)
    words = philox_numpy(counters, keys.T[:, None, None])
    return uniform(words.reshape(len(positions), rows, -1)[..., :copies])


@lru_cache(maxsize=256)
def _step_counters(B: int, rows: int) -> NDArray[np.uint32]:
    """Counter words 1 (node) and 3 (purpose) of a step: (2, purposes, B, rows), never written."""
    odd = np.empty((2, len(_STEP_PURPOSES), B, rows), np.uint32)
    odd[0] = np.arange(rows)
    odd[1] = np.array(_STEP_PURPOSES)[:, None, None]
    odd.flags.writeable = False
    return odd


def _keys(seeds: Sequence[int]) -> NDArray[np.uint32]:
    """(2, B): low and high words."""
    return np.array([split_seed(seed) for seed in seeds], np.uint32).T


class OffsetNoise(Noise):
    """The noise of another proposer in the same step: its rows begin at `first` of those below it.

    Two that draw in one step must share nothing. Gumbel noise of absolute positions is the target's
    own and stays.
    """

    def __init__(self, noise: Noise, first: int) -> None:
        self._noise, self._first = noise, first

    def step(
        self, seeds: Sequence[int], positions: Sequence[int], rows: int, device: torch.device,
        copies: int = 1,
    ) -> StepNoise:  # fmt: skip
        first = self._first
        whole = self._noise.step(seeds, positions, rows + first, device, copies)
        return StepNoise(
            whole.draft[:, first:], whole.accept[:, first:], whole.residual[:, first:],
            whole.bonus[:, first:],
        )  # fmt: skip

    def gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device
    ) -> Tensor:
        return self._noise.gumbel(seeds, positions, vocab, device)

    def draft_gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], rows: Sequence[int], vocab: int,
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        moved = [row + self._first for row in rows]
        return self._noise.draft_gumbel(seeds, positions, moved, vocab, device)


class RecordedNoise(Noise):
    """Noise that a test wrote down: uniforms by (purpose, sequence), Gumbel rows by position.

    Accept coins may have one number per row, or one per copy.
    """

    def __init__(
        self,
        uniforms: Mapping[Purpose, Tensor] | None = None,
        gumbel_rows: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._uniforms, self._gumbel = dict(uniforms or {}), dict(gumbel_rows or {})

    def step(
        self, seeds: Sequence[int], positions: Sequence[int], rows: int, device: torch.device,
        copies: int = 1,
    ) -> StepNoise:  # fmt: skip
        del positions
        drawn: list[Tensor] = []
        for purpose in _STEP_PURPOSES:
            held = self._uniforms.get(purpose)
            if held is not None and purpose == Purpose.ACCEPT:
                held = held if held.ndim == 3 else held[..., None]
                held = held[..., :copies] if held.shape[2] >= copies else None
            if held is None or held.shape[0] != len(seeds) or held.shape[1] < rows:
                raise InvalidArgumentError(f"no {rows} recorded uniforms for {purpose.name}")
            drawn.append(held[:, :rows].float().to(device))
        return StepNoise(*drawn)

    def gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device
    ) -> Tensor:
        del seeds, vocab
        missing = [p for p in positions if p not in self._gumbel]
        if missing:
            raise InvalidArgumentError(f"no recorded Gumbel noise for position {missing[0]}")
        return torch.stack([self._gumbel[p] for p in positions]).to(device)
