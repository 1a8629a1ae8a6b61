"""transformers' processors of known kinds, applied to all rows of all trees at once.

Each gives the scores of the class it is named after, called on every path alone, bit for bit. What
depends on a path's length is decided on the host, where lengths are known; a processor that is idle
at every row costs nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.generation import logits_process as hf

from specdec.sampling.paths import ABSENT, Paths

# Functions of the scores alone: transformers' own call serves every row.
ROW_WISE = (
    hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper,
    hf.TopHLogitsWarper, hf.TypicalLogitsWarper, hf.EpsilonLogitsWarper, hf.EtaLogitsWarper,
    hf.LogitNormalization, hf.InfNanRemoveLogitsProcessor, hf.SuppressTokensLogitsProcessor,
)  # fmt: skip


class PathProcessor(Protocol):
    """A processor of ours: one call for all rows."""

    def __call__(self, scores: Tensor, paths: Paths) -> Tensor:
        """(n, V) scores -> (n, V) scores; the input is left alone."""


def vectorised(processor: Any) -> PathProcessor | None:
    """The same processor for all rows at once; None for a kind that is not known.

    A subclass is another kind: it may do anything.
    """
    if isinstance(processor, (OccurrencePenalties, MinNewTokens)):
        return processor
    make = _KNOWN.get(type(processor))
    return None if make is None else make(processor)


@dataclass(frozen=True, slots=True)
class OccurrencePenalties:
    """Takes presence from the score of every token generated before on the path, and frequency
    once more for each time: the penalties of OpenAI's API and of vLLM. The prompt does not count.
    """

    presence: float
    frequency: float

    def __call__(self, scores: Tensor, paths: Paths) -> Tensor:
        ids = _inside(paths.from_position(paths.prompt_lens), scores.shape[1])
        counts = scores.new_zeros(scores.shape[0], scores.shape[1] + 1)
        counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=scores.dtype))
        counts = counts[:, :-1]
        return scores - self.frequency * counts - self.presence * (counts > 0)


@dataclass(frozen=True, slots=True)
class MinNewTokens:
    """No end token before so many tokens were generated."""

    count: int
    eos_token_ids: tuple[int, ...]

    def __call__(self, scores: Tensor, paths: Paths) -> Tensor:
        generated = [n - p for n, p in zip(paths.lengths, paths.prompt_lens, strict=True)]
        tokens = torch.tensor(self.eos_token_ids, dtype=torch.long)
        return _ban(scores, [n < self.count for n in generated], tokens)


def _inside(ids: Tensor, vocab_size: int) -> Tensor:
    """ids with everything outside the vocabulary at vocab_size, a column that is dropped."""
    return ids.masked_fill((ids < 0) | (ids >= vocab_size), vocab_size)


def _where(active: Sequence[bool], yes: Callable[[], Tensor], no: Tensor) -> Tensor:
    """yes() at the active rows; not called when there are none."""
    if not any(active):
        return no
    return torch.where(torch.tensor(active, device=no.device)[:, None], yes(), no)


def _ban(scores: Tensor, active: Sequence[bool], tokens: Tensor) -> Tensor:
    """-inf at these tokens of the active rows; tokens outside the vocabulary do not matter."""

    def banned() -> Tensor:
        hidden = torch.zeros(scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        hidden[_inside(tokens.to(scores.device), scores.shape[1])] = True
        return scores.masked_fill(hidden[:-1], float("-inf"))

    return _where(active, banned, scores)


def _force(scores: Tensor, active: Sequence[bool], tokens: Tensor | int) -> Tensor:
    """Nothing but these tokens at the active rows."""

    def forced() -> Tensor:
        only = torch.full_like(scores, float("-inf"))
        only[:, tokens] = 0
        return only

    return _where(active, forced, scores)


def _repetition_penalty(processor: hf.RepetitionPenaltyLogitsProcessor) -> PathProcessor | None:
    ignored, penalty = processor.prompt_ignore_length, processor.penalty
    if isinstance(ignored, Tensor):
        return None  # one number per row of transformers' own batch

    def apply(scores: Tensor, paths: Paths) -> Tensor:
        ids = paths.ids
        if ignored is not None:
            ids = paths.from_position([ignored - padding for padding in paths.paddings])
        ids = _inside(ids, scores.shape[1])
        padded = F.pad(scores, (0, 1))
        seen = padded.gather(1, ids)
        seen = torch.where(seen < 0, seen * penalty, seen / penalty)
        return padded.scatter_(1, ids, seen)[:, :-1]

    return apply


def _no_repeat_ngram(processor: hf.NoRepeatNGramLogitsProcessor) -> PathProcessor:
    size = processor.ngram_size

    def apply(scores: Tensor, paths: Paths) -> Tensor:
        ids, V = paths.ids, scores.shape[1]
        if max(paths.lengths) < size:
            return scores
        windows = ids.unfold(1, size, 1)  # (n, L - size + 1, size)
        last = ids[:, ids.shape[1] - size + 1 :]
        # a window that begins before its path never counts
        match = (windows[..., :-1] == last[:, None]).all(-1) & (windows[..., 0] != ABSENT)
        banned = scores.new_zeros(scores.shape[0], V + 1, dtype=torch.bool)
        banned.scatter_(1, _inside(windows[..., -1].masked_fill(~match, ABSENT), V), True)
        return scores.masked_fill(banned[:, :V], float("-inf"))

    return apply


def _on_aligned_ids(processor: hf.SequenceBiasLogitsProcessor) -> PathProcessor:
    """Looks at the ends of paths only, where ABSENT equals no token."""
    return lambda scores, paths: cast(Tensor, processor(paths.ids, scores))


def _min_length(processor: hf.MinLengthLogitsProcessor) -> PathProcessor:
    least, tokens = processor.min_length, processor.eos_token_id
    return lambda scores, paths: _ban(scores, [n < least for n in paths.counted()], tokens)


def _min_new_tokens(processor: hf.MinNewTokensLengthLogitsProcessor) -> PathProcessor:
    least = processor.prompt_length_to_skip + processor.min_new_tokens
    tokens = processor.eos_token_id
    return lambda scores, paths: _ban(scores, [n < least for n in paths.counted()], tokens)


def _suppress_at_begin(processor: hf.SuppressTokensAtBeginLogitsProcessor) -> PathProcessor:
    tokens = processor.begin_suppress_tokens

    def apply(scores: Tensor, paths: Paths) -> Tensor:
        return _ban(scores, [n == processor.begin_index for n in paths.counted()], tokens)

    return apply


def _forced_bos(processor: hf.ForcedBOSTokenLogitsProcessor) -> PathProcessor:
    token = processor.bos_token_id
    return lambda scores, paths: _force(scores, [n == 1 for n in paths.counted()], token)


def _forced_eos(processor: hf.ForcedEOSTokenLogitsProcessor) -> PathProcessor:
    last, tokens = processor.max_length - 1, processor.eos_token_id
    return lambda scores, paths: _force(scores, [n == last for n in paths.counted()], tokens)


def _exponential_decay(processor: hf.ExponentialDecayLengthPenalty) -> PathProcessor:
    start, factor = processor.regulation_start, processor.regulation_factor

    def apply(scores: Tensor, paths: Paths) -> Tensor:
        over = [n - start for n in paths.counted()]
        tokens = processor.eos_token_id.to(scores.device)

        def raised() -> Tensor:
            weights = [factor**n - 1 if n > 0 else 0.0 for n in over]
            eos = scores[:, tokens]
            weight = torch.tensor(weights, dtype=scores.dtype, device=scores.device)
            extra = (eos.abs() * weight[:, None]).masked_fill(~eos.isfinite(), 0.0)
            return scores.index_copy(1, tokens, eos + extra)

        return _where([n > 0 for n in over], raised, scores)

    return apply


_KNOWN: dict[type, Callable[[Any], PathProcessor | None]] = {
    hf.RepetitionPenaltyLogitsProcessor: _repetition_penalty,
    hf.NoRepeatNGramLogitsProcessor: _no_repeat_ngram,
    hf.SequenceBiasLogitsProcessor: _on_aligned_ids,
    hf.NoBadWordsLogitsProcessor: _on_aligned_ids,
    hf.MinLengthLogitsProcessor: _min_length,
    hf.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    hf.SuppressTokensAtBeginLogitsProcessor: _suppress_at_begin,
    hf.ForcedBOSTokenLogitsProcessor: _forced_bos,
    hf.ForcedEOSTokenLogitsProcessor: _forced_eos,
    hf.ExponentialDecayLengthPenalty: _exponential_decay,
}
