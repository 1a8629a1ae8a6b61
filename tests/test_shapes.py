"""Shapes of trees: how many nodes an expansion has, and which are refused."""

from typing import Any

import pytest

from specdec.errors import InvalidArgumentError
from specdec.shapes import (
    MAX_NODES,
    child_counts,
    cut,
    expanded,
    expansion,
    expansion_parents,
    rows_per_level,
    shape_parents,
    within_depth,
)


@pytest.mark.parametrize(
    ("widths", "nodes"),
    [((1,), 1), ((1, 1, 1, 1), 4), ((3, 2, 1), 15), ((2, 2), 6), ((255,), 255), ((), 0)],
    ids=str,
)
def test_nodes_of_an_expansion(widths: tuple[int, ...], nodes: int) -> None:
    assert expanded(widths) == nodes


def test_expansion_takes_any_list_of_numbers() -> None:
    assert expansion([3, 2, 1]) == expansion((3, 2, 1)) == (3, 2, 1)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("3,2", r"tree='3,2': expected the number of children per level, such as \(3, 2, 1\)"),
        ((), r"tree=\(\): expected"),
        ((2, 0), r"tree=\(2, 0\): expected"),
        ((2, True), r"tree=\(2, True\): expected"),
        ((1.5,), r"tree=\(1\.5,\): expected"),
        (3, "tree=3: expected"),
        ((256,), f"has 256 nodes: expected at most {MAX_NODES}"),
        ((4, 4, 4, 4), "has 340 nodes"),
    ],
    ids=str,
)
def test_what_is_no_expansion_is_refused(tree: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        expansion(tree)


def test_shape_of_an_expansion() -> None:
    assert expansion_parents((2, 2)) == (-1, -1, 0, 0, 1, 1)
    assert child_counts(expansion_parents((3, 2, 1))) == ((3,), (2,) * 3, (1,) * 6)
    assert expansion_parents(()) == ()
    assert child_counts(()) == ()


IRREGULAR = (-1, -1, -1, 0, 0, 2, 3, 3, 5)


def test_children_of_an_irregular_shape() -> None:
    assert child_counts(IRREGULAR) == ((3,), (2, 0, 1), (2, 0, 1))
    assert [within_depth(IRREGULAR, depth) for depth in (-1, 0, 1, 2, 3, 9)] == [0, 0, 3, 6, 9, 9]


@pytest.mark.parametrize(
    ("nodes", "siblings", "left"),
    [
        (9, 9, IRREGULAR),
        (8, 9, IRREGULAR[:6]),
        (5, 9, IRREGULAR[:3]),
        (2, 9, ()),
        (0, 9, ()),
        (9, 2, (-1, -1, 0, 0, 2, 2)),
        (9, 1, (-1, 0, 1)),
        (9, 0, ()),
    ],
    ids=str,
)
def test_shape_is_cut_by_ranks_and_then_by_levels(
    nodes: int, siblings: int, left: tuple[int, ...]
) -> None:
    assert cut(IRREGULAR, nodes, siblings) == left


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((), ()),
        (expansion_parents((1, 1, 1, 1)), (1, 1, 1, 1)),
        (expansion_parents((3, 2, 1)), (1, 3, 9)),
        (expansion_parents((1, 1, 2, 1, 1)), (1, 1, 1, 2, 4)),
        (expansion_parents((2, 1, 1)), (1, 2, 4)),
        ((-1, -1, 0, 0, 2, 2), (1, 1, 1)),  # only first children have children: one line
        (IRREGULAR, (1, 2, 4)),
    ],
    ids=str,
)
def test_rows_of_the_draft_s_passes(shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    assert rows_per_level(shape) == rows


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("-1", "shape='-1': expected the parent of every node"),
        ((), r"shape=\(\): expected"),
        ((-1, 0.5), "expected the parent of every node"),
        ((0,), r"shape\[0\]=0: expected -1 to -1"),
        ((-1, 1), r"shape\[1\]=1: expected -1 to 0"),
        ((-1, 0, -1), r"shape\[2\]=-1: expected 0 to 1, since nodes are listed level by level"),
        ((-1,) * 256, f"256 nodes, expected at most {MAX_NODES}"),
    ],
    ids=str,
)
def test_what_is_no_shape_is_refused(shape: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        shape_parents(shape)
