"""Sixteen float32 lanes at a time: what the compiled kernels are made of, as LLVM instructions.

Numbers in memory are float32 or bfloat16; arithmetic is float32. A result is rounded to bfloat16
where torch's own operators would round it. The order of every sum is fixed by the code here, never
by the compiler, so that a row's result does not depend on the rows beside it.
"""

from typing import Any, Literal

from llvmlite import ir

Kind = Literal["float32", "bfloat16"]  # of numbers in memory
LANES = 16
BYTES = {"float32": 4, "bfloat16": 2}

I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
V16I16, V16I32, V16F32 = (ir.VectorType(t, LANES) for t in (I16, I32, F32))

# exp on [-ln2/2, ln2/2] (Cephes expf): coefficients from the highest power down.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


def int64(value: int) -> Any:
    return ir.Constant(I64, value)


class Lanes:
    """Writes vector instructions through one IR builder; addresses are 64-bit integers."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def floats(self, value: float) -> Any:
        return ir.Constant(V16F32, [float(value)] * LANES)

    def ints(self, value: int) -> Any:
        return ir.Constant(V16I32, [value] * LANES)

    def splat(self, scalar: Any) -> Any:
        """The scalar in every lane."""
        vector = ir.VectorType(scalar.type, LANES)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(V16I32, [0] * LANES)
        return self.b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

    def at(self, address: Any, kind: Any) -> Any:
        return self.b.inttoptr(address, kind.as_pointer())

    def load(self, address: Any, kind: Kind) -> Any:
        if kind == "float32":
            return self.b.load(self.at(address, V16F32), align=4)
        halves = self.b.load(self.at(address, V16I16), align=2)
        return self.b.bitcast(self.b.shl(self.b.zext(halves, V16I32), self.ints(16)), V16F32)

    def store(self, value: Any, address: Any, kind: Kind) -> None:
        if kind == "float32":
            self.b.store(value, self.at(address, V16F32), align=4)
        else:
            self.b.store(self._halves(value), self.at(address, V16I16), align=2)

    def rounded(self, value: Any, kind: Kind) -> Any:
        """value as it would come back from memory."""
        if kind == "float32":
            return value
        wide = self.b.zext(self._halves(value), V16I32)
        return self.b.bitcast(self.b.shl(wide, self.ints(16)), V16F32)

    def _halves(self, value: Any) -> Any:
        """bfloat16 bits, rounded to nearest even; a NaN stays one."""
        b = self.b
        bits = b.bitcast(value, V16I32)
        odd = b.and_(b.lshr(bits, self.ints(16)), self.ints(1))
        near = b.lshr(b.add(bits, b.add(odd, self.ints(0x7FFF))), self.ints(16))
        is_nan = b.fcmp_unordered("uno", value, value)
        return b.trunc(b.select(is_nan, self.ints(0x7FC0), near), V16I16)

    def intrinsic(self, name: str, result: Any, *arguments: Any) -> Any:
        """Calls the LLVM intrinsic of this name."""
        function = self.b.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [a.type for a in arguments])
            function = ir.Function(self.b.module, kind, name)
        return self.b.call(function, arguments)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.intrinsic("llvm.fma.v16f32", V16F32, x, y, z)

    def maximum(self, x: Any, y: Any) -> Any:
        """The larger; a NaN in x stays."""
        return self.b.select(self.b.fcmp_ordered("<", x, y), y, x)

    def exp(self, x: Any) -> Any:
        """e**x to about an ulp; 0 below -87, right for x <= 88, NaN stays NaN."""
        b = self.b
        n = self.intrinsic("llvm.rint.v16f32", V16F32, b.fmul(x, self.floats(1.44269504088896341)))
        r = self.fma(n, self.floats(-0.693359375), x)
        r = self.fma(n, self.floats(2.12194440e-4), r)
        y = self.floats(_EXP[0])
        for coefficient in _EXP[1:]:
            y = self.fma(y, r, self.floats(coefficient))
        y = b.fadd(self.fma(y, b.fmul(r, r), r), self.floats(1))
        low = b.fcmp_ordered("<", x, self.floats(-87))
        whole = b.fptosi(b.select(low, self.floats(0), n), V16I32)
        power = b.bitcast(b.shl(b.add(whole, self.ints(127)), self.ints(23)), V16F32)
        return b.select(low, self.floats(0), b.fmul(y, power))

    def total(self, x: Any) -> Any:
        """The sum of the lanes, always added in the same order."""
        return self._fold(x, self.b.fadd)

    def largest(self, x: Any) -> Any:
        return self._fold(x, self.maximum)

    def _fold(self, x: Any, combine: Any) -> Any:
        for distance in (8, 4, 2, 1):
            order = ir.Constant(V16I32, [(i + distance) % LANES for i in range(LANES)])
            x = combine(x, self.b.shuffle_vector(x, x, order))
        return self.b.extract_element(x, ir.Constant(I32, 0))


class Loop:
    """`for i in range(steps)` with values carried from one turn to the next.

        loop = Loop(builder, steps, [start, ...])
        ...                                     # loop.index, loop.carried
        loop.close([next, ...])                 # afterwards loop.carried holds the final values

    steps must be at least 1.
    """

    def __init__(self, builder: Any, steps: Any, start: list[Any]) -> None:
        self.b, self._steps = builder, steps
        before = builder.block
        self._body = builder.append_basic_block("turn")
        self._after = builder.append_basic_block("after")
        builder.branch(self._body)
        builder.position_at_end(self._body)
        self.index = builder.phi(I64)
        self.index.add_incoming(int64(0), before)
        self.carried: list[Any] = []
        for value in start:
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            self.carried.append(phi)

    def close(self, following: list[Any]) -> None:
        following_index = self.b.add(self.index, int64(1))
        end = self.b.block
        self.index.add_incoming(following_index, end)
        for phi, value in zip(self.carried, following, strict=True):
            phi.add_incoming(value, end)
        more = self.b.icmp_signed("<", following_index, self._steps)
        self.b.cbranch(more, self._body, self._after)
        self.b.position_at_end(self._after)
        self.carried = following
