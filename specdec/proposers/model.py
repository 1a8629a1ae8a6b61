"""A draft model as its proposers use it: passes in the target's vocabulary, and the laws to draw
from."""

from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn import functional as F

from specdec.cache import CacheGroup
from specdec.runner import Runner, SequenceRows
from specdec.sampling import Law, SamplingParams
from specdec.sequence import Sequence


class DraftModel:
    """A model of the target's vocabulary, and the settings that it samples by.

    Where the two vocabularies differ by padding rows, the draft's law is cut or padded with zeros:
    a token that the target does not have is never drafted. Settings that are None are the target's
    own; processors=False leaves the processors before them to the target. Greedy targets are
    drafted for greedily.
    """

    def __init__(
        self, runner: Runner, processors: bool, temperature: float | None, top_k: int | None,
        top_p: float | None, min_p: float | None,
    ) -> None:  # fmt: skip
        self.runner = runner
        self._vocab_size = runner.vocab_size
        own = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        self._own = {name: value for name, value in own.items() if value is not None}
        SamplingParams(**self._own)  # type: ignore[arg-type]  # raises for values out of range
        self._processors = processors
        self._laws: WeakKeyDictionary[Law, Law] = WeakKeyDictionary()

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        """As Proposer.join."""
        self._vocab_size = vocab_size
        self.runner.join(group)

    @property
    def known_tokens(self) -> int:
        """Ids below this are tokens of both models."""
        return min(self._vocab_size, self.runner.vocab_size)

    def law(self, sequence: Sequence) -> Law:
        """What a sequence's tokens are drafted from: the target's law under these settings."""
        law = sequence.law
        own = {} if law.greedy else dict(self._own)
        if not own and self._processors:
            return law
        if law not in self._laws:
            greedy = law.greedy or own.get("temperature") == 0
            if greedy:
                own["temperature"] = 1.0
            self._laws[law] = law.truncated(
                replace(law.truncation, **own),  # type: ignore[arg-type]
                greedy=greedy,
                processors=self._processors,
            )
        return self._laws[law]

    def pending(self, sequence: Sequence) -> SequenceRows:
        """The committed tokens that the draft has not computed yet; logits of the last one."""
        cache = sequence.cache
        tokens = sequence.tokens[cache.computed_len(self.runner) :]
        # A padding row that only the target has: any token will do, what is drafted behind it is
        # judged like everything else.
        known = [token if token < self.runner.vocab_size else 0 for token in tokens]
        return SequenceRows(cache, known, keep=1)

    def score(self, rows: list[SequenceRows]) -> Tensor:
        """One pass; (sum of keep, V) logits in the target's vocabulary."""
        logits = self.runner.score(rows)
        extra = self._vocab_size - logits.shape[1]
        if extra < 0:
            return logits[:, : self._vocab_size]
        return F.pad(logits, (0, extra), value=float("-inf")) if extra else logits
