"""Plain torch twins of the attention and cache kernels: the definition, and the path on the CPU.

One sequence contributes n rows whose keys and values sit in its slots context .. context + n - 1.
A row sees the whole context, and among the n rows those that its mask names (itself included).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Above this many rows the per-head mask of the packed form costs more than it saves.
_PACK_ROWS = 64


@dataclass(frozen=True, slots=True)
class Window:
    """Which positions a row may see, besides causality; by position, never by slot."""

    size: int
    chunked: bool = False  # False: the last `size` positions; True: those of its own chunk

    def first_visible(self, positions: Tensor) -> Tensor:
        """The lowest position visible from each position, (N,) -> (N,)."""
        if self.chunked:
            return positions // self.size * self.size
        return positions - self.size + 1


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """Neighbours of a batch that begin with the same pages: samples of one prompt, a cached prefix.

    groups: (g + 1,) from 0 to B, sequences groups[i] to groups[i + 1] - 1 share. slots: (B,) how
    many of its first slots a sequence shares with its group, one number per group, within every
    context. On the device, so that nothing waits for them. Whole splits of what is shared are read
    once per group (tiles.split_start), the rest by each sequence; the result has the same bits.
    """

    groups: Tensor
    slots: Tensor


def visibility(
    context: int,
    rows: int,
    mask: Tensor | None,
    positions: Tensor | None,
    window: Window | None,
    device: torch.device,
) -> Tensor | None:
    """(rows, context + rows) bool, or None where every row sees every slot.

    mask: (rows, rows) bool with self, None for a chain. positions: (rows,) absolute, needed with a
    window; a slot below context holds the position of its own number.
    """
    if rows == 1 and (window is None or (context + 1 <= window.size and not window.chunked)):
        return None
    seen = torch.ones(rows, context + rows, dtype=torch.bool, device=device)
    if mask is None:
        seen.tril_(diagonal=context)
    else:
        seen[:, context:] = mask
    if window is not None:
        if positions is None:
            positions = torch.arange(context, context + rows, device=device)
        slots = torch.cat((torch.arange(context, device=device), positions))
        seen &= slots[None, :] >= window.first_visible(positions)[:, None]
    return seen


def additive(seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as a summand of the scores: 0 where seen, -inf elsewhere."""
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )


def packed_bias(bias: Tensor | None, groups: int) -> Tensor | None:
    """bias (rows, T) repeated for the query heads of one KV head, as attend wants it."""
    if bias is None or groups == 1 or bias.shape[0] > _PACK_ROWS:
        return bias
    return bias.repeat(groups, 1)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one sequence's rows, (rows, H, D) -> (rows, H, Dv).

    keys (1, K, T, D) and values (1, K, T, Dv) are heads_first views of the pages or of gathered
    copies; bias comes from packed_bias(additive(visibility(...))). The query heads of one KV head
    are packed into the rows of one matrix, so that keys and values are read once per KV head.
    """
    rows, heads, size = q.shape
    k, v, kv_heads = keys, values, keys.shape[1]
    groups = heads // kv_heads
    if softcap is not None or sinks is not None:
        return _attend_by_hand(q, k[0], v[0], bias, scale, softcap, sinks)
    if rows > _PACK_ROWS:
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, bias, scale=scale, enable_gqa=groups > 1
        )
        return out[0].transpose(0, 1).contiguous()
    if rows == 1:
        packed = q.view(1, kv_heads, groups, -1)
        return F.scaled_dot_product_attention(packed, k, v, bias, scale=scale).view(1, heads, -1)
    row, head, step = q.stride()
    packed = q.as_strided((kv_heads, groups, rows, size), (groups * head, head, row, step))
    packed = packed.reshape(1, kv_heads, groups * rows, size)
    out = F.scaled_dot_product_attention(packed, k, v, bias, scale=scale)
    return _rows_first(out, kv_heads, groups, rows)


def heads_first(flat: Tensor, begin: int, end: int) -> Tensor:
    """Slots begin .. end - 1 of flat pages (slots, K, D), as a view (1, K, T, D) in one step."""
    slot, head, step = flat.stride()
    _, heads, size = flat.shape
    offset = flat.storage_offset() + begin * slot
    return flat.as_strided((1, heads, end - begin, size), (slot, head, slot, step), offset)


def _attend_by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """attend with the options that torch's fused attention lacks; scores in float32 at least."""
    rows, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads, groups = k.shape[0], heads // k.shape[0]
    packed = q.view(rows, kv_heads, groups, -1).permute(1, 2, 0, 3)
    packed = packed.reshape(kv_heads, groups * rows, -1)
    scores = torch.bmm(packed.to(wide), k.to(wide).mT) * scale  # (K, G * rows, T)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        if bias.shape[0] == rows:
            bias = bias.repeat(groups, 1)
        scores = scores + bias
    if sinks is not None:
        column = sinks.to(wide).view(kv_heads, groups, 1).expand(-1, -1, rows)
        scores = torch.cat((scores, column.reshape(kv_heads, groups * rows, 1)), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    out = torch.bmm(weights, v.to(wide)).to(q.dtype)
    return _rows_first(out, kv_heads, groups, rows)


def _rows_first(out: Tensor, kv_heads: int, groups: int, rows: int) -> Tensor:
    """(K, G * rows, Dv) -> (rows, H, Dv), contiguous: models view attention's result."""
    turned = out.view(kv_heads, groups, rows, -1).permute(2, 0, 1, 3)
    return turned.reshape(rows, kv_heads * groups, -1).contiguous()


def unpack_bits(ancestor_bits: Tensor, rows: int) -> Tensor:
    """(n, words) int64 bit masks -> (n, rows) bool; bit b of word w stands for row 64 w + b."""
    shifts = torch.arange(64, device=ancestor_bits.device)
    bits = (ancestor_bits[:, :, None] >> shifts) & 1
    return bits.flatten(1)[:, :rows].bool()


def pack_bits(mask: Tensor) -> Tensor:
    """The inverse of unpack_bits: (n, rows) bool -> (n, ceil(rows / 64)) int64."""
    n, rows = mask.shape
    words = -(-rows // 64)
    padded = torch.zeros(n, words * 64, dtype=torch.int64, device=mask.device)
    padded[:, :rows] = mask
    shifts = torch.arange(64, device=mask.device)
    return (padded.view(n, words, 64) << shifts).sum(-1)


def gather_slots(pages: Tensor, block_table: Tensor, length: int) -> Tensor:
    """The first length slots of a sequence, (P, page, K, D) -> (length, K, D); a copy."""
    page = pages.shape[1]
    slots = torch.arange(length, device=pages.device)
    flat = block_table[slots // page].long() * page + slots % page
    if pages.dtype == torch.float8_e4m3fn:  # a copy of such numbers is not implemented
        return gather_slots(pages.view(torch.uint8), block_table, length).view(pages.dtype)
    return pages.flatten(0, 1).index_select(0, flat)


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_nodes: Tensor,
    ancestor_bits: Tensor,
    *,
    scale: float,
    window: int | Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of the rows of a ragged batch of trees over paged keys and values.

    q: (rows, H, D). k_pages, v_pages: (P, page, K, D). block_table: (B, max pages) int32.
    context_lens: (B,) slots before each tree. cu_nodes: (B + 1,) row offsets. ancestor_bits:
    (rows, words) int64, which rows of its own tree a row sees, itself included; with a window a
    row's position is context + number of its ancestors. k_scale, v_scale: (K,) factors of
    quantised pages, float8_e4m3fn or its bytes. Returns (rows, H, Dv), written to out when given.
    """
    if k_pages.dtype == torch.uint8:
        k_pages, v_pages = (t.view(torch.float8_e4m3fn) for t in (k_pages, v_pages))
    dtype, groups = q.dtype, q.shape[1] // k_pages.shape[2]
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], v_pages.shape[3])
    limit = Window(window) if isinstance(window, int) else window
    offsets, contexts = cu_nodes.tolist(), context_lens.tolist()
    for index, context in enumerate(contexts):
        begin, end = offsets[index], offsets[index + 1]
        rows = end - begin
        if rows == 0:
            continue
        mask = unpack_bits(ancestor_bits[begin:end], rows)
        positions = context + mask.sum(-1) - 1
        seen = visibility(context, rows, mask, positions, limit, q.device)
        keys = gather_slots(k_pages, block_table[index], context + rows)
        values = gather_slots(v_pages, block_table[index], context + rows)
        if k_scale is not None:
            keys = keys.to(dtype) * k_scale.to(dtype)[None, :, None]
        if v_scale is not None:
            values = values.to(dtype) * v_scale.to(dtype)[None, :, None]
        bias = packed_bias(additive(seen, dtype), groups)
        keys, values = (heads_first(t, 0, context + rows) for t in (keys, values))
        out[begin:end] = attend(
            q[begin:end], keys, values, bias, scale=scale, softcap=softcap, sinks=sinks
        )
    return out


def scatter(
    keys: Tensor,
    values: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes rows of keys (rows, K, D) and values to flat slots of pages (P, page, K, D).

    Rows whose slot lies outside the pages are left out. With scales (K,) the pages are
    float8_e4m3fn and hold key / scale, to nearest, saturated.
    """
    for new, pages, scale in ((keys, k_pages, k_scale), (values, v_pages, v_scale)):
        flat = pages.flatten(0, 1)
        inside = (slots >= 0) & (slots < flat.shape[0])
        held = new[inside]
        if scale is not None:
            held = (held.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
            flat, held = flat.view(torch.uint8), held.view(torch.uint8)
        flat.index_copy_(0, slots[inside], held)


def commit(
    tensors: Sequence[Tensor], block_table: Tensor, lengths: Tensor, cu_rows: Tensor, path: Tensor
) -> None:
    """Keeps accepted paths: the slot of the i-th node of a path becomes slot length + i.

    tensors: pages (P, page, ...) of every layer. block_table: (B, max pages). lengths: (B,) slots
    before each tree, whose node j has slot length + j. cu_rows: (B + 1,) and path: (B, depth) of
    packed rows, root first, -1 pads.
    """
    page = tensors[0].shape[1]
    for table, length, first, rows in zip(
        block_table.tolist(), lengths.tolist(), cu_rows.tolist(), path.tolist(), strict=False
    ):
        nodes = [row - first - 1 for row in rows if row >= 0]
        sources = [table[s // page] * page + s % page for s in (length + n for n in nodes)]
        slots = range(length, length + len(nodes))
        destinations = [table[s // page] * page + s % page for s in slots]
        for pages in tensors:
            flat = pages.flatten(0, 1)
            flat[destinations] = flat[sources]


def copy_pages(tensors: Sequence[Tensor], sources: Tensor, destinations: Tensor) -> None:
    """Copies whole pages (n,) of every layer's tensor (P, page, ...)."""
    for pages in tensors:
        pages[destinations] = pages[sources]
