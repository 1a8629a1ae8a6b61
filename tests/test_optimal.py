"""Optimal trees: the dynamic programme against every tree there is, and against measured costs."""

import random
from functools import cache
from typing import Any

import pytest

from specdec.errors import InvalidArgumentError
from specdec.optimal import TreeChoice, expected_tokens, fastest_shape, optimal_shape
from specdec.shapes import rows_per_level, shape_parents

VECTORS: list[Any] = [
    [0.6, 0.2, 0.1, 0.05],
    [0.1, 0.3, 0.5],  # the later ranks are better
    [0.9],
    [0.0, 0.7, 0.0, 0.2],
    [1.0, 0.0],
    [0.0],
    [[0.5, 0.3], [0.8, 0.1, 0.05], [0.2, 0.6]],  # by depth
    [[0.3, 0.3, 0.3], [0.9], []],
    *([rng.random() / 3 for _ in range(4)] for rng in map(random.Random, range(6))),
]

Ordered = tuple[Any, ...]  # a tree as the tuple of its children


@cache
def forests(nodes: int) -> tuple[Ordered, ...]:
    """Every ordered list of trees with so many nodes in all."""
    if nodes == 0:
        return ((),)
    return tuple(
        (first, *rest)
        for size in range(nodes)
        for first in forests(size)
        for rest in forests(nodes - 1 - size)
    )


@cache
def level_order(tree: Ordered) -> tuple[int, ...]:
    parents: list[int] = []
    level = [(-1, tree)]
    while level:
        below = []
        for parent, children in level:
            for child in children:
                below.append((len(parents), child))
                parents.append(parent)
        level = below
    return tuple(parents)


@cache
def depth_of(tree: Ordered) -> int:
    return 1 + max(map(depth_of, tree)) if tree else 0


def test_there_are_as_many_trees_as_catalan_says() -> None:
    assert [len(forests(n)) for n in range(9)] == [1, 1, 2, 5, 14, 42, 132, 429, 1430]


@pytest.mark.parametrize("acceptance", VECTORS, ids=str)
def test_no_tree_of_eight_nodes_is_better(acceptance: Any) -> None:
    for depth in (1, 2, 3, 8):
        best = 1.0
        for nodes in range(9):
            for tree in forests(nodes):
                if depth_of(tree) <= depth:
                    best = max(best, expected_tokens(level_order(tree), acceptance))
            shape = optimal_shape(acceptance, nodes, depth)
            assert expected_tokens(shape, acceptance) == pytest.approx(best, abs=1e-12)
            assert len(shape) <= nodes
            assert shape == () or shape_parents(shape) == shape
            assert len(rows_per_level(shape)) <= depth


def test_expected_tokens_of_a_chain_is_the_geometric_sum() -> None:
    assert expected_tokens((-1, 0, 1), [0.5]) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_tokens((-1, -1, 0, 1), [0.5, 0.25]) == pytest.approx(1 + 0.75 + 0.375)
    assert expected_tokens((-1, -1), [0.5]) == 1.5  # a rank that was never measured
    assert expected_tokens((), [0.5]) == 1
    by_depth = [[0.5], [0.25], [0.1]]  # the last one goes on
    assert expected_tokens((-1, 0, 1, 2), by_depth) == 1 + 0.5 + 0.125 + 0.0125 + 0.00125


def test_children_that_are_never_accepted_are_left_out() -> None:
    assert optimal_shape([0.5, 0.0], 20, 3) == (-1, 0, 1)
    assert optimal_shape([0.0], 20, 3) == ()


def test_largest_tree_has_the_node_limit() -> None:
    shape = optimal_shape([0.7, 0.15, 0.06, 0.03, 0.02], 255, 12)
    assert len(shape_parents(shape)) == 255
    deeper = expected_tokens(optimal_shape([0.7, 0.15], 255, 13), [0.7, 0.15])
    assert deeper >= expected_tokens(optimal_shape([0.7, 0.15], 254, 13), [0.7, 0.15])


def draft_seconds(rows: int) -> float:
    return 0.3 + 0.02 * rows


def target_seconds(rows: int) -> float:
    return 1 + 0.1 * rows


@pytest.mark.parametrize(
    "acceptance", [[0.7, 0.15, 0.05], [0.3, 0.25, 0.2], [0.1, 0.1], [[0.8], [0.3, 0.2]]], ids=str
)
def test_fastest_shape_weighs_tokens_against_time(acceptance: Any) -> None:
    found = fastest_shape(acceptance, draft_seconds, target_seconds, nodes=7, depth=4)

    def rate(shape: tuple[int, ...]) -> float:
        seconds = sum(map(draft_seconds, rows_per_level(shape))) + target_seconds(len(shape) + 1)
        return expected_tokens(shape, acceptance) / seconds

    assert found.tokens_per_second == pytest.approx(rate(found.shape))
    for nodes in range(8):
        for depth in range(1, 5):
            assert rate(optimal_shape(acceptance, nodes, depth)) <= found.tokens_per_second + 1e-12


def test_drafting_nothing_is_a_choice() -> None:
    found = fastest_shape([0.05], draft_seconds, target_seconds, nodes=15)
    assert found == TreeChoice((), 1.0, target_seconds(1))


def test_free_rows_make_large_trees_and_dear_ones_chains() -> None:
    free = fastest_shape([0.5, 0.3], lambda _: 0.01, lambda _: 1.0, nodes=63, depth=6)
    dear = fastest_shape([0.5, 0.3], lambda _: 0.01, lambda rows: float(rows), nodes=63)
    assert len(free.shape) == 63
    assert dear.shape == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4, 2), r"acceptance=\[\]: expected a probability"),
        (([0.5, 1.2], 4, 2), "acceptance=.*expected a probability"),
        (([float("nan")], 4, 2), "acceptance=.*expected a probability"),
        (([[0.5], [2.0]], 4, 2), "acceptance=.*expected a probability"),
        (([[]], 4, 2), "acceptance=.*expected a probability"),
        (([0.5], 256, 2), "nodes=256: expected 0 to 255"),
        (([0.5], -1, 2), "nodes=-1: expected"),
        (([0.5], 4, 0), "depth=0: expected at least 1"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        optimal_shape(*arguments)


def test_times_that_are_none_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="expected positive times"):
        fastest_shape([0.5], lambda _: 0.0, target_seconds, nodes=3)
