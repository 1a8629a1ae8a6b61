"""The compiled CPU kernels against the same computation in float64, on AVX-512 and on AVX2 code."""

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.attention import LayerCall, Segment, Step
from specdec.backend import Window, visibility
from specdec.cache import BlockTable
from specdec.forward import jit

pytestmark = pytest.mark.skipif(bool(jit.why_not()), reason=jit.why_not())

# Largest error, relative to a value's own size and to the root mean square of all: a few roundings.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)
ROWS = [1, 2, 5, 6, 7, 13, 64, 100]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    wanted = wanted.double()
    size = wanted.abs() + wanted.square().mean().sqrt()
    assert float(((found.double() - wanted).abs() / size).max()) <= TOLERANCE[found.dtype]


def make_linear(*args: Any, **kwargs: Any) -> Callable[..., Tensor]:
    from specdec.forward.jit.linear import make_linear as make

    return make(*args, **kwargs)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' LlamaRMSNorm rounds it."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return weight * normed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(640, 384), (16, 16), (80, 48), (96, 2064)], ids=str)
def test_linear_with_what_surrounds_it(shape: tuple[int, int], dtype: torch.dtype) -> None:
    outputs, inputs = shape
    weight = draw(0, outputs, inputs, dtype=dtype) / inputs**0.5
    bias, scale = draw(1, outputs, dtype=dtype), draw(2, inputs, dtype=dtype).abs()
    plain = make_linear(weight)
    whole = make_linear(weight, bias, norm=(scale, 1e-6))
    for rows in ROWS:
        x, residual = draw(3, 1, rows, inputs, dtype=dtype), draw(4, 1, rows, outputs, dtype=dtype)
        assert_close(plain(x), F.linear(x.double(), weight.double()))
        wanted = F.linear(rms_norm(x, scale).double(), weight.double(), bias.double())
        assert_close(whole(x), wanted)
        assert_close(whole(x, residual), wanted + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [16, 48, 64, 896])
def test_gated_linear(outputs: int, dtype: torch.dtype) -> None:
    weight = draw(0, 2 * outputs, 64, dtype=dtype) / 8
    gated = make_linear(weight, gated=True)
    for rows in ROWS:
        x = draw(1, 1, rows, 64, dtype=dtype)
        gate, up = F.linear(x, weight).double().chunk(2, -1)
        assert_close(gated(x), F.silu(gate) * up)


def test_gate_at_the_ends_of_the_range() -> None:
    weight = torch.eye(16).repeat(2, 1)
    x = torch.zeros(1, 16)
    x[0, :6] = torch.tensor([-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
    found = make_linear(weight, gated=True)(x)
    wanted = F.silu(x.double()) * x.double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_come_through(dtype: torch.dtype) -> None:
    weight = torch.eye(16).repeat(2, 1).to(dtype)
    for bad in (float("nan"), float("inf")):
        x = torch.zeros(2, 16, dtype=dtype)
        x[0, 0] = bad
        for linear in (make_linear(weight[:16]), make_linear(weight, gated=True)):
            found = linear(x)
            assert not torch.isfinite(found[0, 0])
            assert torch.equal(found[1], torch.zeros(16, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    weight, scale = draw(0, 96, 2064, dtype=dtype), draw(1, 2064, dtype=dtype)
    for linear in (
        make_linear(weight, norm=(scale, 1e-6)),
        make_linear(weight, norm=(scale, 1e-6), gated=True),
    ):
        x = draw(2, 100, 2064, dtype=dtype)
        together = linear(x)
        for rows in (1, 3, 4, 7):
            assert torch.equal(torch.cat([linear(part) for part in x.split(rows)]), together)


def test_no_rows() -> None:
    assert make_linear(draw(0, 32, 16), draw(1, 32))(torch.empty(1, 0, 16)).shape == (1, 0, 32)
    layer = Layer(4, 2, 64, 16, torch.float32, 20, scattered=False)
    found = layer.attend(torch.empty(0, 8 * 64), torch.empty(0, 64), Segment(0, 3, layer.table))
    assert found.shape == (0, 4 * 64)


def test_inputs_may_be_strided() -> None:
    weight, x = draw(0, 32, 16), draw(1, 16, 3).T
    assert torch.equal(make_linear(weight)(x, draw(2, 32, 3).T), make_linear(weight)(
        x.contiguous(), draw(2, 32, 3).T.contiguous()
    ))  # fmt: skip


# Attention.


class Layer:
    """One layer's pages and one sequence's table in them."""

    def __init__(
        self, heads: int, kv_heads: int, size: int, page: int, dtype: torch.dtype, slots: int,
        *, scattered: bool,
    ) -> None:  # fmt: skip
        self.heads, self.kv_heads, self.size, self.dtype = heads, kv_heads, size, dtype
        count = -(-slots // page)
        order = torch.randperm(count + 3, generator=torch.Generator().manual_seed(0)).tolist()
        self.table = BlockTable(page)
        self.table.extend(order[:count] if scattered else list(range(2, 2 + count)))
        shape = ((count + 3) * page, kv_heads, size)
        self.keys, self.values = draw(1, *shape, dtype=dtype), draw(2, *shape, dtype=dtype)

    def memory(self) -> Any:
        return SimpleNamespace(
            flat_keys=[self.keys], flat_values=[self.values], device="cpu", on_triton=False
        )

    def flat(self, slots: int) -> Tensor:
        return torch.tensor([self.table.flat(slot) for slot in range(slots)])

    def attend(
        self, qkv: Tensor, angles: Tensor, segment: Segment, window: Window | None = None
    ) -> Tensor:
        from specdec.forward.jit.attention import merged_attention

        step = Step(self.memory(), [segment], {})
        call = LayerCall(0, self.size**-0.5, window, None)
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        sin[..., : self.size // 2] *= -1
        out = merged_attention(step, call, self.heads, self.kv_heads, qkv[None], cos, sin)
        return out[0].flatten(1)

    def wanted(
        self, qkv: Tensor, angles: Tensor, segment: Segment, window: Window | None = None
    ) -> Tensor:
        """The same in float64, but for the rotated heads, which are rounded; writes nothing."""
        end = segment.context + segment.rows
        x = qkv.view(segment.rows, -1, self.size)
        turned = x[:, : self.heads + self.kv_heads]
        half = torch.cat((-turned[..., self.size // 2 :], turned[..., : self.size // 2]), -1)
        cos, sin = (f(angles).to(self.dtype)[:, None] for f in (torch.cos, torch.sin))
        turned = (turned * cos + half * sin).double()
        keys, values = (pages[self.flat(end)].double() for pages in (self.keys, self.values))
        keys[segment.context :] = turned[:, self.heads :]
        values[segment.context :] = x[:, self.heads + self.kv_heads :].double()
        groups = self.heads // self.kv_heads
        keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
        scores = torch.einsum("rhd,thd->rht", turned[:, : self.heads], keys) * self.size**-0.5
        seen = visibility(
            segment.context, segment.rows, segment.mask, segment.positions, window,
            torch.device("cpu"),
        )  # fmt: skip
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], float("-inf"))
        return torch.einsum("rht,thd->rhd", scores.softmax(-1), values).flatten(1)


def tree_mask(rows: int) -> Tensor:
    """Row r hangs below row r // 2."""
    mask = torch.eye(rows, dtype=torch.bool)
    for row in range(1, rows):
        mask[row] |= mask[row // 2]
    return mask


# heads, KV heads, head size, rows, context, page size
GEOMETRIES = [
    (6, 2, 64, 1, 0, 16), (6, 2, 64, 4, 300, 16), (6, 2, 64, 5, 299, 16), (2, 1, 64, 1, 130, 16),
    (4, 4, 128, 7, 63, 4), (8, 1, 128, 64, 200, 16), (1, 1, 256, 3, 61, 16), (6, 2, 64, 2, 333, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("scattered", [False, True], ids=["contiguous", "scattered"])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_merged_attention(
    geometry: tuple[int, ...], dtype: torch.dtype, scattered: bool, tree: bool
) -> None:
    heads, kv_heads, size, rows, context, page = geometry
    layer = Layer(heads, kv_heads, size, page, dtype, context + rows, scattered=scattered)
    mask = tree_mask(rows) if tree else None
    positions = context + mask.sum(-1) - 1 if mask is not None else None
    segment = Segment(rows, context, layer.table, mask, positions)
    qkv = draw(3, rows, (heads + 2 * kv_heads) * size, dtype=dtype)
    angles = draw(4, rows, size // 2).repeat(1, 2)
    for window in (None, Window(5), Window(64), Window(7, chunked=True)):
        wanted = layer.wanted(qkv, angles, segment, window)
        before = layer.keys.clone(), layer.values.clone()
        assert_close(layer.attend(qkv, angles, segment, window), wanted)
        other = torch.ones(len(layer.keys), dtype=torch.bool)
        other[layer.flat(context + rows)[context:]] = False
        assert torch.equal(layer.keys[other], before[0][other])
        assert torch.equal(layer.values[other], before[1][other])
        assert torch.equal(
            layer.values[~other][layer.flat(context + rows)[context:].argsort().argsort()],
            qkv.view(rows, -1, size)[:, heads + kv_heads :],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chains_bits_do_not_depend_on_how_it_is_cut(dtype: torch.dtype) -> None:
    layer = Layer(6, 2, 64, 16, dtype, 400, scattered=True)
    qkv, angles = draw(3, 12, 10 * 64, dtype=dtype), draw(4, 12, 32).repeat(1, 2)
    together = layer.attend(qkv, angles, Segment(12, 315, layer.table))
    for rows in (1, 5):  # the slots behind a part hold what the whole wrote: they are masked
        parts = [
            layer.attend(
                qkv[at : at + rows], angles[at : at + rows],
                Segment(min(rows, 12 - at), 315 + at, layer.table),
            )
            for at in range(0, 12, rows)
        ]  # fmt: skip
        assert torch.equal(torch.cat(parts), together)


def test_two_sequences_in_one_pass() -> None:
    layer = Layer(4, 2, 64, 16, torch.float32, 200, scattered=False)
    far = BlockTable(16)
    far.extend([0, 1])
    segments = [Segment(3, 150, layer.table), Segment(2, 20, far)]
    qkv, angles = draw(3, 5, 8 * 64), draw(4, 5, 32).repeat(1, 2)
    apart = torch.cat([
        layer.attend(qkv[:3], angles[:3], segments[0]),
        layer.attend(qkv[3:], angles[3:], segments[1]),
    ])  # fmt: skip
    from specdec.forward.jit.attention import merged_attention

    sin = angles.sin()
    sin[:, :32] *= -1
    step = Step(layer.memory(), segments, {})
    call = LayerCall(0, 64**-0.5, None, None)
    found = merged_attention(step, call, 4, 2, qkv[None], angles.cos(), sin)
    assert torch.equal(found[0].flatten(1), apart)


@pytest.mark.parametrize("threads", [1, 8])
def test_a_long_prompt(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks on one thread, by torch's own attention where there are many."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layer = Layer(4, 2, 64, 16, torch.float32, 300, scattered=True)
    segment = Segment(200, 50, layer.table)
    qkv, angles = draw(3, 200, 8 * 64), draw(4, 200, 32).repeat(1, 2)
    for window in (None, Window(20)):
        wanted = layer.wanted(qkv, angles, segment, window)
        assert_close(layer.attend(qkv, angles[:, None], segment, window), wanted)


def test_threads_share_the_rows_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make_linear(draw(0, 80, 48), draw(1, 80), norm=(draw(2, 48), 1e-6))
    x, residual = draw(3, 1, 203, 48), draw(4, 1, 203, 80)
    alone = linear(x, residual)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(linear(x, residual), alone)


# Where they run.


def test_large_weights_are_left_to_torchs_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = torch.zeros(16, 16), torch.zeros(1024, 1024)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert jit.takes(small)
    assert not jit.takes(large)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert jit.takes(large)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(16, 17), torch.zeros(17, 16), torch.zeros(16), torch.zeros(16, 16).half()],
    ids=["inputs", "outputs", "vector", "float16"],
)
def test_other_weights_are_left_alone(weight: Tensor) -> None:
    assert not jit.takes(weight)


def test_without_numba_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    jit.why_not.cache_clear()
    monkeypatch.setattr(jit, "find_spec", {}.get)
    try:
        assert 'pip install "specdec[cpu]"' in jit.why_not()
        assert not jit.takes(torch.zeros(16, 16))
    finally:
        jit.why_not.cache_clear()


@pytest.mark.parametrize(
    ("machine", "features", "reason"),
    [
        ("aarch64", {}, "never tried on aarch64"),
        ("x86_64", {"avx2": False, "fma": True}, "no AVX2"),
        ("x86_64", {"avx2": True, "fma": True}, ""),
    ],
)
def test_other_processors_are_told(
    machine: str, features: dict[str, bool], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llvmlite import binding

    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr("platform.machine", lambda: machine)
    jit.why_not.cache_clear()
    try:
        assert reason in jit.why_not()
        assert bool(reason) == bool(jit.why_not())
    finally:
        jit.why_not.cache_clear()


_AS_AVX2 = """
import sys
from llvmlite import binding
features = dict.fromkeys(binding.get_host_cpu_features(), False) | {"avx2": True, "fma": True}
binding.get_host_cpu_features = lambda: features
import pytest
sys.exit(pytest.main([sys.argv[1], "-q", "-k", "not avx2", "-p", "no:cacheprovider"]))
"""


def test_the_same_on_avx2_code() -> None:
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _AS_AVX2, __file__],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
