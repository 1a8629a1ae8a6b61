"""Tree attention, fused verification and the commit of accepted paths on a GPU, in one run, beside
what else there is.

    python -P -m specdec.evals.gpu_bench

Every result is compared with the twin first, on inputs that are then timed: a kernel of ours that
is wrong ends the run, a contender that is wrong has no time. Times are of CUDA events around
replayed CUDA graphs, over input sets that together are several times as large as the cache.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from specdec import backend
from specdec.evals import gpu_problems as problems
from specdec.evals.gpu_problems import OURS, PEERS, TOLERANCE, Cell, Contender, Inputs
from specdec.evals.gpu_timing import CudaTimer, Timer, WrongKernelError, spread
from specdec.evals.gpu_verify import Case, cases, verification
from specdec.evals.provenance import provenance

# Layers, KV heads, head size: the commit moves the accepted path of all layers in one launch.
LAYERS = {
    "Llama-3-8B": (32, 8, 128), "Qwen3-8B": (36, 8, 128), "Llama-3-70B, one of eight": (80, 1, 128),
}  # fmt: skip
PATH, TREE = 8, 64  # nodes of a path that is committed, and of its tree
PARTS = ("attention", "commit", "verification")
BEST_PAGE = 128  # beside the page of 16, at the longest context


def attention(
    cell: Cell, contenders: Sequence[Contender], timer: Timer, device: torch.device,
    dtype: torch.dtype, cache_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """One cell: ours, then the contenders. Raises WrongKernelError where ours is wrong."""
    sets = problems.sets_for(cell, cache_bytes)
    different = problems.inputs(cell, sets=sets, device=device, dtype=dtype)
    row: dict[str, Any] = {**asdict(cell), "sets": sets, "contenders": {}}
    for contender in (OURS, *contenders):
        if not contender.installed:
            row["contenders"][contender.name] = {"error": "not installed"}
            continue
        own = different
        if contender.one_tree:
            own = problems.inputs(cell, sets=2, device=device, dtype=dtype, one_tree=True)
        row["contenders"][contender.name] = _timed(contender, own, timer)
    ours = row["contenders"][OURS.name]["median_us"]
    for found in row["contenders"].values():
        if "median_us" in found:
            found["of_ours"] = round(found["median_us"] / ours, 3)
    return row


def _timed(contender: Contender, sets: Sequence[Inputs], timer: Timer) -> dict[str, Any]:
    """Prepared, compared with the twin on the first and last set, and then timed."""
    if contender is OURS:
        calls = [contender.prepare(problem) for problem in sets]
        check(contender, sets, calls)
        return spread(timer(calls))
    try:
        calls = [contender.prepare(problem) for problem in sets]
        check(contender, sets, calls)
        return spread(timer(calls))
    except Exception as failure:  # noqa: BLE001 - other people's code, on shapes it may not take
        lines = str(failure).strip().splitlines()
        return {"error": f"{type(failure).__name__}: {lines[0] if lines else ''}"}


def check(
    contender: Contender, sets: Sequence[Inputs], calls: Sequence[Callable[[], Tensor]]
) -> None:
    """Raises WrongKernelError unless the first and the last set come out as the twin has them."""
    for problem, call in ((sets[0], calls[0]), (sets[-1], calls[-1])):
        found = call()
        wanted = problems.expected(problem)
        if found.shape != wanted.shape:
            raise WrongKernelError(
                f"{contender.name}: expected {tuple(wanted.shape)}, got {tuple(found.shape)}"
            )
        off, allowed = problems.error(found, wanted), TOLERANCE[problem.q.dtype]
        if not off <= allowed:
            cell = problem.cell
            raise WrongKernelError(
                f"{contender.name} is wrong at batch {cell.batch}, context {cell.context}, "
                f"{cell.rows} rows: off by {off:.3g} of the answer (allowed: {allowed:g})"
            )


def commit(
    model: str, batch: int, timer: Timer, device: torch.device, dtype: torch.dtype,
    context: int = 2048,
) -> dict[str, Any]:  # fmt: skip
    """The accepted path of all layers. Raises WrongKernelError where a slot is wrong."""
    cache, reference = (backend.kernel_file(name) for name in ("cache", "reference"))
    layers, heads, size = LAYERS[model]
    count = -(-(context + TREE) // 16)
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch * count, 16, heads, size)
    pages = [
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for _ in range(2 * layers)
    ]
    table = torch.randperm(shape[0], generator=generator, device=device).view(batch, count).int()
    lengths = torch.full((batch,), context, device=device)
    cu_rows = torch.arange(batch + 1, device=device) * (TREE + 1)
    nodes = torch.linspace(1, TREE - 1, PATH, device=device).long()  # none where it belongs
    path = cu_rows[:-1, None] + 1 + nodes
    wanted = [held.clone() for held in pages]
    reference.commit(wanted, table, lengths, cu_rows, path)
    known = cache.LayerTable.of(pages)

    def call() -> None:
        cache.commit(known, table, lengths, cu_rows, path)

    call()
    if not all(torch.equal(a, b) for a, b in zip(pages, wanted, strict=True)):
        raise WrongKernelError(f"commit is wrong for {model} at batch {batch}")
    moved = 2 * batch * PATH * 2 * layers * heads * size * dtype.itemsize
    return {
        "model": model, "layers": layers, "batch": batch, "path": PATH, "tree": TREE,
        "moved_bytes": moved, **spread(timer([call])),
    }  # fmt: skip


def ceilings(timer: Timer, device: torch.device, size: int = 8192) -> dict[str, float]:
    """Bytes per second of reading, and operations per second of a product in bfloat16."""
    held = torch.ones(size * size * 16, device=device)
    read = median(timer([held.sum]))
    left, right = (torch.ones(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median(timer([lambda: left @ right]))
    return {
        "read_bytes_per_second": held.nbytes / read * 1e6,
        "flops_per_second": 2 * size**3 / product * 1e6,
    }


def against_floor(row: dict[str, Any], cell: Cell, limits: dict[str, float]) -> None:
    """Adds the least time that the run's own ceilings allow, and how near ours comes."""
    traffic = backend.kernel_file("traffic")
    sizes = ((cell.context, cell.rows),) * cell.batch
    shape = traffic.Shape(sizes, cell.heads, cell.kv_heads, cell.size, cell.size, cell.page)
    must = traffic.must_move(shape).total()
    floors = {
        "bytes": must / limits["read_bytes_per_second"] * 1e6,
        "flops": cell.flops / limits["flops_per_second"] * 1e6,
    }
    ours = row["contenders"][OURS.name]["median_us"]
    row["must_bytes"] = must
    row["floor_us"] = {name: round(value, 3) for name, value in floors.items()}
    row["of_bandwidth"] = round(floors["bytes"] / ours, 4)
    row["of_floor"] = round(max(floors.values()) / ours, 4)


def chosen(
    models: Sequence[str], batches: Sequence[int], contexts: Sequence[int], rows: Sequence[int]
) -> Iterator[tuple[Cell, Sequence[Contender]]]:
    """The cells asked for, all where nothing is, and who runs there."""
    for cell in problems.cells():
        asked = (
            (cell.model, models), (cell.batch, batches), (cell.context, contexts), (cell.rows, rows)
        )  # fmt: skip
        if all(not wanted or value in wanted for value, wanted in asked):
            yield cell, PEERS
            if cell.context == max(problems.CONTEXTS):
                yield replace(cell, page=BEST_PAGE), ()


def measure(
    cells: Sequence[tuple[Cell, Sequence[Contender]]], timer: Timer, device: torch.device,
    dtype: torch.dtype, *, cache_bytes: int, commits: Sequence[tuple[str, int]],
    judged: Sequence[Case], limits: dict[str, float], save: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """Everything, saved after each cell. judged: cases of verification."""
    raw: dict[str, Any] = {
        "provenance": _provenance(), "device": _device(device), "dtype": str(dtype)[6:],
        "ceilings": limits, "cache_bytes": cache_bytes, "attention": [], "commit": [],
        "verification": [],
    }  # fmt: skip
    for cell, contenders in tqdm(cells, desc="attention", disable=None):
        row = attention(cell, contenders, timer, device, dtype, cache_bytes)
        against_floor(row, cell, limits)
        raw["attention"].append(row)
        save(raw)
    for model, batch in commits:
        raw["commit"].append(commit(model, batch, timer, device, dtype))
    save(raw)
    bandwidth = limits["read_bytes_per_second"]
    for case in tqdm(judged, desc="verification", disable=None):
        row = verification(case, timer, device, dtype, cache_bytes=cache_bytes, bandwidth=bandwidth)
        raw["verification"].append(row)
        save(raw)


def _provenance() -> dict[str, Any]:
    found = provenance()
    for name in ("triton", "xformers", "flashinfer-python"):
        try:
            found["versions"][name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name, "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count, "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }  # fmt: skip


@click.command()
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path),
    default=Path("evals/results/gpu_bench.json"), show_default=True,
)  # fmt: skip
@click.option("--model", "models", multiple=True, type=click.Choice(list(problems.MODELS)))
@click.option("--batch", "batches", multiple=True, type=int, help="[default: 1, 8, 32, 64]")
@click.option("--context", "contexts", multiple=True, type=int, help="[default: 2k, 8k, 32k]")
@click.option("--rows", multiple=True, type=int, help="[default: 1, 8, 16, 32, 64, 128]")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="[default: all]")
def main(
    out: Path, models: Sequence[str], batches: Sequence[int], contexts: Sequence[int],
    rows: Sequence[int], parts: Sequence[str],
) -> None:  # fmt: skip
    """Measures every shape, or those asked for, and writes --out."""
    if not torch.cuda.is_available():
        raise click.ClickException("it needs a CUDA device, and torch sees none here")
    device = torch.device("cuda", torch.cuda.current_device())
    choice = backend.choose(device)
    if choice.name != "triton":
        raise click.ClickException(f"the Triton kernels do not run here: {choice.why}")
    parts = parts or PARTS
    cells = list(chosen(models, batches, contexts, rows)) if "attention" in parts else []
    judged = [
        case
        for case in (cases() if "verification" in parts else [])
        if (not batches or case.batch in batches) and (not rows or case.rows in rows)
    ]
    commits = [(model, batch) for model in LAYERS for batch in (batches or (1, 8))]
    if not cells and not judged and set(parts) != {"commit"}:
        raise click.ClickException("no shape of the benchmark has these numbers")
    timer = CudaTimer()
    try:
        measure(
            cells, timer, device, torch.bfloat16,
            cache_bytes=torch.cuda.get_device_properties(device).L2_cache_size,
            commits=commits if "commit" in parts else [], judged=judged,
            limits=ceilings(timer, device),
            save=lambda raw: _save(out, raw),
        )  # fmt: skip
    except WrongKernelError as wrong:
        raise click.ClickException(f"not timed: {wrong}") from wrong


def _save(out: Path, raw: dict[str, Any]) -> None:
    out.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
