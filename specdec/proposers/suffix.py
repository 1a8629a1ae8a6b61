"""Suffix decoding: the likeliest continuation of the text's end, by counts over the request and
over past outputs (Oliaro et al. 2024, 2411.04975; ArcticInference)."""

import os
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import isfinite
from typing import Literal, NamedTuple, get_args

import torch

from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.proposers.past_outputs import PastOutputs
from specdec.proposers.suffix_automaton import ROOT, Match, SuffixAutomaton
from specdec.rng import Noise
from specdec.sequence import Sequence
from specdec.tree import TokenTree

Mode = Literal["path", "tree"]
MAX_WIDTH = 16  # children of a node that `tree` looks at


class SuffixProposer(Proposer):
    """Proposes what followed the end of the text most often, before in this request or in past
    outputs, and as much of it as its counts make likely.

    For every length L of the text's end that occurred before, a draft has at most max_spec_factor *
    L + max_spec_offset tokens, each of probability at least min_token_prob: the share of the
    occurrences of the end that went on like this. mode `path` follows the most frequent token, of
    equals the latest; `tree` takes the likeliest nodes, at most MAX_WIDTH below one. The sum of the
    probabilities is the score, the expected number of accepted tokens under the counts; the best
    score wins, of equals the longer match, the request before the past.

    Strings of at most max_depth tokens are counted. The past is the output of requests that have
    ended, cache_tokens tokens of it, oldest out first; 0 switches it off. It is a guess about other
    requests, so a draft, and with it a sampled output, depends on what ended before; the law of the
    output does not. save(path) writes it, cache_file reads it.
    """

    name = "suffix"
    law = "point"
    free = True

    def __init__(
        self, *, mode: Mode = "path", max_depth: int = 64, min_token_prob: float = 0.1,
        max_spec_factor: float = 1.0, max_spec_offset: float = 0.0, cache_tokens: int = 1 << 16,
        cache_file: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        """Raises InvalidArgumentError for values out of range and for a file that is none."""
        self.settings = Settings(mode, min_token_prob, max_spec_factor, max_spec_offset)
        for name, value, least in (("max_depth", max_depth, 2), ("cache_tokens", cache_tokens, 0)):
            if type(value) is not int or value < least:
                raise InvalidArgumentError(
                    f"{name}={value!r}: expected a whole number, {least} or more"
                )
        self.max_depth = max_depth
        self.past = PastOutputs(cache_tokens, max_depth, self.settings.width)
        self._file = cache_file
        self._vocab_size = 0 if cache_file is None else self.past.load(cache_file)
        self._device = torch.device("cpu")
        self._empty = TokenTree.empty(self._device)
        self._requests: dict[Sequence, _Request] = {}

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        """Raises InvalidArgumentError where the file's outputs are of another vocabulary."""
        if self._vocab_size not in (0, vocab_size):
            raise InvalidArgumentError(
                f"cache_file={self._file!r}: made with a vocabulary of {self._vocab_size} tokens, "
                f"the target has {vocab_size}; use the file of this target"
            )
        self._vocab_size = vocab_size
        self._device = group.device
        self._empty = TokenTree.empty(self._device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the past outputs, for cache_file of a later run. Raises SpecDecError where the
        file cannot be written."""
        self.past.save(path, self._vocab_size)

    def start(self, sequence: Sequence) -> None:
        request = _Request(SuffixAutomaton(self.max_depth, self.settings.width))
        request.read(sequence.tokens, self.past)
        self._requests[sequence] = request

    def situation(self, sequence: Sequence) -> int:
        """How many bits the length of the longer match has, in the request or in the past: 0, 1,
        2-3, 4-7, ... tokens."""
        request = self._requests[sequence]
        request.read(sequence.tokens, self.past)
        return max(request.automaton.open.length, request.past.length).bit_length()

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        del noise
        trees = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            if not budget:  # what was said since is read when it is needed
                trees.append(self._empty)
                continue
            request = self._requests[sequence]
            request.read(sequence.tokens, self.past)
            best = self.settings.draft(request.automaton, request.automaton.open, budget)
            if request.past.length:
                past = self.past.automaton
                best = self.settings.draft(past, request.past, budget, best)
            trees.append(self._tree(best))
        return trees

    def finish(self, sequence: Sequence) -> None:
        self._requests.pop(sequence, None)  # one that failed on its way in was never started
        if sequence.finish_reason in ("stop", "length"):
            self.past.add(sequence.tokens[sequence.prompt_len :])

    def _tree(self, draft: "Draft") -> TokenTree:
        if not draft.tokens:
            return self._empty
        tokens = torch.tensor(draft.tokens, device=self._device)
        if draft.parents is None:
            return TokenTree.chain(tokens)
        return TokenTree(tokens, tuple(draft.parents))


class Draft(NamedTuple):
    """What one automaton proposes."""

    tokens: list[int]
    parents: list[int] | None  # None: a chain
    score: float  # expected accepted tokens


_NOTHING = Draft([], None, 0.0)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a draft is taken from counts; the defaults of SuffixProposer are the published ones."""

    mode: Mode
    min_token_prob: float
    max_spec_factor: float
    max_spec_offset: float

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InvalidArgumentError(
                f"mode={self.mode!r}: expected {' or '.join(get_args(Mode))}"
            )
        for name, least, most in (
            ("min_token_prob", 0.0, 1.0),
            ("max_spec_factor", 0.0, float("inf")),
            ("max_spec_offset", float("-inf"), float("inf")),
        ):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and isfinite(value) and least <= value <= most):
                raise InvalidArgumentError(f"{name}={value!r}: expected {least} to {most}")

    @property
    def width(self) -> int:
        """Tokens that can follow a node: more cannot all be as likely as min_token_prob."""
        if self.mode == "path":
            return 1
        return (
            int(min(MAX_WIDTH, 1 / self.min_token_prob + 1e-6))
            if self.min_token_prob
            else MAX_WIDTH
        )

    def draft(
        self, counts: SuffixAutomaton, end: Match, budget: int, best: Draft = _NOTHING
    ) -> Draft:
        """The best draft of at most `budget` tokens behind a text whose end is matched, if its
        score is above that of `best`, else `best`.

        All ends of one class have the same continuations, so its longest, which may draft most, is
        the best of them. Cost: one look per class, and few of them can beat the best so far.
        """
        budget = min(budget, counts.depth - 1)
        if budget <= 0 or not end.length:
            return best
        # what is drafted behind it is counted as well
        at = Match(end.state, end.length)
        counts.narrow(at, counts.depth - budget)
        state, length = at.state, at.length
        grow = self._tree if self.mode == "tree" else self._path
        while state != ROOT:
            nodes = int(self.max_spec_factor * length + self.max_spec_offset + 1e-6)
            if nodes > budget:
                nodes = budget
            likeliest = counts.best[state]
            if nodes > 0 and likeliest >= 0:
                most = counts.count[counts.moves[state][likeliest]] * nodes
                if most / counts.count[state] > best.score:
                    draft = grow(counts, state, nodes)
                    best = draft if draft.score > best.score else best
            state = counts.link[state]
            length = counts.length[state]
        return best

    # A path's probability is the product of count(child) / count(node): all but two counts cancel.

    def _path(self, counts: SuffixAutomaton, state: int, nodes: int) -> Draft:
        best, count, moves = counts.best, counts.count, counts.moves
        start, total = count[state], 0
        tokens: list[int] = []
        while len(tokens) < nodes:
            token = best[state]
            if token < 0:
                break
            state = moves[state][token]
            if count[state] / start < self.min_token_prob:
                break
            tokens.append(token)
            total += count[state]
        return Draft(tokens, None, total / start)

    def _tree(self, counts: SuffixAutomaton, state: int, nodes: int) -> Draft:
        count, moves = counts.count, counts.moves
        start, total = count[state], 0
        tokens: list[int] = []
        parents: list[int] = []
        heap: list[tuple[int, int, int, int]] = []  # -count, parent, rank, token
        states = []
        node = -1
        while True:
            for rank, token in enumerate(counts.followers(state)):
                its_count = count[moves[state][token]]
                if its_count / start < self.min_token_prob:
                    break
                heappush(heap, (-its_count, node, rank, token))
            states.append(state)
            if not heap or len(tokens) == nodes:
                return Draft(tokens, parents, total / start)
            node = len(tokens)
            negative, parent, _, token = heappop(heap)
            state = moves[states[parent + 1]][token]
            total -= negative
            tokens.append(token)
            parents.append(parent)


@dataclass(slots=True)
class _Request:
    """The counts of one request, and where its end stands in the past."""

    automaton: SuffixAutomaton
    past: Match = field(default_factory=Match)
    version: int = -1  # of the past that the match is for

    def read(self, tokens: list[int], past: PastOutputs) -> None:
        """Takes in what the text has grown by since the last call."""
        grown = tokens[self.automaton.num_tokens :]
        for token in grown:
            self.automaton.append(token)
        if self.version != past.version:
            self.past, self.version = Match(), past.version
            grown = tokens[1 - self.automaton.depth :]
        if past.automaton.num_tokens:
            for token in grown:
                past.automaton.advance(self.past, token)
