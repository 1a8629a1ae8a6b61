"""Tree attention in the widespread geometry, as a yardstick: a grid of (16-row block, KV head), and
each program walks the whole KV axis of its sequence, from the first slot to the last.

Nothing of specdec runs it. Its keys and values are read through the same block table.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _grid_attention_kernel(  # type: ignore[no-untyped-def]
    q, k_pages, v_pages, block_table, context_lens, cu_nodes, seen, out, scale, blocks,
    q_row, q_head, page_stride, slot_stride, head_stride, table_stride, seen_row,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """seen: (rows, n) bytes, which rows of its tree a row sees. scale is times log2(e)."""
    sequence, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    head = tl.program_id(1)
    begin = tl.load(cu_nodes + sequence)
    rows = tl.load(cu_nodes + sequence + 1) - begin
    context = tl.load(context_lens + sequence)
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = begin + packed // GROUP
    query_head = head * GROUP + packed % GROUP
    live = packed // GROUP < rows
    d = tl.arange(0, D)
    at = row * q_row + query_head * q_head
    queries = tl.load(q + at[:, None] + d[None, :], live[:, None], other=0)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    for start in range(0, context + rows, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        inside = slots < context + rows
        page = tl.load(block_table + sequence * table_stride + slots // PAGE, inside, other=0)
        place = page.to(tl.int64) * page_stride + slots % PAGE * slot_stride + head * head_stride
        k = tl.load(k_pages + place[:, None] + d[None, :], inside[:, None], other=0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        node = slots - context
        among = live[:, None] & (inside & (node >= 0))[None, :]
        visible = tl.load(seen + row[:, None] * seen_row + node[None, :], among, other=1)
        scores = tl.where((visible != 0) & inside[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - highest[:, None])
        keep = tl.exp2(top - highest)
        total = total * keep + tl.sum(p, 1)
        v = tl.load(v_pages + place[:, None] + d[None, :], inside[:, None], other=0)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        top = highest
    result = acc / total[:, None]
    tl.store(out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), live[:, None])


def grid_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, context_lens: Tensor,
    cu_nodes: Tensor, masks: Tensor, *, scale: float, out: Tensor,
) -> Tensor:  # fmt: skip
    """q and out (B * n, H, D) with D a power of two, pages (P, page, K, D), masks (B, n, n) bool:
    trees of n rows each. Returns out."""
    rows, heads, size = q.shape
    page, kv_heads = k_pages.shape[1:3]
    sequences, per_tree = masks.shape[:2]
    group, block_m = heads // kv_heads, 16
    blocks = -(-per_tree * group // block_m)
    seen = masks.view(rows, per_tree).view(torch.uint8)
    _grid_attention_kernel[(sequences * blocks, kv_heads)](
        q, k_pages, v_pages, block_table, context_lens, cu_nodes, seen, out,
        scale * math.log2(math.e), blocks, q.stride(0), q.stride(1), *k_pages.stride()[:3],
        block_table.stride(0), seen.stride(0), GROUP=group, D=size, PAGE=page, BLOCK_M=block_m,
        BLOCK_N=64, num_warps=4,
    )  # fmt: skip
    return out
