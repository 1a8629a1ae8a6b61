"""transformers' processors of known kinds, applied to all rows of all trees at once.

Each gives the scores of the class it is named after, called on every path alone, bit for bit. What
depends on a path's length is decided on the host, where lengths are known; a processor that is idle
at every row costs nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
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
        generated = paths.from_position(paths.prompt_lens)
        ids, valid = _redirected(generated, scores.shape[1])
        counts = torch.zeros_like(scores).scatter_add_(1, ids, valid.to(scores.dtype))
        times = counts.gather(1, ids)
        lowered = scores.gather(1, ids) - self.frequency * times - self.presence * (times > 0)
        return scores.scatter(1, ids, lowered)


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


def _redirected(ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """ids with everything outside the vocabulary replaced by another id of the row, or by 0 where
    there is none; and which of them were inside. What is written twice is written alike."""
    valid = (ids >= 0) & (ids < vocab_size)
    some = ids.masked_fill(~valid, ABSENT).amax(1, keepdim=True).clamp_min(0)
    return torch.where(valid, ids, some), valid


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
        ids, valid = _redirected(ids, scores.shape[1])
        seen = scores.gather(1, ids)
        penalised = torch.where(seen < 0, seen * penalty, seen / penalty)
        return scores.scatter(1, ids, torch.where(valid.any(1, keepdim=True), penalised, seen))

    return apply


def _no_repeat_ngram(processor: hf.NoRepeatNGramLogitsProcessor) -> PathProcessor:
    size = processor.ngram_size

    def apply(scores: Tensor, paths: Paths) -> Tensor:
        ids, V = paths.ids, scores.shape[1]
        if max(paths.lengths) < size:
            return scores
        windows = ids.unfold(1, size, 1)  # (n, L - size + 1, size)
        last = ids[:, ids.shape[1] - size + 1 :]
        # of a path shorter than this, ABSENT and it stand nowhere else in the row
        match = (windows[..., :-1] == last[:, None]).all(-1)
        banned = scores.new_zeros(scores.shape[0], V + 1, dtype=torch.bool)
        banned.scatter_(1, _inside(windows[..., -1].masked_fill(~match, ABSENT), V), True)
        return scores.masked_fill(banned[:, :V], float("-inf"))

    return apply


def _sequence_bias(processor: hf.SequenceBiasLogitsProcessor) -> PathProcessor:
    biases: dict[tuple[int, ...], float] = processor.sequence_bias
    touched = sorted({sequence[-1] for sequence in biases})
    columns = torch.tensor(touched)
    by_prefix: dict[int, list[tuple[tuple[int, ...], float]]] = {0: []}
    for sequence, bias in biases.items():
        by_prefix.setdefault(len(sequence) - 1, []).append((sequence, bias))
    groups = [
        (
            torch.tensor([sequence[:-1] for sequence, _ in group], dtype=torch.long),
            torch.tensor([touched.index(sequence[-1]) for sequence, _ in group], dtype=torch.long),
            torch.tensor([bias for _, bias in group]),
        )
        for group in by_prefix.values()
        if group
    ]

    def apply(scores: Tensor, paths: Paths) -> Tensor:
        device = scores.device
        total = scores.new_zeros(scores.shape[0], len(touched))
        for prefixes, ends, bias in groups:
            length = prefixes.shape[-1]
            if length > paths.ids.shape[1]:
                continue
            last = paths.ids[:, None, paths.ids.shape[1] - length :]
            # ABSENT equals no token, so a short path matches no long prefix
            matching = (last == prefixes.to(device)).all(-1)
            added = torch.where(matching, bias.to(device), 0.0)
            total.index_add_(1, ends.to(device), added.to(scores.dtype))
        where = columns.to(device)
        return scores.index_copy(1, where, scores[:, where] + total)

    return apply


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
    hf.SequenceBiasLogitsProcessor: _sequence_bias,
    hf.NoBadWordsLogitsProcessor: _sequence_bias,
    hf.MinLengthLogitsProcessor: _min_length,
    hf.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    hf.SuppressTokensAtBeginLogitsProcessor: _suppress_at_begin,
    hf.ForcedBOSTokenLogitsProcessor: _forced_bos,
    hf.ForcedEOSTokenLogitsProcessor: _forced_eos,
    hf.ExponentialDecayLengthPenalty: _exponential_decay,
}
