"""Shapes of token trees that are fixed before anything is drawn."""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from specdec.errors import InvalidArgumentError

# A scored row is the root or a node; kernels and cost tables count at most 256 of them.
MAX_NODES = 255


def expansion(tree: Any) -> tuple[int, ...]:
    """A static expansion <k1, k2, ...>: every node of depth i - 1 has k_i children (SpecInfer,
    Miao et al. 2023, 2305.09781, section 3). Raises InvalidArgumentError for what is none, and for
    more than MAX_NODES nodes."""
    is_list = isinstance(tree, Sequence) and not isinstance(tree, str) and len(tree) > 0
    if not is_list or not all(type(width) is int and width > 0 for width in tree):
        raise InvalidArgumentError(
            f"tree={tree!r}: expected the number of children per level, such as (3, 2, 1)"
        )
    widths = tuple(tree)
    if expanded(widths) > MAX_NODES:
        raise InvalidArgumentError(
            f"tree={tree!r} has {expanded(widths)} nodes: expected at most {MAX_NODES}; take fewer "
            "children or levels"
        )
    return widths


def expanded(widths: Sequence[int]) -> int:
    """Nodes of an expansion: the sum over levels of the product of the widths so far."""
    return sum(accumulate(widths, mul))


def levels_within(widths: Sequence[int], nodes: int) -> int:
    """How many whole levels of an expansion have at most this many nodes in all."""
    sizes = accumulate(accumulate(widths, mul))
    return sum(size <= nodes for size in sizes)
