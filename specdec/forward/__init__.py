"""How a model's forward pass is run on packed rows: by its own modules, or replayed as a graph."""

from specdec.forward.captured import CapturedForward, CaptureError
from specdec.forward.module import ModuleForward
from specdec.forward.packing import PackedLinears, release_packed
from specdec.forward.threads import one_thread

__all__ = [
    "CaptureError",
    "CapturedForward",
    "ModuleForward",
    "PackedLinears",
    "one_thread",
    "release_packed",
]
