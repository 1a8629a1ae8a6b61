"""The exact law of what the production engine emits: every outcome of every coin, on table models.

Engine, proposer, verifier and cache run as they are. Only their Noise is another: its uniforms are
not numbers but `Coins`, which know their address. Where the code compares one with a bound or looks
it up in a cumulative sum, every outcome is taken, with the probability that the coin's remaining
interval gives it; draws by Gumbel top-k are taken in closed form, as successive draws without
replacement (Kool et al. 2019, 1903.06059, section 2). A coin that is read again goes on with what
is left of its interval, so noise that two decisions or two steps share shows as a bias.

Worlds that differ in their outcomes run side by side, as the sequences of one batch; a policy that
lets one sequence's draft hang on the others needs evals/planned.py. Worlds that have emitted the
same text over the same nodes of drafts of one size go on from two representatives: their drafts and
caches differ, and whatever they have seen, the next step must follow the target's law.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec import SamplingParams
from specdec.engine import Engine
from specdec.evals.enumeration import Comparison, Joint, Tokens
from specdec.rng import Noise, Purpose, StepNoise
from specdec.sampling.processors import OccurrencePenalties
from specdec.sequence import Sequence as EngineSequence
from specdec.toy import Table
from specdec.tree import TokenTree
from specdec.verifier import Verdict

TOLERANCE = 3e-7  # three float32 laws, each rounded a few times; 3e-8 is what is found
_BATCH = 512  # worlds of one run
_NOTHING = 1e-13  # outcomes less likely than this are left out; rounding makes some
_GUMBEL = 7  # stands beside the purposes in an address
_COPY, _ROW, _PURPOSE, _POSITION = 8, 10, 3, 16  # bits of an address; the world is above them
_ADDRESS = _COPY + _ROW + _PURPOSE + _POSITION

_AS_IT_IS = SamplingParams()

MakeEngine = Callable[[Noise], Engine]
# (address, how often it was read before) -> the outcome that was taken
Decisions = dict[tuple[int, int], int]
Way = tuple[int, Tokens]  # nodes of a draft, and those of them that were accepted


def emitted_law(
    make: MakeEngine, table: Table, prompt: Sequence[int], *, tokens: int = 3,
    new_tokens: int | None = None, sampling: SamplingParams = _AS_IT_IS,
) -> Comparison:  # fmt: skip
    """The joint law of the first `tokens` that engines of make(noise) emit behind the prompt, and
    the target's own.

    Their target must be a TableRunner of `table`. new_tokens: what the request asks for (default:
    tokens); more lets the last steps draft deeper. sampling: how it samples otherwise; no text may
    end before. The arithmetic is that of production: laws in
    float32 are right to 2**-24 of each probability, so differences below TOLERANCE are rounding.
    """
    params = replace(sampling, max_new_tokens=new_tokens or tokens)
    ours: Joint = defaultdict(float)
    frontier = [_Branch({}, (), 1.0)]
    steps = 0
    while frontier:
        steps += 1
        following: list[_Branch] = []
        for branch, leaves in _leaves(make, frontier, list(prompt), params, steps):
            alike: dict[tuple[Tokens, Way], list[_Leaf]] = defaultdict(list)
            for leaf in leaves:
                alike[(branch.text + leaf.emitted)[:tokens], leaf.way].append(leaf)
            for (text, _), same in alike.items():
                mass = branch.mass * sum(leaf.probability for leaf in same)
                if len(text) == tokens:
                    ours[text] += mass
                    continue
                some = same[:1] if len(same) == 1 else [same[0], same[-1]]
                following += [_Branch(leaf.taken, text, mass / len(some)) for leaf in some]
        frontier = following
    return Comparison(dict(ours), target_law(table, prompt, tokens, sampling))


def target_law(
    table: Table, prompt: Sequence[int], tokens: int, sampling: SamplingParams = _AS_IT_IS
) -> Joint:
    """The joint law of the first tokens that a target of this table emits."""
    law: Joint = {(): 1.0}
    for _ in range(tokens):
        law = {
            (*text, token): mass * p
            for text, mass in law.items()
            for token, p in enumerate(next_law(table, prompt, text, sampling))
            if p > 0
        }
    return law


def next_law(
    table: Table, prompt: Sequence[int], text: Tokens, sampling: SamplingParams
) -> list[float]:
    """The law of the token behind prompt and text, by definition: transformers' own processors and
    warpers, called on this one path in float64."""
    return next_scores(table, prompt, text, sampling).softmax(-1).tolist()


def next_scores(
    table: Table, prompt: Sequence[int], text: Tokens, sampling: SamplingParams
) -> Tensor:
    """(V,) log p behind the processors and warpers."""
    path = torch.tensor([[*prompt, *text]])
    scores = torch.tensor([table((*prompt, *text))], dtype=torch.float64).log()
    for processor in sampling.law().processors:
        if isinstance(processor, OccurrencePenalties):  # not one of transformers'
            for token, count in Counter(text).items():
                scores[0, token] -= processor.frequency * count + processor.presence
        else:
            scores = processor(path, scores)
    return scores[0]


class _Branch(NamedTuple):
    """What was taken so far, the text that it emitted, and its share of the law."""

    taken: Decisions
    text: Tokens
    mass: float


class _Leaf(NamedTuple):
    emitted: Tokens  # in the last step
    way: Way  # in it
    probability: float  # of the last step's decisions
    taken: Decisions


def _leaves(
    make: MakeEngine, branches: Sequence[_Branch], prompt: list[int], params: SamplingParams,
    steps: int,
) -> Iterator[tuple[_Branch, list[_Leaf]]]:  # fmt: skip
    """Per branch every outcome of its next step."""
    found: list[list[_Leaf]] = [[] for _ in branches]
    pending = [(i, branch.taken) for i, branch in enumerate(branches)]
    while pending:
        some, pending = pending[-_BATCH:], pending[:-_BATCH]
        worlds = [_World(branches[i].taken, given) for i, given in some]
        results = _run(make, worlds, prompt, params, steps)
        for (i, given), world, (text, way) in zip(some, worlds, results, strict=True):
            begun = branches[i].text
            assert text[: len(begun)] == begun, "the same outcomes led to another text"
            found[i].append(_Leaf(text[len(begun) :], way, world.probability, world.taken))
            pending += [(i, other) for other in world.siblings(given)]
    for branch, leaves in zip(branches, found, strict=True):
        total = sum(leaf.probability for leaf in leaves)
        assert abs(total - 1) < 1e-9, f"the outcomes of a step add up to {total}"
        yield branch, leaves


def _run(
    make: MakeEngine, worlds: Sequence["_World"], prompt: list[int], params: SamplingParams,
    steps: int,
) -> list[tuple[Tokens, Way]]:  # fmt: skip
    """What each world emits in `steps` steps of one engine, and by which way in the last."""
    engine = make(EnumeratedNoise(worlds))
    ways: dict[int, Way] = {}
    verify = engine.verifier.verify

    def recorded(
        sequences: Sequence[EngineSequence], trees: Sequence[TokenTree], noise: Noise
    ) -> list[Verdict]:
        verdicts = verify(sequences, trees, noise)
        pairs = zip(sequences, verdicts, strict=True)
        ways.update((s.seed, (v.drafted, v.path)) for s, v in pairs)
        return verdicts

    engine.verifier.verify = recorded  # type: ignore[method-assign]
    apart = _Apart(**{each.name: getattr(params, each.name) for each in fields(params)})
    for i in range(len(worlds)):
        engine.add_request(prompt, apart, seed=i, request_id=str(i))
    texts: list[Tokens] = [()] * len(worlds)
    for _ in range(steps):
        for record in engine.step():
            texts[int(record.request_id)] += record.tokens
        engine.check_integrity()
    engine.abort_all()
    return [(text, ways[i]) for i, text in enumerate(texts)]


class _Apart(SamplingParams):
    """Equal to no other, so no two requests share a law: a world that were judged together with
    others would be asked for coins that only those others need."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class NotEnumerableError(AssertionError):
    """Noise is used in a way whose outcomes cannot be taken one by one."""


@dataclass(slots=True, eq=False)
class _World:
    """One sequence of a run: follows the decisions given, takes the first outcome of others."""

    base: Decisions  # of earlier steps: their probability is counted already
    given: Decisions
    probability: float = 1.0
    taken: Decisions = field(default_factory=dict)
    _open: list[tuple[tuple[int, int], list[int]]] = field(default_factory=list)
    _left: dict[int, tuple[float, float]] = field(default_factory=dict)
    _reads: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def cut(self, address: int, edges: Sequence[float]) -> int:
        """The first i with edges[i] > u, of the uniform at this address; edges ascend to 1."""
        low, high = self._left.get(address, (0.0, 1.0))
        cuts = [low, *(min(max(edge, low), high) for edge in edges)]
        cuts[-1] = high
        chosen = self.choose(address, [b - a for a, b in pairwise(cuts)])
        self._left[address] = cuts[chosen], cuts[chosen + 1]
        return chosen

    def choose(self, address: int, weights: Sequence[float]) -> int:
        """The index of one of the unnormalised weights."""
        total = sum(weights)
        options = [i for i, weight in enumerate(weights) if weight > _NOTHING * total]
        key = address, self._reads[address]
        self._reads[address] += 1
        chosen = self.given.get(key, options[0])
        assert chosen in options, "the same outcomes led to another decision"
        if key not in self.base:
            self.probability *= weights[chosen] / sum(weights[i] for i in options)
        if key not in self.given:
            self._open.append((key, options[1:]))
        self.taken[key] = chosen
        return chosen

    def siblings(self, given: Decisions) -> Iterator[Decisions]:
        """Every decision that was not given, taken otherwise, behind those before it."""
        before = dict(given)
        for key, others in self._open:
            for other in others:
                yield {**before, key: other}
            before[key] = self.taken[key]


class EnumeratedNoise(Noise):
    """Coins in the place of uniforms; the seed of a sequence is the number of its world."""

    def __init__(self, worlds: Sequence[_World]) -> None:
        self._worlds = worlds

    def step(
        self, seeds: Sequence[int], positions: Sequence[int], rows: int, device: torch.device,
        copies: int = 1,
    ) -> StepNoise:  # fmt: skip
        del device
        begin = torch.tensor([_address(*where) for where in zip(seeds, positions, strict=True)])
        row = torch.arange(rows) << _COPY

        def coins(purpose: Purpose) -> Tensor:
            names = begin[:, None] + (int(purpose) << _COPY + _ROW) + row
            if purpose == Purpose.ACCEPT:
                names = names[..., None] + torch.arange(copies)
            # stands in for a tensor: does with names what the code does with numbers
            return Coins(self._worlds, names)  # type: ignore[return-value]

        purposes = (Purpose.DRAFT, Purpose.ACCEPT, Purpose.RESIDUAL, Purpose.BONUS)
        return StepNoise(*map(coins, purposes))

    def gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device
    ) -> Tensor:
        del seeds, positions, vocab, device
        raise NotEnumerableError("noise that draft and target share is compared path by path")

    def draft_gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], rows: Sequence[int], vocab: int,
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        del vocab, device
        names = [
            _address(seed, position) + (_GUMBEL << _COPY + _ROW) + (row << _COPY)
            for seed, position, row in zip(seeds, positions, rows, strict=True)
        ]
        return Race(self._worlds, names)  # type: ignore[return-value]


def _address(world: int, position: int) -> int:
    return world << _ADDRESS | position << _COPY + _ROW + _PURPOSE


def _split(name: int) -> tuple[int, int]:
    """World, and the address inside it."""
    return name >> _ADDRESS, name & ((1 << _ADDRESS) - 1)


class Coins:
    """Uniforms on [0, 1) that were not drawn, times a scale: an array of their names."""

    def __init__(
        self, worlds: Sequence[_World], names: Tensor, scale: Tensor | None = None
    ) -> None:
        self._worlds, self.names, self.scale = worlds, names, scale

    # what only moves elements acts on the names alone
    def _moved(self, names: Tensor) -> "Coins":
        assert self.scale is None, "a coin was moved after it was scaled"
        return Coins(self._worlds, names)

    def __getitem__(self, index: Any) -> "Coins":
        return self._moved(self.names[index])

    def reshape(self, *shape: int) -> "Coins":
        return self._moved(self.names.reshape(*shape))

    def gather(self, dim: int, index: Tensor) -> "Coins":
        return self._moved(self.names.gather(dim, index))

    def squeeze(self, dim: int) -> "Coins":
        return self._moved(self.names.squeeze(dim))

    @property
    def shape(self) -> torch.Size:
        return self.names.shape

    def __mul__(self, scale: Tensor) -> "Coins":
        assert self.scale is None
        return Coins(self._worlds, self.names, scale)

    def __lt__(self, bound: Tensor) -> Tensor:
        return self._below(bound, nan=False)

    def __ge__(self, bound: Tensor) -> Tensor:
        return self._below(bound, nan=True).logical_not()

    def _below(self, bound: Tensor, *, nan: bool) -> Tensor:
        """u * scale < bound, elementwise; nan: the answer where the bound is none."""
        names, bounds, scales = torch.broadcast_tensors(
            self.names, bound, torch.ones(()) if self.scale is None else self.scale
        )
        answers = []
        columns = (x.double().flatten().tolist() for x in (bounds, scales))
        for name, b, s in zip(names.flatten().tolist(), *columns, strict=True):
            if b != b:
                answers.append(nan)
                continue
            world, address = _split(name)
            share = (b / s if b < s else 1.0) if s > 0 else float(b > 0)
            answers.append(self._worlds[world].cut(address, (share, 1.0)) == 0)
        return torch.tensor(answers).view(names.shape)

    def _search(self, sums: Tensor) -> Tensor:
        """(B, 1) the first index whose sum is above the coin, of rising sums (B, n)."""
        assert self.scale is not None
        assert self.names.shape == self.scale.shape == (sums.shape[0], 1)
        found = []
        shares = (sums / self.scale).double().tolist()
        for name, edges in zip(self.names.flatten().tolist(), shares, strict=True):
            world, address = _split(name)
            found.append([self._worlds[world].cut(address, edges)])
        return torch.tensor(found)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What the rules do with coins; anything else is an AssertionError."""
        del types
        kwargs = kwargs or {}
        name = function.__name__
        if name in ("mul", "__mul__", "__rmul__"):
            first, second = args
            return first * second if isinstance(first, Coins) else second * first
        if name == "where":
            condition, first, second = args
            return first._moved(torch.where(condition, first.names, second.names))
        if name in ("cat", "stack"):
            return args[0][0]._moved(function([part.names for part in args[0]], *args[1:]))
        if name == "searchsorted":
            assert kwargs == {"right": True}
            return args[1]._search(args[0])
        raise NotEnumerableError(f"{name} of coins: teach specdec.evals.audit what it means")


class Race:
    """Gumbel noise that was not drawn; with log q added, its largest entries are draws of q without
    replacement, in draw order."""

    def __init__(
        self, worlds: Sequence[_World], names: list[int], logits: Tensor | None = None
    ) -> None:
        self._worlds, self._names, self._logits = worlds, names, logits

    def add_(self, logits: Tensor) -> "Race":
        assert self._logits is None
        return Race(self._worlds, self._names, logits)

    def __getitem__(self, index: Any) -> "Race":
        assert self._logits is not None
        part = self._logits[index]
        assert part.shape[0] == len(self._names), "rows of a race were taken out"
        return Race(self._worlds, self._names, part)

    def topk(self, k: int, dim: int) -> "_Winners":
        assert self._logits is not None
        assert dim == -1
        drawn = []
        for name, masses in zip(self._names, self._logits.double().exp().tolist(), strict=True):
            world, address = _split(name)
            left, order = list(masses), list[int]()
            for _ in range(k):
                order.append(self._worlds[world].choose(address, left))
                left[order[-1]] = 0.0
            drawn.append(order)
        return _Winners(torch.tensor(drawn))


class _Winners(NamedTuple):
    indices: Tensor
