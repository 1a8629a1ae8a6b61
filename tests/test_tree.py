"""TokenTree: unique paths as nodes, draws as a list in draw order."""

import random

import pytest
import torch

from specdec.errors import InvalidArgumentError
from specdec.tree import Law, Proposal, TokenTree

CPU = torch.device("cpu")
POINT = Law("point")


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def random_tree(rng: random.Random, size: int) -> TokenTree:
    tokens: list[int] = []
    parents: list[int] = []
    while len(tokens) < size:
        parent, token = rng.randrange(-1, len(tokens)), rng.randrange(5)
        if (parent, token) not in set(zip(parents, tokens, strict=True)):
            tokens.append(token)
            parents.append(parent)
    return TokenTree.build(tokens, parents)


def test_chain_is_one_branch_of_point_masses() -> None:
    tree = TokenTree.chain(torch.tensor([4, 4, 2]))
    assert tree.parents == (-1, 0, 1)
    assert tree.depths == (1, 2, 3)
    assert tree.is_chain
    assert tree.max_depth == len(tree) == 3
    assert tree.proposals == tuple(Proposal(i - 1, t, POINT, i) for i, t in enumerate([4, 4, 2]))


def test_chain_with_laws_was_drawn_from_them() -> None:
    laws = torch.full((2, 3), 1 / 3)
    tree = TokenTree.chain(torch.tensor([0, 2]), laws)
    assert tree.laws is laws
    assert [p.law for p in tree.proposals] == [Law("iid", 0), Law("iid", 1)]


def test_empty_tree() -> None:
    tree = TokenTree.empty(CPU)
    assert len(tree) == tree.max_depth == 0
    assert tree.is_chain
    assert (tree.proposals, tree.depths) == ((), ())
    assert tree.ancestor_mask().shape == (0, 0)


@pytest.mark.parametrize("size", [1, 2, 17, 63])
def test_ancestor_mask_is_the_prefix_relation(size: int) -> None:
    tree = random_tree(random.Random(size), size)
    mask, named = tree.ancestor_mask(), paths(tree)
    assert mask.dtype == torch.bool
    for i, a in enumerate(named):
        assert tree.depths[i] == len(a)
        assert mask[i].tolist() == [a[: len(b)] == b for b in named]


def test_branching_tree_is_no_chain() -> None:
    assert not TokenTree.build([1, 2], [-1, -1]).is_chain
    assert TokenTree.build([1, 2], [-1, 0]).is_chain


def test_tree_is_immutable_and_compares_by_identity() -> None:
    tree = TokenTree.build([1], [-1])
    with pytest.raises(AttributeError):
        tree.parents = ()  # type: ignore[misc]
    assert tree != TokenTree.build([1], [-1])


def test_merge_keeps_paths_once_and_every_draw() -> None:
    first = TokenTree.chain(torch.tensor([1, 2]), torch.eye(3)[[1, 2]])
    second = TokenTree.chain(torch.tensor([1, 0]), torch.full((2, 3), 1 / 3))
    third = TokenTree.build([1, 2, 0], [-1, 0, -1])
    tree = TokenTree.merge([first, second, third])
    assert paths(tree) == [(1,), (1, 2), (1, 0), (0,)]
    assert [(p.node, p.law) for p in tree.proposals] == [
        (0, Law("iid", 0)), (1, Law("iid", 1)), (0, Law("iid", 2)), (2, Law("iid", 3)),
        (0, POINT), (1, POINT), (3, POINT),
    ]  # fmt: skip
    assert tree.laws is not None
    assert torch.equal(tree.laws, torch.cat([torch.eye(3)[[1, 2]], torch.full((2, 3), 1 / 3)]))


def test_merge_keys_nodes_by_their_whole_path() -> None:
    # The same token at the same depth below different parents is two nodes.
    tree = TokenTree.merge([TokenTree.chain(torch.tensor(t)) for t in ([1, 3], [2, 3])])
    assert paths(tree) == [(1,), (1, 3), (2,), (2, 3)]


@pytest.mark.parametrize("seed", range(20))
def test_merge_is_the_union_of_paths(seed: int) -> None:
    rng = random.Random(seed)
    trees = [random_tree(rng, rng.randrange(9)) for _ in range(3)]
    tree = TokenTree.merge(trees)
    named = paths(tree)
    assert len(set(named)) == len(named)
    assert set(named) == {path for t in trees for path in paths(t)}
    assert len(tree.proposals) == sum(len(t.proposals) for t in trees)
    assert all(parent < node for node, parent in enumerate(tree.parents))
    again = TokenTree.merge([tree])
    assert (paths(again), again.proposals) == (named, tree.proposals)


def test_merge_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one"):
        TokenTree.merge([])


def test_duplicate_draws_share_a_node() -> None:
    draws = [Proposal(-1, 1, Law("iid", 0), 0), Proposal(-1, 1, Law("iid", 0), 0)]
    tree = TokenTree.build([1], [-1], draws, torch.full((1, 2), 0.5))
    assert tree.proposals == tuple(draws)


@pytest.mark.parametrize(
    ("tokens", "parents", "proposals"),
    [
        ([1, 2], [-1], None),
        ([1], [0], None),
        ([1, 2], [1, -1], None),
        ([1], [-2], None),
        ([1, 1], [-1, -1], None),
        ([[1]], [-1], None),
        ([1], [-1], [Proposal(-1, 2, POINT, 0)]),
        ([1], [-1], [Proposal(-1, 1, POINT, 1)]),
        ([1], [-1], [Proposal(-1, 1, POINT, -1)]),
        ([1, 2], [-1, 0], [Proposal(-1, 1, POINT, 0)]),
        ([1], [-1], [Proposal(-1, 1, Law("iid", 3), 0)]),
        ([1], [-1], [Proposal(-1, 1, Law("iid"), 0)]),
        ([1], [-1], [Proposal(-1, 1, Law("point", 0), 0)]),
        ([1], [-1], [Proposal(-1, 1, Law("greedy", 0), 0)]),  # type: ignore[arg-type]
    ],
    ids=[
        "lengths", "own-parent", "late-parent", "parent-range", "same-path", "shape", "token",
        "node-range", "node-negative", "undrawn-node", "law-range", "law-missing", "point-with-law",
        "kind",
    ],
)  # fmt: skip
def test_malformed_tree_is_refused(
    tokens: list[int], parents: list[int], proposals: list[Proposal] | None
) -> None:
    with pytest.raises(InvalidArgumentError):
        TokenTree.build(tokens, parents, proposals, torch.full((2, 3), 1 / 3))


def test_laws_must_be_enough_when_proposals_are_implied() -> None:
    with pytest.raises(InvalidArgumentError):
        TokenTree.build([1, 2], [-1, 0], None, torch.full((1, 3), 1 / 3))


def test_ranks_along_a_path_count_draws() -> None:
    chain = TokenTree.build([4, 5, 6], [-1, 0, 1])
    assert chain.ranks([]) == ((1, 0),)
    assert chain.ranks([0, 1]) == ((1, 1), (1, 1), (1, 0))
    assert chain.ranks([0, 1, 2]) == ((1, 1),) * 3
    assert TokenTree.build([], []).ranks([]) == ()
    # the second child of the root was drawn first, and the first one twice
    laws = torch.full((2, 9), 1 / 9)
    draws = [
        Proposal(-1, 5, Law("iid", 0), 1), Proposal(-1, 4, Law("iid", 0), 0),
        Proposal(-1, 4, Law("iid", 0), 0), Proposal(1, 7, Law("iid", 1), 2),
    ]  # fmt: skip
    tree = TokenTree.build([4, 5, 7], [-1, -1, 1], draws, laws)
    assert tree.ranks([]) == ((3, 0),)
    assert tree.ranks([0]) == ((3, 2),)  # a leaf: nothing was drawn below it
    assert tree.ranks([1, 2]) == ((3, 1), (1, 1))
    assert tree.ranks([1]) == ((3, 1), (1, 0))


def test_down_to_keeps_whole_levels() -> None:
    tree = TokenTree.build([1, 2, 3, 4, 5], [-1, 0, 1, -1, 3])
    cut = tree.down_to(1)
    assert (cut.tokens.tolist(), cut.parents) == ([1, 4], (-1, -1))
    cut = tree.down_to(2)
    assert (cut.tokens.tolist(), cut.parents) == ([1, 2, 4, 5], (-1, 0, -1, 2))
    assert tree.down_to(3) is tree
    assert len(tree.down_to(0)) == 0
    chain = TokenTree.build([7, 8, 9], [-1, 0, 1]).down_to(2)
    assert (chain.tokens.tolist(), chain.parents) == ([7, 8], (-1, 0))
    drawn = TokenTree.build([1], [-1], None, torch.full((1, 2), 0.5))
    with pytest.raises(AssertionError, match="drawn"):
        drawn.down_to(0)
