"""The protocol of proposers, enforced: what breaks it, a class, a value or a tree, becomes an error
that names whose it is, before it can reach a model or a cache."""

from collections.abc import Sequence as Items
from functools import lru_cache
from inspect import Parameter, signature
from typing import Any, get_args, get_type_hints

import torch

from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.sequence import Sequence
from specdec.shapes import MAX_NODES
from specdec.tree import Kind, Law, TokenTree

_KINDS = get_args(Kind)
_LAWS = get_args(get_type_hints(Proposer)["law"])
# What the engine calls, and with how many arguments.
_METHODS = {
    "join": 2, "nodes_within": 1, "draft_rows": 1, "situation": 1, "start": 1, "propose": 3,
    "observe": 2, "finish": 1,
}  # fmt: skip
_DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64, 128, MAX_NODES, 1 << 15)


@lru_cache(maxsize=64)
def class_fault(kind: type[Proposer]) -> str:
    """What of the protocol a class lacks; empty where nothing is."""
    missing = sorted(getattr(kind, "__abstractmethods__", ()))
    if missing:
        return f"it has no {', '.join(missing)}()"
    if not isinstance(getattr(kind, "name", None), str):
        return f"its name is {getattr(kind, 'name', None)!r}: expected a text"
    for method, count in _METHODS.items():
        try:
            signature(getattr(kind, method)).bind(*[None] * (count + 1))
        except (TypeError, ValueError) as error:
            return f"its {method}() cannot be called with {count} arguments: {error}"
    return ""


def constructor_fault(kind: type[Proposer]) -> str:
    """Why a proposer cannot be made by its name; empty where it can be."""
    by_position = [
        p
        for p in signature(kind).parameters.values()
        if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    if kind.needs_draft and not by_position:
        return "its constructor takes no draft, and needs_draft is True"
    for parameter in by_position[kind.needs_draft :]:
        if parameter.default is Parameter.empty:
            return (
                f"its constructor needs {parameter.name!r} by position: expected options that are "
                "keyword-only"
            )
    return ""


def check_proposer(proposer: Proposer) -> None:
    """Raises InvalidArgumentError, naming the proposer, unless its class and what it says of itself
    before it joins keep to the protocol."""
    fault = class_fault(type(proposer))
    if fault:
        raise _refuse(proposer, fault)
    law = getattr(proposer, "law", None)
    if law not in _LAWS:
        raise _refuse(proposer, f"law={law!r}: expected one of {', '.join(_LAWS)}")
    _whole_number(proposer, "preferred_nodes", 1, MAX_NODES, optional=True)
    _whole_number(proposer, "spare_slots", 0, None)


def join(proposer: Proposer, group: CacheGroup, vocab_size: int) -> None:
    """Lets a proposer join. Raises InvalidArgumentError, naming it, unless the numbers that it
    gives from then on can be planned with."""
    proposer.join(group, vocab_size)
    _whole_number(proposer, "max_positions", 1, None, optional=True)
    for depth in _DEPTHS:
        nodes: Any = proposer.nodes_within(depth)
        most = max(depth, proposer.preferred_nodes or 0)  # so many slots are held for it
        if not _is_whole(nodes) or not 0 <= nodes <= most:
            raise _refuse(
                proposer, f"nodes_within({depth})={nodes!r}: expected a whole number, 0 to {most}"
            )
    rows: Any = proposer.draft_rows(1)
    if not isinstance(rows, tuple) or not all(_is_whole(n) and n >= 1 for n in rows):
        raise _refuse(proposer, f"draft_rows(1)={rows!r}: expected a tuple of numbers of rows")


def situation_of(proposer: Proposer, sequence: Sequence) -> int:
    """proposer.situation(sequence). Raises InvalidArgumentError, naming the proposer, unless it is
    a whole number, 0 or more."""
    number: Any = proposer.situation(sequence)
    if not isinstance(number, int) or number < 0:
        raise _refuse(proposer, f"situation()={number!r}: expected a whole number, 0 or more")
    return number


def checked(
    proposer: Proposer, trees: Any, sequences: Items[Sequence], budgets: Items[int],
    vocab_size: int, device: torch.device,
) -> list[TokenTree]:  # fmt: skip
    """The trees that a proposer gave for these sequences and budgets.

    Raises InvalidArgumentError, naming the proposer, unless there is one TokenTree per sequence,
    within its budget, no deeper than what may still be emitted, its parents before their children,
    its draws and laws complete. Shapes are read, values are not, but for token ids on the CPU:
    there they must be of the target's vocabulary. On other devices the acceptance rules see those.
    """
    if not isinstance(trees, list | tuple) or len(trees) != len(sequences):
        found = f"{len(trees)} of them" if isinstance(trees, list | tuple) else _kind_of(trees)
        raise _refuse(proposer, f"expected a list of {len(sequences)} trees, got {found}")
    nothing = TokenTree.empty(device)
    for tree, sequence, budget in zip(trees, sequences, budgets, strict=True):
        if tree is nothing:
            continue
        if not isinstance(tree, TokenTree):
            raise _refuse(proposer, f"expected TokenTrees, got {_kind_of(tree)}")
        _check_tokens(proposer, tree, vocab_size, device)
        count = len(tree)
        if not count and not tree.draws and tree.laws is None:
            continue
        if count > budget:
            raise _refuse(proposer, f"a tree of {count} nodes: expected at most {budget}")
        rows = 0 if tree.laws is None else _rows(proposer, tree, vocab_size)
        fault = _fault(tree.parents, tree.draws, rows)
        if fault:
            raise _refuse(proposer, fault)
        if count and tree.max_depth > sequence.remaining - 1:
            raise _refuse(
                proposer,
                f"a tree of depth {tree.max_depth}: expected at most {sequence.remaining - 1}, as "
                f"{sequence.remaining} tokens may still be emitted",
            )
    return list(trees)


def _refuse(proposer: Proposer, reason: str) -> InvalidArgumentError:
    name = getattr(proposer, "name", type(proposer).__name__)
    return InvalidArgumentError(f"proposer={name!r} broke the protocol: {reason}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole_number(
    proposer: Proposer, name: str, least: int, most: int | None, *, optional: bool = False
) -> None:
    value: object = getattr(proposer, name)
    if value is None and optional:
        return
    if not isinstance(value, int) or not least <= value <= (value if most is None else most):
        upper = "or more" if most is None else f"to {most}"
        none = ", or None" if optional else ""
        raise _refuse(proposer, f"{name}={value!r}: expected a whole number, {least} {upper}{none}")


def _kind_of(value: object) -> str:
    return type(value).__name__


def _check_tokens(
    proposer: Proposer, tree: TokenTree, vocab_size: int, device: torch.device
) -> None:
    tokens = tree.tokens
    shape: tuple[object, object] = tree.parents, tree.draws or ()
    if not all(isinstance(part, tuple) for part in shape):
        raise _refuse(proposer, "parents and draws: expected tuples")
    if tokens.shape != (len(tree),) or tokens.dtype != torch.long:
        raise _refuse(
            proposer,
            f"tokens {tuple(tokens.shape)} of {tokens.dtype}: expected ({len(tree)},) of int64, as "
            "there are parents",
        )
    if tokens.device.type != device.type:
        raise _refuse(proposer, f"tokens on {tokens.device}: expected {device}")
    if device.type == "cpu" and len(tree):
        found = tokens.tolist()
        low, high = min(found), max(found)
        if low < 0 or high >= vocab_size:
            raise _refuse(
                proposer,
                f"token {low if low < 0 else high}: expected 0 to {vocab_size - 1}, the target's "
                "vocabulary",
            )


def _rows(proposer: Proposer, tree: TokenTree, vocab_size: int) -> int:
    assert tree.laws is not None
    if proposer.law == "point":
        raise _refuse(proposer, "a tree with laws: expected none, as its law is 'point'")
    if tree.laws.ndim != 2 or tree.laws.shape[1] != vocab_size:
        raise _refuse(proposer, f"laws {tuple(tree.laws.shape)}: expected (rows, {vocab_size})")
    return tree.laws.shape[0]


@lru_cache(maxsize=4096)
def _fault(parents: tuple[int, ...], draws: tuple[tuple[int, Law], ...] | None, rows: int) -> str:
    """What is wrong with a tree's shape; empty where nothing is. Shapes come again and again."""
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            return f"parents[{node}]={parent}: expected -1 or an earlier node"
    if draws is None:
        return f"{rows} laws for {len(parents)} nodes" if rows not in (0, len(parents)) else ""
    for node, (kind, row) in draws:
        if not 0 <= node < len(parents):
            return f"a draw of node {node}: expected 0 to {len(parents) - 1}"
        if kind not in _KINDS:
            return f"a law of kind {kind!r}: expected one of {', '.join(_KINDS)}"
        if (row is None) != (kind == "point") or (row is not None and not 0 <= row < rows):
            return f"a draw from law {row} of kind {kind!r}: there are {rows} laws"
    missing = set(range(len(parents))) - {node for node, _ in draws}
    return f"nothing drew node {min(missing)}" if missing else ""
