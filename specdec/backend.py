"""The only importer of kernels: which implementation runs, and why.

Today there is one: the plain torch functions of kernels/reference.py, on every device.
"""

from specdec.kernels.reference import (
    Window,
    additive,
    attend,
    heads_first,
    packed_bias,
    visibility,
)

__all__ = ["Window", "additive", "attend", "heads_first", "packed_bias", "visibility"]
