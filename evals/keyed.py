"""Exact laws through the production key function: every Philox counter is a uniform of its own.

PhiloxNoise runs as it is, but the rounds that would mix a counter are replaced by ones that number
it. Two decisions that are handed the same counter word then share one number in the enumeration,
and a key that is used twice shows up as a bias.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from operator import mul
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from specdec import rng as philox
from specdec.evals.enumeration import (
    START,
    Comparison,
    Grow,
    Law,
    Probability,
    Replay,
    Tables,
    Verify,
    chained,
    leaves,
    plain_decoding,
)  # fmt: skip
from specdec.rng import Noise, PhiloxNoise, StepNoise

SEED, PROMPT = 12345, 7  # any seed, any number of tokens before the text
PURPOSES = ("draft", "accept", "residual", "bonus")

Address = tuple[int, str, int]  # row, purpose, copy
Key = Callable[[int, int], tuple[int, int]]  # (position, row) -> (position, row)


class Uniforms:
    """Named uniforms on [0, 1), each of which may decide more than once."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._left: dict[int, tuple[Probability, Probability]] = {}  # what a number can still be

    def decide(self, name: int, edges: Sequence[Probability]) -> int:
        """The first i with edges[i] > u; the edges ascend to 1."""
        low, high = self._left.get(name, (Fraction(0), Fraction(1)))
        cuts = [min(max(edge, low), high) for edge in (0, *edges)]
        chosen = self._replay.choose([b - a for a, b in itertools.pairwise(cuts)], high - low)
        self._left[name] = cuts[chosen], cuts[chosen + 1]
        return chosen


class StepRng:
    """The rng of one iteration: decisions are addressed, addresses have names."""

    def __init__(self, uniforms: Uniforms, names: Mapping[Address, int]) -> None:
        self._uniforms, self._names, self._drawn = uniforms, names, 0

    def at(self, row: int, purpose: str, copy: int) -> "_Decision":
        return _Decision(self._uniforms, self._names[row, purpose, copy])

    def draw(self, weights: Law) -> int:
        """The i-th draw makes row i: without duplicates and breadth first, as the rules number."""
        self._drawn += 1
        return self.at(self._drawn, "draft", 0).categorical(weights)


class _Decision:
    def __init__(self, uniforms: Uniforms, name: int) -> None:
        self._uniforms, self._name = uniforms, name

    def bernoulli(self, p: Probability) -> bool:
        return self._uniforms.decide(self._name, (p, 1)) == 0

    def categorical(self, weights: Law) -> int:
        total = sum(weights)
        sums = [partial / total for partial in itertools.accumulate(weights)]
        return self._uniforms.decide(self._name, sums)


class RekeyedNoise(Noise):
    """Noise whose purposes are keyed by something else, or read what another reads: a planted
    fault. reads: a purpose -> whose numbers it has."""

    def __init__(
        self, keys: Mapping[str, Key], reads: Mapping[str, str] | None = None,
        noise: Noise | None = None,
    ) -> None:  # fmt: skip
        self._keys, self._reads, self._noise = keys, reads or {}, noise or PhiloxNoise()

    def step(
        self, seeds: Sequence[int], positions: Sequence[int], rows: int, device: torch.device,
        copies: int = 1,
    ) -> StepNoise:  # fmt: skip
        columns: dict[str, list[torch.Tensor]] = defaultdict(list)
        each = torch.arange(len(positions))
        for purpose, row in itertools.product(PURPOSES, range(rows)):
            key = self._keys.get(purpose, _unchanged)
            at, places = zip(*(key(position, row) for position in positions), strict=True)
            found = self._noise.step(seeds, at, max(places) + 1, device, copies)
            read = self._reads.get(purpose, purpose)
            numbers = getattr(found, read)
            if read == "accept" and purpose != "accept":
                numbers = numbers[..., 0]
            columns[purpose].append(numbers[each, list(places)])
        return StepNoise(**{purpose: torch.stack(parts, 1) for purpose, parts in columns.items()})

    def gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device
    ) -> torch.Tensor:
        return self._noise.gumbel(seeds, positions, vocab, device)

    def draft_gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], rows: Sequence[int], vocab: int,
        device: torch.device,
    ) -> torch.Tensor:  # fmt: skip
        return self._noise.draft_gumbel(seeds, positions, rows, vocab, device)


def _unchanged(position: int, row: int) -> tuple[int, int]:
    return position, row


@contextmanager
def numbered_counters() -> Iterator[None]:
    """Inside, a 24-bit uniform of PhiloxNoise is k * 2**-24, k the number of its counter word."""
    numbers: dict[tuple[int, ...], int] = {}

    def rounds(
        even: NDArray[np.uint32], odd: NDArray[np.uint32], key: NDArray[np.uint32]
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        lanes = np.stack(np.broadcast_arrays(*even, *odd, *key), -1)  # (..., 6)
        words = np.empty((4, *lanes.shape[:-1]), np.uint32)
        for place in np.ndindex(lanes.shape[:-1]):
            number = numbers.setdefault(tuple(lanes[place].tolist()), len(numbers))
            words[(slice(None), *place)] = (4 * number + np.arange(4)) << 8
        return words[0::2], words[1::2]

    with mock.patch.object(philox, "_rounds", rounds):
        yield


def step_names(noise: Noise, position: int, rows: int) -> dict[Address, int]:
    """Which number decides what in a step that begins at `position`."""
    step = noise.step([SEED], [position], rows, torch.device("cpu"))
    names = dict[Address, int]()
    for purpose in PURPOSES:
        values = getattr(step, purpose)[0].reshape(rows, -1).double() * 2**24
        for row, copies in enumerate(values.long().tolist()):
            names |= {(row, purpose, copy): name for copy, name in enumerate(copies)}
    return names


def compare_keyed(
    noise: Noise, verify: Verify, grow: Grow, shape: tuple[int, ...], tables: Tables
) -> Comparison:
    """Like enumeration.compare, with both iterations in one enumeration. No draft may draw a
    token twice below one node."""
    tokens, rows = len(shape) + 2, 1 + sum(itertools.accumulate(shape, mul))
    with numbered_counters():
        names = [step_names(noise, PROMPT + begun, rows) for begun in range(tokens)]

    def run(replay: Replay) -> list[int]:
        uniforms, text = Uniforms(replay), list[int]()
        for _ in range(2):
            if len(text) < tokens:
                rng = StepRng(uniforms, names[len(text)])
                root = grow(shape, tables, text[-1] if text else START, rng)
                text += verify(root, rng)
        return text[:tokens]

    plain = plain_decoding(tables.target)
    ours = chained([lambda _: leaves(run), plain], tokens)
    return Comparison(ours, chained([plain], tokens))
