"""Sections of docs/results.md about the kernels."""

from typing import Any

from specdec.evals.markdown import table

Files = dict[str, dict[str, Any]]
Lines = list[str]


def attention_traffic(files: Files) -> Lines:
    [raw] = files.values()
    lines = [
        f"At batch 8, {raw['about']}.",
        "*Must*: every argument once. *Memory*: that, and",
        "partial sums written and read. *Requested*: what programs load and store; what is beyond",
        "memory's the second-level cache serves. Floor: must at 4.3 TB/s.",
        "",
    ]
    heads = (
        "heads of", "context", "rows", "splits", "must, MB", "memory / must", "requested / must",
        "floor on an H200, us",
    )  # fmt: skip
    rows = [
        [
            shape["model"], shape["context"], shape["rows"], shape["splits"], shape["must"] / 1e6,
            shape["memory"] / shape["must"], shape["requested"] / shape["must"],
            shape["floor_us_h200"],
        ]
        for shape in raw["shapes"]
        if shape["batch"] == 8
    ]  # fmt: skip
    return lines + table(heads, rows)


def kernel_compile(files: Files) -> Lines:
    [raw] = files.values()
    totals = [
        [
            target, len(rows), max(row[0] for row in rows.values()),
            f"{max(row[1] for row in rows.values()) / 1024:.0f} of {limit / 1024:.0f}",
            sum(bool(row[2]) for row in rows.values()),
        ]
        for (target, rows), limit in zip(
            raw["targets"].items(), raw["shared_limit"].values(), strict=True
        )
    ]  # fmt: skip
    names = sorted({name.split()[0] for rows in raw["targets"].values() for name in rows})
    kernels = [
        [f"{kernel}, {target}", *_ranges([r for n, r in rows.items() if n.split()[0] == kernel])]
        for kernel in names
        for target, rows in raw["targets"].items()
    ]
    return [
        "Every configuration of every Triton kernel, compiled ahead of time without a GPU: A100",
        "(sm_80), H100 and H200 (sm_90), B200 (sm_100), MI300 (gfx942). A spill, or more shared",
        "memory than the target has, fails the run. `python -m specdec.evals.compile_kernels`.",
        "",
        *(f"- {wrong}" for wrong in raw["violations"] or ["No violation."]),
        "",
        *table(["target", "compiled", "registers, most", "shared KiB, most", "spill"], totals),
        "",
        "Least and most of all configurations of a kernel; instructions of each kind as they stand",
        "in its code, not as often as they run.",
        "",
        *table(["kernel, target", "compiled", *_HEADS, "spill", "instructions"], kernels),
    ]


_HEADS = ("registers of a thread", "shared memory, bytes")


def _ranges(rows: list[Any]) -> list[object]:
    kinds = sorted({kind for row in rows for kind in row[3]})
    counts = [f"{kind}: {_range([row[3].get(kind, 0) for row in rows])}" for kind in kinds]
    return [
        len(rows), *(_range([row[i] for row in rows]) for i in (0, 1)),
        sum(bool(row[2]) for row in rows), ", ".join(counts),
    ]  # fmt: skip


def _range(numbers: list[int]) -> str:
    if not numbers:
        return "-"
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least} to {most}"


def gpu_bench(files: Files) -> Lines:
    [raw] = files.values()
    others = list(dict.fromkeys(n for row in raw["attention"] for n in row["contenders"]))
    others.remove("specdec")
    rows = [
        [
            f"{row['model']}, page {row['page']}", row["batch"], row["context"], row["rows"],
            row["contenders"]["specdec"]["median_us"], row["of_bandwidth"], row["of_floor"],
            *(row["contenders"].get(name, {}).get("of_ours") for name in others),
        ]
        for row in raw["attention"]
    ]  # fmt: skip
    commits = [
        [row["model"], row["batch"], row["median_us"], row["moved_bytes"] / 1e6]
        for row in raw["commit"]
    ]
    limits, device = raw["ceilings"], raw["device"]
    heads = ["heads of", "batch", "context", "rows", "us", "of bandwidth", "of floor"]
    return [
        f"{device['name']}, {raw['dtype']}; the same run reads",
        f"{limits['read_bytes_per_second'] / 1e12:.2f} TB/s and multiplies at",
        f"{limits['flops_per_second'] / 1e12:.0f} TFLOP/s. Other columns: time as a multiple of",
        "specdec's. `python -m specdec.evals.gpu_bench`.",
        "",
        *table([*heads, *others], rows),
        "",
        *table(["commit of a path of all layers", "batch", "us", "moved, MB"], commits),
        "",
        "Fused verification, from logits to tokens. Floor: the bytes that a rule must read at the",
        "same run's bandwidth. Unfused: probabilities in float32, then the rule.",
        "",
        *table(
            ["rule, law", "batch", "rows", "us", "of floor's time", "launches", "unfused / ours"],
            [_judged(row) for row in raw["verification"]],
        ),
    ]


def _judged(row: dict[str, Any]) -> list[object]:
    ours, theirs = row["contenders"].values()
    return [
        f"{row['rule']}, {row['law']}", row["batch"], row["rows"], ours["median_us"],
        row["over_floor"], ours["launches"], theirs["of_ours"],
    ]  # fmt: skip
