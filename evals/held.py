"""Text that is given: a processor and a runner that hold a model to it, at its full
cost.

The built-in pair hardly copies, so what lookup proposers gain on copied text is measured with its
output held to the copy. Such figures are of the system, not of the pair: label them HELD.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.runner import ModelRunner, SequenceRows

HELD = "held to the reference"
_NEVER, _CERTAIN = -1e4, 1e4


class HeldTo(LogitsProcessor):
    """Leaves one token possible at each position: that of the text, prompt included.

    Works alike in specdec and in transformers' generate, for one prompt without padding. Behind the
    end of the text its last token is repeated. A draft model shares the target's processors; give
    it proposer_options={"processors": False}, or it is held too.
    """

    def __init__(self, text: Sequence[int]) -> None:
        if not text:
            raise InvalidArgumentError("text: it is empty")
        self.text = tuple(text)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        held = torch.full_like(scores, _NEVER)
        held[:, self.text[min(input_ids.shape[1], len(self.text) - 1)]] = 0.0
        return held


class HeldRunner:
    """A Runner whose model computes as ever and then says what `text` says at each position,
    without what a processor costs that is called path by path. One sequence at a time."""

    def __init__(self, model: Any) -> None:
        self._runner = ModelRunner(model)
        self.vocab_size, self.device = self._runner.vocab_size, self._runner.device
        self.max_positions, self.uses_threads = self._runner.max_positions, False
        self.text = torch.empty(0, dtype=torch.long)  # prompt and continuation

    def join(self, group: CacheGroup) -> None:
        self._runner.join(group)
        group.memory[self] = group.memory.pop(self._runner)

    def score(self, rows: Sequence[SequenceRows]) -> Tensor:
        following: list[int] = []
        for row in rows:
            begin = row.cache.computed_len(self)
            row.cache.computed[self._runner] = begin
            last = begin + len(row.tokens) - 1
            places = list(range(begin, last + 1))
            nodes = 0 if row.nodes is None else row.nodes.shape[0]
            parents = range(-1, nodes - 1) if row.parents is None else row.parents
            depths: list[int] = []
            for parent in parents:
                depths.append(depths[parent] + 1 if parent >= 0 else 1)
            places += [last + depth for depth in depths[:nodes]]
            following += places[len(places) - row.keep :]
        logits = self._runner.score(rows)
        for row in rows:
            row.cache.computed[self] = row.cache.computed.pop(self._runner)
        wanted = self.text[[min(place + 1, len(self.text) - 1) for place in following]]
        return torch.zeros_like(logits).scatter_(1, wanted[:, None], _CERTAIN)
