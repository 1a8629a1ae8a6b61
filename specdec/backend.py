"""The only importer of kernels: which implementation runs, and why.

Triton's on a GPU, their twins in plain torch (kernels/reference.py) elsewhere.
"""

import importlib
import os
import pkgutil
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch

from specdec.kernels.reference import (
    Window,
    additive,
    attend,
    heads_first,
    packed_bias,
    visibility,
)

__all__ = [
    "Choice",
    "Window",
    "additive",
    "attend",
    "choose",
    "heads_first",
    "interpreted",
    "kernel_file",
    "kernel_files",
    "packed_bias",
    "visibility",
]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which implementation of the kernels serves a device, and why."""

    name: Literal["triton", "torch"]
    why: str


def choose(device: torch.device) -> Choice:
    """Triton on CUDA and HIP devices that its kernels are compiled for; else plain torch."""
    if device.type != "cuda":
        return Choice(
            "torch", f"the Triton kernels are for CUDA and HIP devices, not {device.type}"
        )
    if find_spec("triton") is None:
        return Choice("torch", "triton is not installed")
    if interpreted():
        return Choice("torch", "TRITON_INTERPRET is set, which would run the kernels as Python")
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return Choice(
                "torch", f"compute capability {major}.{minor}; the kernels need 8.0 or newer"
            )
    return Choice("triton", "a GPU that the kernels are compiled for")


def interpreted() -> bool:
    """Whether Triton was told to run kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")


def kernel_file(name: str) -> ModuleType:
    """A file of kernels by name, for what measures or compiles them; imports Triton."""
    return importlib.import_module(f"specdec.kernels.{name}")


def kernel_files() -> list[str]:
    """The names of all files of kernels."""
    package = importlib.import_module("specdec.kernels")
    return [found.name for found in pkgutil.iter_modules(package.__path__)]
