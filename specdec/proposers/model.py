"""A draft model as its proposers use it: passes in the target's vocabulary, the laws to draw from,
and the cache that it drafts in."""

from collections.abc import Sequence as Items
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.cache import CachedSequence, CacheGroup
from specdec.runner import Runner, SequenceRows
from specdec.sampling import Law, SamplingParams
from specdec.sequence import Sequence
from specdec.verifier import Verdict

# Leading tokens that a window keeps: attention rests on them (Xiao et al. 2023, 2309.17453).
SINKS = 4
# Rows of one pass over a text that is longer than the window.
_PIECE = 256


class DraftModel:
    """A model of the target's vocabulary, and the settings that it samples by.

    Where the two vocabularies differ by padding rows, the draft's law is cut or padded with zeros:
    a token that the target does not have is never drafted. Settings that are None are the target's
    own; processors=False leaves the processors before them to the target. Greedy targets are
    drafted for greedily.

    It drafts in the target's slots, where one commit serves both. A runner with a window has a
    group of its own (MagicDec, Chen et al. 2024, 2408.11049): drafts see the sinks and at least the
    last `window` committed tokens, less than a page more. Older pages are dropped before a step
    drafts, so that what it sees depends on the length of the text alone, and a sequence never holds
    more than window_slots, however long it is.
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
        self._window: int | None = getattr(runner, "window", None)
        self._group: CacheGroup | None = None
        self._caches: dict[Sequence, CachedSequence] = {}  # in a group of its own

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        """As Proposer.join."""
        self._vocab_size = vocab_size
        if self._window is not None:
            group = CacheGroup(group.pool.page_size, 0, self.runner.device)
        self._group = group
        self.runner.join(group)

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        """As Proposer.groups."""
        return () if self._window is None or self._group is None else (self._group,)

    def start(self, sequence: Sequence) -> None:
        """As Proposer.start."""
        if self._window is None:
            return
        assert self._group is not None, "join a cache group first"
        slots = len(sequence.tokens) + sequence.max_new_tokens
        most = window_slots(self._window, self._group.pool.page_size)
        self._caches[sequence] = self._group.open(min(slots, most), SINKS)

    def observe(self, sequences: Items[Sequence], verdicts: Items[Verdict]) -> None:
        """As Proposer.observe, of trees whose nodes this model numbered."""
        if not self.groups:  # what the verifier committed was committed for the draft too
            return
        assert self._group is not None
        for sequence, verdict in zip(sequences, verdicts, strict=True):
            length = len(sequence.tokens)
            slots = [length + node for node in verdict.path]
            self._group.commit(self._caches[sequence], length, slots)

    def finish(self, sequence: Sequence) -> None:
        """As Proposer.finish."""
        if sequence in self._caches:
            assert self._group is not None
            self._group.close(self._caches.pop(sequence))

    def cache(self, sequence: Sequence) -> CachedSequence:
        """Where a sequence is drafted."""
        return self._caches[sequence] if self.groups else sequence.cache

    def cut(self, sequence: Sequence, nodes: int) -> None:
        """Forgets what was computed behind the first `nodes` nodes of the tree being drafted."""
        assert self._group is not None, "join a cache group first"
        self._group.truncate(self.cache(sequence), len(sequence.tokens) + nodes)

    @property
    def known_tokens(self) -> int:
        """How many tokens both models have."""
        return min(self._vocab_size, self.runner.vocab_size)

    def largest(self, scores: Tensor, width: int) -> Tensor:
        """(n, V) -> (n, width) tokens of the largest scores, falling, that both models have."""
        return scores[:, : self.known_tokens].topk(width, dim=-1).indices

    def uniform(self, q: Tensor) -> Tensor:
        """(V,) the same probability for every token that both models have; of q's kind."""
        law = torch.full_like(q[0], 1 / self.known_tokens)
        law[self.known_tokens :] = 0
        return law

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
        cache = self.cache(sequence)
        if cache is not sequence.cache:
            # what a step that raised has drafted; the engine took back the target's part of it
            self.cut(sequence, -1)
        tokens = sequence.tokens[cache.computed_len(self.runner) :]
        # A padding row that only the target has: any token will do, what is drafted behind it is
        # judged like everything else.
        known = [token if token < self.runner.vocab_size else 0 for token in tokens]
        return SequenceRows(cache, known, keep=1)

    def score(self, rows: list[SequenceRows]) -> Tensor:
        """One pass; (sum of keep, V) logits in the target's vocabulary.

        With a window it drops pages before it reads committed tokens, and takes as many passes as
        it needs to read a long text.
        """
        if self._window is not None:
            rows = self._within_window(rows, self._window)
        logits = self.runner.score(rows)
        extra = self._vocab_size - logits.shape[1]
        if extra < 0:
            return logits[:, : self._vocab_size]
        return F.pad(logits, (0, extra), value=float("-inf")) if extra else logits

    def _within_window(self, rows: list[SequenceRows], window: int) -> list[SequenceRows]:
        """Reads all but the last few of each row's tokens; returns what is left, with room."""
        assert self._group is not None
        group, runner = self._group, self.runner
        few = group.pool.page_size
        while long := [row for row in rows if len(row.tokens) > few]:
            pieces = []
            for row in long:
                computed = row.cache.computed_len(runner)
                count = min(window, _PIECE, len(row.tokens) - few)
                group.drop(row.cache, computed - window)
                group.reserve(row.cache, row.cache.slot(computed) + count)
                pieces.append(SequenceRows(row.cache, row.tokens[:count]))
            runner.score(pieces)
            read = {id(row): len(piece.tokens) for row, piece in zip(long, pieces, strict=True)}
            rows = [replace(row, tokens=row.tokens[read.get(id(row), 0) :]) for row in rows]
        for row in rows:
            end = row.cache.computed_len(runner) + len(row.tokens)
            if row.tokens:
                group.drop(row.cache, end - 1 - window)
            nodes = 0 if row.nodes is None else row.nodes.shape[0]
            group.reserve(row.cache, row.cache.slot(end) + nodes)
        return rows


def window_slots(window: int, page_size: int) -> int:
    """The most slots that a sequence's draft holds with a window, in whole pages: the sinks, the
    window, the page that is being left, and a piece of text or a tree no longer than the window."""
    parts = [SINKS, window, 1, min(window, _PIECE)]
    return sum(-(-slots // page_size) for slots in parts) * page_size
