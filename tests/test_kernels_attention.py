"""Tree attention's kernels against their twin, in Triton's interpreter where there is no GPU."""

import dataclasses
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

import specdec
from specdec.kernels import attention, reference, tiles
from specdec.kernels.reference import SharedPrefix, Window, pack_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
# Absolute, for values of unit variance.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # bf16: no tl.dot
DTYPES = [torch.float32, *HALVES]


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """A launch remaps triton.language once: not again at every call inside it, as the interpreter
    does, nor does every sum need a check for overflow. A matrix product adds in one order, however
    many rows it has, as on a GPU: the BLAS behind numpy has others for few rows on some CPUs."""
    if DEVICE == "cuda":
        yield
        return
    mapped: set[str] = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__ not in mapped:
            mapped.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    def dot(a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if a.data.dtype != np.float32:
            return by_blas(a, b, d, input_precision, max_num_imprecise_acc)
        product = np.einsum("ij,jk->ik", a.data, b.data)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        builder = interpreter.interpreter_builder
        by_blas = builder.create_dot
        patch.setattr(builder, "create_dot", dot)
        quick = dataclasses.replace(builder.options, sanitize_overflow=False)
        patch.setattr(builder, "options", quick)
        yield


@dataclass(frozen=True)
class Problem:
    """A ragged batch of trees over shuffled pages whose other slots hold NaN."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    context_lens: Tensor
    cu_nodes: Tensor
    ancestor_bits: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def tree_mask(draw: random.Random, rows: int, chain: bool) -> Tensor:
    """(rows, rows) bool: the rows on each row's path, itself included."""
    mask = torch.zeros(rows, rows, dtype=torch.bool)
    for row in range(rows):
        if row:
            mask[row] = mask[row - 1 if chain else draw.randrange(row)]
        mask[row, row] = True
    return mask


def problem(
    sizes: Sequence[tuple[int, int]],
    heads: int = 2,
    kv_heads: int = 1,
    size: int = 16,
    value_size: int | None = None,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    chain: bool = False,
    spread: float = 1.0,
) -> Problem:
    """sizes: (context, rows) of each sequence. spread: of the queries, and so of the scores."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    value_size = size if value_size is None else value_size
    counts = [-(-(context + rows) // page) for context, rows in sizes]
    order = list(range(sum(counts) + 1))
    draw.shuffle(order)
    table = torch.full((len(sizes), max(counts) + 1), -1, dtype=torch.int32)
    pages = [
        torch.full((len(order), page, kv_heads, n), NAN, dtype=dtype) for n in (size, value_size)
    ]
    masks = [tree_mask(draw, rows, chain) for _, rows in sizes]
    for index, ((context, rows), count) in enumerate(zip(sizes, counts, strict=True)):
        own = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int64)
        table[index, :count] = own.int()
        slots = torch.arange(context + rows)
        flat = own[slots // page] * page + slots % page
        for tensor in pages:
            shape = (context + rows, kv_heads, tensor.shape[3])
            content = torch.randn(shape, generator=generator)
            tensor.view(-1, kv_heads, tensor.shape[3])[flat] = content.to(dtype)
    rows = sum(rows for _, rows in sizes)
    q = torch.randn(rows, heads, size, generator=generator) * spread
    words = max(1, -(-max(rows for _, rows in sizes) // 64))
    bits = [torch.nn.functional.pad(b, (0, words - b.shape[1])) for b in map(pack_bits, masks)]
    cu_nodes = torch.tensor([0, *(rows for _, rows in sizes)]).cumsum(0)
    contexts = torch.tensor([context for context, _ in sizes])
    parts = (q.to(dtype), *pages, table, contexts, cu_nodes, torch.cat(bits))
    return Problem(*(part.to(DEVICE) for part in parts))


def run(p: Problem, **options: Any) -> Tensor:
    """The kernels, writing into an output full of NaN."""
    out = torch.full((*p.q.shape[:2], p.v_pages.shape[3]), NAN, dtype=p.q.dtype, device=DEVICE)
    found = attention.tree_attention(**p.arguments, **{"scale": 0.4, "out": out, **options})
    assert found is out
    return out


def expected(p: Problem, **options: Any) -> Tensor:
    """The twin in float64, which does not split."""
    options.pop("split", None)
    wide = replace(p, q=p.q.double())
    if p.k_scale is None:
        wide = replace(wide, k_pages=p.k_pages.double(), v_pages=p.v_pages.double())
    return reference.tree_attention(**wide.arguments, **{"scale": 0.4, **options})


def check(p: Problem, **options: Any) -> None:
    tolerance = TOLERANCE[p.q.dtype]
    torch.testing.assert_close(
        run(p, **options).double(), expected(p, **options), atol=tolerance, rtol=tolerance
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# Against the twin.

MIXED = [(100, 7), (0, 4), (37, 0), (130, 63), (1, 1)]


@pytest.mark.parametrize(
    ("context", "rows"), [(0, 1), (1, 1), (7, 7), (63, 1), (100, 63), (257, 100), (1, 256)]
)
def test_one_sequence(context: int, rows: int) -> None:
    check(problem([(context, rows)], heads=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_batch(dtype: torch.dtype) -> None:
    check(problem(MIXED, heads=4, kv_heads=2, dtype=dtype))


def test_a_batch_of_empty_trees_gives_no_rows() -> None:
    assert run(problem([(5, 0), (0, 0)])).shape == (0, 2, 16)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 1), (40, 2), (7, 1)])
def test_query_heads_per_kv_head(heads: int, kv_heads: int) -> None:
    check(problem([(33, 7), (0, 1)], heads, kv_heads), split=1024)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "value_size"), [(1, 1), (7, 64), (63, 100), (128, 128), (192, 128), (256, 256)]
)
def test_head_sizes(size: int, value_size: int, dtype: torch.dtype) -> None:
    p = problem([(70, 5)], size=size, value_size=value_size, dtype=dtype)
    check(p, scale=size**-0.5)


@pytest.mark.parametrize("page", [1, 16, 32, 64, 128])
def test_page_sizes(page: int) -> None:
    check(problem([(150, 9), (63, 2)], page=page), split=128)


@pytest.mark.parametrize("page", [16, 128])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_page_sizes_in_half_precision(page: int, dtype: torch.dtype) -> None:
    check(problem([(150, 9)], page=page, dtype=dtype), split=128)


OPTIONS: dict[str, dict[str, Any]] = {
    "window 1": {"window": 1},
    "window 7": {"window": 7},
    "window 100": {"window": Window(100)},
    "chunk 64": {"window": Window(64, chunked=True)},
    "chunk 7": {"window": Window(7, chunked=True)},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -30.0])},
    "all": {"window": 20, "softcap": 5.0, "sinks": torch.tensor([3.0, 1.0])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options: dict[str, Any]) -> None:
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    check(problem([(150, 12), (0, 9), (61, 5)], chain=False), **moved)


def test_a_window_cuts_deep_trees() -> None:
    check(problem([(90, 40), (0, 70)], chain=True), window=16)


def test_long_context_of_many_splits() -> None:
    """All sizes of splits, and more of them than one step of the combination."""
    unit, context = 64, 64 * 140 + 5
    assert tiles.num_splits(context, unit) > 28
    check(problem([(context, 3), (5, 2)], heads=1, page=64, dtype=torch.float16), split=unit)


# Quantised pages.


def quantised(p: Problem, stored: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(1)
    scales = [(torch.rand(p.k_pages.shape[2], generator=generator) + 0.5) for _ in range(2)]
    k, v = (
        (pages.float() * 20).to(torch.float8_e4m3fn).view(stored)
        for pages in (p.k_pages, p.v_pages)
    )
    k_scale, v_scale = (scale.to(DEVICE) / 20 for scale in scales)
    return replace(p, k_pages=k, v_pages=v, k_scale=k_scale, v_scale=v_scale)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_pages(dtype: torch.dtype, stored: torch.dtype) -> None:
    check(quantised(problem(MIXED[:2], heads=4, kv_heads=2, dtype=dtype), stored), softcap=8.0)


def test_every_e4m3_byte_is_decoded() -> None:
    p = problem([(255, 1)], heads=1, size=1)
    codes = torch.arange(256, dtype=torch.uint8)
    finite = (codes & 0x7F) != 0x7F
    pages = [torch.zeros_like(pages, dtype=torch.uint8) for pages in (p.k_pages, p.v_pages)]
    flat = reference.gather_slots(torch.arange(p.k_pages.shape[0] * 16).view(-1, 16, 1, 1).to(
        DEVICE), p.block_table[0], 256).flatten()  # fmt: skip
    pages[1].view(-1)[flat] = torch.where(finite, codes, 0).to(DEVICE)
    one = torch.ones(1, device=DEVICE)
    check(replace(p, k_pages=pages[0], v_pages=pages[1], k_scale=one, v_scale=one))
    pages[1].view(-1)[flat] = codes.to(DEVICE)
    found = run(replace(p, k_pages=pages[0], v_pages=pages[1], k_scale=one, v_scale=one))
    assert found.isnan().all()


# A row's bits depend on what it sees alone.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    sizes = [(100, 5), (0, 33), (140, 1)]
    p = problem(sizes, heads=2, kv_heads=1, dtype=dtype)
    together = run(p, split=64)
    for index in range(len(sizes)):
        begin, end = p.cu_nodes[index : index + 2].tolist()
        alone = replace(
            p, q=p.q[begin:end], block_table=p.block_table[index : index + 1],
            context_lens=p.context_lens[index : index + 1],
            cu_nodes=p.cu_nodes[index : index + 2] - begin,
            ancestor_bits=p.ancestor_bits[begin:end],
        )  # fmt: skip
        assert same_bits(run(alone, split=64), together[begin:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 30])
def test_a_chain_has_the_bits_of_plain_decoding(dtype: torch.dtype, window: int | None) -> None:
    context, rows = 120, 12  # crosses the borders of a block and of a split at 128
    p = problem([(context, rows)], dtype=dtype, chain=True)
    chain = run(p, split=64, window=window)
    for row in (0, 8, 11):
        step = replace(
            p, q=p.q[row : row + 1], context_lens=p.context_lens + row,
            cu_nodes=torch.tensor([0, 1], device=DEVICE), ancestor_bits=p.ancestor_bits[:1],
        )  # fmt: skip
        assert same_bits(run(step, split=64, window=window), chain[row : row + 1])


def test_bits_do_not_depend_on_max_context() -> None:
    p = problem([(100, 7), (130, 1)])
    assert same_bits(run(p, split=64), run(p, split=64, max_context=130))


def test_a_context_beyond_max_context_is_nan_not_wrong() -> None:
    p = problem([(300, 2), (60, 2), (1, 1)])
    for limit in (100, 0):  # with room for two splits, and for one
        found = run(p, split=64, max_context=limit, validate=False)
        assert found[:2].isnan().all()
        if limit:
            assert same_bits(found[2:], run(p, split=64)[2:])


# The unified maximum.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unified_maximum(dtype: torch.dtype) -> None:
    p = problem([(100, 7), (70, 9)], heads=4, kv_heads=2, dtype=dtype)
    sinks = torch.tensor([1.0, 0.0, -2.0, 3.0], device=DEVICE)
    check_unified(p, split=64, sinks=sinks)


def check_unified(p: Problem, **options: Any) -> None:
    tolerance = TOLERANCE[p.q.dtype]
    found = run(p, softmax="unified", unified_max=1.0, **options)
    torch.testing.assert_close(
        found.double(), expected(p, sinks=options.get("sinks")), atol=tolerance, rtol=tolerance
    )


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # what the flags are for
@pytest.mark.parametrize("split", [64, 1024], ids=["several splits", "one split"])
def test_rows_out_of_range_are_computed_again_and_others_are_not(split: int) -> None:
    p = problem([(100, 5), (70, 4)])
    p.q[3] *= 300  # scores far above the unified maximum
    p.q[6, 1] = 0  # and one head far below
    exact = run(p, split=split)
    unified = run(p, split=split, softmax="unified", unified_max=44.0)
    low, high = attention.TRUSTED[torch.float32]
    log2e = 1.4426950408889634
    highest = highest_scores(p) * log2e
    far = (highest < 44 * log2e + low) | (highest > 44 * log2e + high)
    assert 0 < far.sum() < far.numel()
    assert same_bits(unified[far], exact[far])
    torch.testing.assert_close(unified, exact, atol=1e-5, rtol=1e-5)
    assert not same_bits(unified[~far], exact[~far])


def highest_scores(p: Problem) -> Tensor:
    """(rows, H): the largest score of each row."""
    found = torch.empty(p.q.shape[:2], device=DEVICE)
    for index, context in enumerate(p.context_lens.tolist()):
        begin, end = p.cu_nodes[index : index + 2].tolist()
        keys = reference.gather_slots(p.k_pages, p.block_table[index], context + end - begin)
        mask = reference.unpack_bits(p.ancestor_bits[begin:end], end - begin)
        seen = torch.cat((mask.new_ones(end - begin, context), mask), dim=1)
        keys = keys.repeat_interleave(p.q.shape[1] // keys.shape[1], 1)
        scores = torch.einsum("nhd,thd->nht", p.q[begin:end], keys) * 0.4
        found[begin:end] = scores.masked_fill(~seen[:, None], -torch.inf).amax(-1)
    return found


# Shared prefixes.


def sharing(p: Problem, groups: Sequence[int], shared: Sequence[int]) -> tuple[Problem, Any]:
    """The problem with each group's first pages those of its first sequence."""
    page, table = p.k_pages.shape[1], p.block_table.clone()
    slots = torch.zeros(len(table), dtype=torch.int32, device=DEVICE)
    for begin, end, count in zip(groups[:-1], groups[1:], shared, strict=True):
        slots[begin:end] = count
        table[begin:end, : -(-count // page)] = table[begin, : -(-count // page)].clone()
    prefix = SharedPrefix(torch.tensor(groups, dtype=torch.int32, device=DEVICE), slots)
    return replace(p, block_table=table), prefix


@pytest.mark.parametrize("softmax", ["running", "unified"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_shared_prefix_changes_no_bit(dtype: torch.dtype, softmax: str) -> None:
    sizes = [(140, 7), (160, 1), (200, 0), (130, 9), (70, 3), (64, 2)]
    p, prefix = sharing(problem(sizes, dtype=dtype), [0, 4, 5, 6], [128, 0, 64])
    alone = run(p, split=64, softmax=softmax)
    assert same_bits(run(p, split=64, softmax=softmax, shared_prefix=prefix), alone)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(alone.double(), expected(p), atol=tolerance, rtol=tolerance)


def test_shared_pages_are_read_through_the_first_sequence_only() -> None:
    p, prefix = sharing(problem([(140, 3), (150, 2)]), [0, 2], [140])
    wanted = run(p, split=64, shared_prefix=prefix)
    p.block_table[1, : 128 // 16] = p.block_table[0, -1]  # never to be read
    assert same_bits(run(p, split=64, shared_prefix=prefix, validate=False), wanted)


def test_a_window_leaves_a_shared_prefix_alone() -> None:
    p, prefix = sharing(problem([(140, 3), (150, 2)]), [0, 2], [128])
    alone = run(p, split=64, window=90)
    assert same_bits(run(p, split=64, window=90, shared_prefix=prefix), alone)


# What comes in.


def test_strides_are_honoured() -> None:
    p = problem([(40, 5), (3, 2)], heads=4, kv_heads=2)

    def spread(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape[:-2], t.shape[-2] + 1, t.shape[-1] * 2), NAN, device=DEVICE)
        wide[..., 1:, : t.shape[-1]] = t
        return wide[..., 1:, : t.shape[-1]]

    wanted = run(p)
    table = torch.full((2, 9), 99, dtype=torch.int32, device=DEVICE)
    table[:, : p.block_table.shape[1]] = p.block_table
    apart = replace(
        p, q=spread(p.q), k_pages=spread(p.k_pages), v_pages=spread(p.v_pages),
        block_table=table[:, : p.block_table.shape[1]],
        cu_nodes=p.cu_nodes.int(), context_lens=p.context_lens.int(),
    )  # fmt: skip
    out = spread(torch.zeros_like(p.q))
    attention.tree_attention(**apart.arguments, scale=0.4, out=out)
    assert same_bits(out.contiguous(), wanted)


def test_public_function_is_the_twin_on_the_cpu_and_the_kernels_on_a_gpu() -> None:
    p = problem([(20, 5)])
    found = specdec.kernels.tree_attention(**p.arguments, scale=0.4)
    kernels = attention.tree_attention if DEVICE == "cuda" else reference.tree_attention
    assert same_bits(found, kernels(**p.arguments, scale=0.4))


def changed(p: Problem, **changes: Any) -> dict[str, Any]:
    return {**p.arguments, "scale": 0.4, **changes}


def bits(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE)[:, None]


def whole(*numbers: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


def refusals() -> dict[str, tuple[str, dict[str, Any]]]:
    """What is wrong -> the argument to be named, and the arguments of the call."""
    p = problem([(20, 3), (5, 1)], heads=4, kv_heads=2)
    half = torch.float16
    table, three = p.block_table, torch.ones(3, device=DEVICE)
    wide = problem([(1, 1)], heads=1, size=257)
    eight = quantised(p, torch.float8_e4m3fn)
    shared = SharedPrefix(whole(0, 2), whole(0, 0))
    return {
        "dtype of q": ("q", changed(p, q=p.q.double())),
        "dtype of pages": ("k_pages", changed(p, k_pages=p.k_pages.to(half))),
        "keys and values differ": ("v_pages", changed(p, v_pages=p.v_pages.to(half))),
        "dtype of the table": ("block_table", changed(p, block_table=table.long())),
        "dtype of lengths": ("context_lens", changed(p, context_lens=p.context_lens.float())),
        "dtype of offsets": ("cu_nodes", changed(p, cu_nodes=p.cu_nodes.to(torch.int16))),
        "dtype of bits": ("ancestor_bits", changed(p, ancestor_bits=p.ancestor_bits.int())),
        "device": ("context_lens", changed(p, context_lens=p.context_lens.to("meta"))),
        "shape of q": ("q", changed(p, q=p.q[0])),
        "heads": ("q", changed(p, q=p.q[:, :3])),
        "no heads": ("k_pages", changed(
            p, k_pages=p.k_pages[:, :, :0], v_pages=p.v_pages[:, :, :0])),
        "head size of keys": ("k_pages", changed(p, k_pages=p.k_pages[..., :8])),
        "more than 256 numbers": ("q", changed(wide)),
        "pages of keys and values": ("v_pages", changed(p, v_pages=p.v_pages[:-1])),
        "page size": ("k_pages", changed(
            p, k_pages=p.k_pages[:, :12], v_pages=p.v_pages[:, :12])),
        "sequences": ("context_lens", changed(p, context_lens=p.context_lens[:1])),
        "offsets": ("cu_nodes", changed(p, cu_nodes=p.cu_nodes[:2])),
        "rows of bits": ("ancestor_bits", changed(p, ancestor_bits=p.ancestor_bits[:3])),
        "no words": ("ancestor_bits", changed(p, ancestor_bits=p.ancestor_bits[:, :0])),
        "stride of q": ("q", changed(p, q=p.q.transpose(1, 2).contiguous().transpose(1, 2))),
        "stride of pages": ("v_pages", changed(
            p, v_pages=p.v_pages.transpose(2, 3).contiguous().transpose(2, 3))),
        "stride of lengths": ("context_lens", changed(p, context_lens=whole(20, 9, 5)[::2])),
        "sinks": ("sinks", changed(p, sinks=three)),
        "scales": ("k_scale", changed(p, k_scale=three)),
        "no scales": ("v_scale", changed(eight, v_scale=None)),
        "out": ("out", changed(p, out=p.q.to(half))),
        "scale": ("scale", changed(p, scale=0.0)),
        "softcap": ("softcap", changed(p, softcap=-1.0)),
        "window": ("window", changed(p, window=0)),
        "softmax": ("softmax", changed(p, softmax="online")),
        "max_context below 0": ("max_context", changed(p, max_context=-1)),
        "split": ("split", changed(p, split=100)),
        "page number": ("block_table", changed(p, block_table=table + 3)),
        "negative page": ("block_table", changed(p, block_table=table - 9)),
        "context beyond the table": ("context_lens", changed(p, context_lens=whole(46, 5))),
        "context below 0": ("context_lens", changed(p, context_lens=whole(20, -1))),
        "context beyond max_context": ("context_lens", changed(p, max_context=19)),
        "offsets fall": ("cu_nodes", changed(p, cu_nodes=whole(0, 5, 4))),
        "offsets end early": ("cu_nodes", changed(p, cu_nodes=whole(0, 3, 3))),
        "not itself": ("ancestor_bits", changed(p, ancestor_bits=bits(1, 1, 5, 1))),
        "cycle": ("ancestor_bits", changed(p, ancestor_bits=bits(1, 7, 7, 1))),
        "parent after child": ("ancestor_bits", changed(p, ancestor_bits=bits(1, 7, 5, 1))),
        "beyond the tree": ("ancestor_bits", changed(p, ancestor_bits=bits(1, 3, 7 + 8, 1))),
        "not its parent's": ("ancestor_bits", changed(p, ancestor_bits=bits(1, 3, 6, 1))),
        "groups": ("shared_prefix.groups", changed(
            p, shared_prefix=SharedPrefix(whole(0, 1), shared.slots))),
        "group of two numbers": ("shared_prefix.slots", changed(
            p, shared_prefix=SharedPrefix(shared.groups, whole(0, 4)))),
        "pages not shared": ("shared_prefix.slots", changed(
            p, shared_prefix=SharedPrefix(shared.groups, whole(4, 4)))),
        "shared beyond the context": ("shared_prefix.slots", changed(
            p, shared_prefix=SharedPrefix(shared.groups, whole(16, 16)))),
    }  # fmt: skip


@pytest.mark.parametrize("name", refusals())
@pytest.mark.parametrize("module", ["attention", "public"])
def test_bad_input_is_refused_by_name(name: str, module: str) -> None:
    argument, arguments = refusals()[name]
    function = attention.tree_attention if module == "attention" else (
        specdec.kernels.tree_attention)  # fmt: skip
    with pytest.raises(ValueError, match=f"^{argument}: "):
        function(**arguments, validate=True)


def test_more_than_256_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^q: expected at most 256 rows per tree, got 257"):
        attention.tree_attention(**changed(problem([(0, 257)], heads=1)))
    with pytest.raises(ValueError, match=r"^cu_nodes: expected trees of at most 256 rows"):
        attention.tree_attention(**changed(problem([(0, 257), (0, 1)], heads=1)))
    p = problem([(0, 65)], heads=1)
    with pytest.raises(ValueError, match=r"^ancestor_bits: expected 2 words"):
        attention.tree_attention(**changed(p, ancestor_bits=p.ancestor_bits[:, :1]))


# How the work is cut.


@pytest.mark.parametrize("unit", [64, 256])
def test_splits_follow_each_other(unit: int) -> None:
    starts = [tiles.split_start(split, unit) for split in range(60)]
    sizes = [after - before for before, after in itertools.pairwise(starts)]
    assert starts[0] == 0
    lengths = [1] * 8 + [2] * 4 + [4] * 4 + [8] * 12 + [16] * 31
    assert sizes == [unit * length for length in lengths]
    for split, start in enumerate(starts[:-1]):
        assert tiles.split_of(start, unit) == split
        assert tiles.split_of(starts[split + 1] - 1, unit) == split
        assert tiles.num_splits(start, unit) == split
        assert tiles.num_splits(start + 1, unit) == split + 1


COMPILE = """
import sys
from specdec.kernels import attention
from specdec.kernels.configuration import TARGETS
[found] = [c for c in attention.configurations(sys.argv[1]) if c.name == sys.argv[2]]
compiled = found.compile(TARGETS[sys.argv[1]])
print(compiled.metadata.shared)
print(compiled.asm["ttgir"])
"""


def compiled(target: str, name: str, cache: Path) -> tuple[int, str]:
    """Bytes of shared memory and Triton's last intermediate form."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE, target, name], capture_output=True, text=True,
        env=environment, cwd=cache, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shared, text = done.stdout.split("\n", 1)
    return int(shared), text


def test_tiles_of_hopper_sum_in_one_order(tmp_path: Path) -> None:
    """Warps beside each other along the rows and one instruction shape: a row meets its numbers in
    the same order in both tiles, which the number of rows chooses between."""
    layouts = []
    for rows, warps in ((64, 4), (128, 8)):
        shared, text = compiled("sm_90", f"attend plain bf16 128 page 16 rows {rows}", tmp_path)
        assert shared <= 227 * 1024
        found = set(re.findall(r"#ttg.nvidia_mma<\{.*?\}>", text))
        assert all(f"warpsPerCTA = [{warps}, 1]" in layout for layout in found)
        layouts.append({layout.replace(f"[{warps}, 1]", "[all, 1]") for layout in found})
    assert layouts[0] == layouts[1]
    assert len(layouts[0]) == 2  # of scores and of values


def test_fp8_bytes_compile_for_ampere(tmp_path: Path) -> None:
    shared, _ = compiled("sm_80", "attend fp8 pages bf16 u8 128 page 16 rows 64", tmp_path)
    assert shared <= 163 * 1024
