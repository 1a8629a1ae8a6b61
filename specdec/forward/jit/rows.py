"""Kernels over one row or one tile of rows, callable from numba's compiled functions.

Addresses and strides are in bytes, `steps` count vectors of sixteen numbers unless said otherwise.
"""

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from specdec.forward.jit.vector import (
    BYTES,
    F32,
    I32,
    I64,
    LANES,
    V16F32,
    V16I32,
    Kind,
    Lanes,
    Loop,
    int64,
)

_FEATURES = binding.get_host_cpu_features()
# Columns and rows of the largest tile: its accumulators fill the vector registers, 24 of 32 with
# AVX-512, 12 of 16 with AVX2.
COLUMNS = 64 if _FEATURES.get("avx512f") else LANES
MAX_ROWS = 6
_VECTORS = COLUMNS // LANES

binding.initialize_native_asmparser()  # for the one instruction that llvmlite cannot name
_HAS_BF16_DOT = bool(_FEATURES.get("avx512bf16"))


def _kernel(arguments: str, build: Callable[..., Any], result: Any = types.void) -> Any:
    """An intrinsic over 64-bit integers (i) and float32 (f); build(lanes, *values) writes it."""
    kinds = {"i": types.intp, "f": types.float32}
    signature = result(*(kinds[a] for a in arguments))

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del signature
        answer = build(Lanes(builder), *values)
        return context.get_dummy_value() if result is types.void else answer

    def kernel(*values: Any) -> Any:
        del values
        return signature, codegen

    # numba reads the number of arguments off the function
    names = ["context", *(f"{kind}{at}" for at, kind in enumerate(arguments))]
    kernel.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return intrinsic(kernel)


def make_tile(rows: int, kind: str) -> Any:
    """out[r, :COLUMNS] += x[r] @ w, for `rows` rows: the tile of every matrix product.

    Arguments: w, bytes from one step of w to the next, x, bytes from row to row of x, steps, out,
    bytes from row to row of out, and whether to start from what is in out (else from zero); out is
    float32. One step of
      "float32":  w has COLUMNS float32, x one float32 a row;
      "bfloat16": w has COLUMNS pairs of bfloat16, x one pair a row (two products a step);
      "mixed":    w has COLUMNS bfloat16, x one float32 a row.
    """

    def build(
        lanes: Lanes, w: Any, w_step: Any, x: Any, x_row: Any, steps: Any, out: Any, out_row: Any,
        resume: Any,
    ) -> None:  # fmt: skip
        b = lanes.b
        places = [
            [b.add(out, b.add(b.mul(out_row, int64(r)), int64(64 * v))) for v in range(_VECTORS)]
            for r in range(rows)
        ]
        going_on = b.icmp_signed("!=", resume, int64(0))
        start = [
            b.select(going_on, lanes.load(place, "float32"), lanes.floats(0))
            for row in places
            for place in row
        ]
        loop = Loop(b, steps, start)
        sums = list(loop.carried)
        weights = _load_step(lanes, b.add(w, b.mul(loop.index, w_step)), kind)
        at = b.mul(loop.index, int64(4))
        for r in range(rows):
            value = b.load(lanes.at(b.add(b.add(x, b.mul(x_row, int64(r))), at), I32), align=2)
            spread = lanes.splat(value)
            for v in range(_VECTORS):
                i = r * _VECTORS + v
                sums[i] = _multiply(lanes, kind, weights[v], spread, sums[i])
        loop.close(sums)
        for place, value in zip((p for row in places for p in row), loop.carried, strict=True):
            lanes.store(value, place, "float32")

    return _kernel("iiiiiiii", build)


def _load_step(lanes: Lanes, address: Any, kind: str) -> list[Any]:
    """One step of w: four vectors of float32, or of pairs as 32-bit integers."""
    b = lanes.b
    width = 32 if kind == "mixed" else 64
    places = [b.add(address, int64(v * width)) for v in range(_VECTORS)]
    if kind == "bfloat16":
        return [b.load(lanes.at(place, V16I32), align=4) for place in places]
    return [lanes.load(place, "bfloat16" if kind == "mixed" else "float32") for place in places]


def _multiply(lanes: Lanes, kind: str, weights: Any, spread: Any, total: Any) -> Any:
    """total + weights * spread; spread holds 32-bit integers."""
    b = lanes.b
    if kind != "bfloat16":
        return lanes.fma(weights, b.bitcast(spread, V16F32), total)
    if _HAS_BF16_DOT:
        shape = ir.FunctionType(V16F32, [V16I32, V16I32, V16F32])
        code = ir.InlineAsm(shape, "vdpbf16ps $2, $1, $0", "=v,v,v,0", side_effect=False)
        return b.call(code, [weights, spread, total])
    for part in (_even, _odd):
        total = lanes.fma(part(lanes, weights), part(lanes, spread), total)
    return total


def _even(lanes: Lanes, pairs: Any) -> Any:
    return lanes.b.bitcast(lanes.b.shl(pairs, lanes.ints(16)), V16F32)


def _odd(lanes: Lanes, pairs: Any) -> Any:
    return lanes.b.bitcast(lanes.b.and_(pairs, lanes.ints(0xFFFF0000 - (1 << 32))), V16F32)


def make_rms_norm(kind: Kind) -> Any:
    """out = weight * (x / sqrt(mean(x**2) + eps)) for one row, rounded where transformers rounds.

    Arguments: x, weight, out, steps, eps.
    """

    def build(lanes: Lanes, x: Any, weight: Any, out: Any, steps: Any, eps: Any) -> None:
        b, width = lanes.b, int64(16 * BYTES[kind])
        loop = Loop(b, steps, [lanes.floats(0)])
        value = lanes.load(b.add(x, b.mul(loop.index, width)), kind)
        loop.close([lanes.fma(value, value, loop.carried[0])])
        count = b.sitofp(b.mul(steps, int64(16)), F32)
        mean = b.fadd(b.fdiv(lanes.total(loop.carried[0]), count), eps)
        inverse = b.fdiv(ir.Constant(F32, 1.0), lanes.intrinsic("llvm.sqrt.f32", F32, mean))
        factor = lanes.splat(inverse)
        loop = Loop(b, steps, [])
        at = b.mul(loop.index, width)
        normed = lanes.rounded(b.fmul(lanes.load(b.add(x, at), kind), factor), kind)
        scaled = b.fmul(lanes.load(b.add(weight, at), kind), normed)
        lanes.store(scaled, b.add(out, at), kind)
        loop.close([])

    return _kernel("iiiif", build)


def make_finish(kind: Kind, *, bias: bool, residual: bool) -> Any:
    """out = sums (+ bias) (+ residual) for one row. Arguments: sums, bias, residual, out, steps."""

    def build(lanes: Lanes, sums: Any, bias_at: Any, old: Any, out: Any, steps: Any) -> None:
        b = lanes.b
        loop = Loop(b, steps, [])
        at = b.mul(loop.index, int64(16 * BYTES[kind]))
        value = lanes.load(b.add(sums, b.mul(loop.index, int64(64))), "float32")
        if bias:
            value = b.fadd(value, lanes.load(b.add(bias_at, at), kind))
        if residual:
            value = b.fadd(lanes.load(b.add(old, at), kind), lanes.rounded(value, kind))
        lanes.store(value, b.add(out, at), kind)
        loop.close([])

    return _kernel("iiiii", build)


def make_gate(kind: Kind) -> Any:
    """out = silu(gate) * up for one row. Arguments: gate, up (sums), out, steps."""

    def build(lanes: Lanes, gate: Any, up: Any, out: Any, steps: Any) -> None:
        b = lanes.b
        loop = Loop(b, steps, [])
        at = b.mul(loop.index, int64(64))
        x = lanes.rounded(lanes.load(b.add(gate, at), "float32"), kind)
        y = lanes.rounded(lanes.load(b.add(up, at), "float32"), kind)
        # exp is right up to 88, where silu(x) has long been nothing beside x
        grown = lanes.exp(_at_most(lanes, b.fsub(lanes.floats(-0.0), x), 88))
        silu = lanes.rounded(b.fdiv(x, b.fadd(lanes.floats(1), grown)), kind)
        place = b.add(out, b.mul(loop.index, int64(16 * BYTES[kind])))
        lanes.store(b.fmul(silu, y), place, kind)
        loop.close([])

    return _kernel("iiii", build)


def _at_most(lanes: Lanes, x: Any, limit: float) -> Any:
    """min(x, limit); a NaN stays."""
    return lanes.b.select(lanes.b.fcmp_ordered(">", x, lanes.floats(limit)), lanes.floats(limit), x)


def make_rotate(kind: Kind) -> Any:
    """Rotary embedding of one head: out = x * cos + rotate_half(x) * sin.

    signed_sin holds -sin in its first half. Arguments: x, cos, signed_sin, out, steps of a HALF.
    """

    def build(lanes: Lanes, x: Any, cos: Any, sin: Any, out: Any, steps: Any) -> None:
        b, width = lanes.b, int64(16 * BYTES[kind])
        half = b.mul(steps, width)
        loop = Loop(b, steps, [])
        low = b.mul(loop.index, width)
        high = b.add(low, half)
        values = {at: lanes.load(b.add(x, at), kind) for at in (low, high)}
        for at, other in ((low, high), (high, low)):
            straight = b.fmul(values[at], lanes.load(b.add(cos, at), kind))
            turned = b.fmul(values[other], lanes.load(b.add(sin, at), kind))
            total = b.fadd(lanes.rounded(straight, kind), lanes.rounded(turned, kind))
            lanes.store(total, b.add(out, at), kind)
        loop.close([])

    return _kernel("iiiii", build)


def make_softmax() -> Any:
    """scores <- exp(scale * scores - its maximum) for one float32 row; returns the row's sum.

    Masked scores are -inf, and at least one is not. Arguments: scores, steps, scale.
    """

    def build(lanes: Lanes, scores: Any, steps: Any, scale: Any) -> Any:
        b = lanes.b
        factor = lanes.splat(scale)

        def scaled(index: Any) -> tuple[Any, Any]:
            place = b.add(scores, b.mul(index, int64(64)))
            return place, b.fmul(lanes.load(place, "float32"), factor)

        loop = Loop(b, steps, [lanes.floats(float("-inf"))])
        loop.close([lanes.maximum(scaled(loop.index)[1], loop.carried[0])])
        top = lanes.splat(lanes.largest(loop.carried[0]))
        loop = Loop(b, steps, [lanes.floats(0)])
        place, value = scaled(loop.index)
        grown = lanes.exp(b.fsub(value, top))
        lanes.store(grown, place, "float32")
        loop.close([b.fadd(loop.carried[0], grown)])
        return lanes.total(loop.carried[0])

    return _kernel("iif", build, types.float32)


def make_scale(kind: Kind) -> Any:
    """out = sums * factor for one row. Arguments: sums, out, steps, factor."""

    def build(lanes: Lanes, sums: Any, out: Any, steps: Any, factor: Any) -> None:
        b = lanes.b
        spread = lanes.splat(factor)
        loop = Loop(b, steps, [])
        value = lanes.load(b.add(sums, b.mul(loop.index, int64(64))), "float32")
        place = b.add(out, b.mul(loop.index, int64(16 * BYTES[kind])))
        lanes.store(b.fmul(value, spread), place, kind)
        loop.close([])

    return _kernel("iiif", build)


def make_transpose() -> Any:
    """A 16 x 16 block of 32-bit numbers, turned. Arguments: the 16 row addresses' address (each
    64 bits), byte offset into the rows, out, bytes from row to row of out."""

    def build(lanes: Lanes, places: Any, offset: Any, out: Any, out_row: Any) -> None:
        b = lanes.b
        rows = []
        for i in range(16):
            place = b.load(lanes.at(b.add(places, int64(8 * i)), I64))
            rows.append(b.load(lanes.at(b.add(place, offset), V16I32), align=2))
        for distance in (8, 4, 2, 1):  # exchanges the off-diagonal quarters, ever smaller
            low = [i + (0 if not i & distance else 16 - distance) for i in range(16)]
            high = [i + (distance if not i & distance else 16) for i in range(16)]
            for i in range(16):
                if not i & distance:
                    first, second = rows[i], rows[i + distance]
                    rows[i] = b.shuffle_vector(first, second, ir.Constant(V16I32, low))
                    rows[i + distance] = b.shuffle_vector(first, second, ir.Constant(V16I32, high))
        for i, row in enumerate(rows):
            place = b.add(out, b.mul(out_row, int64(i)))
            b.store(row, lanes.at(place, V16I32), align=4)

    return _kernel("iiii", build)


def make_copy() -> Any:
    """Copies vectors of 64 bytes. Arguments: from, to, how many."""

    def build(lanes: Lanes, source: Any, to: Any, count: Any) -> None:
        b = lanes.b
        loop = Loop(b, count, [])
        at = b.mul(loop.index, int64(64))
        value = b.load(lanes.at(b.add(source, at), V16I32), align=2)
        b.store(value, lanes.at(b.add(to, at), V16I32), align=2)
        loop.close([])

    return _kernel("iii", build)


def _load_int64(lanes: Lanes, address: Any) -> Any:
    return lanes.b.load(lanes.at(address, I64))


def _load_byte(lanes: Lanes, address: Any) -> Any:
    return lanes.b.zext(lanes.b.load(lanes.at(address, ir.IntType(8))), I64)


load_int64 = _kernel("i", _load_int64, types.intp)
load_byte = _kernel("i", _load_byte, types.intp)
