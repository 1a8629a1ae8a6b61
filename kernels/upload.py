"""Numbers from the host to a device: all at once, and without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; what Triton compiles a kernel of its own for


def upload(
    parts: Sequence[tuple[bytes | bytearray, torch.dtype]], device: torch.device
) -> list[Tensor]:
    """One tensor for each buffer of numbers of that type, from a single copy."""
    whole, spans = bytearray(), list[tuple[int, int]]()
    for numbers, _ in parts:
        whole += bytes(-len(whole) % _ALIGNMENT)
        begin = len(whole)
        whole += numbers
        spans.append((begin, len(whole)))
    if not whole:
        return [torch.empty(0, dtype=dtype, device=device) for _, dtype in parts]
    held = torch.frombuffer(whole, dtype=torch.uint8)
    if device.type == "cuda":  # from pageable memory it would wait for what the device still does
        held = torch.empty(len(whole), dtype=torch.uint8, pin_memory=True).copy_(held)
    held = held.to(device, non_blocking=True)
    return [
        held[begin:end].view(dtype) for (begin, end), (_, dtype) in zip(spans, parts, strict=True)
    ]
