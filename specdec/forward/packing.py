"""Linear layers with weights packed for the CPU.

torch's own float32 and bfloat16 linear reads unpacked weights: at 1-16 rows it costs 1.3-8x what
oneDNN's packed layout costs. The originals stay where they are; packed copies serve a step only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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


class PackedLinears:
    """Packed copies of a model's Linear layers, put in their place only inside a step."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: list[tuple[nn.Module, Linear]] = []
        made: dict[int, Linear] = {}  # tied weights are packed once
        for module in model.modules():
            if type(module) is nn.Linear and pays_to_pack(module.weight):
                if id(module.weight) not in made:
                    made[id(module.weight)] = pack_linear(module.weight, module.bias)
                self._layers.append((module, made[id(module.weight)]))

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

    def release(self) -> int:
        """Empties the originals that nothing but these layers uses; returns the bytes freed."""
        held: dict[int, int] = {}
        for module in self._model.modules():
            for parameter in module.parameters(recurse=False):
                held[id(parameter)] = held.get(id(parameter), 0) + 1
        freed = 0
        for module, _ in self._layers:
            weight = module.weight
            assert isinstance(weight, Tensor)
            if held[id(weight)] == 1:  # a tied embedding still needs its table
                freed += weight.numel() * weight.itemsize
                weight.data = weight.data.new_empty(0)
        return freed
