"""Rotary embedding, cache write and tree attention of one sequence's rows, straight from the merged
projection: one call per layer.

Keys are turned one tile of slots at a time: scores are the same product as a linear layer's.
Masked slots get a probability of exactly zero and every sum runs over the slots in their order, so
that a row of a chain has the same bits whatever rows it shares the pass with.
"""

from array import array
from typing import Any

import numpy as np
import torch
from numba import cfunc, njit, types
from torch import Tensor

from specdec.attention import LayerCall, Recorder, Segment, Step
from specdec.backend import Window
from specdec.forward.fused import qkv_attention
from specdec.forward.jit import rows as kernels
from specdec.forward.jit.linear import kind_of
from specdec.forward.jit.product import make_product
from specdec.forward.jit.vector import BYTES, Kind

COLUMNS = kernels.COLUMNS
_HEAD_STEP = max(COLUMNS, 32)  # rotation takes each half of a head in vectors of 16
_CHUNK = 64  # rows of a chain that one call takes: a prompt's early rows skip its later keys
_SIGNATURE = types.void(*([types.intp] * 16), types.float32)


def _compile_place(kind: Kind) -> Any:
    """Rotates the rows' queries and keys; keys and values go to their slots."""
    rotate, copy = kernels.make_rotate(kind), kernels.make_copy()

    @njit
    def place(  # type: ignore[no-untyped-def]
        qkv, cos, sin, keys, values, slot_bytes, starts, page, context, rows, heads, kv_heads,
        head_bytes, queries, half,
    ):  # fmt: skip
        groups = heads // kv_heads
        for r in range(rows):
            x = qkv + r * (heads + 2 * kv_heads) * head_bytes
            angle, slot = r * head_bytes, context + r
            flat = starts[slot // page] + slot % page
            for h in range(heads):  # the query rows of one KV head stand together
                line = (h // groups * rows + r) * groups + h % groups
                to = queries + line * head_bytes
                rotate(x + h * head_bytes, cos + angle, sin + angle, to, half)
            x += heads * head_bytes
            for h in range(kv_heads):
                to = keys + flat * slot_bytes + h * head_bytes
                rotate(x + h * head_bytes, cos + angle, sin + angle, to, half)
            copy(x + kv_heads * head_bytes, values + flat * slot_bytes, kv_heads * head_bytes // 64)

    return place


def _compile_turn() -> Any:
    """Turns the keys of one tile of slots: one step of a product holds one number per slot."""
    transpose = kernels.make_transpose()

    @njit
    def turn(keys, slot_bytes, starts, page, begin, length, head_bytes, turned):  # type: ignore[no-untyped-def]
        places = np.empty(16, np.int64)
        for part in range(COLUMNS // 16):
            for i in range(16):  # slots past the end repeat the last one; they are masked
                slot = min(begin + part * 16 + i, length - 1)
                places[i] = keys + (starts[slot // page] + slot % page) * slot_bytes
            for d in range(head_bytes // 64):
                to = turned + d * 16 * COLUMNS * 4 + part * 64
                transpose(places.ctypes.data, d * 64, to, COLUMNS * 4)
        places[0] = 0  # keeps the array to here: numba does not see uses by address

    return turn


def _compile_hide() -> Any:
    """Sets a row's scores to -inf wherever it must not look."""
    load_int64, load_byte = kernels.load_int64, kernels.load_byte

    @njit
    def hide(line, row, context, rows, mask, window):  # type: ignore[no-untyped-def]
        first = load_int64(window + 8 * row) if window != 0 else 0  # lowest position it sees
        line[: min(max(first, 0), context)] = -np.inf
        for c in range(rows):
            seen = c <= row if mask == 0 else load_byte(mask + row * rows + c) != 0
            if window != 0:
                seen = seen and load_int64(window + 8 * (rows + c)) >= first
            if not seen:
                line[context + c] = -np.inf
        line[context + rows :] = -np.inf

    return hide


def _compile(kind: Kind) -> Any:
    """The address-taking function of one number format."""
    product = make_product(kind)
    mix = make_product("mixed" if kind == "bfloat16" else kind)
    place, turn, hide = _compile_place(kind), _compile_turn(), _compile_hide()
    softmax, scale_row = kernels.make_softmax(), kernels.make_scale(kind)
    load_int64, size, step_bytes = kernels.load_int64, BYTES[kind], COLUMNS * 4

    @cfunc(_SIGNATURE)
    def run(  # type: ignore[no-untyped-def]
        qkv, cos, sin, keys, values, slot_bytes, table, page, context, rows, heads, kv_heads,
        head_size, mask, window, out, scale,
    ):  # fmt: skip
        head_bytes, groups = head_size * size, heads // kv_heads
        lines, length = groups * rows, context + rows  # lines: query rows of one KV head
        padded = (length + COLUMNS - 1) // COLUMNS * COLUMNS
        line_bytes = padded * 4
        queries = np.empty(heads * rows * head_bytes, np.uint8)
        turned = np.empty(head_bytes * COLUMNS, np.uint8)
        scores = np.empty((lines, padded), np.float32)
        totals = np.empty(lines, np.float32)
        sums = np.empty(lines * COLUMNS, np.float32)
        starts = np.empty((length - 1) // page + 1, np.int64)  # flat slot of each page
        for i in range(len(starts)):
            starts[i] = load_int64(table + 8 * i) * page
        queries_at, scores_at, sums_at = queries.ctypes.data, scores.ctypes.data, sums.ctypes.data
        turned_at = turned.ctypes.data
        place(
            qkv, cos, sin, keys, values, slot_bytes, starts, page, context, rows, heads, kv_heads,
            head_bytes, queries_at, head_size // 32,
        )  # fmt: skip
        for kv in range(kv_heads):
            query = queries_at + kv * lines * head_bytes
            key, value = keys + kv * head_bytes, values + kv * head_bytes
            for t in range(0, padded, COLUMNS):
                turn(key, slot_bytes, starts, page, t, length, head_bytes, turned_at)
                to, steps = scores_at + t * 4, head_bytes // 4
                product(turned_at, step_bytes, query, head_bytes, lines, steps, to, line_bytes, 0)
            for line in range(lines):
                hide(scores[line], line // groups, context, rows, mask, window)
                totals[line] = softmax(scores_at + line * line_bytes, padded // 16, scale)
            for d in range(0, head_size, COLUMNS):
                t = 0
                while t < length:
                    flat = starts[t // page] + t % page
                    end = min((t // page + 1) * page, length)
                    while end < length and starts[end // page] == flat + end - t:
                        end = min(end + page, length)  # the next page lies right behind
                    at, x = value + flat * slot_bytes + d * size, scores_at + t * 4
                    mix(at, slot_bytes, x, line_bytes, lines, end - t, sums_at, step_bytes, t)
                    t = end
                for line in range(lines):
                    h = kv * groups + line % groups
                    to = out + ((line // groups) * heads + h) * head_bytes + d * size
                    factor = np.float32(1) / totals[line]
                    scale_row(sums_at + line * step_bytes, to, COLUMNS // 16, factor)
        # numba frees an array behind its last use, and does not see uses by address
        queries[0] = turned[0] = 0
        sums[0] = scores[0, 0] = 0

    return run.ctypes


_COMPILED: dict[Kind, Any] = {}


def fits(heads: int, kv_heads: int, head_size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes these heads."""
    return kind_of(dtype) is not None and heads % kv_heads == 0 and head_size % _HEAD_STEP == 0


class _Rows:
    """Where one sequence's rows go and what they see, as addresses; made once per pass."""

    def __init__(self, segment: Segment, window: Window | None) -> None:
        self.count, self.context, self.page = segment.rows, segment.context, segment.table.page_size
        self._pages = array("q", segment.table.pages)
        self._mask = None if segment.mask is None else segment.mask.contiguous()
        self._window: Tensor | None = None
        if window is not None:
            positions = segment.positions
            if positions is None:
                positions = torch.arange(self.context, self.context + self.count)
            self._window = torch.stack((window.first_visible(positions), positions))
        self.table, _ = self._pages.buffer_info()
        self.mask = 0 if self._mask is None else self._mask.data_ptr()
        self.window = 0 if self._window is None else self._window.data_ptr()

    @staticmethod
    def parts(segment: Segment, window: Window | None) -> "list[_Rows]":
        """A tree whole; a chain in chunks, each of which sees the keys of those before it."""
        if segment.rows == 0:  # the kernel's loops run at least once
            return []
        if segment.mask is not None or segment.rows <= _CHUNK:
            return [_Rows(segment, window)]
        return [
            _Rows(
                Segment(
                    min(_CHUNK, segment.rows - begin), segment.context + begin, segment.table,
                    positions=None if segment.positions is None
                    else segment.positions[begin : begin + _CHUNK],
                ),
                window,
            )
            for begin in range(0, segment.rows, _CHUNK)
        ]  # fmt: skip


def merged_attention(
    step: Step | Recorder, call: LayerCall, heads: int, kv_heads: int, qkv: Tensor, cos: Tensor,
    signed_sin: Tensor,
) -> Tensor:  # fmt: skip
    """fused.qkv_attention by the compiled kernel: writes keys and values, returns (1, R, H, D)."""
    if not isinstance(step, Step) or (step.longest > _CHUNK and torch.get_num_threads() > 2):
        # the kernel runs on one thread: a long prompt is quicker on torch's
        return qkv_attention(step, call, heads, kv_heads, qkv, cos, signed_sin)
    kind = kind_of(qkv.dtype)
    assert kind is not None
    run = _COMPILED.get(kind)
    if run is None:
        run = _COMPILED[kind] = _compile(kind)
    keys, values = step.memory.flat_keys[call.layer], step.memory.flat_values[call.layer]
    head_size, size = keys.shape[2], keys.itemsize
    out = torch.empty((1, qkv.shape[1], heads, head_size), dtype=qkv.dtype)
    x, to, c, s = qkv.data_ptr(), out.data_ptr(), cos.data_ptr(), signed_sin.data_ptr()
    keys_at, values_at = keys.data_ptr(), values.data_ptr()
    angle, read, written = head_size * size, qkv.stride(1) * size, heads * head_size * size
    slot_bytes = kv_heads * head_size * size
    for parts in step.derived((_Rows, call.window), lambda s: _Rows.parts(s, call.window)):
        for rows in parts:
            run(
                x, c, s, keys_at, values_at, slot_bytes, rows.table, rows.page, rows.context,
                rows.count, heads, kv_heads, head_size, rows.mask, rows.window, to, call.scale,
            )  # fmt: skip
            x, to = x + rows.count * read, to + rows.count * written
            c, s = c + rows.count * angle, s + rows.count * angle
    return out
