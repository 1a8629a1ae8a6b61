"""Known mistakes inside the production engine: what a user of a wrong build would sample.

Wrong verifiers of evals/wrong_rules.py take the place of the rule, wrong drafts that of the
proposer, wrong keys that of the noise; everything else, engine, cache, the other half of the step
and the runner of table models, is production code. Unlike an enumerated law, its texts come with
budgets that end with the text and steps of every length. All randomness is the engine's noise: with
numbers it is sampled, with coins part (a) of `specdec verify` takes every outcome (evals/audit.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from operator import mul
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from specdec.acceptance.draw import sample
from specdec.engine import Engine
from specdec.errors import NumericalError
from specdec.evals import wrong_rules
from specdec.evals.audit import emitted_law
from specdec.evals.enumeration import (
    DRAFTS,
    START,
    Comparison,
    Grow,
    Law,
    Tables,
    V,
    make_tables,
)  # fmt: skip
from specdec.evals.keyed import RekeyedNoise
from specdec.evals.wrong_rules import KeyFault, Variant
from specdec.proposers import Proposer
from specdec.rng import Noise
from specdec.sequence import Sequence as Sample
from specdec.toy import Table, TableRunner
from specdec.tree import Law as DrawLaw, Proposal, TokenTree
from specdec.verifier import Answer

_PRODUCTION = {"iid": DRAFTS["iid"], "without_replacement": DRAFTS["without replacement"]}


def engine_of(fault: Variant | KeyFault, seed: int, noise: Noise | None = None) -> Engine:
    """The engine with this mistake in it, on the mistake's tables of this seed."""
    tables = _tables(fault, seed)
    if isinstance(fault, KeyFault):
        noise = RekeyedNoise(fault.keys, fault.reads, noise)
        return _engine(tables, fault.rule, DRAFTS[fault.draft], fault.shape, noise)
    wrong = _wrong_verifier(fault)
    rule = fault.name.split(":")[0] if not wrong else ""
    engine = _engine(tables, rule or "auto", fault.grow, fault.shape, noise)
    if wrong:
        _plant(engine, wrong)
    return engine


def plain_engine(fault: Variant | KeyFault, seed: int) -> Engine:
    """The same target alone."""
    return Engine(_runner(_tables(fault, seed).target), grow=True)


def audited(fault: Variant | KeyFault, seed: int, tokens: int) -> Comparison | None:
    """Part (a) of `specdec verify` on this engine: the law of its first tokens, whose steps draft
    as deep as the shape is, and the target's; None where the engine refuses to go on."""
    laws = _tables(fault, seed).target
    try:
        return emitted_law(
            partial(engine_of, fault, seed), _table(laws), [START], tokens=tokens,
            new_tokens=max(tokens, len(fault.shape) + 1),
        )  # fmt: skip
    except NumericalError:
        return None


def small(fault: Variant | KeyFault) -> Variant | KeyFault:
    """With half the nodes: what takes seconds to enumerate and shows the same. Where the first
    level decides how wide the second is, that one stays."""
    if isinstance(fault, KeyFault) or fault.shape != (2, 2):
        return fault
    return replace(fault, shape=(2, 1) if fault.grow in DRAFTS.values() else (1, 2))


def _tables(fault: Variant | KeyFault, seed: int) -> Tables:
    kind = fault.tables if isinstance(fault, Variant) else "generic"
    return make_tables(kind, seed).as_floats()


def _engine(
    tables: Tables, rule: str, grow: Grow, shape: Sequence[int], noise: Noise | None
) -> Engine:
    options: dict[str, Any] = {
        "verification": rule, "grow": True, "policy": "constant", "noise": noise,
    }  # fmt: skip
    kind = next((kind for kind, its in _PRODUCTION.items() if its is grow), None)
    if kind is None:
        options |= {"proposer": Grown(tables, grow, shape)}
    elif set(shape) == {1}:
        options |= {"draft": _runner(tables.drafts[0]), "num_draft_tokens": len(shape)}
    else:
        options |= {"draft": _runner(tables.drafts[0]), "proposer": "tree",
                    "proposer_options": {"tree": list(shape), "kind": kind}}  # fmt: skip
    return Engine(_runner(tables.target), lossy=rule == "typical", **options)


def _runner(laws: Sequence[Law]) -> TableRunner:
    return TableRunner(_table(laws), V)


def _table(laws: Sequence[Law]) -> Table:
    return lambda context: laws[context[-1] if context else START]


class _Numbers:
    """The rng of a rule or of a draft: uniforms (n,), one after the other."""

    def __init__(self, uniforms: Tensor) -> None:
        self._uniforms, self._used = uniforms, 0

    def bernoulli(self, p: float) -> bool:
        return bool(self._next() < torch.tensor([p], dtype=torch.float64))

    def categorical(self, weights: Sequence[float]) -> int:
        return int(sample(torch.tensor([weights], dtype=torch.float64), self._next()))

    draw = categorical

    def _next(self) -> Tensor:
        self._used += 1
        return self._uniforms[self._used - 1 : self._used]


def _wrong_verifier(fault: Variant) -> Any:
    """The verifier of wrong_rules with its mistake; None where the rule itself is sound."""
    verify = fault.verify
    own = isinstance(verify, partial) and verify.func.__module__ == wrong_rules.__name__
    return verify if own else None


# wrong verifiers


def _plant(engine: Engine, wrong: Any) -> None:
    def judge(
        rule: str, sequences: Sequence[Sample], trees: Sequence[TokenTree], logits: Tensor,
        noise: Noise,
    ) -> list[Answer]:  # fmt: skip
        del rule
        p = sequences[0].law.probabilities(logits, _no_paths).double().tolist()
        answers, first = [], 0
        for sequence, tree in zip(sequences, trees, strict=True):
            rows = p[first : first + len(tree) + 1]
            first += len(rows)
            most = len(tree.proposals) + 2  # a coin for each, and what follows
            step = noise.step([sequence.seed], [len(sequence.tokens)], most, logits.device)
            coins = _Numbers(step.accept[0, :, 0])
            answers.append(_answer(tree, wrong(_as_nodes(tree, rows), coins)))
        return answers

    for name in ("_judge", "_judge_fused"):
        assert hasattr(engine.verifier, name)
        setattr(engine.verifier, name, judge)


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

    def __init__(self, tables: Tables, grow: Grow, shape: Sequence[int]) -> None:
        self._tables, self._grow, self._shape = tables, grow, tuple(shape)
        self._sizes: list[int] = list(
            accumulate(accumulate(shape, mul))
        )  # nodes down to each depth at most

    @property
    def preferred_nodes(self) -> int:
        return self._sizes[-1]

    def nodes_within(self, depth: int) -> int:
        return self._sizes[min(depth, len(self._sizes)) - 1]

    def propose(
        self, sequences: Sequence[Sample], budgets: Sequence[int], noise: Noise
    ) -> list[TokenTree]:
        most = 3 * self._sizes[-1]  # draws of a tree: the best of two, or in another order
        device = torch.device("cpu")
        return [
            self._tree(
                s.tokens[-1], budget,
                _Numbers(noise.step([s.seed], [len(s.tokens)], most, device).draft[0]),
            )
            for s, budget in zip(sequences, budgets, strict=True)
        ]  # fmt: skip

    def _tree(self, last: int, budget: int, rng: _Numbers) -> TokenTree:
        depth = sum(size <= budget for size in self._sizes)
        if not depth:
            return TokenTree.empty(torch.device("cpu"))
        root = self._grow(self._shape[:depth], self._tables, last, rng)
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
