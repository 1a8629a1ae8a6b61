"""Kernels for the CPU, compiled when they are first used: linear layers with what surrounds them,
and tree attention, for one to a few dozen rows.

They need numba (`pip install "specdec[cpu]"`), which compiles them in about two seconds a process;
where they cannot run, or a weight or head does not fit them, torch's own operators do the work.
"""

import platform
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# A weight from this size on is left to torch where more than two threads can share it: the kernels
# run on one.
_SHARED_BYTES = 4 << 20


@cache
def why_not() -> str:
    """Why the kernels cannot run here; empty where they can."""
    if find_spec("numba") is None:
        return 'numba is not installed (pip install "specdec[cpu]")'
    from llvmlite import binding

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"they were never tried on {platform.machine()}"
    features = binding.get_host_cpu_features()
    if not (features.get("avx2") and features.get("fma")):
        return "the processor has no AVX2"
    return ""


def takes(weight: Tensor) -> bool:
    """Whether linear.make_linear is there for this weight, and the quickest on these threads."""
    if why_not() or (weight.nbytes >= _SHARED_BYTES and torch.get_num_threads() > 2):
        return False
    from specdec.forward.jit.linear import fits

    return fits(weight)
