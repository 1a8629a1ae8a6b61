"""What the GPU benchmark runs tree attention on: shapes, inputs, the right answer, contenders."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec import backend

# Query heads, KV heads, head size. Qwen3-8B attends in Llama-3-8B's shape.
MODELS = {"Llama-3-8B, Qwen3-8B": (32, 8, 128), "Llama-3-70B, one of eight": (8, 1, 128)}
BATCHES, CONTEXTS, ROWS = (1, 8, 32, 64), (2048, 8192, 32768), (1, 8, 16, 32, 64, 128)
# Largest root mean square of the error, relative to that of the answer.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_MOST_SETS = 64


@dataclass(frozen=True, slots=True)
class Cell:
    """One shape: a batch of trees of `rows` rows each, a different tree per request."""

    model: str
    heads: int
    kv_heads: int
    size: int
    batch: int
    context: int
    rows: int
    page: int = 16

    @property
    def kv_bytes(self) -> int:
        """Of keys and values in 16 bits."""
        return 4 * self.batch * (self.context + self.rows) * self.kv_heads * self.size

    @property
    def flops(self) -> int:
        """Of the two products."""
        seen = self.context + self.rows
        return 4 * self.batch * self.rows * self.heads * self.size * seen


def cells() -> list[Cell]:
    """Every shape of the benchmark."""
    return [
        Cell(model, *heads, batch, context, rows)
        for model, heads in MODELS.items()
        for batch in BATCHES
        for context in CONTEXTS
        for rows in ROWS
    ]


def sets_for(cell: Cell, cache_bytes: int) -> int:
    """So many input sets that each is gone from the cache when its turn comes again."""
    return min(max(2, -(-4 * cache_bytes // cell.kv_bytes)), _MOST_SETS)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The arguments of one call. masks: (B, n, n) bool, the trees, as ancestor_bits has them."""

    cell: Cell
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    context_lens: Tensor
    cu_nodes: Tensor
    ancestor_bits: Tensor
    masks: Tensor

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.cell.size)


def inputs(
    cell: Cell, *, sets: int, device: torch.device, dtype: torch.dtype, one_tree: bool = False
) -> list[Inputs]:
    """So many sets over one pool of shuffled pages. one_tree: all requests have the same tree.

    Along the first coordinate every tree slot has a score that outweighs the context as a whole
    about evenly: a kernel that errs in the tree alone is far off, however long the context.
    """
    generator = torch.Generator(device).manual_seed(0)
    reference = backend.kernel_file("reference")
    batch, rows = cell.batch, cell.rows
    count = -(-(cell.context + rows) // cell.page)
    shape = (sets * batch * count, cell.page, cell.kv_heads, cell.size)
    k_pages, v_pages = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2)
    )
    k_pages[..., 0] = 0
    order = torch.randperm(shape[0], generator=generator, device=device)
    tables = order.view(sets, batch, count)
    slots = torch.arange(cell.context, cell.context + rows, device=device)
    boost = math.log(max(cell.context, 2) / rows + 1) / (8 * cell.size**-0.5)
    flat = tables[:, :, slots // cell.page] * cell.page + slots % cell.page
    k_pages.flatten(0, 1)[flat.flatten(), :, 0] = boost
    found = []
    for index in range(sets):
        q = torch.randn(
            batch * rows, cell.heads, cell.size, generator=generator, device=device, dtype=dtype
        )
        q[..., 0] = 8
        masks = _trees(1 if one_tree else batch, rows, seed=index).expand(batch, -1, -1)
        bits = reference.pack_bits(masks.reshape(batch * rows, rows))
        found.append(
            Inputs(
                cell, q, k_pages, v_pages, tables[index].int(),
                torch.full((batch,), cell.context, device=device),
                torch.arange(batch + 1, device=device) * rows, bits.to(device),
                masks.contiguous().to(device),
            )
        )  # fmt: skip
    return found


def _trees(count: int, rows: int, seed: int) -> Tensor:
    """(count, rows, rows) bool: random recursive trees, each row with its ancestors and itself."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.eye(rows, dtype=torch.bool).repeat(count, 1, 1)
    for row in range(1, rows):
        parents = torch.randint(row, (count,), generator=generator)
        masks[:, row] |= masks[torch.arange(count), parents]
    return masks


def expected(problem: Inputs) -> Tensor:
    """The answer in float32, by the twin, sequence by sequence."""
    reference = backend.kernel_file("reference")
    cell, answers = problem.cell, []
    for index in range(cell.batch):
        length = cell.context + cell.rows
        keys, values = (
            reference.gather_slots(pages, problem.block_table[index], length).float()
            for pages in (problem.k_pages, problem.v_pages)
        )
        seen = backend.visibility(
            cell.context, cell.rows, problem.masks[index], None, None, problem.q.device
        )
        bias = backend.packed_bias(
            backend.additive(seen, torch.float32), cell.heads // cell.kv_heads
        )
        keys, values = (backend.heads_first(t, 0, length) for t in (keys, values))
        rows = problem.q[index * cell.rows : (index + 1) * cell.rows].float()
        answers.append(backend.attend(rows, keys, values, bias, scale=problem.scale))
    return torch.cat(answers)


def error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the error relative to the answer's; NaN where found holds one."""
    return float((found.float() - wanted).norm() / wanted.norm())


Call = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to compute the same: prepare makes what is outside the timing, and the call."""

    name: str
    prepare: Callable[[Inputs], Call]
    needs: str = "torch"  # the package it comes from
    one_tree: bool = False  # takes one tree for the whole batch only

    @property
    def installed(self) -> bool:
        return find_spec(self.needs) is not None


def specdec(problem: Inputs) -> Call:
    attention = backend.kernel_file("attention")
    out = torch.empty_like(problem.q).fill_(float("nan"))
    return lambda: attention.tree_attention(
        problem.q, problem.k_pages, problem.v_pages, problem.block_table, problem.context_lens,
        problem.cu_nodes, problem.ancestor_bits, scale=problem.scale, out=out,
    )  # fmt: skip


def grid(problem: Inputs) -> Call:
    from specdec.evals.grid_attention import grid_attention

    out = torch.empty_like(problem.q).fill_(float("nan"))
    return lambda: grid_attention(
        problem.q, problem.k_pages, problem.v_pages, problem.block_table, problem.context_lens,
        problem.cu_nodes, problem.masks, scale=problem.scale, out=out,
    )  # fmt: skip


def _gathered(problem: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values of each sequence side by side: (B, K, T, D), copies."""
    length = problem.cell.context + problem.cell.rows
    table = problem.block_table.long()
    keys, values = (
        pages[table].flatten(1, 2)[:, :length].transpose(1, 2)
        for pages in (problem.k_pages, problem.v_pages)
    )
    return keys, values


def _batched(problem: Inputs) -> Tensor:
    """Queries (B, H, n, D)."""
    cell = problem.cell
    return problem.q.view(cell.batch, cell.rows, cell.heads, cell.size).transpose(1, 2)


def _rows(out: Tensor) -> Tensor:
    """(B, H, n, D) -> (B * n, H, D)."""
    return out.transpose(1, 2).flatten(0, 1)


def sdpa(problem: Inputs) -> Call:
    """torch's own attention; the gather of keys and values is part of the call."""
    seen = F.pad(problem.masks, (problem.cell.context, 0), value=True)[:, None]
    q = _batched(problem)

    def call() -> Tensor:
        keys, values = _gathered(problem)
        out = F.scaled_dot_product_attention(
            q, keys, values, seen, scale=problem.scale, enable_gqa=True
        )
        return _rows(out)

    return call


def flex(problem: Inputs, compiled: Callable[..., Any] = torch.compile) -> Call:
    """torch's FlexAttention with the trees as its mask, on keys and values gathered beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cell, masks = problem.cell, problem.masks

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del h
        node = k - cell.context
        return (node < 0) | masks[b, q, node.clamp(min=0)]

    length = cell.context + cell.rows
    blocks = create_block_mask(
        seen, cell.batch, None, cell.rows, length, device=str(problem.q.device)
    )
    keys, values = (t.contiguous() for t in _gathered(problem))
    attend, q = compiled(flex_attention), _batched(problem).contiguous()
    return lambda: _rows(
        attend(q, keys, values, block_mask=blocks, scale=problem.scale, enable_gqa=True)
    )


def xformers(problem: Inputs) -> Call:
    """xformers' tree attention (xformers.ops.tree_attention), which takes one tree per batch."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalPaddedKeysMask
    from xformers.ops.tree_attention import tree_attention

    cell = problem.cell
    group = cell.heads // cell.kv_heads
    keys, values = _gathered(problem)

    def grouped(x: Tensor) -> Tensor:  # (B, K, T, D) -> (B, T, K, group, D) without a copy
        turned = x.transpose(1, 2)[:, :, :, None]
        return turned.expand(-1, -1, -1, group, -1)

    fresh = [grouped(x[:, :, cell.context :].contiguous()) for x in (keys, values)]
    cached = [
        x.flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, group, -1)
        for x in (problem.k_pages, problem.v_pages)
    ]
    padded = problem.block_table.shape[1] * cell.page
    prefix = BlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[cell.rows] * cell.batch, kv_padding=padded,
        kv_seqlen=[cell.context] * cell.batch,
    ).make_paged(
        block_tables=problem.block_table, page_size=cell.page, paged_type=_paged_mask()
    )  # fmt: skip
    bias = torch.zeros_like(problem.masks[0], dtype=problem.q.dtype)
    bias.masked_fill_(~problem.masks[0], float("-inf"))
    q = problem.q.view(cell.batch, cell.rows, cell.kv_heads, group, cell.size)

    def call() -> Tensor:
        out: Tensor = tree_attention(q, *fresh, *cached, bias, prefix)
        return out.reshape(cell.batch * cell.rows, cell.heads, cell.size)

    return call


def _paged_mask() -> Any:
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask

    return PagedBlockDiagonalPaddedKeysMask


def flashinfer(problem: Inputs) -> Call:
    """FlashInfer's FA2 with a custom mask over the same pages; its plan is outside the timing."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    cell, device = problem.cell, problem.q.device
    length, count = cell.context + cell.rows, problem.block_table.shape[1]
    seen = F.pad(problem.masks, (cell.context, 0), value=True)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=device), "NHD", backend="fa2"
    )
    wrapper.plan(
        problem.cu_nodes.int(), torch.arange(cell.batch + 1, device=device).int() * count,
        problem.block_table.flatten(),
        torch.full((cell.batch,), (length - 1) % cell.page + 1, device=device).int(),
        cell.heads, cell.kv_heads, cell.size, cell.page, custom_mask=seen.flatten(),
        sm_scale=problem.scale, q_data_type=problem.q.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(problem.q, (problem.k_pages, problem.v_pages))


def flashinfer_xqa(problem: Inputs) -> Call:
    """FlashInfer's XQA with its draft mask: trees of one size, pages of 16 to 128."""
    from flashinfer.xqa import xqa

    cell, device = problem.cell, problem.q.device
    words = -(-cell.rows // 32)
    place = torch.arange(32, device=device)
    padded = F.pad(problem.masks, (0, words * 32 - cell.rows)).view(
        cell.batch, cell.rows, words, 2, 16
    )
    halves = (padded.int() << place[:16].int()).sum(-1)
    mask = halves.flatten(2).to(torch.uint16)
    lengths = (problem.context_lens + cell.rows).to(torch.uint32)[:, None]
    q = problem.q.view(cell.batch, 1, cell.rows, cell.heads, cell.size)
    out = torch.empty_like(q)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    semaphores = torch.zeros(8 << 20, dtype=torch.uint8, device=device)

    def call() -> Tensor:
        xqa(
            q, problem.k_pages, problem.v_pages, problem.block_table, lengths, out, workspace,
            semaphores, cell.kv_heads, cell.page, q_seq_len=cell.rows, mask=mask,
        )  # fmt: skip
        return out.view(cell.batch * cell.rows, cell.heads, cell.size)

    return call


OURS = Contender("specdec", specdec)
PEERS = (
    Contender("2D grid, no KV split", grid),
    Contender("SDPA on gathered KV", sdpa),
    Contender("FlexAttention", flex),
    Contender("xformers tree_attention", xformers, "xformers", one_tree=True),
    Contender("FlashInfer FA2, custom mask", flashinfer, "flashinfer"),
    Contender("FlashInfer XQA, draft mask", flashinfer_xqa, "flashinfer"),
)
