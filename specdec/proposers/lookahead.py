"""Lookahead decoding: n-grams from Jacobi trajectories, which the target works out beside its
verification (Fu et al. 2024, 2402.02057)."""

from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.rng import Noise, philox_numpy
from specdec.sequence import Sequence
from specdec.shapes import MAX_NODES
from specdec.tree import TokenTree
from specdec.verifier import Verdict

MAX_KEYS = 8192  # first tokens that a sequence's pool knows; the one longest without news goes out
_KEY = np.array([0x6C6F6F6B, 0x61686561], np.uint32)  # of the words that pick prompt tokens
_BLOCK = 256


class LookaheadProposer(Proposer):
    """Proposes the n-grams that a Jacobi iteration of the target met behind the last token.

    window columns are guesses about positions ahead, each a trajectory of at most ngram - 1 tokens
    one behind the other. In every step a column goes on by the target's argmax behind its last
    token; when it has ngram tokens they go to the pool, and its first one leaves. The pool keeps,
    per first token, the guesses latest n-grams, besides those of the text itself
    (pool_from_prompt); those of the last committed token are the draft. The columns start with
    random tokens of the prompt, from a fixed seed, window + ngram - 3 of them; one leaves in each
    of the first ngram - 2 steps. An end token in a column is replaced by such a token too.

    Columns and n-grams are branches of one token tree, since entry (level, column) sees just the
    path to it: the first tokens of the columns up to its own, then its column's. So one target pass
    scores all, nodes of equal path once; columns may be accepted as well, n-grams are verified from
    the first step on, and a whole n-gram emits ngram tokens, where the published code emits one
    less. A budget goes to the n-grams, the latest first, then to the columns, the nearest first; a
    column that did not fit, or lies past the last token to be emitted, waits as it is.

    It tells no situations apart: a step without n-grams pays later, by those that it finds.

    The tree is a function of the committed tokens, of how steps divided them and of budgets;
    trajectories follow the argmax when sampling too, so they hold no coin of the verification.
    """

    name = "lookahead"
    law = "point"

    def __init__(
        self, *, window: int = 7, ngram: int = 5, guesses: int = 7, pool_from_prompt: bool = True
    ) -> None:
        """Raises InvalidArgumentError for values out of range and for more than MAX_NODES nodes."""
        for name, value, least in (("window", window, 1), ("ngram", ngram, 2),
                                   ("guesses", guesses, 1)):  # fmt: skip
            if type(value) is not int or not least <= value <= MAX_NODES:
                raise InvalidArgumentError(
                    f"{name}={value!r}: expected a whole number, {least} to {MAX_NODES}"
                )
        if type(pool_from_prompt) is not bool:
            raise InvalidArgumentError(
                f"pool_from_prompt={pool_from_prompt!r}: expected True or False"
            )
        self.window, self.ngram, self.guesses = window, ngram, guesses
        self.pool_from_prompt = pool_from_prompt
        if self.preferred_nodes > MAX_NODES:
            raise InvalidArgumentError(
                f"window={window}, ngram={ngram}, guesses={guesses}: their tree has "
                f"{self.preferred_nodes} nodes, (ngram - 1) * (window + guesses) - 1 or more: "
                f"expected at most {MAX_NODES}; make one of them smaller"
            )
        self._device = torch.device("cpu")
        self._empty = TokenTree.empty(self._device)
        self._states: dict[Sequence, _State] = {}

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        del vocab_size
        self._device = group.device
        self._empty = TokenTree.empty(self._device)

    @property
    def preferred_nodes(self) -> int:
        return self.nodes_within(self.window + self.ngram - 2)

    def nodes_within(self, depth: int) -> int:
        """The largest window of this depth, filling or full, and all n-grams."""
        W, N = self.window, self.ngram
        columns = (
            levels * min(W + N - 1 - levels, depth - levels + 2) - 1 for levels in range(1, N)
        )
        return max(0, *columns) + self.guesses * max(0, min(N - 1, depth))

    def start(self, sequence: Sequence) -> None:
        state = _State(Pool(self.ngram, self.guesses), sequence.tokens[: sequence.prompt_len])
        columns = self.window + self.ngram - 2
        state.columns = [sequence.tokens[-1:], *([state.draw()] for _ in range(columns - 1))]
        self._states[sequence] = state

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        del noise
        trees = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            state = self._read(sequence)
            branches = _Branches(min(budget, self.preferred_nodes), sequence.remaining - 1)
            for gram in reversed(state.pool.get(sequence.tokens[-1])):
                branches.add_part(gram)
            state.ends = branches.add_columns(state.columns)
            tokens = torch.tensor(branches.tokens, dtype=torch.long, device=self._device)
            tree = TokenTree(tokens, tuple(branches.parents))
            trees.append(tree if len(tree) else self._empty)
        return trees

    def observe(self, sequences: Items[Sequence], verdicts: Items[Verdict]) -> None:
        """Every scored column goes on by the target's argmax: one read per batch."""
        states = [self._states[sequence] for sequence in sequences]
        rows = [
            verdict.logits[torch.tensor([end + 1 for end in state.ends], device=self._device)]
            for state, verdict in zip(states, verdicts, strict=True)
            if state.ends
        ]
        if not rows:
            return
        following = iter(torch.cat(rows).argmax(-1).tolist())
        for sequence, state in zip(sequences, states, strict=True):
            fresh = [next(following) for _ in state.ends]
            state.advance(fresh, self.ngram, self.window, sequence.eos_token_ids)

    def finish(self, sequence: Sequence) -> None:
        self._states.pop(sequence, None)  # one that failed on its way in was never started

    def _read(self, sequence: Sequence) -> "_State":
        """The sequence's state behind its last token."""
        state = self._states[sequence]
        state.columns[0][0] = sequence.tokens[-1]
        if self.pool_from_prompt:
            state.pool.extend(sequence.tokens)
        return state


class Pool:
    """n-grams by their first token, per token the latest `guesses`, for MAX_KEYS tokens."""

    __slots__ = ("_grams", "guesses", "ngram", "size")

    def __init__(self, ngram: int, guesses: int) -> None:
        self.ngram, self.guesses = ngram, guesses
        self.size = 0  # tokens of the text that were read
        # Per first token its continuations, the latest last; a dict without values is an ordered
        # set. The token that had news last is last.
        self._grams: OrderedDict[int, dict[tuple[int, ...], None]] = OrderedDict()

    def insert(self, first: int, rest: tuple[int, ...]) -> None:
        """rest: the ngram - 1 tokens behind it."""
        held = self._grams.setdefault(first, {})
        held.pop(rest, None)
        held[rest] = None
        if len(held) > self.guesses:
            del held[next(iter(held))]
        self._grams.move_to_end(first)
        if len(self._grams) > MAX_KEYS:
            self._grams.popitem(last=False)

    def extend(self, tokens: list[int]) -> None:
        """Inserts the n-grams that the text has grown by since the last call."""
        for end in range(max(self.size + 1, self.ngram), len(tokens) + 1):
            first = end - self.ngram
            self.insert(tokens[first], tuple(tokens[first + 1 : end]))
        self.size = len(tokens)

    def get(self, first: int) -> list[tuple[int, ...]]:
        """The continuations of a token, the latest last."""
        return list(self._grams.get(first, ()))

    def __len__(self) -> int:
        return len(self._grams)


@dataclass(slots=True, eq=False)
class _State:
    """One sequence's window and pool."""

    pool: Pool
    prompt: list[int]
    # Column j: the tokens of levels 0, 1, .. at positions s + j, s + j + 1, .. where s is that of
    # the last committed token, which is level 0 of column 0.
    columns: list[list[int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # nodes of the columns scored, -1 the root
    drawn: int = 0

    def draw(self) -> int:
        """A random token of the prompt."""
        word = _words(self.drawn // _BLOCK)[self.drawn % _BLOCK]
        self.drawn += 1
        return self.prompt[word % len(self.prompt)]

    def advance(
        self, fresh: Items[int], ngram: int, window: int, eos_token_ids: frozenset[int]
    ) -> None:
        """fresh: what follows each of the first columns, those that were scored."""
        for token, column in zip(fresh, self.columns, strict=False):
            column.append(token)
            if len(column) == ngram:
                self.pool.insert(column[0], tuple(column[1:]))
                del column[0]
            if token in eos_token_ids:
                column[-1] = self.draw()
        if fresh and len(self.columns) > window:
            del self.columns[0]
        self.ends = []


class _Branches:
    """Branches merged by full path, at most `budget` nodes, none deeper than `depth`."""

    __slots__ = ("_index", "budget", "depth", "parents", "tokens")

    def __init__(self, budget: int, depth: int) -> None:
        self.budget, self.depth = budget, depth
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._index: dict[tuple[int, int], int] = {}  # (parent, token) -> node

    def add_part(self, path: Items[int]) -> None:
        """As much of a path below the root as fits."""
        node = -1
        for token in path[: max(0, self.depth)]:
            known = self._index.get((node, token))
            if known is None and len(self.tokens) >= self.budget:
                return
            node = self._add(node, token)

    def add_columns(self, columns: Items[list[int]]) -> list[int]:
        """The leading columns that fit whole; returns the node of each one's last token, -1 for
        the root."""
        ends: list[int] = []
        trunk = -1
        if self.budget <= 0:  # nothing is to be drafted, so that nothing is to be learnt
            return ends
        for j, column in enumerate(columns):
            path = column if j else column[1:]
            if j + len(column) - 1 > self.depth or self._new(trunk, path) > self._free:
                break
            if j:
                trunk = self._add(trunk, column[0])
            node = trunk
            for token in column[1:]:
                node = self._add(node, token)
            ends.append(node)
        return ends

    @property
    def _free(self) -> int:
        return self.budget - len(self.tokens)

    def _new(self, node: int, path: Items[int]) -> int:
        """How many nodes a path below a node adds."""
        for depth, token in enumerate(path):
            known = self._index.get((node, token))
            if known is None:
                return len(path) - depth
            node = known
        return 0

    def _add(self, parent: int, token: int) -> int:
        node = self._index.get((parent, token))
        if node is None:
            node = self._index[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
        return node


@lru_cache(maxsize=64)
def _words(block: int) -> list[int]:
    """Random words, the same ones for every sequence."""
    counters = np.zeros((_BLOCK // 4, 4), np.uint32)
    counters[:, 0] = np.arange(_BLOCK // 4)
    counters[:, 1] = block
    words: list[int] = philox_numpy(counters, _KEY).ravel().tolist()
    return words
