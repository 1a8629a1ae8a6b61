"""Shapes of trees: how many nodes an expansion has, and which are refused."""

from typing import Any

import pytest

from specdec.errors import InvalidArgumentError
from specdec.shapes import MAX_NODES, expanded, expansion, levels_within


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


@pytest.mark.parametrize(
    ("nodes", "levels"), [(0, 0), (2, 0), (3, 1), (8, 1), (9, 2), (14, 2), (15, 3), (99, 3)]
)
def test_whole_levels_that_fit_into_a_budget(nodes: int, levels: int) -> None:
    assert levels_within((3, 2, 1), nodes) == levels
