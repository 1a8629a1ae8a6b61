"""A draft model as its proposers use it: passes in the target's vocabulary, the laws to draw from,
and the cache that it drafts in."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.cache import CachedSequence, CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.vocabulary import Translation, Vocabulary, common_prefix
from specdec.runner import Runner, SequenceRows
from specdec.sampling import Law, SamplingParams
from specdec.sequence import Sequence
from specdec.verifier import Verdict

# Vocabularies of one tokenizer differ in padding rows only; more than this is another tokenizer.
MAX_PADDING_ROWS = 1024
# Leading tokens that a window keeps: attention rests on them (Xiao et al. 2023, 2309.17453).
SINKS = 4
# Rows of one pass over a text that is longer than the window.
_PIECE = 256


@dataclass(slots=True)
class _Text:
    """A sequence in the draft's own tokens."""

    tokens: list[int]  # what the draft reads
    read: int  # committed tokens of the target that are in it
    behind: list[int] = field(default_factory=list)  # what stands in its cache after those tokens
    is_drafted: bool = False  # since the last verdict


class DraftModel:
    """A model of the target's vocabulary, and the settings that it samples by.

    Where the two vocabularies differ by padding rows, the draft's law is cut or padded with zeros:
    a token that the target does not have is never drafted. Settings that are None are the target's
    own; processors=False leaves the processors before them to the target. Greedy targets are
    drafted for greedily.

    With two tokenizers that differ it drafts from its law on the tokens that both have (Timor et
    al. 2025, 2502.05202, section 5): that is the law that is stored, in the target's ids. Committed
    tokens that it does not have it reads as text. Where processors leave none of the shared tokens,
    it drafts what they leave.

    It drafts in the target's slots, where one commit serves both. A draft that reads tokens of its
    own has a cache group of its own, and so has a runner with a window (MagicDec, Chen et al. 2024,
    2408.11049): drafts see the sinks and at least the last `window` tokens of the text, less than a
    page more. Older pages are dropped before a step drafts, so that what it sees depends on the
    length of the text alone, and a sequence never holds more than window_slots, however long it is.
    """

    def __init__(
        self, runner: Runner, processors: bool, temperature: float | None, top_k: int | None,
        top_p: float | None, min_p: float | None, tokenizer: Any = None,
        draft_tokenizer: Any = None, as_text: bool = False,
    ) -> None:  # fmt: skip
        """tokenizer and draft_tokenizer: transformers' tokenizers of target and draft; None: they
        are the same. as_text: what it drafts is not proposed token by token."""
        if (tokenizer is None) != (draft_tokenizer is None):
            raise InvalidArgumentError(
                "tokenizer and draft_tokenizer: expected both, the target's and the draft's, or "
                "neither"
            )
        self.runner = runner
        self._tokenizers, self._as_text = (tokenizer, draft_tokenizer), as_text
        self.translation: Translation | None = None
        self._texts: dict[Sequence, _Text] = {}
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
        """As Proposer.join. Raises InvalidArgumentError for a vocabulary that is not the target's
        where no tokenizers were given."""
        self._vocab_size = vocab_size
        if self._tokenizers[0] is None:
            _check_padding(self.runner.vocab_size, vocab_size)
        else:
            translation = Translation(
                Vocabulary(self._tokenizers[0], vocab_size, "tokenizer"),
                Vocabulary(self._tokenizers[1], self.runner.vocab_size, "draft_tokenizer"),
                self.runner.device,
            )
            if not (as_text := self._as_text) and not translation.pairs:
                raise InvalidArgumentError(
                    "tokenizer and draft_tokenizer have no token in common; draft text: "
                    "proposer_options={'vocabulary': 'text', ...}"
                )
            self.translation = translation if as_text or not translation.is_identity else None
        if self._window is not None or self.translation is not None:
            group = CacheGroup(group.pool.page_size, 0, self.runner.device)
        self._group = group
        self.runner.join(group)

    @property
    def max_positions(self) -> int | None:
        """As Proposer.max_positions; within() counts what is read in tokens of its own."""
        return self.runner.max_positions if self._tokenizers[0] is None else None

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        """As Proposer.groups."""
        owns = self._window is not None or self.translation is not None
        return (self._group,) if owns and self._group is not None else ()

    def start(self, sequence: Sequence) -> None:
        """As Proposer.start."""
        if not self.groups:
            return
        [group] = self.groups
        length = len(sequence.tokens)
        if self.translation is not None:
            begun = self.translation.begin(sequence.tokens)
            self._texts[sequence] = _Text(begun, length)
            length = len(begun)
        slots = length + sequence.max_new_tokens
        if self._window is not None:
            slots = min(slots, window_slots(self._window, group.pool.page_size))
        self._caches[sequence] = group.open(slots, SINKS)

    def observe(self, sequences: Items[Sequence], verdicts: Items[Verdict]) -> None:
        """As Proposer.observe, of trees whose nodes this model numbered."""
        if not self.groups:  # what the verifier committed was committed for the draft too
            return
        assert self._group is not None
        commits: list[tuple[CachedSequence, int, list[int]]] = []
        for sequence, verdict in zip(sequences, verdicts, strict=True):
            text = self._texts.get(sequence)
            if text is not None and not text.is_drafted:
                continue
            length = len(sequence.tokens) if text is None else len(text.tokens)
            slots = [length + node for node in verdict.path]
            commits.append((self._caches[sequence], length, slots))
            if text is not None and self.translation is not None:
                text.is_drafted = False
                pairs = self.translation.pairs
                text.behind = [pairs.get(t, 0) for t in verdict.tokens[: verdict.accepted]]
        self._group.commit_all(commits)

    def finish(self, sequence: Sequence) -> None:
        """As Proposer.finish."""
        self._texts.pop(sequence, None)
        if sequence in self._caches:
            assert self._group is not None
            self._group.close(self._caches.pop(sequence))

    def cache(self, sequence: Sequence) -> CachedSequence:
        """Where a sequence is drafted."""
        return self._caches[sequence] if self.groups else sequence.cache

    def cut(self, sequence: Sequence, nodes: int) -> None:
        """Forgets what was computed behind the first `nodes` nodes of the tree being drafted."""
        assert self._group is not None, "join a cache group first"
        text = self._texts.get(sequence)
        length = len(sequence.tokens) if text is None else len(text.tokens)
        self._group.truncate(self.cache(sequence), length + nodes)

    def within(self, sequences: Items[Sequence], budgets: Items[int]) -> Items[int]:
        """The budgets, less what would not fit into the draft's own context any more."""
        limit = self.runner.max_positions
        if self._tokenizers[0] is None or limit is None:
            return budgets
        own = self.translation is not None
        rooms = [limit - len(self._read(s).tokens if own else s.tokens) for s in sequences]
        return [max(0, min(pair)) for pair in zip(budgets, rooms, strict=True)]

    @property
    def known_tokens(self) -> int:
        """How many tokens both models have."""
        if self.translation is not None:
            return len(self.translation.pairs)
        return min(self._vocab_size, self.runner.vocab_size)

    @property
    def known_ids(self) -> int:
        """Every token that both have is below; one that only the target has has no mass there,
        unless processors leave no other."""
        return self.known_tokens if self.translation is None else self._vocab_size

    def largest(self, scores: Tensor, width: int) -> Tensor:
        """(n, V) -> (n, width) tokens of the largest scores, falling, that both models have."""
        return scores[:, : self.known_ids].topk(width, dim=-1).indices

    def uniform(self, q: Tensor) -> Tensor:
        """(V,) the same probability for every token that both models have; of q's kind."""
        law = torch.full_like(q[0], 1 / self.known_tokens)
        if self.translation is not None:
            law = torch.zeros_like(law).index_fill_(0, self.translation.shared, float(law[0]))
        else:
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
        if self.translation is not None:
            text = self._read(sequence)
            self.cut(sequence, -1)  # at least one row, whose logits are drafted from
            text.is_drafted = True
            return SequenceRows(cache, text.tokens[cache.computed_len(self.runner) :], keep=1)
        if cache is not sequence.cache:
            # what a step that raised has drafted; the engine took back the target's part of it
            self.cut(sequence, -1)
        tokens = sequence.tokens[cache.computed_len(self.runner) :]
        # A padding row that only the target has: any token will do, what is drafted behind it is
        # judged like everything else.
        known = [token if token < self.runner.vocab_size else 0 for token in tokens]
        return SequenceRows(cache, known, keep=1)

    def _read(self, sequence: Sequence) -> _Text:
        """Takes in what was committed; the cache keeps what of it the draft has computed."""
        assert self.translation is not None
        assert self._group is not None
        text = self._texts[sequence]
        added = self.translation.follow(sequence.tokens[text.read :], text.behind)
        kept = len(text.tokens) + common_prefix(added, text.behind)
        self._group.truncate(self.cache(sequence), kept)
        text.tokens += added
        text.read, text.behind, text.is_drafted = len(sequence.tokens), [], False
        return text

    def leave(self, sequence: Sequence, tokens: Items[int]) -> None:
        """Says which of the draft's own tokens it drafted behind the text, where they are not
        proposed one by one: what turns out to be said stays in the cache."""
        text = self._texts[sequence]
        text.behind, text.is_drafted = list(tokens), False

    def score(self, rows: list[SequenceRows]) -> Tensor:
        """One pass; nodes, and (sum of keep, V) logits, are of the target's vocabulary.

        With a window it drops pages before it reads committed tokens, and takes as many passes as
        it needs to read a long text.
        """
        if self.translation is not None:
            translated = self.translation.nodes
            rows = [
                row if row.nodes is None else replace(row, nodes=translated(row.nodes))
                for row in rows
            ]
            return self.translation.logits(self.score_own(rows))
        logits = self.score_own(rows)
        extra = self._vocab_size - logits.shape[1]
        if extra < 0:
            return logits[:, : self._vocab_size]
        return F.pad(logits, (0, extra), value=float("-inf")) if extra else logits

    def score_own(self, rows: list[SequenceRows]) -> Tensor:
        """As score, in the draft's own vocabulary."""
        if self._window is not None:
            rows = self._within_window(rows, self._window)
        elif self.groups:
            for row in rows:
                nodes = 0 if row.nodes is None else row.nodes.shape[0]
                end = row.cache.computed_len(self.runner) + len(row.tokens) + nodes
                self.groups[0].reserve(row.cache, end)
        return self.runner.score(rows)

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


def _check_padding(draft_size: int, size: int) -> None:
    if abs(draft_size - size) > MAX_PADDING_ROWS:
        raise InvalidArgumentError(
            f"draft: its vocabulary has {draft_size} tokens, the target's {size}; expected a draft "
            "with the target's tokenizer, or the two tokenizers: proposer_options="
            "{'tokenizer': <the target's>, 'draft_tokenizer': <the draft's>}"
        )


def window_slots(window: int, page_size: int) -> int:
    """The most slots that a sequence's draft holds with a window, in whole pages: the sinks, the
    window, the page that is being left, and a piece of text or a tree no longer than the window."""
    parts = [SINKS, window, 1, min(window, _PIECE)]
    return sum(-(-slots // page_size) for slots in parts) * page_size
