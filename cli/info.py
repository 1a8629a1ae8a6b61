"""specdec info: versions, devices, kernels available, and why a fast path is off."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click
import torch

from specdec import backend
from specdec.forward import jit

_PACKAGES = ("specdec", "torch", "triton", "transformers", "tokenizers", "numpy", "numba")
# Variables that change what runs, or how quickly.
_VARIABLES = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SPECDEC_CACHE")
_FEATURES = ("avx2", "fma", "avx512f", "avx512bf16", "amx-bf16")


@dataclass(frozen=True, slots=True)
class FastPath:
    """Something that makes specdec quicker where it can run."""

    name: str
    on: bool
    why: str


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object as output.")
def info(as_json: bool) -> None:
    """Show versions and devices, and which fast paths are on or why not."""
    facts: dict[str, Any] = {
        "versions": versions(), "environment": environment(), "devices": devices(),
        "fast_paths": [asdict(path) for path in fast_paths()],
    }  # fmt: skip
    click.echo(json.dumps(facts) if as_json else _text(facts))


def versions() -> dict[str, str | None]:
    """Of Python and of packages; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def environment() -> dict[str, str]:
    """The variables that are set."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def devices() -> list[dict[str, Any]]:
    """The CPU, then the GPUs that torch sees."""
    cpu: dict[str, Any] = {
        "device": "cpu", "name": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(), "features": _features(),
    }  # fmt: skip
    return [cpu, *(_gpu(index) for index in range(torch.cuda.device_count()))]


def _features() -> list[str] | None:
    """Those of the processor that the compiled kernels look for; None where numba is absent."""
    try:
        from llvmlite import binding
    except ImportError:
        return None
    host = binding.get_host_cpu_features()
    return [name for name in _FEATURES if host.get(name)]


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}", "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
    }  # fmt: skip


def fast_paths() -> list[FastPath]:
    """Every one that specdec has, on this machine."""
    return [_compiled(), _shared_weights(), *_triton()]


def _compiled() -> FastPath:
    why = jit.why_not()
    return FastPath("CPU kernels compiled by numba", not why, why or "the processor has AVX2")


def _shared_weights() -> FastPath:
    name, threads = "large weights in CPU kernels", torch.get_num_threads()
    if jit.why_not():
        return FastPath(name, False, "the CPU kernels are off")
    if threads > 2:
        return FastPath(
            name, False, f"torch has {threads} threads, which share them; the kernels run on one"
        )
    return FastPath(name, True, f"torch has {threads} thread{'s' if threads > 1 else ''}")


def _triton() -> list[FastPath]:
    count = torch.cuda.device_count()
    if count == 0:
        return [FastPath("Triton kernels", False, f"{no_gpu()}; plain torch twins run instead")]
    found = []
    for index in range(count):
        choice = backend.choose(torch.device("cuda", index))
        is_on = choice.name == "triton"
        why = f"{choice.why}; {backend.LEFT_TO_TWINS}" if is_on else choice.why
        found.append(FastPath(f"Triton kernels on cuda:{index}", is_on, why))
    return found


def no_gpu() -> str:
    """Why torch sees no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA and HIP"
    return "torch sees no GPU"


def _text(facts: dict[str, Any]) -> str:
    lines = [
        " ".join(f"{name} {number or 'absent'}," for name, number in facts["versions"].items())
        .removesuffix(",")
    ]  # fmt: skip
    lines += [f"{name}={value}" for name, value in facts["environment"].items()]
    for device in facts["devices"]:
        rest = (
            f"{name} {' '.join(value) if isinstance(value, list) else value}"
            for name, value in device.items()
            if name not in ("device", "name") and value is not None
        )
        lines.append(f"{device['device']}: {device['name']}, {', '.join(rest)}")
    lines += [
        f"{'on ' if path['on'] else 'off'}  {path['name']}: {path['why']}"
        for path in facts["fast_paths"]
    ]
    return "\n".join(lines)
