"""What a kernel is compiled with: launches, compile test and report read the same values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# What every kernel must compile for: A100, H100 and H200, B200, MI300.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True, slots=True, eq=False)
class Configuration:
    """One kernel as it is compiled."""

    name: str
    kernel: Any  # the function under triton.jit
    signature: Mapping[str, str]  # argument -> "*bf16", "i32", "constexpr", in order
    constants: Mapping[str, Any]  # the constexpr arguments, and others that are None or 1
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16: pointers, most strides
    options: Mapping[str, int] = field(default_factory=dict)  # num_warps, num_stages

    def compile(self, target: GPUTarget) -> Any:
        """triton.compile for a target that need not be here."""
        order = {name: (index,) for index, name in enumerate(self.signature)}
        attributes = {order[name]: [["tt.divisibility", 16]] for name in self.aligned}
        constants = {order[name]: value for name, value in self.constants.items()}
        source = ASTSource(self.kernel, dict(self.signature), constants, attributes)
        return triton.compile(source, target=target, options=dict(self.options))
