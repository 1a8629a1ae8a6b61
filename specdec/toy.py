"""Models whose next-token laws are known: exact tables for tests and audits, synthetic drafts."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.cache import BlockTable, CacheGroup, LayerShape, Paged
from specdec.errors import InvalidArgumentError
from specdec.rng import log_uniform, philox_numpy, split_seed
from specdec.runner import Runner, SequenceRows

Context = tuple[int, ...]  # every token so far
Table = Callable[[Context], Sequence[float]]  # context -> law of the next token

_CACHED = 1 << 16  # contexts whose laws are kept
_CERTAIN = 1e4  # a logit beside which others are nothing


class TableRunner:
    """A Runner that answers from a table: the law after a context is table(context).

    It keeps the token and the position of every row in the paged slots that a model would keep keys
    and values in, and reads each context back from there. So a wrong commit, truncate, parent or
    slot shows: as the law of another context, or as an AssertionError where a slot holds another
    position than its own. Logits are log p in float32; on the CPU. A draft with a window gives the
    law after the tokens that it still sees.
    """

    device = torch.device("cpu")

    def __init__(
        self, table: Table, vocab_size: int, *, max_positions: int | None = None,
        window: int | None = None,
    ) -> None:  # fmt: skip
        """window: as ModelRunner's. Raises InvalidArgumentError for a table whose first law is
        none."""
        self.vocab_size, self.max_positions, self.window = vocab_size, max_positions, window
        self.uses_threads = False
        self.passes = 0
        self._table = table
        self._logits = lru_cache(maxsize=_CACHED)(self._logits_after)
        self._slots: _Slots | None = None
        self.law(())

    def law(self, context: Context) -> NDArray[np.float64]:
        """(V,) what follows a context. Raises InvalidArgumentError where the table says no law."""
        law = np.array(self._table(context), np.float64)
        if law.shape != (self.vocab_size,) or not law.min() >= 0 or abs(law.sum() - 1) > 1e-9:
            raise InvalidArgumentError(
                f"table: {law} after {context}: expected {self.vocab_size} probabilities"
            )
        return law

    def join(self, group: CacheGroup) -> None:
        self._slots = _Slots.join(self, group)

    def score(self, rows: Sequence[SequenceRows]) -> Tensor:
        assert self._slots is not None, "join a cache group first"
        self.passes += 1
        found: list[Tensor] = []
        for row in rows:
            contexts = self._contexts(row)
            assert 0 <= row.keep <= len(contexts)
            found += [self._logits(context) for context in contexts[len(contexts) - row.keep :]]
        return torch.stack(found) if found else torch.empty(0, self.vocab_size)

    def _contexts(self, row: SequenceRows) -> list[Context]:
        """Each row's context, itself included; their slots are filled."""
        assert self._slots is not None
        end, cache = row.cache.computed_len(self), row.cache
        begin = end - cache.dropped
        tokens, positions = self._slots.read(cache.table, range(begin))
        wanted = [p for p in range(end) if not 0 <= p - cache.sinks < cache.dropped]
        assert positions == wanted, f"slots hold the positions {positions}"
        before = tuple(tokens)
        contexts: list[Context] = []
        for token, parent in _rows(row):
            contexts.append((*(contexts[parent] if parent >= 0 else before), token))
        where = [cache.dropped + len(context) - 1 for context in contexts]
        assert self.max_positions is None or max(where, default=0) < self.max_positions
        self._slots.write(cache.table, begin, [context[-1] for context in contexts], where)
        cache.computed[self] = end + len(contexts)
        return contexts

    def _logits_after(self, context: Context) -> Tensor:
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(self.law(context))).float()


def random_table(
    vocab_size: int, *, order: int | None = 1, seed: int = 0, concentration: float = 1.0,
    zeros: int = 0,
) -> Table:  # fmt: skip
    """Laws that the last `order` tokens decide (None: the whole context), drawn from a symmetric
    Dirichlet; a small concentration makes peaked ones. `zeros` tokens of each have no mass."""
    if vocab_size < 1 or not 0 <= zeros < vocab_size:
        raise InvalidArgumentError(
            f"vocab_size={vocab_size}, zeros={zeros}: expected 0 <= zeros < vocab_size"
        )
    if not concentration > 0 or (order is not None and order < 0):
        raise InvalidArgumentError(
            f"concentration={concentration}, order={order}: expected above 0, and 0 or more"
        )

    @lru_cache(maxsize=_CACHED)
    def law(context: Context) -> tuple[float, ...]:
        rng = np.random.default_rng([seed, len(context), *context])
        some = rng.permutation(vocab_size)[: vocab_size - zeros]
        masses = np.zeros(vocab_size)
        masses[some] = rng.dirichlet(np.full(len(some), concentration))
        return tuple((masses / masses.sum()).tolist())

    def table(context: Context) -> tuple[float, ...]:
        return law(context if order is None else context[max(0, len(context) - order) :])

    return table


def with_overlap(target: Table, overlap: float, *, seed: int = 0) -> Table:
    """A draft's table with sum_x min(p, q) = overlap at every context: under token-wise
    verification each drafted token is accepted with that probability, whatever came before.

    Raises InvalidArgumentError for an overlap outside 0..1, and at a context whose smallest
    probability is larger: every law then has more in common with it.
    """
    if not 0 <= overlap <= 1:
        raise InvalidArgumentError(f"overlap={overlap}: expected 0 to 1")

    def table(context: Context) -> tuple[float, ...]:
        p = np.array(target(context))
        # on the way from p to a law z the overlap falls linearly, to 1 - TV(p, z)
        rng = np.random.default_rng([seed, len(context), *context])
        random = rng.dirichlet(np.ones(len(p)))
        farthest = np.eye(len(p))[p.argmin()]
        z = next((z for z in (random, farthest) if _distance(p, z) > 1 - overlap), farthest)
        if 1 - overlap > _distance(p, z) + 1e-12:
            raise InvalidArgumentError(
                f"overlap={overlap}: expected at least {p.min():.3g}, the smallest probability "
                f"after {context}; give the target tokens without mass (zeros=1)"
            )
        step = min(1.0, (1 - overlap) / _distance(p, z)) if overlap < 1 else 0.0
        return tuple(((1 - step) * p + step * z).tolist())

    return table


def table_pair(
    vocab_size: int, overlap: float, *, order: int | None = 1, seed: int = 0,
    concentration: float = 1.0, zeros: int = 0,
) -> tuple[TableRunner, TableRunner]:  # fmt: skip
    """A random target and a draft with this overlap at every context; arguments as above."""
    table = random_table(
        vocab_size, order=order, seed=seed, concentration=concentration, zeros=zeros
    )
    draft = with_overlap(table, overlap, seed=seed + 1)
    return TableRunner(table, vocab_size), TableRunner(draft, vocab_size)


class ContinuationRunner:
    """A Runner that recites: after the beginning of a known text it is certain of the next token.

    texts: prompts with their continuations, as plain decoding made them: greedily, or with a seed
    under the rule gumbel, so that the target emits exactly them. Behind anything else, and behind
    their ends, it is certain of token 0; `lost` counts the passes whose committed tokens did so.
    """

    max_positions: int | None = None

    def __init__(
        self, texts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.uses_threads = False
        self.lost = 0
        self._texts = [tuple(text) for text in texts]
        self._slots: _Slots | None = None
        bad = [t for text in self._texts for t in text if not 0 <= t < vocab_size]
        if bad or not self._texts:
            raise InvalidArgumentError(
                f"texts: expected some, of tokens below {vocab_size}, got {bad[:1] or 'none'}"
            )

    def join(self, group: CacheGroup) -> None:
        self._slots = _Slots.join(self, group)

    def score(self, rows: Sequence[SequenceRows]) -> Tensor:
        assert self._slots is not None, "join a cache group first"
        following: list[int] = []
        for row in rows:
            following += self._next_tokens(row)
        logits = torch.zeros(len(following), self.vocab_size)
        logits[range(len(following)), following] = _CERTAIN
        return logits.to(self.device)

    def _next_tokens(self, row: SequenceRows) -> list[int]:
        """Of the rows that are kept. Each slot holds which text it belongs to, -1: none."""
        assert self._slots is not None
        begin, table = row.cache.computed_len(self), row.cache.table
        known, whose = list(_rows(row)), list[int]()
        if begin == 0:
            before = self._find([token for token, _ in known[: len(row.tokens)]])
        else:
            [before] = self._slots.read(table, range(begin - 1, begin))[1]
        places: list[int] = []
        for token, parent in known:
            places.append(places[parent] + 1 if parent >= 0 else begin)
            text = whose[parent] if parent >= 0 else before
            whose.append(text if self._at(text, places[-1]) == token else -1)
        self.lost += any(text < 0 for text in whose[: len(row.tokens)])
        self._slots.write(table, begin, [token for token, _ in known], whose)
        row.cache.computed[self] = begin + len(known)
        following = [self._at(t, at + 1) for t, at in zip(whose, places, strict=True)]
        return following[len(following) - row.keep :]

    def _find(self, prompt: Sequence[int]) -> int:
        found = (i for i, t in enumerate(self._texts) if t[: len(prompt)] == tuple(prompt))
        return next(found, -1)

    def _at(self, text: int, position: int) -> int:
        tokens = self._texts[text] if text >= 0 else ()
        return tokens[position] if position < len(tokens) else 0


class SyntheticDraft:
    """SYNTHETIC: a draft that is right at a known rate, to measure a system without a trained one.

    oracle is a Runner that knows what the target will say: one of the target's own model (its law,
    so that sampled runs accept too), or a ContinuationRunner, which costs nothing. After each
    context a coin, a function of (seed, context), is right with probability `acceptance`: then the
    oracle's logits pass unchanged, else all mass is put on the token that they like least. Each
    drafted token of a chain is then accepted with that probability, independently, up to the
    target's probability of its least likely token; greedy and sampled, token-wise or block.

    pass_seconds: every pass takes at least that long (it waits, busy), so that a policy has a cost
    to weigh. Say `label` wherever its figures are shown. Raises InvalidArgumentError.
    """

    def __init__(
        self, oracle: Runner, acceptance: float, *, seed: int = 0, pass_seconds: float = 0.0
    ) -> None:
        if not 0 <= acceptance <= 1:
            raise InvalidArgumentError(f"acceptance={acceptance}: expected 0 to 1")
        if not pass_seconds >= 0:
            raise InvalidArgumentError(f"pass_seconds={pass_seconds}: expected 0 or more")
        self.oracle, self.acceptance, self.pass_seconds = oracle, acceptance, pass_seconds
        self.vocab_size, self.max_positions = oracle.vocab_size, oracle.max_positions
        self.device = oracle.device
        self.uses_threads: bool = getattr(oracle, "uses_threads", True)
        self.rows = self.right = 0  # rows that were answered, and those answered rightly
        self._key = np.array(split_seed(seed), np.uint32)
        self._slots: _Slots | None = None

    @property
    def label(self) -> str:
        return f"synthetic draft, acceptance {self.acceptance:g}"

    @property
    def stats(self) -> dict[str, float | str]:
        """What it did, under its label."""
        return {"draft": self.label, "rows": self.rows, "right": self.right}

    def join(self, group: CacheGroup) -> None:
        self.oracle.join(group)
        self._slots = _Slots.join(self, group)

    def score(self, rows: Sequence[SequenceRows]) -> Tensor:
        began = time.perf_counter()
        logits = self.oracle.score(rows)
        coins = np.concatenate([self._coins(row) for row in rows])
        wrong = torch.from_numpy(coins >= self.acceptance).to(logits.device)
        self.rows += len(coins)
        self.right += int((coins < self.acceptance).sum())
        certain = torch.zeros_like(logits)
        certain.scatter_(1, logits.argmin(-1, keepdim=True), _CERTAIN)
        answer = torch.where(wrong[:, None], certain, logits)
        while time.perf_counter() - began < self.pass_seconds:
            pass
        return answer

    def _coins(self, row: SequenceRows) -> NDArray[np.float64]:
        """(keep,) one uniform per row, of its whole context: each slot holds the hash up to it."""
        assert self._slots is not None, "join a cache group first"
        begin, table = row.cache.computed_len(self), row.cache.table
        before = self._slots.read(table, range(begin - 1, begin))[0] if begin else [0]
        tokens, hashes = list[int](), list[int]()
        for token, parent in _rows(row):
            tokens.append(token)
            hashes.append(_mixed(hashes[parent] if parent >= 0 else before[0], token))
        self._slots.write(table, begin, hashes, tokens)
        row.cache.computed[self] = begin + len(hashes)
        kept = np.array(hashes[len(hashes) - row.keep :], np.int64).view(np.uint64)
        counters = np.zeros((len(kept), 4), np.uint32)
        counters[:, 0], counters[:, 1] = kept & np.uint64(0xFFFFFFFF), kept >> np.uint64(32)
        return log_uniform(philox_numpy(counters, self._key)[:, 0])


def _mixed(above: int, token: int) -> int:
    """The hash of a context and one more token; signed 64 bits, as slots hold them."""
    bits = (above ^ (token + 1)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    bits ^= bits >> 29
    return bits - (1 << 64) if bits >> 63 else bits


def _rows(row: SequenceRows) -> Iterator[tuple[int, int]]:
    """(token, row above among these, -1: the end of the cache), chain first, then the nodes."""
    chain = len(row.tokens)
    yield from zip(row.tokens, range(-1, chain - 1), strict=True)
    nodes = [] if row.nodes is None else row.nodes.tolist()
    parents = range(-1, len(nodes) - 1) if row.parents is None else row.parents
    for token, parent in zip(nodes, parents, strict=True):
        yield token, chain + parent if parent >= 0 else chain - 1


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """Two whole numbers per slot of a cache group, committed and moved like keys and values."""

    memory: Paged

    @staticmethod
    def join(model: Runner, group: CacheGroup) -> "_Slots":
        return _Slots(group.add_model(model, [LayerShape(1, 1, 1, torch.int64)]))

    def read(self, table: BlockTable, slots: range) -> tuple[list[int], list[int]]:
        flat = self._flat(table, slots)
        both = self.memory.flat_keys[0], self.memory.flat_values[0]
        first, second = (numbers[flat, 0, 0].tolist() for numbers in both)
        return first, second

    def write(
        self, table: BlockTable, begin: int, first: Sequence[int], second: Sequence[int]
    ) -> None:
        flat = self._flat(table, range(begin, begin + len(first)))
        self.memory.flat_keys[0][flat, 0, 0] = self._tensor(first)
        self.memory.flat_values[0][flat, 0, 0] = self._tensor(second)

    def _flat(self, table: BlockTable, slots: range) -> slice | Tensor:
        if table.contiguous and slots:
            return slice(table.flat(slots[0]), table.flat(slots[-1]) + 1)
        return self._tensor([table.flat(slot) for slot in slots])

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.memory.device)


def _distance(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    return float(np.abs(p - q).sum() / 2)
