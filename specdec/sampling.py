"""Logits -> the law really sampled from: temperature, truncation, processors along each path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from specdec.errors import InvalidArgumentError

Path = Sequence[int]

# Functions of the scores alone: one call serves every row of every tree.
_ROW_WISE = (
    hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper, hf.EpsilonLogitsWarper, hf.EtaLogitsWarper, hf.LogitNormalization,
)  # fmt: skip
# Functions of the length as transformers counts it, left padding included.
_BY_LENGTH = (
    hf.MinLengthLogitsProcessor, hf.MinNewTokensLengthLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor, hf.ForcedBOSTokenLogitsProcessor,
    hf.ExponentialDecayLengthPenalty, hf.SuppressTokensAtBeginLogitsProcessor,
)  # fmt: skip
# A state of their own, which a rejected draft would corrupt, or a second model inside.
_REFUSED = (
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor, hf.SynthIDTextWatermarkLogitsProcessor,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. temperature 0 is greedy decoding."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    processors: LogitsProcessorList | None = None  # further ones, applied before these

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")

    def law(self) -> "Law":
        """The law these parameters describe, in transformers' order of processors."""
        processors = LogitsProcessorList(self.processors or [])
        if self.temperature > 0:
            if self.temperature != 1:
                processors.append(hf.TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k > 0:
                processors.append(hf.TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                processors.append(hf.TopPLogitsWarper(self.top_p))
            if self.min_p > 0:
                processors.append(hf.MinPLogitsWarper(self.min_p))
        return Law(processors, greedy=self.temperature == 0)


def _counts_padding(processor: Any) -> bool:
    ignores_tokens = isinstance(getattr(processor, "prompt_ignore_length", None), int)
    return isinstance(processor, _BY_LENGTH) or ignores_tokens


def _require(ok: bool, name: str, value: object, accepted: str) -> None:
    if not ok:
        raise InvalidArgumentError(f"{name}={value!r}: expected {accepted}")


class Law:
    """Turns rows of logits into the distributions that are sampled from and compared.

    Target and draft share it; each row is processed along its own path, so a penalty sees the
    drafted tokens before it.
    """

    def __init__(self, processors: Sequence[Any], *, greedy: bool) -> None:
        for processor in processors:
            if isinstance(processor, _REFUSED):
                raise InvalidArgumentError(
                    f"{type(processor).__name__} keeps a state or runs a model of its own; a "
                    "rejected draft would corrupt it. Remove it, or use model.generate()"
                )
        self.processors = tuple(processors)
        self.greedy = greedy

    @property
    def by_path(self) -> bool:
        """Whether some processor needs the tokens of each row's path, on the host."""
        return any(not isinstance(p, _ROW_WISE) for p in self.processors)

    @property
    def slow_processors(self) -> tuple[str, ...]:
        """Names of the processors that are called once per row."""
        return tuple(type(p).__name__ for p in self.processors if not isinstance(p, _ROW_WISE))

    def scores(self, logits: Tensor, paths: Callable[[], list[Path]], padding: int = 0) -> Tensor:
        """(n, V) logits -> (n, V) processed scores in float32.

        paths() gives each row's tokens from the start of its prompt; it is only called when
        by_path. padding: how many left padding tokens transformers counted before the prompt.
        """
        scores = logits.float()
        rows: list[Path] | None = None
        nothing: Any = scores.new_zeros((scores.shape[0], 1), dtype=torch.long)
        for processor in self.processors:
            if isinstance(processor, _ROW_WISE):
                scores = processor(nothing, scores)
                continue
            if rows is None:
                rows = paths()
            extra = [0] * padding if _counts_padding(processor) else []
            scores = torch.cat(
                [
                    processor(
                        torch.tensor([[*extra, *path]], device=scores.device), scores[i : i + 1]
                    )
                    for i, path in enumerate(rows)
                ]
            )
        return scores

    def probabilities(
        self, logits: Tensor, paths: Callable[[], list[Path]], padding: int = 0
    ) -> Tensor:
        """(n, V) logits -> (n, V) laws in float32."""
        if not self.processors:
            return torch.softmax(logits, -1, dtype=torch.float32)
        return torch.softmax(self.scores(logits, paths, padding), -1)

    def best(self, logits: Tensor, paths: Callable[[], list[Path]], padding: int = 0) -> Tensor:
        """(n,) lowest-index argmax of each row's processed scores."""
        if self.processors:
            logits = self.scores(logits, paths, padding)
        return logits.argmax(-1)
