"""The trees of one step as the verification kernels read them: packed on the device."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.checks import check_tensor
from specdec.kernels.upload import upload
from specdec.kernels.verify_records import DRAW

MOST_ROWS = 256  # of one tree, its root included


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """The trees of one step on the device; all int64. Rows are packed: per sequence its root, then
    its nodes, parents before children. A function of the shape alone, but for tokens."""

    tokens: Tensor  # (nodes,) node of row r of sequence b: r - b - 1
    cu_rows: Tensor  # (B + 1,) first row of each sequence
    sequences: Tensor  # (R,)
    parents: Tensor  # (R,) row, -1 for a root
    depths: Tensor  # (R,) a root's is 0
    cu_draws: Tensor  # (R + 1,) first proposal of each row; proposals in draw order
    draws: Tensor  # (P, DRAW) records of the proposals: see verify_records
    used_laws: Tensor  # (R, places) the different stored laws of a row's proposals, -1 pads
    most_rows: int  # of one tree, its root included
    depth: int  # of the deepest tree
    laws: int  # stored laws of all trees
    is_chain: bool  # no row has two proposals

    @staticmethod
    def of(
        tokens: Tensor,
        parents: Sequence[Sequence[int]],
        draws: Sequence[tuple[int, int, int, bool]],
        laws: int = 0,
    ) -> "Trees":
        """tokens: (nodes,) packed. parents: per tree, each node's, -1 for the root. draws: in draw
        order (parent row, row, stored law or -1, drawn from what earlier siblings left of it).

        Raises ValueError for a parent that is not an earlier node, a proposal that does not name a
        child of its parent or a stored law, and for a tree of more than 256 rows.
        """
        device, cu_rows, ups, depths = tokens.device, [0], list[int](), list[int]()
        for tree in parents:
            first = cu_rows[-1]
            ups.append(-1)
            depths.append(0)
            for node, parent in enumerate(tree):
                if not -1 <= parent < node:
                    raise ValueError(
                        f"parents: node {node}: expected -1 to {node - 1}, an earlier node or the "
                        f"root, got {parent}"
                    )
                ups.append(first + parent + 1)
                depths.append(depths[first + parent + 1] + 1)
            if len(tree) >= MOST_ROWS:
                raise ValueError(
                    f"parents: expected at most {MOST_ROWS} rows per tree, root included, got "
                    f"{len(tree) + 1}"
                )
            cu_rows.append(first + len(tree) + 1)
        rows = cu_rows[-1]
        nodes = rows - len(parents)
        check_tensor("tokens", tokens, (nodes,), (torch.int64,), device)
        proposals: list[list[tuple[int, int, bool]]] = [[] for _ in range(rows)]
        for parent, row, law, reduced in draws:
            if not (0 <= row < rows and ups[row] == parent >= 0):
                raise ValueError(f"draws: expected row {row} to be a child of row {parent}")
            if not -1 <= law < laws:
                raise ValueError(f"draws: expected a stored law -1 to {laws - 1}, got {law}")
            proposals[parent].append((row, law, reduced))
        used = [list(dict.fromkeys(law for _, law, _ in ps if law >= 0)) for ps in proposals]
        places = max(map(len, used), default=0)
        starts = [0]
        flat: list[tuple[int, int, int, int, int]] = []
        for own, ps in zip(used, proposals, strict=True):
            for i, (row, law, reduced) in enumerate(ps):
                copy = sum(earlier == row for earlier, _, _ in ps[:i])
                flat.append((row, law, own.index(law) if law >= 0 else 0, copy, int(reduced)))
            starts.append(len(flat))

        lists = (
            cu_rows, [b for b, tree in enumerate(parents) for _ in range(len(tree) + 1)], ups,
            depths, starts, [number for entry in flat for number in entry],
            [law for own in used for law in own + [-1] * (places - len(own))],
        )  # fmt: skip
        firsts, sequences, above, levels, first_draws, records, laws_used = upload(
            [(array("q", its).tobytes(), torch.int64) for its in lists], device
        )
        return Trees(
            tokens, firsts, sequences, above, levels, first_draws, records.view(-1, DRAW.value),
            laws_used.view(rows, places),
            max((len(tree) + 1 for tree in parents), default=1), max(depths, default=0), laws,
            len(flat) == nodes
            and all(list(tree) == list(range(-1, len(tree) - 1)) for tree in parents),
        )  # fmt: skip
