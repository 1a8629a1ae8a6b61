"""SamplingParams: how one request is sampled."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from specdec.errors import InvalidArgumentError
from specdec.sampling.law import Law
from specdec.sampling.processors import MinNewTokens, OccurrencePenalties


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. temperature 0 is greedy decoding.

    Applied in transformers' order: logit_bias, repetition_penalty, presence_penalty and
    frequency_penalty, no_repeat_ngram_size, bad_words_ids, min_new_tokens, processors, temperature,
    top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff. Greedy decoding ignores what comes
    from temperature on. Each acts on every drafted token along its own path. Raises
    InvalidArgumentError for a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    processors: LogitsProcessorList | None = None  # further ones of transformers' kind
    repetition_penalty: float = 1.0  # divides scores of tokens of the prompt and the output
    presence_penalty: float = 0.0  # taken once from the score of every token of the output
    frequency_penalty: float = 0.0  # taken once for each time that it occurs there
    logit_bias: Mapping[int, float] | None = None  # token -> what is added to its score
    bad_words_ids: Sequence[Sequence[int]] = ()  # token sequences that are never completed
    no_repeat_ngram_size: int = 0  # 0: n-grams may repeat
    min_new_tokens: int = 0  # no end token before
    typical_p: float = 1.0  # Meister et al. 2022, 2202.00666
    epsilon_cutoff: float = 0.0  # Hewitt et al. 2022, 2210.15191; so is eta_cutoff
    eta_cutoff: float = 0.0

    def __post_init__(self) -> None:
        for name, (holds, accepted) in _RANGES.items():
            value = getattr(self, name)
            try:
                holds_here = holds(value)
            except TypeError:  # a value of another kind, which cannot be compared
                holds_here = False
            if not holds_here:
                raise InvalidArgumentError(f"{name}={value!r}: expected {accepted}")

    def law(self) -> Law:
        """The law these parameters describe."""
        processors = [*self._by_path(), *self._warpers()]
        return Law(processors, greedy=self.temperature == 0, eos_token_ids=self.eos_token_ids)

    def _by_path(self) -> list[Any]:
        found: list[Any] = []
        if self.logit_bias:
            bias = {(token,): float(value) for token, value in self.logit_bias.items()}
            found.append(hf.SequenceBiasLogitsProcessor(bias))  # type: ignore[arg-type]
        if self.repetition_penalty != 1:
            found.append(hf.RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.presence_penalty or self.frequency_penalty:
            found.append(OccurrencePenalties(self.presence_penalty, self.frequency_penalty))
        if self.no_repeat_ngram_size:
            found.append(hf.NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.bad_words_ids:
            found.append(hf.NoBadWordsLogitsProcessor([list(word) for word in self.bad_words_ids]))
        if self.min_new_tokens and self.eos_token_ids:
            found.append(MinNewTokens(self.min_new_tokens, tuple(self.eos_token_ids)))
        return [*found, *(self.processors or ())]

    def _warpers(self) -> list[Any]:
        if self.temperature == 0:
            return []
        found: list[Any] = []
        if self.temperature != 1:
            found.append(hf.TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k > 0:
            found.append(hf.TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(hf.TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            found.append(hf.MinPLogitsWarper(self.min_p))
        if self.typical_p < 1:
            found.append(hf.TypicalLogitsWarper(self.typical_p))
        if self.epsilon_cutoff > 0:
            found.append(hf.EpsilonLogitsWarper(self.epsilon_cutoff))
        if self.eta_cutoff > 0:
            found.append(hf.EtaLogitsWarper(self.eta_cutoff))
        return found


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 0


def _are_tokens(values: Any) -> bool:
    return all(_is_count(value) for value in values)


def _are_words(words: Any) -> bool:
    return all(len(word) > 0 and _are_tokens(word) for word in words)


def _is_bias(bias: Any) -> bool:
    return bias is None or (
        isinstance(bias, Mapping)
        and _are_tokens(bias)
        and all(float("-inf") <= value < float("inf") for value in bias.values())
    )


_FINITE = (math.isfinite, "a finite number")
_COUNT = (_is_count, "a whole number, 0 or more")
_RANGES: Mapping[str, tuple[Any, str]] = {
    "max_new_tokens": (lambda n: _is_count(n) and n >= 1, "at least 1"),
    "temperature": (lambda t: 0 <= t < math.inf, "0 (greedy) or more"),
    "top_k": (_is_count, "0 (all tokens) or more"),
    "top_p": (lambda p: 0 < p <= 1, "in (0, 1]"),
    "min_p": (lambda p: 0 <= p <= 1, "in [0, 1]"),
    "eos_token_ids": (_are_tokens, "token ids"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "more than 0; 1 changes nothing"),
    "presence_penalty": _FINITE,
    "frequency_penalty": _FINITE,
    "logit_bias": (_is_bias, "a mapping from token ids to numbers or -inf"),
    "bad_words_ids": (_are_words, "non-empty sequences of token ids"),
    "no_repeat_ngram_size": _COUNT,
    "min_new_tokens": _COUNT,
    "typical_p": (lambda p: 0 < p <= 1, "in (0, 1]"),
    "epsilon_cutoff": (lambda e: 0 <= e < 1, "in [0, 1)"),
    "eta_cutoff": (lambda e: 0 <= e < 1, "in [0, 1)"),
}
