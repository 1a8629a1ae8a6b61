"""Which batches a batched rule refuses: on the host from the layout, on the device by a flag."""

from collections.abc import Sequence
from itertools import groupby
from typing import NoReturn

import torch
from torch import Tensor

from specdec.acceptance.layout import Draw, Layout, TreeBatch
from specdec.errors import InvalidLawError

TOLERANCE = 1e-3  # of a sum: laws may have been rounded to half precision on their way here

_CHAIN_RULES = ("block", "token")
_Q_RULES = (*_CHAIN_RULES, "recursive", "kseq", "traversal")


def require(rule: str, layout: Layout, p: Tensor, q: Tensor | None) -> None:
    """Refuses what shapes tell: trees that the rule is not defined for, laws that are missing.

    Raises InvalidLawError. Reads no tensor's values.
    """
    rows = layout.row_offsets[-1]
    if p.ndim != 2 or p.shape[0] != rows:
        raise InvalidLawError(rule, "all", f"p is {tuple(p.shape)}; expected ({rows}, V)")
    if q is not None and q.shape != (layout.laws, p.shape[1]):
        expected = (layout.laws, p.shape[1])
        raise InvalidLawError(
            rule, "all", f"stored laws are {tuple(q.shape)}; the trees name {expected}"
        )
    if q is None and layout.laws and rule in _Q_RULES:
        raise InvalidLawError(
            rule, "all", f"the draft's {layout.laws} laws are missing; pass the trees' laws"
        )
    if rule in _CHAIN_RULES and not layout.is_chain:
        worst = max(layout.draws, key=lambda d: d.rank)
        raise InvalidLawError(
            rule, f"row {worst.parent}", "it judges chains, and this row has several proposals"
        )
    if rule == "kseq":
        _require_iid(layout.draws)


def _require_iid(draws: Sequence[Draw]) -> None:
    """k-SEQ counts on siblings that are iid: without replacement its bias is large (0.35)."""
    for parent, group in groupby(sorted(draws, key=lambda d: d.parent), lambda d: d.parent):
        siblings = list(group)
        laws = {(d.kind, d.law, d.node if d.law < 0 else -1) for d in siblings}
        if len(siblings) > 1 and (len(laws) > 1 or siblings[0].kind == "without_replacement"):
            raise InvalidLawError(
                "kseq", f"row {parent}",
                "its proposals are not iid from one law; use 'recursive' or 'traversal'",
            )  # fmt: skip


def is_law(p: Tensor) -> Tensor:
    """(n, V) -> (n,) whether each row sums to one without a negative entry; NaN does not."""
    return are_laws(p.sum(-1), p.amin(-1))


def are_laws(sums: Tensor, least: Tensor) -> Tensor:
    """is_law, from each row's sum and its least entry."""
    return (sums.sub(1).abs_() < TOLERANCE).logical_and_(least >= 0)


def valid(batch: TreeBatch, p: Tensor, q: Tensor | None) -> Tensor:
    """(B,) whether every law of a sequence is one, and every drafted token has mass in its own."""
    layout, found = batch.layout, batch.layout.branches()
    sound = is_law(p)
    bad = torch.zeros(len(layout.lengths), dtype=torch.long, device=p.device)
    bad.index_add_(0, layout.row_sequence, sound.logical_not().long())
    tokens = batch.tokens[found.draw_nodes]
    held = (tokens >= 0) & (tokens < p.shape[1])
    if q is not None and layout.laws:
        drawn = q[found.draw_laws, tokens.clamp(0, p.shape[1] - 1)] > 0
        held &= drawn | found.draw_is_point
        laws_bad = is_law(q).logical_not_().long()
        bad.index_add_(0, found.law_sequence, laws_bad)
    bad.index_add_(0, found.draw_sequence, held.logical_not_().long())
    return bad == 0


def diagnose(rule: str, batch: TreeBatch, p: Tensor, laws: Tensor | None) -> None:
    """Raises InvalidLawError with the first node whose law made Outcome.valid false.

    p (R, V), laws (L, V) as the rule got them. Synchronises and reads everything: call it only
    after a flag was raised. Returns when every law is sound.
    """
    require(rule, batch.layout, p, laws)
    names = _names(batch)
    _refuse_first(rule, p, "the target's law", names)
    owners: dict[int, str] = {}
    for draw in batch.layout.draws:
        token, name = int(batch.tokens[draw.node]), names[draw.row]
        if not 0 <= token < p.shape[1]:
            raise InvalidLawError(rule, name, f"token {token} is not in 0..{p.shape[1] - 1}")
        if laws is not None and draw.law >= 0:
            owners.setdefault(draw.law, name)
            gone = [int(batch.tokens[node]) for node in draw.taken]
            if not laws[draw.law, token] > 0 or token in gone:
                _refuse_first(rule, laws, "the draft's law", {draw.law: name})
                raise InvalidLawError(rule, name, "the drafted token has no mass in its law q")
    if laws is not None:
        _refuse_first(rule, laws, "the draft's law", owners)


def _refuse_first(rule: str, laws: Tensor, what: str, names: dict[int, str]) -> None:
    for row in is_law(laws).logical_not().nonzero().flatten().tolist():
        if row in names:
            _refuse(rule, names[row], what, laws[row])


def _refuse(rule: str, name: str, what: str, law: Tensor) -> NoReturn:
    if not bool((law >= 0).all()):  # NaN fails every comparison
        raise InvalidLawError(rule, name, f"{what} has a negative or NaN entry")
    raise InvalidLawError(rule, name, f"{what} sums to {float(law.double().sum()):.6g}, not 1")


def _names(batch: TreeBatch) -> dict[int, str]:
    """Each row by its sequence and the tokens on its path."""
    names: dict[int, str] = {}
    layout = batch.layout
    for b, row in enumerate(layout.row_offsets[:-1]):
        names[row] = f"root of sequence {b}"
    tokens, parents = batch.tokens.tolist(), layout.parent_rows.tolist()
    for row, parent, token in zip(layout.node_rows.tolist(), parents, tokens, strict=True):
        path, _, owner = names[parent].partition(" of ")
        names[row] = f"{path}/{token} of {owner}"
    return names
