"""Refusals before a launch: a ValueError that names the argument, what it should be, what came."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    rows_apart: bool = False,
) -> None:
    """shape: a size, or a name for any. rows_apart: strides of all but the last dimension are free;
    otherwise the tensor must be contiguous."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")
    fits = tensor.ndim == len(shape) and all(
        isinstance(wanted, str) or wanted == size
        for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(tensor.shape)}")
    if rows_apart:
        if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a last dimension of stride 1, got {tensor.stride()}"
            )
    elif not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def check_values(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Refuses numbers outside low .. high - 1. Waits for the device where the tensor is on one."""
    if tensor.numel() and not low <= (least := int(tensor.min())) <= int(tensor.max()) < high:
        found = least if least < low else int(tensor.max())
        raise ValueError(f"{name}: expected {low} to {high - 1}, got {found}")
