"""The batched rules emit what their definitions emit when both read the same uniforms."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.acceptance import RULES, batched, draw, kseq, laws, reference, trees
from specdec.acceptance.batched import Outcome, TreeBatch
from specdec.errors import InvalidLawError
from specdec.rng import StepNoise
from specdec.tree import Law, Proposal, TokenTree

DTYPES = {"float32": torch.float32, "float64": torch.float64}
POINT = Law("point")
Vector = Sequence[float]


@dataclass(eq=False)
class Node:
    p: Vector
    row: int
    proposals: list[tuple[int, Vector, "Node"]] = field(default_factory=list)


@dataclass(eq=False)
class Case:
    """One sequence: its tree, the target's laws and whether coins tie with them on purpose."""

    tree: TokenTree
    p: list[list[float]]  # per row
    q: list[list[float]]  # per stored law
    is_dyadic: bool = False


class Recorded:
    """The batch's uniforms for the definition, by address; each moved by shift()."""

    def __init__(
        self, noise: StepNoise, b: int, gumbel: Tensor, shift: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.noise, self.b, self.rows, self.u, self.shift = noise, b, gumbel, 0.0, shift

    def at(self, row: int, purpose: str, copy: int) -> "Recorded":
        held = getattr(self.noise, purpose)[self.b, row]
        assert held.ndim == 1 or copy == 0
        self.u = min(max((held[copy] if held.ndim else held).item() + self.shift(), 0), 1 - 2**-53)
        return self

    def bernoulli(self, p: float) -> bool:
        return self.u < p

    def categorical(self, weights: Vector) -> int:
        sums = list(itertools.accumulate(weights))
        return next(i for i, s in enumerate(sums) if s > self.u * sums[-1])

    def gumbel(self, position: int) -> Vector:
        row: list[float] = self.rows[position].tolist()
        return row


# Random and adversarial cases.

KINDS = ["generic", "peaked", "truncated", "one-hot p", "one-hot q", "one-hot", "equal", "disjoint",
         "dyadic", "near"]  # fmt: skip


def normed(weights: Vector) -> list[float]:
    total = sum(weights)
    return [w / total for w in weights]


def random_law(rng: random.Random, kind: str, V: int) -> list[float]:
    if kind == "one-hot":
        at = rng.randrange(V)
        return [float(x == at) for x in range(V)]
    if kind == "dyadic":  # eighths, so that sums, products and ties are exact
        cuts = sorted(rng.randrange(9) for _ in range(V - 1))
        return [(b - a) / 8 for a, b in itertools.pairwise([0, *cuts, 8])]
    law = [rng.random() ** (9 if kind == "peaked" else 1) + 1e-9 for _ in range(V)]
    if kind == "truncated":
        kept = rng.sample(range(V), rng.randrange(1, V + 1))
        law = [x if i in kept else 0.0 for i, x in enumerate(law)]
    return normed(law)


def law_pair(rng: random.Random, kind: str, V: int) -> tuple[list[float], list[float]]:
    """The target's law and a drafter's at one row."""
    base = kind if kind in ("peaked", "truncated", "one-hot", "dyadic") else "generic"
    p, q = random_law(rng, base, V), random_law(rng, base, V)
    if kind == "one-hot p":
        p = random_law(rng, "one-hot", V)
    elif kind == "one-hot q":
        q = random_law(rng, "one-hot", V)
    elif kind == "equal":
        q = p
    elif kind == "near":
        q = normed([x * (1 + 1e-3 * rng.random()) for x in p])
    elif kind == "disjoint":
        half = rng.randrange(1, V)
        p = normed([x if i < half else 0.0 for i, x in enumerate(p)])
        q = normed([x if i >= half else 0.0 for i, x in enumerate(q)])
    return p, q


def drawn(rng: random.Random, law: Vector) -> int:
    return rng.choices(range(len(law)), weights=law)[0]


def siblings(
    rng: random.Random, draft: str, laws: list[tuple[int, list[float]]], width: int
) -> list[tuple[int, Law]]:
    """(token, law) of one row's proposals, in draw order; laws: (stored row, law) per drafter."""
    found: list[tuple[int, Law]] = []
    for i, (row, law) in enumerate(laws):
        kind = draft if draft != "mixed" else rng.choice(["point", "iid", "without_replacement"])
        left = list(law)
        for _ in range(rng.randrange(0 if i else 1, width + 1)):
            if kind == "point":
                found.append((rng.randrange(len(law)), POINT))
            elif kind == "iid":
                found.append((drawn(rng, law), Law("iid", row)))
            elif sum(left) > 0:
                found.append((drawn(rng, left), Law("without_replacement", row)))
                left[found[-1][0]] = 0.0
    if draft == "mixed":
        rng.shuffle(found)  # what was drawn in one order could have been drawn in any
    return found


def random_case(
    rng: random.Random, kind: str, V: int, draft: str, size: int, depth: int, width: int,
    dtype: torch.dtype,
) -> Case:  # fmt: skip
    """A tree of up to `size` nodes whose tokens were really drawn from its laws."""

    def held(law: Vector) -> list[float]:
        rounded: list[float] = torch.tensor(law, dtype=torch.float64).to(dtype).tolist()
        return rounded

    p: list[list[float]] = []
    q: list[list[float]] = []
    tokens, parents, depths = list[int](), list[int](), [0]
    proposals: list[Proposal] = []
    row = 0
    while row <= len(tokens):
        own, other = law_pair(rng, kind, V)
        p.append(held(own))
        if len(tokens) < size and depths[row] < depth:
            drafters = 2 if draft in ("several", "mixed") else 1
            offered = [other, *(random_law(rng, "generic", V) for _ in range(drafters - 1))]
            inner = {"several": rng.choice(["iid", "without_replacement"])}.get(draft, draft)
            laws = [(len(q) + i, held(law)) for i, law in enumerate(offered)]
            children: dict[int, int] = {}
            listed = siblings(rng, inner, laws, width)
            q.extend(law for _, law in laws)
            for token, law in listed:
                if token not in children:
                    children[token] = len(tokens)
                    tokens.append(token)
                    parents.append(row - 1)
                    depths.append(depths[row] + 1)
                proposals.append(Proposal(row - 1, token, law, children[token]))
        row += 1
    stored = torch.tensor(q, dtype=dtype) if q else None
    tree = TokenTree.build(tokens, parents, proposals, stored)
    return Case(tree, p, q, kind == "dyadic")


def definition(case: Case, shift: Callable[[], float] = lambda: 0.0) -> Node:
    """The tree as the definitions read it; shift() moves every entry of every law, relatively."""

    def moved(law: Vector) -> list[float]:
        return [x * (1 + shift()) for x in law]

    nodes = [Node(moved(law), row) for row, law in enumerate(case.p)]
    laws = [moved(law) for law in case.q]
    V = len(case.p[0])
    gone: dict[tuple[int, int], set[int]] = {}
    for parent, token, law, node in case.tree.proposals:
        if law.row is None:
            q = [float(x == token) for x in range(V)]
        else:
            q = laws[law.row]
            taken = gone.setdefault((parent, law.row), set())
            if law.kind == "without_replacement" and taken:
                q = normed([0.0 if x in taken else a for x, a in enumerate(q)])
            taken.add(token)
        nodes[parent + 1].proposals.append((token, q, nodes[node + 1]))
    return nodes[0]


# Batches of them, by both.

ANY = ("greedy", "walk", "gumbel", "recursive", "traversal", "typical")
CHAINS = (*ANY, "token", "block")
# Draft: kind of draws, rules, width, cases. Every rule gets more than 10,000, both dtypes together.
GROUPS: dict[str, tuple[str, tuple[str, ...], int, int]] = {
    "chain iid": ("iid", (*CHAINS, "kseq"), 1, 1700),
    "chain point": ("point", (*CHAINS, "kseq"), 1, 1700),
    "chain mixed": ("one of each", CHAINS, 1, 1700),
    "iid": ("iid", (*ANY, "kseq"), 4, 1700),
    "without replacement": ("without_replacement", ANY, 4, 1200),
    "point": ("point", ANY, 4, 600),
    "several drafters": ("several", ANY, 2, 1200),
    "mixed": ("mixed", ANY, 2, 1200),
}
LARGE_BATCHES = 8  # per group, of those whose vocabulary counts as large
SIZES = [(0, 0), (1, 1), (3, 3), (5, 2), (8, 4), (14, 3)]


def random_batch(rng: random.Random, draft: str, dtype: torch.dtype) -> list[Case]:
    """Sequences that share a vocabulary and nothing else."""
    V = rng.choice([2, 3, 3, 4, 7])
    draws, _, width, _ = GROUPS[draft]
    cases = []
    even = rng.choice(SIZES) if rng.random() < 0.3 else None
    for _ in range(rng.choice([1, 2, 5, 9, 30])):
        size, depth = even or rng.choice(SIZES)
        if rng.random() < 0.004:
            size = depth = 64
        if width == 1:
            depth = size
        kind = draws if draws != "one of each" else rng.choice(["point", "iid"])
        cases.append(random_case(rng, rng.choice(KINDS), V, kind, size, depth, width, dtype))
    if draws == "point" and rng.random() < 0.7:  # the others hold laws that nobody reads
        for case in cases:
            case.tree, case.q = replace(case.tree, laws=None), []
    return cases


def random_noise(rng: random.Random, cases: list[Case], copies: int) -> StepNoise:
    """Uniforms in 24 bits; eighths where the laws are; the interval's ends now and then."""
    g = torch.Generator().manual_seed(rng.randrange(2**32))
    shape = len(cases), max(len(case.p) for case in cases)
    drawn = []
    for last in ((), (copies,), (), ()):
        u = torch.randint(2**24, (*shape, *last), generator=g)
        tied = torch.tensor([case.is_dyadic for case in cases]).view(-1, *(1,) * (u.ndim - 1))
        u = torch.where(tied, u >> 21 << 21, u)
        edge = torch.randint(100, u.shape, generator=g)
        u = torch.where(edge == 0, 0, torch.where(edge == 1, 2**24 - 1, u))
        drawn.append(u.float() * 2.0**-24)
    return StepNoise(*drawn)


@dataclass(eq=False)
class Batch:
    """Several cases and all that a rule reads of them."""

    cases: list[Case]
    trees: TreeBatch
    p: Tensor
    q: Tensor | None
    noise: StepNoise
    levels: Tensor  # (B, depth + 1, V) Gumbel noise by position

    @staticmethod
    def of(rng: random.Random, cases: list[Case], dtype: torch.dtype) -> "Batch":
        trees = TreeBatch.of([case.tree for case in cases])
        p = torch.tensor([row for case in cases for row in case.p], dtype=dtype)
        laws = [case.tree.laws for case in cases if case.tree.laws is not None]
        noise = random_noise(rng, cases, trees.copies)
        g = torch.Generator().manual_seed(rng.randrange(2**32))
        depth = max(case.tree.max_depth for case in cases)
        u = torch.rand((len(cases), depth + 1, p.shape[1]), generator=g, dtype=torch.float64)
        levels = -(-u.clamp(1e-9, 1 - 1e-9).log()).log()
        return Batch(cases, trees, p, torch.cat(laws) if laws else None, noise, levels.to(dtype))

    def fast(self, rule: str) -> Outcome:
        if rule == "greedy":
            return batched.greedy(self.trees, self.p.argmax(-1), self.p)
        if rule == "gumbel":
            rows = [self.levels[b, [0, *c.tree.depths]] for b, c in enumerate(self.cases)]
            return batched.gumbel(self.trees, self.p, torch.cat(rows))
        found: Outcome = getattr(batched, rule)(self.trees, self.p, self.q, self.noise)
        return found

    def defined(self, rule: str, b: int, root: Node) -> list[int]:
        rng = Recorded(self.noise, b, self.levels[b])
        return reference.verify(rule, root, rng, lossy=rule == "typical")

    def is_near_tie(self, rule: str, b: int, ours: list[int], ulp: float) -> bool:
        """Whether the margin is below 8 ulp: ours is what the definition says of laws and coins
        that differ by no more."""
        moves = random.Random(b)

        def move() -> float:
            return 8 * ulp * moves.uniform(-1, 1)

        rng = Recorded(self.noise, b, self.levels[b], move)
        function = reference.DEFINITIONS[rule]
        answers = (function(definition(self.cases[b], move), rng) for _ in range(500))
        return any(answer == ours for answer in answers)


def emitted(batch: Batch, outcome: Outcome, b: int) -> list[int]:
    """The answer of one sequence, whose padding and path must fit it."""
    row, path = outcome.tokens[b].tolist(), outcome.path[b].tolist()
    n, first = int(outcome.accepted[b]), batch.trees.row_offsets[b]
    assert row[n + 1 :] == [-1] * (len(row) - n - 1)
    assert path[n:] == [-1] * (len(path) - n)
    tree, above = batch.cases[b].tree, -1
    for node, token in zip([r - first - 1 for r in path[:n]], row, strict=False):
        assert tree.parents[node] == above
        assert tree.tokens[node] == token
        above = node
    return row[: n + 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draft", GROUPS)
def test_batched_emits_what_the_definition_emits(
    draft: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, kind, (_, rules, _, wanted) = (
        random.Random(f"{draft} {dtype}"),
        DTYPES[dtype],
        GROUPS[draft],
    )
    ulp = torch.finfo(kind).eps
    cases, ties = 0, dict.fromkeys(rules, 0)
    while cases < wanted:
        batch = Batch.of(rng, random_batch(rng, draft, kind), kind)
        roots = [definition(case) for case in batch.cases]
        cases += len(roots)
        for rule in rules:
            outcome = batch.fast(rule)
            assert outcome.valid.all()
            for b, root in enumerate(roots):
                ours = emitted(batch, outcome, b)
                if ours != batch.defined(rule, b, root):
                    assert batch.is_near_tie(rule, b, ours, ulp), (rule, b, batch.cases)
                    ties[rule] += 1
    with capsys.disabled():
        print(f"\n{draft}, {dtype}: {cases} cases per rule, near ties {ties}", end="")  # noqa: T201
    assert max(ties.values()) < cases / (100 if kind == torch.float32 else 400)


def small_batches(dtype: torch.dtype) -> list[Batch]:
    rng = random.Random(5)
    batches = []
    for draft in ("iid", "without replacement", "several drafters", "chain iid"):
        batches += [Batch.of(rng, random_batch(rng, draft, dtype), dtype) for _ in range(12)]
    return batches


def disagree(rule: str, batches: list[Batch]) -> bool:
    """Whether some answer is not the definition's, near ties apart."""
    for batch in batches:
        if rule in ("token", "block") and not batch.trees.layout.is_chain:
            continue
        outcome, ulp = batch.fast(rule), torch.finfo(batch.p.dtype).eps
        for b, case in enumerate(batch.cases):
            ours = emitted(batch, outcome, b)
            wanted = batch.defined(rule, b, definition(case))
            if ours != wanted and not batch.is_near_tie(rule, b, ours, ulp):
                return True
    return False


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize("fault", ["no residual", "no scale", "copies kept", "weight kept"])
def test_planted_fault_is_seen(rule: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = small_batches(torch.float64)
    assert not disagree(rule, batches)
    ratio, reject = trees.Remainder.ratio, trees.Remainder.reject

    def wrong_ratio(self: Any, turn: Any) -> tuple[Tensor, Tensor]:
        own = replace(turn, is_copy=torch.zeros_like(turn.is_copy))
        found, scale = ratio(self, own if fault == "copies kept" else turn)
        return (found * scale, torch.ones_like(scale)) if fault == "no scale" else (found, scale)

    def wrong_reject(self: Any, turn: Any, scale: Tensor, *, needed: bool) -> None:
        kept, shares = self.weight[turn.parents], self.share.clone()
        reject(self, turn, scale, needed=needed)
        if fault == "weight kept":
            self.weight[turn.parents] = 0.9 * kept
        if fault == "no residual":
            self.share.copy_(shares)

    monkeypatch.setattr(trees.Remainder, "ratio", wrong_ratio)
    monkeypatch.setattr(trees.Remainder, "reject", wrong_reject)
    if (rule, fault) == ("recursive", "weight kept"):
        assert not disagree(rule, batches)  # it reads no weight
    elif fault == "copies kept":
        assert not disagree(rule, batches)  # the residual has no mass there already
    else:
        assert disagree(rule, batches)


@pytest.mark.parametrize(
    ("rule", "draft"),
    [(rule, draft) for draft, (_, rules, _, _) in GROUPS.items()
     for rule in ("token", "block", "recursive", "kseq", "traversal") if rule in rules],
)  # fmt: skip
def test_one_tree_under_many_coins(rule: str, draft: str) -> None:
    draws, _, width, _ = GROUPS[draft]
    draws = "iid" if draws == "one of each" else draws
    rng = random.Random(f"{rule} {draft}")
    size, depth, width = (4, 4, 1) if width == 1 else (8, 2, 4)
    for kind in ("generic", "peaked", "truncated"):
        case = random_case(rng, kind, 5, draws, size, depth, width, torch.float64)
        if draws == "point":
            case.tree, case.q = replace(case.tree, laws=None), []
        batch = Batch.of(rng, [case] * 40, torch.float64)
        assert not disagree(rule, [batch])


def test_kseq_judges_point_masses_and_drawn_siblings_side_by_side() -> None:
    rng = random.Random(1)
    p, q = [0.5, 0.2, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
    law = torch.tensor([q], dtype=torch.float64)
    twice = TokenTree.build([0], [-1], [Proposal(-1, 0, POINT, 0)] * 2)
    drawn = TokenTree.build(
        [3, 2], [-1, -1], [Proposal(-1, x, Law("iid", 0), n) for n, x in ((0, 3), (1, 2))], law
    )
    for cases in ([Case(twice, [p] * 2, [])] * 60,
                  [Case(twice, [p] * 2, []), Case(drawn, [p] * 3, [q])] * 40):  # fmt: skip
        assert not disagree("kseq", [Batch.of(rng, cases, torch.float64)])


# float32 sums decide late where q is almost p
@pytest.mark.parametrize(("dtype", "error"), [("float64", 1e-14), ("float32", 0.05)])
def test_rho_is_that_of_the_definition(dtype: str, error: float) -> None:
    rng = random.Random(3)
    pairs = [law_pair(rng, rng.choice(KINDS), 4) for _ in range(40)]
    p, q = torch.tensor(pairs, dtype=DTYPES[dtype]).unbind(1)
    k = torch.tensor([rng.randrange(1, 6) for _ in pairs], dtype=torch.float64)
    wanted = [reference._kseq_rho(*pair, int(n)) for pair, n in zip(pairs, k, strict=True)]
    assert kseq._rho(p, q, k).tolist() == pytest.approx(wanted, abs=error)


# Rejections that only rounding could cause: coins of one, which no uniform is.

LAW = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


def coins(accept: list[float], residual: float) -> StepNoise:
    row = torch.full((1, len(accept)), residual)
    return StepNoise(row, torch.tensor([accept])[..., None], row, row)


@pytest.mark.parametrize("rule", ["token", "block", "recursive", "kseq", "traversal"])
@pytest.mark.parametrize(("u", "extra"), [(0.05, 0), (0.45, 2), (0.9, 3)])
def test_nothing_is_drawn_from_an_empty_residual(rule: str, u: float, extra: int) -> None:
    tree = TokenTree.chain(torch.tensor([1]), LAW)
    p, noise = LAW.expand(2, -1), coins([0.5, 1.0], u)
    assert judge(rule, TreeBatch.of([tree]), p, LAW, noise).tokens.tolist() == [[extra, -1]]


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize(("coin", "accepted"), [(0.4, 1), (0.6, 0)])
def test_law_stands_where_a_rejection_left_nothing(rule: str, coin: float, accepted: int) -> None:
    laws = torch.cat((LAW, LAW.flip(1)))
    tree = TokenTree.build(
        [3, 1], [-1, -1], [Proposal(-1, 3, Law("iid", 0), 0), Proposal(-1, 1, Law("iid", 1), 1)],
        laws,
    )  # fmt: skip
    p = torch.tensor([[0.1, 0.15, 0.35, 0.4]], dtype=torch.float64).expand(3, -1)
    laws[0] = p[0]  # the second's p / q is 0.5
    outcome = judge(rule, TreeBatch.of([tree]), p, laws, coins([0.5, 1.0, coin], 0.5))
    assert outcome.accepted.tolist() == [accepted]


# Drawing.


@pytest.mark.parametrize("V", [1, 3, 4, 8, 11])
def test_two_levels_draw_what_one_draws(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "LARGE", 1)
    monkeypatch.setattr(draw, "_BLOCK", 4)
    rng = random.Random(V)
    for _ in range(10):
        law = [0] * V
        for _ in range(64):
            law[rng.randrange(V)] += 1
        if V > 2:
            law[rng.randrange(V - 1)] = 0
        total = sum(law)  # small whole numbers: every sum and product is exact
        wanted = [x for x, count in enumerate(law) for _ in range(count)]
        u = (torch.arange(total, dtype=torch.float64) + 0.5) / total
        assert draw.sample(torch.tensor([law] * total).float(), u).tolist() == wanted


def test_rounded_block_sum_leads_to_no_token_of_weight_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = draw._block_sums
    monkeypatch.setattr(draw, "LARGE", 1)
    monkeypatch.setattr(draw, "_BLOCK", 4)
    monkeypatch.setattr(draw, "_block_sums", lambda weights: exact(weights) * 1.01)
    weights = torch.tensor([1.0, 2, 0, 0, 0, 3, 1, 0, 1, 0]).expand(400, -1)
    found = draw.sample(weights, torch.arange(400) / 400)
    assert found.unique().tolist() == [0, 1, 5, 6, 8]
    assert found.equal(found.sort().values)


@pytest.mark.parametrize("V", [1, 7, 8, 11])
@pytest.mark.parametrize("large", [1, 100])
def test_bad_law_draws_a_token_all_the_same(
    V: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "LARGE", large)
    monkeypatch.setattr(draw, "_BLOCK", 4)
    weights = torch.stack([torch.full((V,), value) for value in (math.nan, 0.0, math.inf, -1.0)])
    for u in (0.0, 0.5, 1 - 2.0**-24):
        found = draw.sample(weights, torch.full((4,), u))
        assert ((found >= 0) & (found < V)).all()


class Elsewhere(Tensor):
    """Stands for a tensor that numpy cannot see."""

    device = torch.device("cuda")

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(force)


def test_logarithm_is_added_on_any_device() -> None:
    law, noise = LAW.float(), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    wanted = (law.log() + noise).tolist()[0]
    assert draw.plus_log(noise, law).tolist()[0] == pytest.approx(wanted)
    found = draw.plus_log(noise.as_subclass(Elsewhere), law.as_subclass(Elsewhere))
    assert found.tolist()[0] == pytest.approx(wanted)
    assert noise.tolist() == [[1.0, 2.0, 3.0, 4.0]]


@pytest.mark.parametrize(
    "rule", ["walk", "gumbel", "token", "block", "recursive", "kseq", "traversal"]
)
def test_large_vocabulary_is_searched_on_two_levels(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (draw, batched, trees):
        monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(draw, "_BLOCK", 3)
    rng = random.Random(rule)
    for draft in [name for name, (_, rules, _, _) in GROUPS.items() if rule in rules]:
        for _ in range(LARGE_BATCHES):
            batch = Batch.of(rng, random_batch(rng, draft, torch.float64), torch.float64)
            assert not disagree(rule, [batch])


@pytest.mark.parametrize("V", [1, 2, 63, 4096, 40000])
def test_sample_never_draws_weight_zero(V: int) -> None:
    g = torch.Generator().manual_seed(V)
    edge = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    for _ in range(50):
        weights = torch.rand((4, V), generator=g) ** 8
        weights[torch.rand((4, V), generator=g) < 0.7] = 0
        weights[:, V // 2] += 1e-6
        found = batched.sample(weights, edge)
        assert (weights.gather(1, found[:, None]) > 0).all()
        assert found[0] == weights[0].nonzero()[0]
        beyond = weights[3, found[3] + 1 :].sum()
        assert found[3] == weights[3].nonzero()[-1] or beyond < 2.0**-23 * weights[3].sum()


@pytest.mark.parametrize("V", [1, 511, 40000, 40960])
def test_largest_is_the_lowest_index_of_the_maximum(V: int) -> None:
    g = torch.Generator().manual_seed(V)
    for top in (3, 1000, 2**24):
        scores = torch.randint(top, (5, V), generator=g).float()
        scores[1] = -math.inf
        assert draw.largest(scores).tolist() == scores.numpy().argmax(-1).tolist()
        scores[2, V // 2] = math.nan
        assert draw.largest(scores)[2] == V // 2


# Bad input.

PLAIN = TokenTree.chain(torch.tensor([1, 2]), torch.full((2, 4), 0.25))
FORK = TokenTree.build(
    [0, 1], [-1, -1],
    [Proposal(-1, x, Law("without_replacement", 0), x) for x in (0, 1)], torch.full((1, 4), 0.25),
)  # fmt: skip
FORKED_TWICE = TokenTree.build(  # breadth first: the siblings' draws do not follow one another
    [0, 1, 2], [-1, 0, -1],
    [Proposal(-1, 0, Law("iid", 0), 0), Proposal(0, 1, POINT, 1), Proposal(-1, 2, POINT, 2)],
    torch.full((1, 4), 0.25),
)  # fmt: skip
EMPTY = TokenTree.empty(torch.device("cpu"))
Q_RULES = ["token", "block", "recursive", "kseq", "traversal"]


def uniform_batch(members: list[TokenTree], copies: int = 1) -> tuple[Any, ...]:
    batch = TreeBatch.of(members)
    rows = max(len(tree) for tree in members) + 1
    u = torch.full((len(members), rows), 0.5)
    laws = [tree.laws for tree in members if tree.laws is not None]
    noise = StepNoise(u, u[..., None].expand(-1, -1, copies), u, u)
    p = torch.full((batch.row_offsets[-1], 4), 0.25)
    return batch, p, torch.cat(laws) if laws else None, noise


def judge(rule: str, batch: TreeBatch, p: Tensor, q: Tensor | None, noise: Any) -> Outcome:
    if rule == "greedy":
        return batched.greedy(batch, p.argmax(-1), p)
    if rule == "gumbel":
        return batched.gumbel(batch, p, torch.zeros_like(p))
    found: Outcome = getattr(batched, rule)(batch, p, q, noise)
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.5, -0.25])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_bad_target_row_invalidates_its_sequence_alone(rule: str, value: float) -> None:
    for members in ([PLAIN, EMPTY, PLAIN], [FORK, EMPTY, PLAIN], [EMPTY, EMPTY, EMPTY]):
        if rule in ("token", "block", "kseq") and members[0] is FORK:
            continue
        batch, p, q, noise = uniform_batch(members)
        if rule == "greedy" and math.isfinite(value):
            continue  # it reads logits
        for row in (batch.row_offsets[-1] - 1, batch.row_offsets[-2]):
            bad = p.clone()
            bad[row, 1:3] = torch.tensor([value, 0.25 if value == 0.5 else 0.5 - value])
            outcome = judge(rule, batch, bad, q, noise)
            assert outcome.valid.tolist() == [True, True, False]
            with pytest.raises(InvalidLawError, match="of sequence 2: the target's law") as caught:
                batched.diagnose(rule, batch, bad, q)
            assert caught.value.rule == rule


@pytest.mark.parametrize("value", [math.nan, 0.5, -0.25, 0.0])
@pytest.mark.parametrize("rule", [*Q_RULES, "walk", "typical"])
def test_bad_draft_law_invalidates_its_sequence_alone(rule: str, value: float) -> None:
    mixed = TokenTree.build(
        [1, 2], [-1, 0], [Proposal(-1, 1, Law("iid", 0), 0), Proposal(0, 2, POINT, 1)],
        torch.full((1, 4), 0.25),
    )  # fmt: skip
    for members in ([PLAIN, PLAIN, EMPTY], [PLAIN, mixed], [mixed, mixed]):
        batch, p, q, noise = uniform_batch(members)
        row = 0 if members[0] is mixed else 2
        row += members[0] is mixed
        assert judge(rule, batch, p, q, noise).valid.all()
        q[row, 1] = value
        if value == 0:  # still a law, without mass at the drafted token
            q[row, 0] = 0.5
        outcome = judge(rule, batch, p, q, noise)
        assert outcome.valid.tolist() == [True, False, *[True] * (len(members) - 2)]
        with pytest.raises(InvalidLawError, match=r"node root/1 of sequence 1: .*(draft|drafted)"):
            batched.diagnose(rule, batch, p, q)


def test_exhausted_law_and_foreign_token_are_refused() -> None:
    spent = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    twice = TokenTree.build(
        [0, 1], [-1, -1], [Proposal(-1, x, Law("without_replacement", 0), x) for x in (0, 1)], spent
    )
    for rule in ("recursive", "traversal"):
        batch, p, q, noise = uniform_batch([FORK, twice])
        assert judge(rule, batch, p, q, noise).valid.tolist() == [True, False]
        with pytest.raises(InvalidLawError, match=r"root/1 of sequence 1: .* no mass"):
            batched.diagnose(rule, batch, p, q)
    again = TokenTree.build(
        [0], [-1], [Proposal(-1, 0, Law("without_replacement", 0), 0)] * 2, torch.full((1, 4), 0.25)
    )
    foreign = TokenTree.build([7], [-1])
    for rule in ("recursive", "traversal"):
        for bad in (again, foreign):
            batch, p, q, noise = uniform_batch([FORK, bad], copies=2)
            assert judge(rule, batch, p, q, noise).valid.tolist() == [True, False]
            with pytest.raises(InvalidLawError, match="of sequence 1"):
                batched.diagnose(rule, batch, p, q)


@pytest.mark.parametrize("foreign", [4, 7, -1, 10**6])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("rule", [*Q_RULES, "typical"])
def test_token_outside_the_vocabulary_invalidates_its_sequence_alone(
    rule: str, drawn: bool, foreign: int
) -> None:
    laws = torch.full((2, 4), 0.25) if drawn else None
    good, bad = (TokenTree.chain(torch.tensor([1, x]), laws) for x in (2, foreign))
    for members in ([good] * 3 + [bad, good], [good] * 3 + [bad, EMPTY]):
        batch, p, q, noise = uniform_batch(members)
        outcome = judge(rule, batch, p, q, noise)
        assert outcome.valid.tolist() == [True, True, True, False, True]
        alone = judge(rule, *uniform_batch([good])).tokens
        assert outcome.tokens[:3].equal(alone.expand(3, -1))
        with pytest.raises(InvalidLawError, match=rf"token {foreign} is not in 0\.\.3") as caught:
            batched.diagnose(rule, batch, p, q)
        assert caught.value.node == f"root/1/{foreign} of sequence 3"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_bad_law_reaches_no_other_sequence(rule: str, value: float) -> None:
    two = TokenTree.build(
        [0, 1], [-1, -1], [Proposal(-1, x, Law("iid", x), x) for x in (0, 1)],
        torch.full((2, 4), 0.25),
    )  # fmt: skip
    batch, p, q, _ = uniform_batch([two, PLAIN])
    p[3] = torch.tensor([0.0, 0.0, 0.5, 0.5])  # the drafted 1 is rejected
    noise = StepNoise(*(torch.full((2, 3, *last), 0.2) for last in ((), (1,), (), ())))
    for law in (q[0].clone(), torch.full((4,), value)):
        q[0] = law
        outcome = judge(rule, batch, p, q, noise)
        assert outcome.tokens[1].tolist() == [2, -1, -1]
        assert outcome.valid.tolist() == [math.isfinite(law[0]), True]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_nothing_is_accepted_where_nothing_was_drafted(rule: str) -> None:
    batch, p, q, noise = uniform_batch([EMPTY] * 3)
    p[:] = torch.tensor([0.125, 0.125, 0.25, 0.5])
    outcome = judge(rule, batch, p, q, noise)
    assert outcome.accepted.tolist() == [0, 0, 0]
    assert outcome.tokens.tolist() == [[3]] * 3  # by the uniform 0.5 too
    assert outcome.path.shape == (3, 0)
    assert batch.copies == 1
    assert outcome.valid.tolist() == [True] * 3


@pytest.mark.parametrize("large", [1, 1000])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_rule_leaves_what_it_reads_as_it_was(
    rule: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (draw, batched, trees):
        monkeypatch.setattr(module, "LARGE", large)
    for members in ([PLAIN] * 3, [PLAIN, EMPTY, PLAIN], [FORK, PLAIN]):
        if rule in ("token", "block", "kseq") and members[0] is FORK:
            continue
        batch, p, q, noise = uniform_batch(members)
        layout, found = batch.layout, batch.layout.branches()
        held = {f"{of}.{name}": getattr(of, name) for of in (layout, found, noise, batch)
                for name in of.__slots__}  # fmt: skip
        held |= {"p": p, "q": q}
        before = {name: x.clone() for name, x in held.items() if isinstance(x, Tensor)}
        judge(rule, batch, p, q, noise)
        assert all(held[name].equal(x) for name, x in before.items())


@pytest.mark.parametrize("rule", ["walk", "token", "block", "recursive", "kseq", "traversal"])
def test_noise_may_have_more_rows_than_the_trees(rule: str) -> None:
    rng = random.Random(2)
    for draft in ("chain iid", "chain point"):
        for _ in range(6):
            batch = Batch.of(rng, random_batch(rng, draft, torch.float64), torch.float64)
            before = batch.fast(rule)
            batch.noise = StepNoise(
                *(
                    torch.cat((held, torch.rand(held.shape[0], 3, *held.shape[2:])), 1)
                    for held in (getattr(batch.noise, name) for name in StepNoise.__slots__)
                )
            )
            assert batch.fast(rule).tokens.equal(before.tokens)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_tiny_draft_probability_overflows_nowhere(rule: str) -> None:
    tiny = 1e-39  # p / q is infinite in float32
    q = torch.tensor([[0.5, 0.5], [1.0, tiny]])
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    batch = TreeBatch.of([TokenTree.chain(torch.tensor([1, 1]), q)])
    u = torch.full((1, 3), 0.5)
    outcome = judge(rule, batch, p, q, StepNoise(u, u[..., None], u, u))
    assert outcome.tokens.tolist() == [[0, -1, -1]]
    assert outcome.valid.all()


def test_walk_refuses_a_tree_with_a_token_outside_the_vocabulary() -> None:
    good, bad = (TokenTree.build([0, x], [-1, -1]) for x in (1, 7))
    batch, p, q, noise = uniform_batch([good, bad])
    assert judge("walk", batch, p, q, noise).valid.tolist() == [True, False]


def test_typical_breaks_ties_by_row_whatever_was_drawn_first() -> None:
    tree = TokenTree.build([0, 1], [-1, -1], [Proposal(-1, x, POINT, x) for x in (1, 0)])
    batch, p, q, noise = uniform_batch([tree])
    assert batched.typical(batch, p, q, noise).tokens.tolist() == [[0, 2]]


def test_typical_takes_more_than_the_threshold() -> None:
    batch, p, q, noise = uniform_batch([TokenTree.build([0], [-1])])
    p[0] = torch.tensor([0.25, 0.75, 0.0, 0.0])
    for eps, accepted in ((0.25, 0), (0.24, 1)):
        found = batched.typical(batch, p, q, noise, eps=eps, delta=1.0)
        assert found.accepted.tolist() == [accepted]


@pytest.mark.parametrize(
    ("rule", "tree", "reason"),
    [
        ("token", FORK, "judges chains"),
        ("block", FORK, "judges chains"),
        ("kseq", FORK, "not iid"),
        ("kseq", TokenTree.build([0, 1], [-1, -1]), "not iid"),
        ("kseq", FORKED_TWICE, "not iid"),
    ],
)
def test_rule_refuses_drafts_it_is_not_valid_for(rule: str, tree: TokenTree, reason: str) -> None:
    batch, p, q, noise = uniform_batch([PLAIN, tree])
    with pytest.raises(InvalidLawError, match=reason) as caught:
        judge(rule, batch, p, q, noise)
    assert (caught.value.rule, caught.value.node) == (rule, "row 3")


@pytest.mark.parametrize("rule", Q_RULES)
def test_missing_laws_are_refused(rule: str) -> None:
    batch, p, _, noise = uniform_batch([PLAIN])
    with pytest.raises(InvalidLawError, match="2 laws are missing") as caught:
        judge(rule, batch, p, None, noise)
    assert caught.value.rule == rule


@pytest.mark.parametrize("rule", [*Q_RULES, "walk", "typical"])
def test_misshapen_laws_are_refused(rule: str) -> None:
    batch, p, q, noise = uniform_batch([PLAIN])
    for few in (q[:1], q[:, :3], q[0]):
        with pytest.raises(
            InvalidLawError, match=r"stored laws are .*trees name \(2, 4\)"
        ) as caught:
            judge(rule, batch, p, few, noise)
        assert caught.value.rule == rule
        with pytest.raises(InvalidLawError, match="stored laws are"):
            batched.diagnose(rule, batch, p, few)
    for few in (p[:2], p[0], p[:, 0], p[:, None]):
        with pytest.raises(InvalidLawError, match=r"p is .*expected \(3, V\)") as caught:
            judge(rule, batch, few, q, noise)
        assert caught.value.rule == rule


def test_sound_laws_pass_the_diagnosis() -> None:
    mixed = TokenTree.build(
        [1, 2], [-1, 0], [Proposal(-1, 1, Law("iid", 0), 0), Proposal(0, 2, POINT, 1)],
        torch.tensor([[0.5, 0.5, 0.0, 0.0]]),
    )  # fmt: skip
    batch, p, q, _ = uniform_batch([PLAIN, EMPTY, mixed])
    for rule in RULES:
        batched.diagnose(rule, batch, p, q)


def test_law_sums_to_one_within_a_thousandth() -> None:
    sums = [1.0, 0.9995, 1.0005, 0.998, 1.002, 0.5, 1.5]
    rows = [[0.0, 0.25, x - 0.25] for x in sums]
    bad = [[0.5, 0.75, -0.25], [math.nan, 0.5, 0.5], [math.inf, 0.0, 0.0]]
    for dtype in DTYPES.values():
        found = laws.is_law(torch.tensor([*rows, *bad], dtype=dtype))
        assert found.tolist() == [True] * 3 + [False] * 7


def test_kseq_judges_one_draw_without_replacement() -> None:
    single = TokenTree.build(
        [0], [-1], [Proposal(-1, 0, Law("without_replacement", 0), 0)], torch.full((1, 4), 0.25)
    )
    batch, p, q, noise = uniform_batch([single])
    assert judge("kseq", batch, p, q, noise).tokens.tolist() == [[0, 2]]


@pytest.mark.parametrize("rule", [*Q_RULES, "walk", "typical"])
def test_laws_that_no_draw_names_may_be_empty(rule: str) -> None:
    points = TokenTree.chain(torch.tensor([1, 2]))
    batch, p, _, noise = uniform_batch([points, points])
    found = [judge(rule, batch, p, q, noise) for q in (None, torch.empty(0, 4))]
    assert all(outcome.valid.all() for outcome in found)
    assert found[0].tokens.equal(found[1].tokens)


@pytest.mark.parametrize("rule", ["walk", "typical"])
def test_rules_that_read_no_draft_law_need_none(rule: str) -> None:
    batch, p, q, noise = uniform_batch([PLAIN, FORK])
    found = [judge(rule, batch, p, laws, noise) for laws in (q, None)]
    assert all(outcome.valid.all() for outcome in found)
    assert found[0].tokens.equal(found[1].tokens)
    batched.diagnose(rule, batch, p, None)


# The batch of PLAIN and FORK: rows of p, then stored laws.
NEGATIVE, HEAVY, SPARSE = [-0.25, 0.5, 0.5, 0.25], [0.25, 0.25, 0.25, 0.5], [0.25, 0.0, 0.5, 0.25]
LIGHT = [0.25, 0.0, 0.25, 0.25]


@pytest.mark.parametrize(
    ("p_rows", "q_rows", "node", "reason"),
    [
        ({0: HEAVY}, {}, "root of sequence 0", "the target's law sums to 1.25, not 1"),
        ({3: LIGHT}, {}, "root of sequence 1", "the target's law sums to 0.75, not 1"),
        ({2: NEGATIVE}, {}, "root/1/2 of sequence 0",
         "the target's law has a negative or NaN entry"),
        ({5: HEAVY}, {0: HEAVY}, "root/1 of sequence 1", "the target's law sums to 1.25, not 1"),
        ({1: HEAVY, 4: NEGATIVE}, {}, "root/1 of sequence 0",
         "the target's law sums to 1.25, not 1"),
        ({}, {0: HEAVY}, "root/1 of sequence 0", "the draft's law sums to 1.25, not 1"),
        ({}, {1: HEAVY}, "root/1/2 of sequence 0", "the draft's law sums to 1.25, not 1"),
        ({}, {2: NEGATIVE}, "root/0 of sequence 1", "the draft's law has a negative or NaN entry"),
        ({}, {2: HEAVY}, "root/0 of sequence 1", "the draft's law sums to 1.25, not 1"),
        ({}, {1: HEAVY, 2: LIGHT}, "root/1 of sequence 1", "the draft's law sums to 0.75, not 1"),
        ({}, {1: HEAVY, 2: SPARSE}, "root/1 of sequence 1",
         "the drafted token has no mass in its law q"),
    ],
)  # fmt: skip
def test_diagnosis_names_node_and_reason(
    p_rows: dict[int, Vector], q_rows: dict[int, Vector], node: str, reason: str
) -> None:
    batch, p, q, _ = uniform_batch([PLAIN, FORK])
    for held, rows in ((p, p_rows), (q, q_rows)):
        for row, law in rows.items():
            held[row] = torch.tensor(law)
    with pytest.raises(InvalidLawError) as caught:
        batched.diagnose("traversal", batch, p, q)
    assert (caught.value.rule, caught.value.node) == ("traversal", node)
    assert caught.value.reason == reason


def test_every_rule_is_batched() -> None:
    assert set(RULES) <= set(batched.__all__)


# Index tensors.

LAYOUT: dict[str, Any] = {
    "row_offsets": (0, 3, 4, 9), "lengths": (2, 0, 4), "depth": 3, "laws": 5, "copies": 2,
    "is_chain": False, "is_even": False, "is_plain": False,
    "roots": [0, 3, 4], "counts": [2, 0, 4],
    "parent_rows": [0, 1, 4, 4, 5, 7], "node_rows": [1, 2, 5, 6, 7, 8],
    "sequence": [0, 0, 2, 2, 2, 2], "row_sequence": [0, 0, 0, 1, 2, 2, 2, 2, 2],
    "local": [0, 1, 2, 0, 0, 1, 2, 3, 4], "nodes": [0, 1, 2, 3, 4, 5],
    "steps": [0, 1, 2, 3], "blank": [[-1], [-1], [-1]],
}  # fmt: skip
BRANCHES: dict[str, Any] = {
    "lineage": [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [3, 3, 3, 3],
                [4, 4, 4, 4], [4, 5, 5, 5], [4, 6, 6, 6], [4, 5, 7, 7], [4, 5, 7, 8]],
    "row_depths": [0, 1, 2, 0, 0, 1, 1, 2, 3],
    "post_order": [[2, 1, 0, 0, 0], [3, 3, 3, 3, 3], [8, 7, 5, 6, 4]],
    "has_draws": [True, True, False, False, True, True, False, True, False],
    "laws_used": [[0, 0], [1, 0], [0, 0], [0, 0], [2, 3], [4, 0], [0, 0], [4, 0], [0, 0]],
    "draw_parents": [0, 1, 4, 4, 5, 4, 5, 7], "draw_nodes": [0, 1, 2, 3, 4, 2, 4, 5],
    "draw_laws": [0, 1, 2, 2, 0, 3, 4, 4], "draw_sequence": [0, 0, 2, 2, 2, 2, 2, 2],
    "draw_is_point": [False, False, False, False, True, False, False, False],
    "law_sequence": [0, 0, 2, 2, 2],
}  # fmt: skip
# By rank alone and, of the same, by depth.
ROUND_FIELDS = ("parents", "rows", "nodes", "siblings", "own", "copy", "reduced", "fresh", "place",
                "is_last")  # fmt: skip
RANKS: list[tuple[Any, ...]] = [
    ([0, 1, 4, 7, 5], [1, 2, 5, 8, 7], [0, 1, 2, 5, 4], [[0], [1], [2], [5], [4]],
     [0, 1, 2, 4, 0], [0] * 5, [], [0, 1, 2, 3, 4], [0] * 5, False),
    ([4, 5], [6, 7], [3, 4], [[2, 3], [4, 4]], [2, 4], [0, 1], [0], [0], [0, 0], False),
    ([4], [5], [2], [[2, 3, 2]], [3], [1], [], [], [1], True),
]  # fmt: skip
ROUNDS: list[tuple[Any, ...]] = [
    ([0, 4], [1, 5], [0, 2], [[0], [2]], [0, 2], [0, 0], [], [0, 1], [0, 0], False),
    ([4], [6], [3], [[2, 3]], [2], [0], [0], [0], [0], False),
    ([4], [5], [2], [[2, 3, 2]], [3], [1], [], [], [1], True),
    ([1, 5], [2, 7], [1, 4], [[1], [4]], [1, 0], [0, 0], [], [0, 1], [0, 0], False),
    ([5], [7], [4], [[4, 4]], [4], [1], [], [], [0], True),
    ([7], [8], [5], [[5]], [4], [0], [], [0], [0], True),
]


def plain(value: Any) -> Any:
    assert not isinstance(value, list)
    return value.tolist() if isinstance(value, Tensor) else value


def test_layout_numbers_the_rows_of_a_ragged_batch() -> None:
    bushy = TokenTree.build(
        [3, 1, 2, 0], [-1, -1, 0, 2],
        [Proposal(-1, 3, Law("without_replacement", 0), 0),
         Proposal(-1, 1, Law("without_replacement", 0), 1),
         Proposal(0, 2, POINT, 2), Proposal(-1, 3, Law("iid", 1), 0),
         Proposal(0, 2, Law("iid", 2), 2), Proposal(2, 0, Law("without_replacement", 2), 3)],
        torch.full((3, 4), 0.25),
    )  # fmt: skip
    layout = TreeBatch.of([PLAIN, EMPTY, bushy]).layout
    found = layout.branches()
    assert {name: plain(getattr(layout, name)) for name in LAYOUT} == LAYOUT
    assert {name: plain(getattr(found, name)) for name in BRANCHES} == BRANCHES
    assert isinstance(layout.draws, tuple)
    assert [d.law for d in layout.draws] == [0, 1, 2, 2, -1, 3, 4, 4]
    assert [d.taken for d in layout.draws] == [(), (), (), (2,), (), (), (), ()]
    assert found.is_used.sum(1).tolist() == [1, 1, 0, 0, 2, 1, 0, 1, 0]
    for rounds, expected in ((found.ranks, RANKS), (found.rounds, ROUNDS)):
        got = [tuple(plain(getattr(turn, name)) for name in ROUND_FIELDS) for turn in rounds]
        assert got == expected
        assert [turn.taken.tolist() for turn in rounds if len(turn.reduced)] == [[[2]]]
        for turn in rounds:
            assert turn.is_copy.equal(turn.copy > 0)
            assert turn.is_drawn.equal(found.draw_is_point.logical_not()[
                [[(d.row, d.rank) for d in layout.draws].index((row, turn.siblings.shape[1] - 1))
                 for row in turn.rows.tolist()]
            ])  # fmt: skip
    assert [[place.tolist() for place in turn.used] for turn in found.ranks] == [
        [[0, 1, 2, 4]], [[2, 4]], [[2], [3]],
    ]  # fmt: skip


def test_layout_of_chains_pads_them_to_one_length() -> None:
    layout = TreeBatch.of(
        [PLAIN, EMPTY, TokenTree.chain(torch.tensor([3]), torch.full((1, 4), 0.25))]
    ).layout
    assert (layout.is_chain, layout.is_even, layout.is_plain) == (True, False, True)
    assert layout.chain_rows.tolist() == [[0, 1, 2], [3, 3, 3], [4, 5, 5]]
    assert layout.chain_nodes.tolist() == [[0, 1, 0], [0, 0, 0], [2, 0, 0]]
    assert layout.inside.tolist() == [[True, True], [False, False], [True, False]]
    assert layout.is_last.tolist() == [[False, True], [False, False], [True, False]]
    assert layout.checked.tolist() == [[0, 1, 2, 6, 7], [3, 3, 3, 3, 3], [4, 5, 5, 8, 4]]


POINTS = TokenTree.chain(torch.tensor([1, 2]))


def same_draws(tree: TokenTree, *draws: tuple[int, Law]) -> TokenTree:
    return replace(tree, draws=draws)


@pytest.mark.parametrize(
    ("members", "chain", "even", "plain"),
    [
        ([POINTS, POINTS], True, True, True),
        ([PLAIN, PLAIN], True, True, True),
        ([POINTS, PLAIN], True, True, False),
        ([same_draws(POINTS, (1, POINT), (0, POINT))], True, True, False),
        ([same_draws(POINTS, (0, POINT), (1, POINT), (1, POINT))], False, False, False),
        ([same_draws(PLAIN, (0, Law("iid", 1)), (1, Law("iid", 0)))], True, True, False),
        ([same_draws(PLAIN, (0, Law("iid", 0)), (1, POINT))], True, True, False),
        ([TokenTree.build([0, 1], [-1, -1])], False, False, False),
        ([TokenTree.build([0, 1], [-1, 0])], True, True, True),
        ([TokenTree.build([1], [-1], [Proposal(-1, 1, Law("iid", 0), 0)], torch.ones(2, 4) / 4)],
         True, True, False),
    ],
)  # fmt: skip
def test_layout_knows_chains(
    members: list[TokenTree], *, chain: bool, even: bool, plain: bool
) -> None:
    layout = TreeBatch.of(members).layout
    assert (layout.is_chain, layout.is_even, layout.is_plain) == (chain, even, plain)


def test_layout_of_uneven_siblings_repeats_what_is_gone() -> None:
    fair, first = torch.full((2, 4), 0.25), [Law("without_replacement", 0)] * 4
    second = [Law("iid", 1), *first[1:]]  # its second law comes first
    members = [
        TokenTree.build(
            list(range(4)), [-1] * 4, [Proposal(-1, x, law, x) for x, law in enumerate(drawn)], fair
        )
        for drawn in (second, first)
    ]
    found = TreeBatch.of(members).layout.branches()
    last = found.ranks[3]
    assert last.nodes.tolist() == [3, 7]
    assert last.taken.tolist() == [[1, 2, 2], [4, 5, 6]]
    assert last.place.tolist() == [1, 0]
