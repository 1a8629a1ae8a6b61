"""The protocol of proposers, enforced: a tree that breaks it becomes an error that names whose it
is, before it can reach a model or a cache."""

from collections.abc import Sequence as Items
from functools import lru_cache
from typing import Any, get_args

import torch

from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.sequence import Sequence
from specdec.tree import Kind, Law, TokenTree

_KINDS = get_args(Kind)


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
    return InvalidArgumentError(f"proposer={proposer.name!r} broke the protocol: {reason}")


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
