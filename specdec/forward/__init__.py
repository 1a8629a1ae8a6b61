"""How a model's forward pass is run on packed rows: by its own modules, or replayed as a graph."""

from specdec.forward.captured import CapturedForward, CaptureError
from specdec.forward.module import ModuleForward
from specdec.forward.packing import PackedLinears, release_packed

__all__ = [
    "CaptureError",
    "CapturedForward",
    "ModuleForward",
    "PackedLinears",
    "release_packed",
]
