"""Moves in the paged cache: new keys and values to their slots, accepted paths to the front, pages.

A flat slot is page * page size + offset. Twins in reference.py; nothing here waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.checks import check_tensor, check_values
from specdec.kernels.configuration import Configuration

_LANES = 1024  # elements of one row, or words of one page, that a program moves at a time
_STEP = 8  # slots of a path that are read before the first of them is written
_MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@triton.jit
def e4m3(x):
    """float32 -> the byte of float8_e4m3fn: nearest, ties to even, saturated at 448; NaN stays.

    In integers, since sm_80 has no such conversion.
    """
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    held = tl.minimum(size, 0x43E00000)  # 448
    normal = ((held + 0x7FFFF + ((held >> 20) & 1)) >> 20) - 960  # exponent bias 127 -> 7
    # Adding 2**14 rounds to multiples of 2**-9, the step below 2**-6.
    small = (held.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    found = tl.where(held < 0x3C800000, small, normal)
    found = tl.where(size > 0x7F800000, 0x7F, found)
    return (found | sign).to(tl.uint8)


@triton.jit
def _scatter_kernel(
    keys, values, k_pages, v_pages, slots, k_scale, v_scale, key_stride, value_stride,
    num_slots,
    KEYS: tl.constexpr, VALUES: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    QUANTISED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
        _scatter_row(
            keys + row * key_stride, k_pages + slot * KEYS, k_scale, lane, KEYS, KEY_SIZE, QUANTISED
        )
        _scatter_row(
            values + row * value_stride, v_pages + slot * VALUES, v_scale, lane, VALUES, VALUE_SIZE,
            QUANTISED,
        )  # fmt: skip


@triton.jit
def _scatter_row(source, destination, scale, lane, COUNT, SIZE, QUANTISED: tl.constexpr):
    inside = lane < COUNT
    found = tl.load(source + lane, inside, other=0.0)
    if QUANTISED:
        factor = tl.load(scale + lane // SIZE, inside, other=1.0)
        found = e4m3(tl.div_rn(found.to(tl.float32), factor))
    tl.store(destination + lane, found.to(destination.dtype.element_ty), inside)


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
    """Writes new keys (rows, K, D) and values (rows, K, Dv) to their flat slots of one layer's
    pages (P, page, K, D) and (P, page, K, Dv); one launch.

    slots: (rows,) int64, different ones; rows whose slot is outside the pages, as -1, are not
    written: a captured graph pads with them. With k_scale and v_scale (K,) float32 the pages are
    float8_e4m3fn and hold key / scale, to nearest, saturated. Raises ValueError for a wrong dtype,
    device, shape or stride, naming the argument.
    """
    _check_scatter(keys, values, k_pages, v_pages, slots, k_scale, v_scale)
    write(keys, values, k_pages, v_pages, slots, k_scale=k_scale, v_scale=v_scale)


def write(
    keys: Tensor, values: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """scatter's launch, with nothing checked: for the layers of a pass."""
    rows, heads, key_size = keys.shape
    value_size = values.shape[2]
    widest = heads * max(key_size, value_size)
    if rows == 0 or widest == 0:
        return
    quantised = k_scale is not None
    if quantised:
        k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    lanes = min(_LANES, triton.next_power_of_2(widest))
    _scatter_kernel[(rows, triton.cdiv(widest, lanes))](
        keys, values, k_pages, v_pages, slots, k_scale, v_scale, keys.stride(0), values.stride(0),
        k_pages.shape[0] * k_pages.shape[1], KEYS=heads * key_size, VALUES=heads * value_size,
        KEY_SIZE=key_size, VALUE_SIZE=value_size, QUANTISED=quantised, LANES=lanes, num_warps=4,
    )  # fmt: skip


def _check_scatter(
    keys: Tensor, values: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    device = keys.device
    check_tensor("keys", keys, ("rows", "K", "D"), _MODEL_DTYPES, device, rows_apart=True)
    rows, heads, key_size = keys.shape
    check_tensor(
        "values", values, (rows, heads, "Dv"), (keys.dtype,), device, rows_apart=True
    )  # fmt: skip
    value_size = values.shape[2]
    for name, new, size in (("keys", keys, key_size), ("values", values, value_size)):
        if heads > 1 and size and new.stride(1) != size:
            raise ValueError(f"{name}: expected the heads of a row side by side, {new.stride()=}")
    if (k_scale is None) != (v_scale is None):
        missing = "k_scale" if k_scale is None else "v_scale"
        raise ValueError(f"{missing}: expected scales for keys and values, or for neither")
    stored = keys.dtype if k_scale is None else torch.float8_e4m3fn
    check_tensor("k_pages", k_pages, ("P", "page", heads, key_size), (stored,), device)
    check_tensor("v_pages", v_pages, (*k_pages.shape[:2], heads, value_size), (stored,), device)
    check_tensor("slots", slots, (rows,), (torch.int64,), device)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            check_tensor(name, scale, (heads,), (torch.float32,), device)


@dataclass(frozen=True, slots=True, eq=False)
class LayerTable:
    """The pages of all layers, keys and values, as a table on the device: one launch reaches all.

    Every tensor is (P, page, ...) with the same P and page. Make it anew when a tensor is replaced.
    """

    tensors: tuple[Tensor, ...]  # kept alive: the table holds their addresses
    addresses: Tensor  # (n,) int64
    words: Tensor  # (n,) int64 words per slot
    most_words: int
    word: torch.dtype
    num_pages: int
    page_size: int

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "LayerTable":
        """Raises ValueError for no tensor, for one that is not contiguous or not like the first."""
        if not tensors:
            raise ValueError("tensors: expected the pages of at least one layer")
        first = tensors[0]
        for index, pages in enumerate(tensors):
            shape = (*first.shape[:2], *(str(i) for i in range(2, pages.ndim)))
            check_tensor(f"tensors[{index}]", pages, shape, (pages.dtype,), first.device)
        num_pages, page_size = first.shape[:2]
        sizes = [pages[:1, :1].numel() * pages.element_size() for pages in tensors]
        common = gcd(8, *sizes, *(pages.data_ptr() for pages in tensors))
        words = [size // common for size in sizes]
        device = first.device
        return LayerTable(
            tuple(tensors), torch.tensor([pages.data_ptr() for pages in tensors], device=device),
            torch.tensor(words, device=device), max(words), _WORDS[common], num_pages, page_size,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.addresses.device


@triton.jit
def _commit_kernel(
    addresses, words, block_table, lengths, cu_rows, path, table_stride, path_stride, depth,
    table_width, page_size, num_pages, WORD: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program moves some words of every slot of one sequence's path in one layer's tensor.

    A path's slots rise and none lies before its destination, so what a step writes is never read
    by a later one; inside a step everything is read before anything is written.
    """
    sequence = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    base = tl.load(addresses + layer).to(tl.pointer_type(WORD))
    per_slot = tl.load(words + layer)
    lane = tl.program_id(2) * LANES + tl.arange(0, LANES)
    length = tl.load(lengths + sequence)
    first_row = tl.load(cu_rows + sequence)
    table = block_table + sequence * table_stride
    for begin in range(0, depth, STEP):
        step = begin + tl.arange(0, STEP)
        row = tl.load(path + sequence * path_stride + step, step < depth, other=-1)
        source = length + row - first_row - 1
        destination = length + step
        moved = (row >= 0) & (source > destination)
        source = _flat(table, source, moved, table_width, page_size, num_pages)
        destination = _flat(table, destination, moved, table_width, page_size, num_pages)
        moved = moved & (source >= 0) & (destination >= 0)
        inside = moved[:, None] & (lane < per_slot)[None, :]
        held = tl.load(base + source[:, None] * per_slot + lane[None, :], inside, other=0)
        tl.debug_barrier()
        tl.store(base + destination[:, None] * per_slot + lane[None, :], held, inside)


@triton.jit
def _flat(table, slot, wanted, table_width, page_size, num_pages):
    """Flat numbers of a sequence's slots; -1 where the table or the pool does not reach."""
    index = slot // page_size
    held = wanted & (index >= 0) & (index < table_width)
    page = tl.load(table + index, held, other=-1).to(tl.int64)
    held = held & (page >= 0) & (page < num_pages)
    return tl.where(held, page * page_size + slot % page_size, -1)


def commit(
    layers: LayerTable, block_table: Tensor, lengths: Tensor, cu_rows: Tensor, path: Tensor
) -> None:
    """Keeps the accepted path of every sequence: the slot of its i-th node becomes slot length + i.

    All layers in one launch, in place; sources and destinations may overlap. block_table: (B, max
    pages) int32. lengths: (B,) int64 slots before each tree, whose node j has slot length + j.
    cu_rows: (B + 1,) int64 and path: (B, depth) int64 as in acceptance.Outcome: packed rows, root
    first, parents before children, -1 pads. What a table or the pool does not reach stays as it is.
    Raises ValueError for a wrong dtype, device, shape or stride, naming the argument, and for page
    numbers outside the pool where they can be read without waiting for a device.
    """
    device = layers.device
    check_tensor("block_table", block_table, ("B", "max pages"), (torch.int32,), device)
    B, width = block_table.shape
    check_tensor("lengths", lengths, (B,), (torch.int64,), device)
    check_tensor("cu_rows", cu_rows, (B + 1,), (torch.int64,), device)
    check_tensor("path", path, (B, "depth"), (torch.int64,), device)
    if device.type == "cpu":
        check_values("block_table", block_table, -1, layers.num_pages)
        check_values("lengths", lengths, 0, width * layers.page_size + 1)
    depth = path.shape[1]
    if B == 0 or depth == 0 or layers.most_words == 0:
        return
    lanes = min(_LANES // _STEP, triton.next_power_of_2(layers.most_words))
    grid = (B, len(layers.tensors), triton.cdiv(layers.most_words, lanes))
    _commit_kernel[grid](
        layers.addresses, layers.words, block_table, lengths, cu_rows, path, width, depth, depth,
        width, layers.page_size, layers.num_pages, WORD=_POINTED[layers.word], STEP=_STEP,
        LANES=lanes, num_warps=4,
    )  # fmt: skip


@triton.jit
def _copy_pages_kernel(
    addresses, words, sources, destinations, page_size, num_pages, WORD: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    layer = tl.program_id(1)
    source = tl.load(sources + index)
    destination = tl.load(destinations + index)
    if (tl.minimum(source, destination) >= 0) & (tl.maximum(source, destination) < num_pages):
        base = tl.load(addresses + layer).to(tl.pointer_type(WORD))
        per_page = tl.load(words + layer) * page_size
        lane = tl.program_id(2).to(tl.int64) * LANES + tl.arange(0, LANES)
        held = tl.load(base + source * per_page + lane, lane < per_page, other=0)
        tl.store(base + destination * per_page + lane, held, lane < per_page)


def copy_pages(layers: LayerTable, sources: Tensor, destinations: Tensor) -> None:
    """Copies whole pages of all layers, (n,) int64 each, in one launch: copy-on-write.

    No page may be both copied from and written to. Raises ValueError as commit does.
    """
    device = layers.device
    check_tensor("sources", sources, ("n",), (torch.int64,), device)
    check_tensor("destinations", destinations, sources.shape, (torch.int64,), device)
    if device.type == "cpu":
        check_values("sources", sources, 0, layers.num_pages)
        check_values("destinations", destinations, 0, layers.num_pages)
        if torch.isin(destinations, sources).any():
            raise ValueError("destinations: expected pages that are not among the sources")
    most = layers.most_words * layers.page_size
    if sources.shape[0] == 0 or most == 0:
        return
    lanes = min(_LANES, triton.next_power_of_2(most))
    _copy_pages_kernel[(sources.shape[0], len(layers.tensors), triton.cdiv(most, lanes))](
        layers.addresses, layers.words, sources, destinations, layers.page_size, layers.num_pages,
        WORD=_POINTED[layers.word], LANES=lanes, num_warps=4,
    )  # fmt: skip


_POINTED = {
    torch.int64: tl.int64, torch.int32: tl.int32, torch.int16: tl.int16, torch.uint8: tl.uint8,
}  # fmt: skip


def configurations() -> list[Configuration]:
    """What the kernels of this file are compiled with, for the compile test and the report."""
    found = []
    heads, size = 8, 128
    shared = {"slots": "*i64", "key_stride": "i64", "value_stride": "i64", "num_slots": "i64"}
    constants: dict[str, Any] = {
        "KEYS": heads * size, "VALUES": heads * size, "KEY_SIZE": size, "VALUE_SIZE": size,
        "LANES": _LANES,
    }  # fmt: skip
    for dtype in ("fp32", "fp16", "bf16"):
        for quantised in (False, True):
            stored, scale = ("*u8", "*fp32") if quantised else (f"*{dtype}", "constexpr")
            types = {
                **shared, "keys": f"*{dtype}", "values": f"*{dtype}", "k_pages": stored,
                "v_pages": stored, "k_scale": scale, "v_scale": scale,
            }  # fmt: skip
            held: dict[str, Any] = {**constants, "QUANTISED": quantised}
            if not quantised:
                held.update(k_scale=None, v_scale=None)
            name = f"scatter {dtype}{' to e4m3' if quantised else ''}"
            aligned = ("keys", "values", "k_pages", "v_pages", "key_stride", "value_stride")
            found.append(_configuration(name, _scatter_kernel, types, held, aligned))
    table = {"addresses": "*i64", "words": "*i64", "page_size": "i32", "num_pages": "i32"}
    for word in _WORDS.values():
        named = str(word).removeprefix("torch.")
        types = {
            **table, "block_table": "*i32", "lengths": "*i64", "cu_rows": "*i64", "path": "*i64",
            "table_stride": "i32", "path_stride": "i32", "depth": "i32", "table_width": "i32",
        }  # fmt: skip
        held = {"WORD": _POINTED[word], "STEP": _STEP, "LANES": _LANES // _STEP}
        found.append(_configuration(f"commit {named}", _commit_kernel, types, held))
        types = {**table, "sources": "*i64", "destinations": "*i64"}
        held = {"WORD": _POINTED[word], "LANES": _LANES}
        found.append(_configuration(f"copy_pages {named}", _copy_pages_kernel, types, held))
    return found


def _configuration(
    name: str, kernel: Any, types: dict[str, str], held: dict[str, Any],
    aligned: tuple[str, ...] = (),
) -> Configuration:  # fmt: skip
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    return Configuration(name, kernel, signature, held, aligned, {"num_warps": 4})
