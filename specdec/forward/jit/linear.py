"""Matrix products of a few rows with a packed weight, and what stands before and behind them.

One call does [norm ->] linear [+ bias] [+ residual], or [norm ->] gate and up projection ->
silu(gate) * up. Weights are read once, in one stream, in blocks of COLUMNS outputs. A row's result
is the same bits whatever rows it shares the call with.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import cfunc, njit, types
from torch import Tensor

from specdec.forward.jit import rows as kernels
from specdec.forward.jit.product import make_product
from specdec.forward.jit.vector import BYTES, Kind
from specdec.memory import Arena

COLUMNS = kernels.COLUMNS
_CHUNK = 512  # steps of a weight block that more rows than one tile read again from the cache

_SHARED_ROWS = 64  # from here on, a prompt's, the work is worth waking threads for
_POOL = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="specdec")

_SIGNATURE = types.void(*([types.intp] * 3), types.float32, *([types.intp] * 7))


def _compile_finish(kind: Kind) -> Any:
    """out = sums (+ bias) (+ residual) for one row; 0 stands for an absent one."""
    plain = kernels.make_finish(kind, bias=False, residual=False)
    with_bias = kernels.make_finish(kind, bias=True, residual=False)
    with_residual = kernels.make_finish(kind, bias=False, residual=True)
    with_both = kernels.make_finish(kind, bias=True, residual=True)

    @njit
    def finish(sums, bias, residual, out, vectors):  # type: ignore[no-untyped-def]
        if bias != 0 and residual != 0:
            with_both(sums, bias, residual, out, vectors)
        elif bias != 0:
            with_bias(sums, bias, 0, out, vectors)
        elif residual != 0:
            with_residual(sums, 0, residual, out, vectors)
        else:
            plain(sums, 0, 0, out, vectors)

    return finish


def _compile(kind: Kind, gated: bool) -> Any:
    """The address-taking function of one number format; gated blocks come in pairs, gate and up."""
    product = make_product(kind)
    norm_row = kernels.make_rms_norm(kind)
    gate_row = kernels.make_gate(kind)
    finish = _compile_finish(kind)
    size = BYTES[kind]
    per_step = 4 // size  # numbers of x
    row_bytes = COLUMNS * 4
    parts = 2 if gated else 1

    @cfunc(_SIGNATURE)
    def run(x, norm, out, eps, weight, bias, residual, rows, inputs, outputs, blocks):  # type: ignore[no-untyped-def]
        x_row = inputs * size
        normed = np.empty(rows * x_row if norm != 0 else 1, np.uint8)
        if norm != 0:
            for r in range(rows):
                to = normed.ctypes.data + r * x_row
                norm_row(x + r * x_row, norm, to, inputs // 16, eps)
            x = normed.ctypes.data
        sums = np.empty(rows * COLUMNS * parts, np.float32)
        at, up = sums.ctypes.data, sums.ctypes.data + rows * row_bytes
        steps = inputs // per_step
        chunk = steps if rows <= 6 else _CHUNK
        for j in range(blocks):
            for part in range(parts):
                w = weight + (j * parts + part) * steps * row_bytes
                to = at if part == 0 else up
                for begin in range(0, steps, chunk):
                    n = min(chunk, steps - begin)
                    wb, xb = w + begin * row_bytes, x + begin * 4
                    product(wb, row_bytes, xb, x_row, rows, n, to, row_bytes, begin)
            first = j * COLUMNS
            vectors = min(COLUMNS, outputs - first) // 16
            for r in range(rows):
                here, place = at + r * row_bytes, (r * outputs + first) * size
                if gated:
                    gate_row(here, up + r * row_bytes, out + place, vectors)
                else:
                    bias_at = bias + first * size if bias != 0 else 0
                    residual_at = residual + place if residual != 0 else 0
                    finish(here, bias_at, residual_at, out + place, vectors)
        # numba frees an array behind its last use, and does not see uses by address
        sums[0] = normed[0] = 0

    return run.ctypes


_COMPILED: dict[tuple[Kind, bool], Any] = {}
_ARENA = Arena()


def _function(kind: Kind, gated: bool) -> Any:
    if (kind, gated) not in _COMPILED:
        _COMPILED[kind, gated] = _compile(kind, gated)
    return _COMPILED[kind, gated]


def kind_of(dtype: torch.dtype) -> Kind | None:
    """The kernels' name of a dtype; None for one they do not have."""
    kinds: dict[torch.dtype, Kind] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    return kinds.get(dtype)


def fits(weight: Tensor) -> bool:
    """Whether the kernels take this weight."""
    if weight.device.type != "cpu" or kind_of(weight.dtype) is None or weight.ndim != 2:
        return False
    return weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0


def make_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
) -> Callable[..., Tensor]:
    """f(x, residual=None): x (..., K) -> (..., N), over a packed copy of weight (N, K).

    norm: (weight, eps) of a root-mean-square norm of x before the product. gated: the first half of
    the outputs is a gate, f gives silu(gate) * the second half, (..., N // 2), and takes neither
    bias nor residual.
    """
    kind = kind_of(weight.dtype)
    assert kind is not None
    assert fits(weight)
    assert not (gated and bias is not None)
    packed = _pack(weight.detach(), gated)
    inputs, outputs = weight.shape[1], weight.shape[0] // (2 if gated else 1)
    kept = (packed, None if bias is None else bias.detach().contiguous(), norm)
    run, empty = _function(kind, gated), torch.empty
    weight_at, blocks, dtype = packed.data_ptr(), -(-outputs // COLUMNS), weight.dtype
    bias_at = 0 if kept[1] is None else kept[1].data_ptr()
    size = weight.element_size()
    norm_at, eps = (0, 0.0) if norm is None else (norm[0].data_ptr(), norm[1])

    def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        out = empty((*x.shape[:-1], outputs), dtype=dtype)
        old = None if residual is None else residual.contiguous()
        x_at, out_at, old_at = x.data_ptr(), out.data_ptr(), 0 if old is None else old.data_ptr()
        rows = x.numel() // inputs
        if rows == 0:  # the kernel's loops run at least once
            return out
        if rows < _SHARED_ROWS:
            run(
                x_at, norm_at, out_at, eps, weight_at, bias_at, old_at, rows, inputs, outputs,
                blocks,
            )  # fmt: skip
            return out

        def part(begin: int, end: int) -> None:
            read, written = begin * inputs * size, begin * outputs * size
            run(
                x_at + read, norm_at, out_at + written, eps, weight_at, bias_at,
                old_at + written if old_at else 0, end - begin, inputs, outputs, blocks,
            )  # fmt: skip

        _share(rows, part)
        return out

    linear.kept = kept  # type: ignore[attr-defined]  # it knows them by address only
    return linear


def _share(rows: int, part: Callable[[int, int], None]) -> None:
    """Calls part(begin, end) over all rows, cut for as many threads as torch has."""
    threads = torch.get_num_threads()
    cuts = [rows * i // threads for i in range(threads + 1)]
    jobs = [_POOL.submit(part, a, b) for a, b in pairwise(cuts[1:])]
    part(0, cuts[1])
    for job in jobs:
        job.result()


def _pack(weight: Tensor, gated: bool) -> Tensor:
    """(N, K) -> (blocks, 1 or gate and up, steps, COLUMNS, numbers of a step), zeros behind N."""
    per_step = 4 // weight.element_size()
    parts = weight.chunk(2) if gated else (weight,)
    inputs, blocks = weight.shape[1], -(-parts[0].shape[0] // COLUMNS)
    shape = blocks, len(parts), inputs // per_step, COLUMNS, per_step
    packed = _ARENA.zeros(shape, weight.dtype)
    for i, part in enumerate(parts):
        padded = part.new_zeros(blocks * COLUMNS, inputs)
        padded[: part.shape[0]] = part
        packed[:, i] = padded.view(blocks, COLUMNS, inputs // per_step, per_step).transpose(1, 2)
    return packed
