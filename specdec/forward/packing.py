"""Linear layers with weights laid out for the CPU and for few rows.

torch's own float32 and bfloat16 linear reads unpacked weights: at 2-16 rows it costs 1.3-8x what
oneDNN's packed layout costs, and one float32 row runs at half the memory bandwidth that OpenBLAS
reaches on the transposed weight. The originals stay where they are; the copies serve a step only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

Linear = Callable[[Tensor], Tensor]
Rows = Literal["one", "several"]  # what most passes will have
_PACK_FOR_ROWS = 8  # oneDNN chooses its layout for this many rows; it serves 1-64 well


def can_pack(weight: Tensor) -> bool:
    """Whether this build of torch can pack this weight; tried on a small one."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    if weight.ndim != 2:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )


def pays_to_pack(weight: Tensor) -> bool:
    """Whether the packed layout is quicker than torch's own linear for this weight.

    oneDNN spends about 12 microseconds on a call; MKL multiplies a small float32 matrix in less.
    """
    return can_pack(weight) and (weight.dtype != torch.float32 or weight.numel() > 1 << 18)


def pack_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """x -> x @ weight.T + bias with a packed copy of weight; can_pack(weight) must hold."""
    with torch.inference_mode():
        packed = torch.ops.mkldnn._reorder_linear_weight(
            weight.detach().contiguous(), _PACK_FOR_ROWS
        )
    operator = torch.ops.mkldnn._linear_pointwise.default
    kept_bias = None if bias is None else bias.detach()
    nothing: list[object] = []

    def linear(x: Tensor) -> Tensor:
        result: Tensor = operator(x, packed, kept_bias, "none", nothing, "")
        return result

    return linear


# numpy's own BLAS. Where that is not OpenBLAS, single rows go the way of several.
_OPENBLAS = ThreadpoolController().select(internal_api="openblas").lib_controllers


@contextmanager
def limited_blas() -> Iterator[None]:
    """Inside, numpy's BLAS runs on one thread; outside, on as many as before.

    One row is bound by memory, and a pool of OpenBLAS's own would wait at every call for the cores
    on which torch's idle threads still spin: measured, a tenfold slowdown on two cores.
    """
    wanted = 1
    before = [library.get_num_threads() for library in _OPENBLAS]
    for library, threads in zip(_OPENBLAS, before, strict=True):
        if threads != wanted:
            library.set_num_threads(wanted)
    try:
        yield
    finally:
        for library, threads in zip(_OPENBLAS, before, strict=True):
            if threads != wanted:
                library.set_num_threads(threads)


def row_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """x -> x @ weight.T + bias over a transposed float32 copy; one row goes through OpenBLAS."""
    with torch.inference_mode():
        transposed = weight.detach().t().contiguous()
    array, inputs, outputs = transposed.numpy(), weight.shape[1], weight.shape[0]
    kept_bias = None if bias is None else bias.detach()
    dot, wrap = np.dot, torch.from_numpy

    def linear(x: Tensor) -> Tensor:
        if x.numel() == inputs:
            y = wrap(dot(x.numpy().reshape(inputs), array)).view(*x.shape[:-1], outputs)
        else:
            y = torch.matmul(x, transposed)
        return y if kept_bias is None else y + kept_bias

    return linear


def quick_linear(weight: Tensor, bias: Tensor | None, rows: Rows) -> Linear | None:
    """The quickest linear over a copy of weight on this machine; None: torch's own is."""
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.ndim == 2
    if rows == "one" and is_plain and _OPENBLAS:
        return row_linear(weight, bias)
    return pack_linear(weight, bias) if pays_to_pack(weight) else None


class PackedLinears:
    """Packed copies of a model's Linear layers, put in their place only inside a step."""

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[tuple[nn.Module, Linear]] = []
        made: dict[tuple[int, int], Linear] = {}  # tied weights are packed once
        for module in model.modules():
            if type(module) is nn.Linear and pays_to_pack(module.weight):
                key = id(module.weight), id(module.bias)
                if key not in made:
                    made[key] = pack_linear(module.weight, module.bias)
                self._layers.append((module, made[key]))

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the layers run packed; outside, not a byte of the model differs."""
        for module, linear in self._layers:
            module.__dict__["forward"] = linear
        try:
            yield
        finally:
            for module, _ in self._layers:
                del module.__dict__["forward"]


def release_packed(model: nn.Module) -> int:
    """Empties the weights of Linear layers that packed copies stand in for; returns bytes freed.

    A weight that another module shares, as a tied embedding does, stays.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    freed = 0
    for module in model.modules():
        if type(module) is not nn.Linear or owners[id(module.weight)] > 1:
            continue
        if pays_to_pack(module.weight):
            freed += module.weight.numel() * module.weight.itemsize
            module.weight.data = module.weight.data.new_empty(0)
    return freed
