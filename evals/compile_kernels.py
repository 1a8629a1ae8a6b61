"""Compiles every kernel for every target, without a GPU, and says what the compilers made of it.

    python -P -m specdec.evals.compile_kernels --out evals/results/kernel_compile.json

Every configuration that the files of kernels list, for A100, H100 and H200, B200 and MI300: it must
compile, stay within the target's shared memory and spill no register. Exit code 1 otherwise.
"""

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import click

from specdec import backend
from specdec.evals.provenance import provenance

# Bytes of shared memory that one block of threads may have (CUDA C++ Programming Guide, table of
# technical specifications per compute capability; CDNA3 ISA, LDS).
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

# What is counted, by the name it gets in the report: products, copies that go on in the background,
# and reads of global memory by their width.
_PTX = {
    "tcgen05.mma": r"\btcgen05\.mma\.",
    "wgmma": r"\bwgmma\.mma_async\.",
    "mma": r"(?<!t)\bmma\.sync\.",
    "cp.async 16 B": r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, 0x10[,\s;]",
    "cp.async 8 B": r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, 0x8[,\s;]",
    "cp.async 4 B": r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, 0x4[,\s;]",
    "ldmatrix": r"\bldmatrix\.sync\.",
}
_PTX_LOAD = re.compile(r"\bld\.global(?:\.[A-Za-z_0-9:]+?)*?(?:\.v([248]))?\.[bsuf](8|16|32|64)\b")
_GCN = {
    "mfma": r"^\s*v_mfma_",
    "ds_read": r"^\s*ds_read",
}
_GCN_LOAD = re.compile(
    r"^\s*(?:global|buffer)_load_(dwordx4|dwordx3|dwordx2|dword|[us]short|[us]byte|lds_dword\w*)",
    re.MULTILINE,
)
_AMD_SPILLS = {
    "vector registers": "vgpr_spill_count",
    "scalar registers": "sgpr_spill_count",
    "bytes of scratch": "private_segment_fixed_size",
}
_GCN_WIDTH = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as one compiler left it."""

    registers: int  # of a thread
    shared: int  # bytes of a block
    # What -> how much, empty where all is well. AMD keeps scalar registers that it spills in lanes
    # of vector registers, not in memory; they count all the same.
    spilled: dict[str, int]
    instructions: dict[str, int]  # how many stand in the code, not how often they run


def configurations(target: str) -> list[Any]:
    """Every configuration that a file of kernels lists for a target."""
    found: list[Any] = []
    for name in backend.kernel_files():
        make = getattr(backend.kernel_file(name), "configurations", None)
        if make is not None:
            found += make(target) if signature(make).parameters else make()
    return found


def targets() -> dict[str, Any]:
    """Name -> what triton.compile wants to know."""
    found: dict[str, Any] = backend.kernel_file("configuration").TARGETS
    return found


def compiled(configuration: Any, target: Any) -> Compiled:
    """Compiles, and reads the result. Whatever Triton raises comes through."""
    done = configuration.compile(target)
    shared = int(done.metadata.shared)
    if target.backend == "cuda":
        registers, spilled = _usage(done.asm["cubin"])
        return Compiled(registers, shared, spilled, ptx_instructions(done.asm["ptx"]))
    text = done.asm["amdgcn"]
    registers = _field(text, "vgpr_count")  # accumulation registers among them
    spilled = {what: _field(text, name) for what, name in _AMD_SPILLS.items()}
    return Compiled(registers, shared, _present(spilled), gcn_instructions(text))


def _usage(cubin: bytes) -> tuple[int, dict[str, int]]:
    """Registers of a thread, and what it spills, as the assembler noted them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    spilled = {"bytes of stack": found["STACK"], "bytes of local memory": found["LOCAL"]}
    return found["REG"], _present(spilled)


def _field(text: str, name: str) -> int:
    """A number of the metadata of an hsaco."""
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    if found is None:
        raise click.ClickException(f"the metadata of the hsaco has no {name}")
    return int(found[1])


def ptx_instructions(text: str) -> dict[str, int]:
    """How many of each kind stand in PTX; only kinds that do."""
    counts = Counter({name: len(re.findall(pattern, text)) for name, pattern in _PTX.items()})
    for lanes, bits in _PTX_LOAD.findall(text):
        counts[f"ld.global {int(lanes or 1) * int(bits) // 8} B"] += 1
    return _present(counts)


def gcn_instructions(text: str) -> dict[str, int]:
    """How many of each kind stand in AMD's assembly; only kinds that do."""
    counts = Counter(
        {name: len(re.findall(pattern, text, re.MULTILINE)) for name, pattern in _GCN.items()}
    )
    for kind in _GCN_LOAD.findall(text):
        counts[f"load {_GCN_WIDTH.get(kind, 1)} B"] += 1
    return _present(counts)


def _present(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items()) if count}


def violations(target: str, name: str, found: Compiled) -> list[str]:
    """What is wrong with a compiled kernel."""
    wrong = []
    if found.shared > SHARED_LIMIT[target]:
        wrong.append(
            f"{name}, {target}: {found.shared} bytes of shared memory, of {SHARED_LIMIT[target]}"
        )
    if found.spilled:
        what = ", ".join(f"{count} {kind}" for kind, count in found.spilled.items())
        wrong.append(f"{name}, {target}: spills {what}")
    return wrong


def report(wanted: Iterable[str], only: str = "") -> tuple[dict[str, Any], list[str]]:
    """The raw file's `targets`, and everything that is wrong. only: a part of the names."""
    rows: dict[str, Any] = {}
    wrong: list[str] = []
    for target in wanted:
        rows[target] = {}
        for configuration in configurations(target):
            name = configuration.name
            if only not in name:
                continue
            try:
                found = compiled(configuration, targets()[target])
            except Exception as error:  # noqa: BLE001 - a compiler's own errors, of any kind
                wrong.append(f"{name}, {target}: {type(error).__name__}: {_last_line(error)}")
                continue
            wrong += violations(target, name, found)
            rows[target][name] = [
                found.registers, found.shared, found.spilled, found.instructions,
                dict(configuration.options),
            ]  # fmt: skip
    return rows, wrong


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else ""


def dump(raw: dict[str, Any]) -> str:
    """JSON with one configuration to a line."""
    head = {name: value for name, value in raw.items() if name != "targets"}
    targets = []
    for target, rows in raw["targets"].items():
        lines = ",\n".join(
            f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()
        )
        targets.append(f"  {json.dumps(target)}: {{\n{lines}\n  }}")
    body = ",\n".join(targets)
    return f'{json.dumps(head, indent=1)[:-2]},\n "targets": {{\n{body}\n }}\n}}\n'


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The table to write.")
@click.option("--target", "wanted", multiple=True, type=click.Choice(list(SHARED_LIMIT)))
@click.option("--only", default="", help="Configurations with this in their name.")
def main(out: Path | None, wanted: tuple[str, ...], only: str) -> None:
    """Compiles the kernels for all targets, or for those of --target."""
    if os.environ.get("TRITON_INTERPRET"):
        raise click.ClickException("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    rows, wrong = report(wanted or SHARED_LIMIT, only)
    for target, found in rows.items():
        click.echo(f"{target}: {len(found)} configurations compiled")
    if not any(rows.values()) and not wrong:
        raise click.ClickException(f"--only {only!r}: no configuration has this in its name")
    if out is not None:
        about = provenance()
        about["versions"]["triton"] = version("triton")
        columns = ["registers", "shared bytes", "spilled", "instructions", "options"]
        raw = {
            "provenance": about, "shared_limit": SHARED_LIMIT, "columns": columns,
            "violations": wrong, "targets": rows,
        }  # fmt: skip
        out.write_text(dump(raw), encoding="utf-8")
    if wrong:
        raise click.ClickException("\n".join(wrong))


if __name__ == "__main__":
    main()
