"""The cache kernels write what their twins write, in Triton's interpreter, and compile ahead."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from specdec.kernels import cache, reference
from specdec.kernels.cache import LayerTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, NAN, device=DEVICE).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# Scatter.


@pytest.mark.parametrize("rows", [0, 1, 7, 63, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_writes_what_its_twin_writes(rows: int, dtype: torch.dtype) -> None:
    heads, size, value_size, page = 3, 7, 100, 16
    pages = 20
    slots = torch.randperm(pages * page, generator=torch.Generator().manual_seed(rows))[:rows]
    slots = slots.to(DEVICE)
    keys = random(rows, heads, size, seed=1, dtype=dtype)
    values = random(rows, heads, value_size, seed=2, dtype=dtype)
    ours = [poisoned(pages, page, heads, n, dtype=dtype) for n in (size, value_size)]
    twins = [tensor.clone() for tensor in ours]
    cache.scatter(keys, values, ours[0], ours[1], slots)
    reference.scatter(keys, values, twins[0], twins[1], slots)
    assert all(map(same_bits, ours, twins))
    assert ours[0].isnan().sum() == (pages * page - rows) * heads * size


@pytest.mark.parametrize(("heads", "size"), [(1, 1), (8, 128), (5, 257)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_quantises_like_torch(heads: int, size: int, dtype: torch.dtype) -> None:
    keys, values = (random(7, heads, size, seed=s, dtype=dtype) * 90 for s in (3, 4))
    scales = [torch.rand(heads, device=DEVICE) + 0.25 for _ in range(2)]
    ours = [poisoned(3, 4, heads, size, dtype=torch.float8_e4m3fn) for _ in range(2)]
    twins = [tensor.clone() for tensor in ours]
    slots = torch.tensor([11, 0, 3, 7, -1, 12, 5], device=DEVICE)  # two lie outside
    for function, (k, v) in ((cache.scatter, ours), (reference.scatter, twins)):
        function(keys, values, k, v, slots, k_scale=scales[0], v_scale=scales[1])
    assert all(map(same_bits, ours, twins))


def test_every_float32_near_an_e4m3_number_or_tie_becomes_torchs_byte() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    ties = (codes[1:] + codes[:-1]) / 2
    wanted = torch.cat((codes, ties)).float()
    near = [wanted, wanted.nextafter(torch.tensor(math.inf)), wanted.nextafter(torch.tensor(0.0))]
    extreme = torch.tensor([449, 464, 480, 1e30, math.inf, NAN, 1e-45, 2**-10, 2**-6, 2**-149])
    values = torch.cat((*near, extreme))
    values = torch.cat((values, -values)).to(DEVICE).view(1, 1, -1)
    pages = [poisoned(1, 1, 1, values.shape[2], dtype=torch.float8_e4m3fn) for _ in range(4)]
    slot, one = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.ones(1, device=DEVICE)
    cache.scatter(values, values, pages[0], pages[1], slot, k_scale=one, v_scale=one)
    reference.scatter(values, values, pages[2], pages[3], slot, k_scale=one, v_scale=one)
    assert same_bits(pages[0], pages[2])
    assert same_bits(pages[1], pages[3])


def test_scatter_reads_rows_of_a_packed_projection() -> None:
    packed = random(7, 4 * 8)
    keys, values = packed[:, :16].view(7, 2, 8), packed[:, 16:].view(7, 2, 8)
    pages = [poisoned(2, 4, 2, 8, dtype=torch.float32) for _ in range(2)]
    slots = torch.arange(7, device=DEVICE)
    cache.scatter(keys, values, pages[0], pages[1], slots)
    assert torch.equal(pages[0].flatten(0, 1)[:7], keys)
    assert torch.equal(pages[1].flatten(0, 1)[:7], values)


# Commit.


def paths(
    trees: list[list[int]], depth: int | None = None, sizes: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """cu_rows and packed paths of accepted nodes; sizes: nodes of each tree."""
    sizes = sizes or [max(nodes, default=-1) + 1 for nodes in trees]
    starts = [0, *itertools.accumulate(n + 1 for n in sizes)]
    depth = max(map(len, trees)) if depth is None else depth
    rows = [
        [start + node + 1 for node in nodes] + [-1] * (depth - len(nodes))
        for start, nodes in zip(starts, trees, strict=False)
    ]
    as_tensor = torch.tensor(rows, dtype=torch.int64, device=DEVICE).view(len(trees), depth)
    return torch.tensor(starts, device=DEVICE), as_tensor


def check_commit(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, page: int, lengths: list[int],
    trees: list[list[int]], depth: int | None = None,
) -> None:  # fmt: skip
    cu_rows, path = paths(trees, depth)
    most = max(n + max(nodes, default=0) + 1 for n, nodes in zip(lengths, trees, strict=True))
    width, B = -(-most // page), len(trees)
    order = torch.randperm(B * width, generator=torch.Generator().manual_seed(page))
    table = order.view(B, width).int().to(DEVICE)
    ours = [
        random(B * width, page, *shape, seed=i).clamp_(-400, 400).to(dtype)
        for i, shape in enumerate(shapes)
    ]
    twins = [tensor.clone() for tensor in ours]
    before = [tensor.clone() for tensor in ours]
    where = torch.tensor(lengths, device=DEVICE)
    cache.commit(LayerTable.of(ours), table, where, cu_rows, path)
    reference.commit(twins, table, where, cu_rows, path)
    assert all(map(same_bits, ours, twins))
    moved = any(node != i for nodes in trees for i, node in enumerate(nodes))
    assert all(map(same_bits, ours, before)) is not moved


PATHS = {
    "no nodes": [[]],
    "a chain, nothing to move": [[0, 1, 2, 3]],
    "one node": [[6]],
    "sources overlap destinations": [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]],
    "part of them": [[0, 2, 3, 7]],
    "256 nodes": [[*range(0, 256, 2)]],
    "deep and shifted by one": [[*range(1, 256)]],
    "mixed": [[3, 9], [], [0, 1], [1, 2, 3, 4, 5, 6, 7, 8, 20], [99]],
}


@pytest.mark.parametrize("trees", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("page", [1, 16, 128])
def test_commit_moves_what_its_twin_moves(trees: list[list[int]], page: int) -> None:
    lengths = [(37 * i) % 101 for i in range(len(trees))]
    check_commit([(2, 8), (2, 4), (1, 8)], torch.float16, page, lengths, trees)


@pytest.mark.parametrize(
    ("dtype", "shapes"),
    [
        (torch.float32, [(1, 63), (1, 63)]),
        (torch.bfloat16, [(3, 7), (3, 100)]),
        (torch.bfloat16, [(8, 128), (8, 128)]),
        (torch.float8_e4m3fn, [(1, 7), (1, 1)]),
        (torch.float8_e4m3fn, [(2, 257)]),
    ],
    ids=str,
)
def test_commit_serves_every_width_of_a_slot(
    dtype: torch.dtype, shapes: list[tuple[int, ...]]
) -> None:
    check_commit(shapes, dtype, 16, [5, 0], [[2, 3, 4, 9], [0, 5]], depth=7)


def test_all_layers_are_moved_by_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []
    kernel = cache._commit_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(cache, "_commit_kernel", Counted())
    check_commit([(2, 8)] * 12, torch.float32, 16, [3], [[1, 2, 5]])
    assert [grid[:2] for grid in grids] == [(1, 12)]


def test_slots_that_a_table_does_not_reach_stay_as_they_are() -> None:
    pages = random(4, 2, 1, 8)
    before = pages.clone()
    cu_rows, path = paths([[3, 40]])
    table = torch.tensor([[0, -1]], dtype=torch.int32, device=DEVICE)
    cache.commit(LayerTable.of([pages]), table, torch.tensor([0], device=DEVICE), cu_rows, path)
    assert torch.equal(pages, before)


def test_planted_fault_in_the_order_of_moves_is_seen() -> None:
    """Last slots first: what the overlap cases would let pass if they did not overlap."""
    pages = [random(16, 16, 1, 8) for _ in range(1)]
    wrong = [tensor.clone() for tensor in pages]
    cu_rows, path = paths([[*range(1, 12)]])
    table = torch.arange(16, dtype=torch.int32, device=DEVICE)[None]
    length = torch.tensor([3], device=DEVICE)
    cache.commit(LayerTable.of(pages), table, length, cu_rows, path)
    flat = wrong[0].flatten(0, 1)
    for i in range(10, -1, -1):
        flat[3 + i] = flat[4 + i].clone()
    assert not torch.equal(pages[0], wrong[0])


# Copies of pages.


@pytest.mark.parametrize("count", [0, 1, 7])
def test_copied_pages_are_the_twins(count: int) -> None:
    shapes = [(2, 8), (2, 257), (1, 1)]
    ours = [random(16, 16, *shape, seed=i, dtype=torch.float16) for i, shape in enumerate(shapes)]
    twins = [tensor.clone() for tensor in ours]
    sources = torch.arange(count, device=DEVICE) * 2 % 5
    destinations = torch.arange(count, device=DEVICE) + 8
    cache.copy_pages(LayerTable.of(ours), sources, destinations)
    reference.copy_pages(twins, sources, destinations)
    assert all(map(same_bits, ours, twins))


def test_addresses_beyond_32_bits_are_reached() -> None:
    stride = 2**31  # bytes per page; of the memory asked for, little is ever touched
    pages = torch.empty(stride + 64, dtype=torch.uint8, device=DEVICE)
    pages[:64], pages[stride:] = 7, 0
    table = torch.tensor([pages.data_ptr()], device=DEVICE)
    words = torch.tensor([stride], device=DEVICE)
    first, second = torch.tensor([0], device=DEVICE), torch.tensor([1], device=DEVICE)
    cache._copy_pages_kernel[(1, 1, 1)](
        table, words, first, second, 1, 2, WORD=tl.uint8, LANES=64, num_warps=4
    )
    assert pages[stride:].tolist() == [7] * 64


# Refusals.


def layer(heads: int = 2, size: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(3, 4, heads, size, dtype=dtype, device=DEVICE)


def test_bad_arguments_of_scatter_are_named() -> None:
    rows = torch.zeros(5, 2, 4, device=DEVICE)
    slots = torch.arange(5, device=DEVICE)
    good: dict[str, Any] = {
        "keys": rows,
        "values": rows,
        "k_pages": layer(),
        "v_pages": layer(),
        "slots": slots,
    }
    scale = torch.ones(2, device=DEVICE)
    bad: dict[str, list[Any]] = {
        "keys": [rows.double(), rows[0], rows.transpose(1, 2)],
        "values": [rows.half(), rows[:4], rows.transpose(1, 2).contiguous().transpose(1, 2)],
        "k_pages": [layer(3), layer().half(), layer(size=8)[..., :4], layer().to("meta")],
        "v_pages": [layer(3), layer().flatten(0, 1)],
        "slots": [slots.int(), slots[:4], slots[:, None]],
        "v_scale": [scale],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=name if name != "v_scale" else "k_scale"):
                cache.scatter(**{**good, name: value})
    pages = {"k_pages": layer(dtype=torch.float8_e4m3fn), "v_pages": layer()}
    with pytest.raises(ValueError, match="v_pages"):
        cache.scatter(**{**good, **pages, "k_scale": scale, "v_scale": scale})
    with pytest.raises(ValueError, match="k_pages"):
        cache.scatter(**{**good, "k_scale": scale, "v_scale": scale})


def test_bad_arguments_of_commit_are_named() -> None:
    cu_rows, path = paths([[1, 2]])
    good: dict[str, Any] = {
        "layers": LayerTable.of([layer()]), "path": path, "cu_rows": cu_rows,
        "block_table": torch.zeros(1, 3, dtype=torch.int32, device=DEVICE),
        "lengths": torch.zeros(1, dtype=torch.int64, device=DEVICE),
    }  # fmt: skip
    bad: dict[str, list[Any]] = {
        "block_table": [good["block_table"].long(), good["block_table"][0]],
        "lengths": [good["lengths"].int(), good["lengths"][:0]],
        "cu_rows": [cu_rows[:1], cu_rows.int()],
        "path": [path.int(), path.repeat(1, 2)[:, ::2], path[0]],
    }
    if DEVICE == "cpu":  # on a device the kernel leaves such slots alone instead of waiting
        bad["block_table"].append(good["block_table"] + 3)
        bad["lengths"].append(good["lengths"] + 13)
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                cache.commit(**{**good, name: value})


def test_bad_arguments_of_tables_and_copies_are_named() -> None:
    for tensors in ([], [layer(), layer()[:2]], [layer(size=8)[..., :4]]):
        with pytest.raises(ValueError, match="tensors"):
            LayerTable.of(tensors)
    table = LayerTable.of([layer()])
    page = torch.tensor([1], device=DEVICE)
    with pytest.raises(ValueError, match="sources"):
        cache.copy_pages(table, page.int(), page)
    with pytest.raises(ValueError, match="destinations"):
        cache.copy_pages(table, page, page[:0])
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="sources"):
            cache.copy_pages(table, page + 2, page)
        with pytest.raises(ValueError, match="destinations"):
            cache.copy_pages(table, page, page)


# Ahead of time.

COMPILE = """
import subprocess, sys, triton
from pathlib import Path
from specdec.kernels import cache
from specdec.kernels.configuration import TARGETS
tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
for configuration in cache.configurations():
    for name in sys.argv[1:]:
        done = configuration.compile(TARGETS[name])
        if "cubin" not in done.asm:
            assert "vgpr_spill_count: 0" in done.asm["amdgcn"], configuration.name
            assert "sgpr_spill_count: 0" in done.asm["amdgcn"], configuration.name
            continue
        Path("kernel.cubin").write_bytes(done.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", "kernel.cubin"], capture_output=True, text=True)
        assert " STACK:0 " in usage.stdout, (configuration.name, name, usage)
        print(configuration.name, name, done.metadata.shared)
"""


def test_kernels_compile_ahead_of_time_and_spill_nothing(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE, "sm_80", "gfx942"], capture_output=True, text=True,
        env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
