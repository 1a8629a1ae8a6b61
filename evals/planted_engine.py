"""Known mistakes inside the production engine: what a user of a wrong build would sample.

Wrong verifiers of evals/wrong_rules.py take the place of the rule, wrong drafts that of the
proposer, wrong keys that of the noise; everything else, engine, cache, the other half of the step
and the runner of table models, is production code. Unlike an enumerated law, its texts come with
budgets that end with the text and steps of every length.
"""

import random
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from operator import mul
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from specdec.engine import Engine
from specdec.evals import wrong_rules
from specdec.evals.enumeration import DRAFTS, Grow, Law, Tables, V, make_tables
from specdec.evals.keyed import RekeyedNoise
from specdec.evals.wrong_rules import KeyFault, Variant
from specdec.proposers import Proposer
from specdec.rng import Noise
from specdec.sequence import Sequence as Sample
from specdec.toy import TableRunner
from specdec.tree import Law as DrawLaw, Proposal, TokenTree
from specdec.verifier import Answer

_PRODUCTION = {"iid": DRAFTS["iid"], "without_replacement": DRAFTS["without replacement"]}


def engine_of(fault: Variant | KeyFault, seed: int) -> Engine:
    """The engine with this mistake in it, on the mistake's tables of this seed."""
    kind = fault.tables if isinstance(fault, Variant) else "generic"
    tables = make_tables(kind, seed).as_floats()
    if isinstance(fault, KeyFault):
        engine = _engine(tables, fault.rule, DRAFTS[fault.draft], fault.shape, seed)
        engine.noise = RekeyedNoise(fault.keys)
        return engine
    wrong = _wrong_verifier(fault)
    rule = fault.name.split(":")[0] if not wrong else ""
    engine = _engine(tables, rule or "auto", fault.grow, fault.shape, seed)
    if wrong:
        _plant(engine, wrong, random.Random(seed))
    return engine


def plain_engine(fault: Variant | KeyFault, seed: int) -> Engine:
    """The same target alone."""
    kind = fault.tables if isinstance(fault, Variant) else "generic"
    return Engine(_runner(make_tables(kind, seed).as_floats().target), grow=True)


def _engine(tables: Tables, rule: str, grow: Grow, shape: Sequence[int], seed: int) -> Engine:
    options: dict[str, Any] = {"verification": rule, "grow": True, "policy": "constant"}
    kind = next((kind for kind, its in _PRODUCTION.items() if its is grow), None)
    if kind is None:
        options |= {"proposer": Grown(tables, grow, shape, seed)}
    elif set(shape) == {1}:
        options |= {"draft": _runner(tables.drafts[0]), "num_draft_tokens": len(shape)}
    else:
        options |= {"draft": _runner(tables.drafts[0]), "proposer": "tree",
                    "proposer_options": {"tree": list(shape), "kind": kind}}  # fmt: skip
    return Engine(_runner(tables.target), lossy=rule == "typical", **options)


def _runner(laws: Sequence[Law]) -> TableRunner:
    def table(context: tuple[int, ...]) -> Law:
        return laws[context[-1]] if context else laws[0]

    return TableRunner(table, V)


def _wrong_verifier(fault: Variant) -> Any:
    """The verifier of wrong_rules with its mistake; None where the rule itself is sound."""
    verify = fault.verify
    own = isinstance(verify, partial) and verify.func.__module__ == wrong_rules.__name__
    return verify if own else None


# wrong verifiers


class _Coins:
    """The rng of a rule, from a stream."""

    def __init__(self, stream: random.Random) -> None:
        self._stream = stream

    def bernoulli(self, p: float) -> bool:
        return self._stream.random() < p

    def categorical(self, weights: Sequence[float]) -> int:
        return self._stream.choices(range(len(weights)), weights)[0]


def _plant(engine: Engine, wrong: Any, stream: random.Random) -> None:
    coins = _Coins(stream)

    def judge(
        sequences: Sequence[Sample], trees: Sequence[TokenTree], logits: Tensor, noise: Noise
    ) -> list[Answer]:
        del noise
        p = sequences[0].law.probabilities(logits, _no_paths).double().tolist()
        answers, first = [], 0
        for tree in trees:
            rows = p[first : first + len(tree) + 1]
            first += len(rows)
            answers.append(_answer(tree, wrong(_as_nodes(tree, rows), coins)))
        return answers

    engine.verifier._judge = judge  # type: ignore[method-assign]


def _no_paths() -> Any:
    raise AssertionError("nothing here looks at a path")


def _as_nodes(tree: TokenTree, rows: list[list[float]]) -> Any:
    """The root of the same tree as rules read it."""
    laws = [] if tree.laws is None else tree.laws.double().tolist()
    nodes = [SimpleNamespace(p=row, proposals=[]) for row in rows]
    taken: dict[int, list[int]] = {}
    for parent, token, law, node in tree.proposals:
        assert law.row is not None
        q = laws[law.row]
        if law.kind == "without_replacement":
            drawn = taken.setdefault(parent, [])
            left = [0.0 if t in drawn else mass for t, mass in enumerate(q)]
            q = [mass / sum(left) for mass in left]
            drawn.append(token)
        nodes[parent + 1].proposals.append((token, q, nodes[node + 1]))
    return nodes[0]


def _answer(tree: TokenTree, tokens: Sequence[int]) -> Answer:
    place = {(p, t): n for n, (p, t) in enumerate(zip(tree.parents, tree.tokens.tolist(),
                                                      strict=True))}  # fmt: skip
    path, above = [], -1
    for token in tokens[:-1]:
        above = place[above, token]
        path.append(above)
    return tuple(tokens), tuple(path)


# wrong drafts


class Grown(Proposer):
    """Draws trees as an experiment of evals/enumeration.py does; level by level as deep as the
    budget allows."""

    name = "grown"
    law = "sampled"

    def __init__(self, tables: Tables, grow: Grow, shape: Sequence[int], seed: int) -> None:
        self._tables, self._grow, self._shape = tables, grow, tuple(shape)
        self._sizes = list(accumulate(accumulate(shape, mul)))  # nodes down to each depth at most
        self._rng = _Draws(random.Random(seed))

    @property
    def preferred_nodes(self) -> int:
        return self._sizes[-1]

    def nodes_within(self, depth: int) -> int:
        return self._sizes[min(depth, len(self._sizes)) - 1]

    def propose(
        self, sequences: Sequence[Sample], budgets: Sequence[int], noise: Noise
    ) -> list[TokenTree]:
        del noise
        return [self._tree(s.tokens[-1], b) for s, b in zip(sequences, budgets, strict=True)]

    def _tree(self, last: int, budget: int) -> TokenTree:
        depth = sum(size <= budget for size in self._sizes)
        if not depth:
            return TokenTree.empty(torch.device("cpu"))
        root = self._grow(self._shape[:depth], self._tables, last, self._rng)
        tokens, parents, proposals, laws = list[int](), list[int](), list[Proposal](), list[Law]()
        rows: dict[tuple[int, Law], int] = {}  # siblings of one law share its row
        pending: list[tuple[Any, int]] = [(root, -1)]
        while pending:
            node, number = pending.pop(0)
            known: dict[int, int] = {}
            for token, law, child in node.proposals:
                if token not in known:
                    known[token] = len(tokens)
                    tokens.append(token)
                    parents.append(number)
                    pending.append((child, known[token]))
                row = rows.setdefault((number, tuple(law)), len(laws))
                if row == len(laws):
                    laws.append(law)
                proposals.append(Proposal(number, token, DrawLaw("iid", row), known[token]))
        if not tokens:
            return TokenTree.empty(torch.device("cpu"))
        return TokenTree.build(tokens, parents, proposals, torch.tensor(laws))


class _Draws:
    def __init__(self, stream: random.Random) -> None:
        self._stream = stream

    def draw(self, weights: Law) -> int:
        return self._stream.choices(range(len(weights)), weights)[0]
