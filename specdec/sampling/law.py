"""The law that is sampled from and compared: processors along each path, then truncation."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from specdec.errors import InvalidArgumentError
from specdec.sampling.paths import Path, Paths
from specdec.sampling.processors import ROW_WISE, PathProcessor, vectorised
from specdec.sampling.stateful import ForkableProcessor, ForkPerPath, PathByPath
from specdec.sampling.truncation import Truncation

# A state of their own, which a rejected draft would corrupt, or a second model inside.
_REFUSED = (
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor, hf.SynthIDTextWatermarkLogitsProcessor,
)  # fmt: skip
# In the order in which one Truncation applies them.
_WARPERS = (
    (hf.TemperatureLogitsWarper, "temperature"), (hf.TopKLogitsWarper, "top_k"),
    (hf.TopPLogitsWarper, "top_p"), (hf.MinPLogitsWarper, "min_p"),
)  # fmt: skip


class Law:
    """Turns rows of logits into the distributions that are sampled from and compared.

    Target and draft share it; each row is processed along its own path, so a penalty sees the
    drafted tokens before it. Equal to calling each processor on every path alone, as transformers'
    generate would. Unknown processors are not asked about drafts behind one of eos_token_ids.
    Raises InvalidArgumentError for a processor that keeps a state of its own and has no
    fork(parent, token).
    """

    def __init__(
        self, processors: Sequence[Any], *, greedy: bool, eos_token_ids: Sequence[int] = ()
    ) -> None:
        self.processors, self.greedy = tuple(processors), greedy
        self._steps, self.truncation = _compiled(processors, frozenset(eos_token_ids))
        self._proved = False

    @property
    def by_path(self) -> bool:
        """Whether some processor needs the tokens of each row's path."""
        return any(not isinstance(step, (_RowWise, Truncation)) for step in self._steps)

    @property
    def is_truncation(self) -> bool:
        """Whether it is its truncation of the logits, with no processor before."""
        return not self._steps

    @property
    def slow_processors(self) -> tuple[str, ...]:
        """Names of the processors that are called path by path on the host."""
        return tuple(type(step.processor).__name__ for step in self._slow)

    @property
    def _slow(self) -> tuple[PathByPath | ForkPerPath, ...]:
        return tuple(s for s in self._steps if isinstance(s, (PathByPath, ForkPerPath)))

    def truncated(self, truncation: Truncation, *, greedy: bool, processors: bool) -> "Law":
        """This law under another truncation; with or without the processors before it.

        Forks along paths are shared with this law.
        """
        other = Law((), greedy=greedy)
        other._steps = self._steps if processors else ()
        other.truncation, other._proved = truncation, True
        return other

    def prove(self, prompt: Path, vocab_size: int, device: torch.device) -> None:
        """Raises InvalidArgumentError for a processor that cannot be used; once per law.

        Unknown ones are called on the prompt to see whether they keep a state; token ids of known
        ones must lie in the vocabulary.
        """
        if self._proved:
            return
        for processor in self.processors:
            _check_tokens(processor, vocab_size)
        if self._slow:
            scores = torch.linspace(-8, 8, vocab_size, device=device).roll(vocab_size // 3)[None]
            for step in self._slow:
                step.prove(prompt, scores)
        self._proved = True

    def scores(self, logits: Tensor, paths: Callable[[], Paths]) -> Tensor:
        """(n, V) logits -> (n, V) processed scores in float32.

        paths() gives each row's tokens from the start of its prompt; only called when by_path.
        """
        return self.truncation.scores(self._processed(logits, paths))

    def probabilities(self, logits: Tensor, paths: Callable[[], Paths]) -> Tensor:
        """(n, V) logits -> (n, V) laws in float32."""
        return self.truncation.law(self._processed(logits, paths) if self._steps else logits)

    def best(self, logits: Tensor, paths: Callable[[], Paths]) -> Tensor:
        """(n,) lowest-index argmax of each row's processed scores."""
        plain = not self._steps and self.truncation.changes_nothing
        return (logits if plain else self.scores(logits, paths)).argmax(-1)

    def _processed(self, logits: Tensor, paths: Callable[[], Paths]) -> Tensor:
        scores = logits.float()
        found = paths() if self.by_path else None
        for step in self._steps:
            if isinstance(step, Truncation):
                scores = step.scores(scores)
            elif isinstance(step, _RowWise):
                scores = step(scores)
            else:
                assert found is not None
                scores = step(scores, found)
        return scores


class _RowWise:
    """A function of the scores alone."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, scores: Tensor) -> Tensor:
        nothing = torch.zeros(scores.shape[0], 1, dtype=torch.long, device=scores.device)
        processed: Tensor = self.processor(nothing, scores)
        return processed


_Step = Truncation | _RowWise | PathByPath | ForkPerPath | PathProcessor


def _compiled(
    processors: Sequence[Any], ends: frozenset[int]
) -> tuple[tuple[_Step, ...], Truncation]:
    """The steps before the last truncation, and that; runs of warpers become one truncation."""
    steps: list[_Step] = []
    rank = -1  # of the last warper of the run, -1 outside of one
    for processor in processors:
        before, rank = rank, _rank(processor)
        if rank < 0:
            steps.append(_step(processor, ends))
            continue
        _, name = _WARPERS[rank]
        run = steps.pop() if 0 <= before < rank else Truncation()
        assert isinstance(run, Truncation)
        steps.append(replace(run, **{name: getattr(processor, name)}))
    last = steps.pop() if rank >= 0 else Truncation()
    assert isinstance(last, Truncation)
    return tuple(steps), last


def _rank(processor: Any) -> int:
    """Its place in _WARPERS; -1 for anything else, and for a warper with unusual options."""
    usual = (
        getattr(processor, "filter_value", float("-inf")) == float("-inf")
        and getattr(processor, "min_tokens_to_keep", 1) == 1
    )
    kinds = [kind for kind, _ in _WARPERS]
    return kinds.index(type(processor)) if usual and type(processor) in kinds else -1


def _step(processor: Any, ends: frozenset[int]) -> _Step:
    can_fork = isinstance(processor, ForkableProcessor)
    if isinstance(processor, _REFUSED) and not can_fork:
        raise InvalidArgumentError(
            f"{type(processor).__name__} keeps a state or runs a model of its own; a rejected "
            "draft would corrupt it. Give it fork(parent, token) "
            "(specdec.sampling.ForkableProcessor), remove it, or use model.generate()"
        )
    if type(processor) in ROW_WISE:
        return _RowWise(processor)
    known = vectorised(processor)
    if known is not None:
        return known
    return ForkPerPath(processor, ends) if can_fork else PathByPath(processor, ends)


def _check_tokens(processor: Any, vocab_size: int) -> None:
    for tokens in getattr(processor, "sequence_bias", None) or ():
        bad = [token for token in tokens if not 0 <= token < vocab_size]
        if bad:
            raise InvalidArgumentError(
                f"{type(processor).__name__}: token {bad[0]}: expected 0 to {vocab_size - 1}"
            )
