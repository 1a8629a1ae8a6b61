"""How many bytes tree attention must move, and how many it does, by argument and without a GPU.

The count is a formula over the same plan that a launch makes; a test holds it to the loads and
stores met in Triton's interpreter, byte for byte. Requested bytes are what programs ask for: tiles
of one sequence ask for the same pages at the same time, which the second-level cache serves, so
device memory sees `memory` of them at best: what must move, and partial sums written and read.

    python -P -m specdec.kernels.traffic FILE.json    the benchmark's shapes
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specdec.kernels.attention import Plan
from specdec.kernels.tiles import num_splits, split_start

H200_BYTES = 4.3e12  # per second, read


@dataclass(frozen=True, slots=True)
class Shape:
    """A call without options: sizes of each sequence as (context, rows)."""

    sizes: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    page: int
    dtype: torch.dtype = torch.bfloat16
    split: int | None = None

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.sizes)

    @property
    def words(self) -> int:
        return max(1, -(-max(rows for _, rows in self.sizes) // 64))

    def plan(self, table_width: int) -> Plan:
        """What a launch on an H200 plans for this shape."""
        pages = (1, self.page, self.kv_heads)
        q, k, v = (
            torch.empty(*shape, dtype=self.dtype, device="meta")
            for shape in (
                (self.rows, self.heads, self.key_size),
                (*pages, self.key_size),
                (*pages, self.value_size),
            )
        )
        table = torch.empty(len(self.sizes), table_width, device="meta")
        return Plan.of(q, k, v, table, window=None, softcap=None, max_context=None, unit=self.split)

    @property
    def table_width(self) -> int:
        return max(-(-(context + rows) // self.page) for context, rows in self.sizes)


Bytes = Counter[str]


def must_move(shape: Shape) -> Bytes:
    """Bytes of each argument that some program has to read or write once."""
    width = shape.dtype.itemsize
    slots = sum(context + rows for context, rows in shape.sizes if rows)
    pages = sum(-(-(context + rows) // shape.page) for context, rows in shape.sizes if rows)
    heads = shape.rows * shape.heads
    return Counter(
        q=heads * shape.key_size * width,
        k_pages=slots * shape.kv_heads * shape.key_size * width,
        v_pages=slots * shape.kv_heads * shape.value_size * width,
        block_table=pages * 4,
        bits=shape.rows * shape.words * 8,
        context_lens=len(shape.sizes) * 8,
        cu_nodes=(len(shape.sizes) + 1) * 8,
        out=heads * shape.value_size * width,
    )


def does_move(shape: Shape, table_width: int | None = None) -> Bytes:
    """Bytes that the launches of one call request, loads and stores, by argument."""
    plan = shape.plan(shape.table_width if table_width is None else table_width)
    moved: Bytes = Counter()
    for (context, rows), count in Counter(shape.sizes).items():
        for name, number in _of_sequence(shape, plan, context, rows).items():
            moved[name] += number * count
    batch = len(shape.sizes)
    moved["cu_nodes"] += plan.units * 2 * batch * 8
    moved["context_lens"] += plan.units * batch * 8
    if plan.max_splits > 1:
        programs = shape.rows * shape.heads
        moved["cu_nodes"] += programs * (batch + 2) * 8
        moved["context_lens"] += programs * 8
    return moved


def _of_sequence(shape: Shape, plan: Plan, context: int, rows: int) -> Bytes:
    """What the units of one sequence and the combination of its rows request."""
    moved: Bytes = Counter()
    if rows == 0:
        return moved
    width, block, stop = shape.dtype.itemsize, plan.tile.slots, context + rows
    splits, packed = num_splits(stop, plan.unit), rows * plan.group
    whole = context // block * block
    for split in range(splits):
        start = split_start(split, plan.unit)
        slots = min(split_start(split + 1, plan.unit), stop) - start
        blocks = -(-slots // block)
        masked = [at for at in range(start, start + slots, block) if at >= whole]
        words = sum(_words(at - context, shape.words) for at in masked)
        for tile in range(0, packed, plan.tile.rows):
            live = min(plan.tile.rows, packed - tile)
            moved.update(
                q=live * shape.key_size * width,
                k_pages=slots * shape.key_size * width,
                v_pages=slots * shape.value_size * width,
                block_table=4 * (blocks if plan.page % block == 0 else slots),
                bits=8 * live * words,
                cu_nodes=16,
                context_lens=8,
            )
            if splits == 1:
                moved["out"] += live * shape.value_size * width
            else:
                moved.update(partial=live * shape.value_size * 4, tops=live * 4, totals=live * 4)
    for name in moved:
        moved[name] *= shape.kv_heads
    if splits > 1:
        sums = rows * shape.heads * splits
        moved.update(partial=sums * shape.value_size * 4, tops=2 * sums * 4, totals=sums * 4)
        moved["out"] += rows * shape.heads * shape.value_size * width
    return moved


def _words(first: int, words: int) -> int:
    """Words of a row's bits that a block reads whose first slot is `first` after the context."""
    word = first >> 6
    return sum(0 <= each < words for each in (word, word + 1))


# Benchmark shapes: query heads, KV heads; head size 128 and pages of 16 throughout.
MODELS = {
    "Llama-3-8B, Qwen3-8B": (32, 8),
    "Llama-3-70B, one of eight": (8, 1),
}
BATCHES, CONTEXTS, ROWS = (1, 8, 32, 64), (2048, 8192, 32768), (1, 8, 16, 32, 64, 128)
_SUMS = ("partial", "tops", "totals")


def table(
    batches: Sequence[int] = BATCHES, contexts: Sequence[int] = CONTEXTS, rows: Sequence[int] = ROWS
) -> list[dict[str, Any]]:
    """One line per benchmark shape, bytes of one layer."""
    lines = []
    for model, (heads, kv_heads) in MODELS.items():
        for batch, context, size in ((b, c, n) for b in batches for c in contexts for n in rows):
            shape = Shape(((context, size),) * batch, heads, kv_heads, 128, 128, 16)
            plan, must, does = shape.plan(shape.table_width), must_move(shape), does_move(shape)
            sums = sum(does[name] for name in _SUMS)
            lines.append(
                {
                    "model": model,
                    "batch": batch,
                    "context": context,
                    "rows": size,
                    "tile_rows": plan.tile.rows,
                    "splits": num_splits(context + size, plan.unit),
                    "programs": plan.units,
                    "must": must.total(),
                    "memory": must.total() + sums,
                    "requested": does.total(),
                    "requested_by": dict(sorted(does.items())),
                    "floor_us_h200": round(must.total() / H200_BYTES * 1e6, 2),
                }
            )
    return lines


def main(path: str) -> None:
    content = {
        "about": "bytes of one layer's tree attention, bf16, head size 128, pages of 16",
        "sources": "kernels/traffic.py, a formula held to the interpreter's loads and stores",
        "shapes": table(),
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
