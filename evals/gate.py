"""Is a text the target's own? What a benchmark asks before it reports a speed.

The texts are read again by transformers' forward, in one pass over each. A greedy text, or one
whose noise is known, must take the best token at every position; where it does not, the two tokens
must be closer than rounding can tell, which is measured there: the logits again in a wider dtype.
A sampled text must look drawn from the laws: its probability integral transform is uniform.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import exp, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.rng import PhiloxNoise
from specdec.sampling import Paths, SamplingParams

# False alarms per row of a sampled benchmark.
LEVEL = 1e-4
# Both sides of a comparison of two logits may be off by the error that was measured, and the other
# implementation's error is another number of the same size.
_SLACK = 4.0
_ULP = 2.0**-23
_HALF = (torch.bfloat16, torch.float16)
_WIDER = {torch.float32: torch.float64}  # of other dtypes: float32


@dataclass(frozen=True, slots=True)
class Near:
    """A token that is not the best one, as wide logits have it."""

    position: int  # among the new tokens
    gap: float  # how much less its logit is than the best
    rounding: float  # largest error of the model's own logits there

    @property
    def is_explained(self) -> bool:
        return self.gap <= _SLACK * self.rounding


@dataclass(slots=True)
class Verdict:
    """Of one row: its texts, and what is known of them."""

    texts: int = 0
    equal: int = 0  # the same tokens as the first row's
    near_ties: int = 0  # texts with tokens that only rounding tells from the best
    largest_gap: float = 0.0
    wrong: list[str] = field(default_factory=list)  # why, one per text
    tested_tokens: int = 0  # sampled
    p_value: float | None = None

    @property
    def passed(self) -> bool:
        return not self.wrong and (self.p_value is None or self.p_value >= LEVEL)

    @property
    def note(self) -> str:
        """In a few words."""
        if self.wrong:
            return self.wrong[0]
        if self.p_value is not None:
            verdict = "fits the target's laws" if self.passed else "DOES NOT FIT the target's laws"
            return f"{verdict}: p = {self.p_value:.2g}, {self.tested_tokens} tokens"
        ties = f", {self.near_ties} near-ties up to {self.largest_gap:.1g}"
        return f"{self.equal} of {self.texts} texts equal" + (ties if self.near_ties else "")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "note": self.note}


class Gate:
    """Judges texts of one model under one way of sampling."""

    def __init__(self, model: Any, sampling: SamplingParams) -> None:
        """model: a transformers model that nobody wrapped; sampling without processors."""
        self.model, self.sampling, self.law = model, sampling, sampling.law()
        self._wide: Any = None
        self._known: dict[tuple[Any, ...], list[Near]] = {}
        self._rng = np.random.default_rng(0)

    @property
    def knows_paths(self) -> bool:
        """Whether a text whose noise is known can be told exactly: where a law is cut off, rounding
        decides about tokens at the edge, and in half precision that is often."""
        cut = self.law.truncation
        keeps_all = cut.top_k == 0 and cut.top_p == 1 and cut.min_p == 0
        return keeps_all or self.model.dtype not in _HALF

    @torch.no_grad()
    def not_best(
        self, prompt: Sequence[int], tokens: Sequence[int], seed: int | None
    ) -> list[Near]:
        """Tokens of a text that are not the best ones: of the logits, or with a seed of the scores
        with that seed's noise, in the model's own dtype and in a wider one."""
        key = (tuple(prompt), tuple(tokens), seed)
        if key not in self._known:
            self._known[key] = self._not_best(prompt, tokens, seed)
        return self._known[key]

    def _not_best(
        self, prompt: Sequence[int], tokens: Sequence[int], seed: int | None
    ) -> list[Near]:
        chosen = torch.tensor(tokens, device=self.model.device)[:, None]
        noise = self._noise(len(prompt), len(tokens), seed)
        own = self._scores(self.model, prompt, tokens, seed)
        best = (own + noise).argmax(-1, keepdim=True)
        if torch.equal(best, chosen):
            return []
        wide = self._scores(self._widened(), prompt, tokens, seed)
        both = wide.isfinite() & own.isfinite()
        rounding = (own - wide).masked_fill(~both, 0.0).abs().amax(-1)
        # scores, and their sums with noise, are kept in float32
        rounding += _ULP * wide.masked_fill(~both, 0.0).abs().amax(-1)
        noisy = wide + noise
        gaps = (noisy.amax(-1) - noisy.gather(-1, chosen)[:, 0]).tolist()
        return [
            Near(position, gap, error)
            for position, (gap, error) in enumerate(zip(gaps, rounding.tolist(), strict=True))
            if gap > 0
        ]

    @torch.no_grad()
    def transforms(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Per token: the mass of the likelier ones and a uniform share of its own. Of a text drawn
        from the laws they are independent and uniform; a token without mass gives 2."""
        laws = self.law.probabilities(self._logits(self.model, prompt, tokens), _no_paths)
        chosen = torch.tensor(tokens, device=laws.device)[:, None]
        mass = laws.gather(-1, chosen)
        above = torch.where(laws > mass, laws, 0.0).sum(-1)
        ties = torch.where(laws == mass, laws, 0.0)
        below = torch.arange(laws.shape[1], device=laws.device)[None] < chosen
        above = above + torch.where(below, ties, 0.0).sum(-1)
        own = mass[:, 0].double().cpu().numpy()
        found = above.double().cpu().numpy() + own * self._rng.random(len(tokens))
        result: list[float] = np.where(own > 0, np.minimum(found, 1.0), 2.0).tolist()
        return result

    def _scores(
        self, model: Any, prompt: Sequence[int], tokens: Sequence[int], seed: int | None
    ) -> Tensor:
        logits = self._logits(model, prompt, tokens)
        if seed is None:
            return logits
        # the rule takes logarithms of a law: a constant per row less
        return self.law.scores(logits, _no_paths).to(logits.dtype)

    def _noise(self, start: int, count: int, seed: int | None) -> Tensor:
        if seed is None:
            return torch.zeros((), device=self.model.device)
        positions, width = list(range(start, start + count)), self.model.config.vocab_size
        return PhiloxNoise().gumbel([seed] * count, positions, width, self.model.device)

    @staticmethod
    def _logits(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """(T, V) what each token was chosen from."""
        ids = torch.tensor([[*prompt, *tokens]], device=model.device)
        logits: Tensor = model(ids, use_cache=False).logits[0, -len(tokens) - 1 : -1]
        return logits if logits.dtype == torch.float64 else logits.float()

    def _widened(self) -> Any:
        if self._wide is None:
            wider = _WIDER.get(self.model.dtype, torch.float32)
            self._wide = copy.deepcopy(self.model).to(wider)
        return self._wide


def uniform_p_value(values: Sequence[float]) -> float:
    """Kolmogorov-Smirnov test of uniformity, by its limit law; 0 where a value is above 1."""
    ordered = np.sort(np.array(values))
    n = len(ordered)
    if n == 0 or ordered[-1] > 1:
        return 1.0 if n == 0 else 0.0
    ranks = np.arange(n)
    distance = max((ordered - ranks / n).max(), ((ranks + 1) / n - ordered).max())
    # Stephens' correction makes the limit good from a few values on
    x = distance * (sqrt(n) + 0.12 + 0.11 / sqrt(n))
    series = sum((-1) ** (k - 1) * exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return float(min(1.0, max(0.0, 2 * series))) if x > 0.2 else 1.0


def _no_paths() -> Paths:
    raise AssertionError("no processor of a benchmark looks at a path")
