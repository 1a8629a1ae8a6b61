"""Linear layers with weights laid out for the CPU and for few rows.

torch's own float32 and bfloat16 linear reads unpacked weights: at 2-16 rows it costs 1.3-8x what a
packed layout costs. The compiled kernels have the quickest layout; where they cannot run, oneDNN's
stands in. The originals stay where they are; the copies serve a step only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from specdec.forward import jit

Linear = Callable[[Tensor], Tensor]
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


def has_quick(weight: Tensor) -> bool:
    """Whether quick_linear has something for this weight."""
    return jit.takes(weight) or pays_to_pack(weight)


def quick_linear(weight: Tensor, bias: Tensor | None) -> Linear | None:
    """The quickest linear over a copy of weight on this machine; None: torch's own is."""
    if jit.takes(weight):
        from specdec.forward.jit.linear import make_linear

        return make_linear(weight, bias)
    return pack_linear(weight, bias) if pays_to_pack(weight) else None


class PackedLinears:
    """Packed copies of a model's Linear layers, put in their place only inside a step."""

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[tuple[nn.Module, Linear]] = []
        made: dict[tuple[int, int], Linear] = {}  # tied weights are packed once
        for module in model.modules():
            if type(module) is not nn.Linear:
                continue
            key = id(module.weight), id(module.bias)
            if key not in made and (quick := quick_linear(module.weight, module.bias)):
                made[key] = quick
            if key in made:
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
        if has_quick(module.weight):
            freed += module.weight.numel() * module.weight.itemsize
            module.weight.data = module.weight.data.new_empty(0)
    return freed
