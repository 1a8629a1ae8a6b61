"""The rules that follow one line down the tree, on the host: where the numbers are there anyway, a
walk along the accepted path costs less than the dozen tensor operations of batched.py."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from specdec.tree import TokenTree, children

Line = tuple[tuple[int, ...], tuple[int, ...]]  # emitted tokens, accepted nodes


def followed(
    trees: Sequence[TokenTree], best: Sequence[int], sound: Sequence[bool]
) -> list[Line | None]:
    """What batched.py's greedy, gumbel and walk decide: each visited row emits what it says, and
    the line goes on to the child that carries it, if there is one. None where a law was none.

    best: what each row says, trees packed in this order, root rows first. sound: whether its law is
    one, of each row or of each tree. Reads the trees' tokens.
    """
    lines: list[Line | None] = []
    first, by_row = 0, len(sound) == len(best)
    for index, tree in enumerate(trees):
        end = first + len(tree) + 1
        said = best[first:end]
        if not (all(sound[first:end]) if by_row else sound[index]):
            lines.append(None)
        else:
            lines.append(_along(tree, said) if tree.is_chain else _down(tree, said))
        first = end
    return lines


def have_peaks(best: Tensor, logits: Tensor) -> list[bool]:
    """Whether each row's largest logit is a number: argmax lands on a NaN where there is one.

    best (R,) of logits (R, V), on the CPU.
    """
    rows, chosen = logits.numpy(), best.numpy()
    found: list[bool] = np.isfinite(rows[np.arange(len(chosen)), chosen]).tolist()
    return found


def _along(tree: TokenTree, said: Sequence[int]) -> Line:
    """A chain."""
    accepted, count = 0, len(tree)
    if count:
        tokens = tree.tokens.tolist()
        while accepted < count and tokens[accepted] == said[accepted]:
            accepted += 1
    return tuple(said[: accepted + 1]), tuple(range(accepted))


def _down(tree: TokenTree, said: Sequence[int]) -> Line:
    tokens, below = tree.tokens.tolist(), children(tree.parents)
    emitted: list[int] = []
    path: list[int] = []
    node: int | None = -1
    while node is not None:
        token = said[node + 1]
        emitted.append(token)
        node = next((child for child in below[node + 1] if tokens[child] == token), None)
        if node is not None:
            path.append(node)
    return tuple(emitted), tuple(path)
