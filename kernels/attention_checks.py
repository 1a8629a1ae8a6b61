"""Refusals of tree attention: what its arguments must be. A ValueError names the argument."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from specdec.kernels.checks import check_tensor, check_values
from specdec.kernels.reference import SharedPrefix, Window, unpack_bits
from specdec.kernels.tiles import MAX_HEAD_SIZE, MAX_ROWS

_MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FP8_DTYPES = (torch.float8_e4m3fn, torch.uint8)
_INTEGERS = (torch.int32, torch.int64)


def check_tree_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, context_lens: Tensor,
    cu_nodes: Tensor, ancestor_bits: Tensor, *, scale: float, window: Window | None,
    softcap: float | None, sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
    out: Tensor | None, softmax: str, shared_prefix: SharedPrefix | None, max_context: int | None,
    split: int | None,
) -> None:  # fmt: skip
    """What can be told without reading a tensor: dtypes, devices, shapes, strides, numbers."""
    device = q.device
    check_tensor("q", q, ("rows", "H", "D"), _MODEL_DTYPES, device, rows_apart=True)
    rows, heads, _ = q.shape
    kv_heads = _check_pages(q, k_pages, v_pages, k_scale, v_scale)
    if heads % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} heads, the pages', got {heads}")
    check_tensor(
        "block_table", block_table, ("B", "max pages"), (torch.int32,), device, rows_apart=True
    )
    sequences = block_table.shape[0]
    check_tensor("context_lens", context_lens, (sequences,), _INTEGERS, device)
    check_tensor("cu_nodes", cu_nodes, (sequences + 1,), _INTEGERS, device)
    check_tensor(
        "ancestor_bits", ancestor_bits, (rows, "words"), (torch.int64,), device, rows_apart=True
    )
    if rows > MAX_ROWS * sequences:
        raise ValueError(
            f"q: expected at most {MAX_ROWS} rows per tree, got {rows} of {sequences} trees"
        )
    if rows and ancestor_bits.shape[1] == 0:
        raise ValueError("ancestor_bits: expected at least one word per row, got 0")
    if sinks is not None:
        check_tensor("sinks", sinks, (heads,), _MODEL_DTYPES, device)
    if out is not None:
        shape = (rows, heads, v_pages.shape[3])
        check_tensor("out", out, shape, (q.dtype,), device, rows_apart=True)
    _check_numbers(scale, window, softcap, softmax, max_context, split)
    if shared_prefix is not None:
        groups, slots = shared_prefix.groups, shared_prefix.slots
        check_tensor("shared_prefix.groups", groups, ("groups + 1",), _INTEGERS, device)
        check_tensor("shared_prefix.slots", slots, (sequences,), _INTEGERS, device)
        if groups.shape[0] < 1:
            raise ValueError("shared_prefix.groups: expected at least one number, got none")


def _check_pages(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> int:
    """Returns the number of KV heads."""
    size, device = q.shape[2], q.device
    stored = (q.dtype, *_FP8_DTYPES)
    shape = ("P", "page", "K", size)
    check_tensor("k_pages", k_pages, shape, stored, device, rows_apart=True)
    pages, page, kv_heads, _ = k_pages.shape
    values = (pages, page, kv_heads, "Dv")
    check_tensor("v_pages", v_pages, values, (k_pages.dtype,), device, rows_apart=True)
    for name, width in (("q", size), ("v_pages", v_pages.shape[3])):
        if not 1 <= width <= MAX_HEAD_SIZE:
            raise ValueError(f"{name}: expected a head size of 1 to {MAX_HEAD_SIZE}, got {width}")
    if page < 1 or page & (page - 1):
        raise ValueError(f"k_pages: expected pages of a power of two of slots, got {page}")
    if kv_heads < 1:
        raise ValueError("k_pages: expected at least one head, got none")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            check_tensor(name, scale, (kv_heads,), (torch.float32,), device)
        elif k_pages.dtype in _FP8_DTYPES:
            raise ValueError(
                f"{name}: expected a factor per head of {k_pages.dtype} pages, got None"
            )
    return kv_heads


def _check_numbers(
    scale: float, window: Window | None, softcap: float | None, softmax: str,
    max_context: int | None, split: int | None,
) -> None:  # fmt: skip
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name}: expected a positive number, got {number}")
    if window is not None and window.size < 1:
        raise ValueError(f"window: expected at least 1 position, got {window.size}")
    if softmax not in ("running", "unified"):
        raise ValueError(f"softmax: expected 'running' or 'unified', got {softmax!r}")
    if max_context is not None and max_context < 0:
        raise ValueError(f"max_context: expected at least 0, got {max_context}")
    if split is not None and (split < 64 or split % 64):
        raise ValueError(f"split: expected a multiple of 64 slots, got {split}")


def check_tree_values(
    pages_shape: Sequence[int], block_table: Tensor, context_lens: Tensor, cu_nodes: Tensor,
    ancestor_bits: Tensor, *, rows: int, shared_prefix: SharedPrefix | None = None,
    max_context: int | None = None,
) -> None:  # fmt: skip
    """What only the numbers tell: lengths, page numbers, trees. Waits for the device."""
    num_pages, page = pages_shape[:2]
    offsets, contexts = cu_nodes.tolist(), context_lens.tolist()
    sizes = [after - before for before, after in pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != rows or min(sizes, default=0) < 0:
        raise ValueError(f"cu_nodes: expected to rise from 0 to {rows} rows, got {offsets}")
    words, slots = ancestor_bits.shape[1], block_table.shape[1] * page
    longest = slots if max_context is None else min(slots, max_context)
    for index, (context, size) in enumerate(zip(contexts, sizes, strict=True)):
        if size > MAX_ROWS:
            raise ValueError(
                f"cu_nodes: expected trees of at most {MAX_ROWS} rows, sequence {index} has {size}"
            )
        if size > 64 * words:
            raise ValueError(
                f"ancestor_bits: expected {-(-size // 64)} words for {size} rows, got {words}"
            )
        if not 0 <= context <= longest or context + size > slots:
            raise ValueError(
                f"context_lens: sequence {index} has {context} slots and {size} rows, the block "
                f"table holds {slots}" + (f", max_context is {max_context}" if max_context else "")
            )
        needed = -(-(context + size) // page) if size else 0
        check_values("block_table", block_table[index, :needed], 0, num_pages)
        begin = offsets[index]
        _check_tree(ancestor_bits[begin : begin + size], begin)
    if shared_prefix is not None:
        _check_shared(shared_prefix, block_table, contexts, page)


def _check_tree(bits: Tensor, begin: int) -> None:
    """Rows are parents before children, and each sees exactly itself and what its parent sees."""
    rows = bits.shape[0]
    if rows == 0:
        return
    wide = unpack_bits(bits, 64 * bits.shape[1])
    seen, place = wide[:, :rows], torch.arange(rows, device=bits.device)
    if not seen.diagonal().all():
        row = int((~seen.diagonal()).nonzero()[0])
        raise ValueError(f"ancestor_bits: row {begin + row} does not see itself")
    later = torch.cat((seen.triu(1), wide[:, rows:]), dim=1)
    if later.any():
        row, which = divmod(int(later.flatten().nonzero()[0]), later.shape[1])
        raise ValueError(
            f"ancestor_bits: row {begin + row}, of the tree from row {begin} on, sees its row "
            f"{which}, which is not before it: a parent after its child, or a cycle"
        )
    below = seen.tril(-1)
    parent = torch.where(below, place, -1).amax(-1)
    wanted = seen[parent.clamp(min=0)] & (parent >= 0)[:, None]
    if not torch.equal(below, wanted):
        row = int((below != wanted).any(-1).nonzero()[0])
        raise ValueError(
            f"ancestor_bits: row {begin + row} sees other rows than itself and those its parent, "
            f"row {begin + int(parent[row])}, sees"
        )


def _check_shared(
    shared: SharedPrefix, block_table: Tensor, contexts: list[int], page: int
) -> None:
    groups, slots = shared.groups.tolist(), shared.slots.tolist()
    rising = all(a <= b for a, b in pairwise(groups))
    if groups[0] != 0 or groups[-1] != len(contexts) or not rising:
        raise ValueError(
            f"shared_prefix.groups: expected to rise from 0 to {len(contexts)}, got {groups}"
        )
    for begin, end in pairwise(groups):
        for index in range(begin, end):
            if slots[index] != slots[begin] or not 0 <= slots[index] <= contexts[index]:
                raise ValueError(
                    f"shared_prefix.slots: expected one number within every context of a group, "
                    f"sequence {index} of {contexts[index]} slots has {slots[index]}"
                )
            pages = -(-slots[begin] // page)
            if not torch.equal(block_table[index, :pages], block_table[begin, :pages]):
                raise ValueError(
                    f"shared_prefix.slots: sequences {begin} and {index} do not share the pages of "
                    f"{slots[begin]} slots"
                )
