"""The only importer of kernels: which implementation runs, and why.

Triton's on a GPU, their twins in plain torch (kernels/reference.py) elsewhere.
"""

import importlib
import os
import pkgutil
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from specdec.kernels.reference import (
    Window,
    additive,
    attend,
    heads_first,
    packed_bias,
    visibility,
)
from specdec.kernels.tiles import MAX_HEAD_SIZE
from specdec.kernels.upload import upload

if TYPE_CHECKING:
    from specdec.kernels.cache import LayerTable
    from specdec.kernels.packed import PackedPass
    from specdec.kernels.verify import Trees, Verified

__all__ = [
    "LEFT_TO_TWINS",
    "Choice",
    "Window",
    "additive",
    "attend",
    "choose",
    "choose_for",
    "commit_paths",
    "fused_rules",
    "heads_first",
    "interpreted",
    "kernel_file",
    "kernel_files",
    "layer_table",
    "packed_bias",
    "packed_pass",
    "trees_of",
    "upload",
    "verify_fused",
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


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What choose_for leaves to the twins on every device, in words.
LEFT_TO_TWINS = f"models in float64 or with a head size above {MAX_HEAD_SIZE} run on torch twins"


def choose_for(
    device: torch.device, dtypes: Iterable[torch.dtype], head_sizes: Iterable[int]
) -> Choice:
    """What serves a model whose layers keep keys and values of these types and head sizes."""
    choice = choose(device)
    if choice.name == "torch":
        return choice
    other = next((dtype for dtype in dtypes if dtype not in _DTYPES), None)
    if other is not None:
        return Choice(
            "torch", f"the Triton kernels attend in float32, float16 or bfloat16, not in {other}"
        )
    widest = max(head_sizes, default=0)
    if widest > MAX_HEAD_SIZE:
        return Choice(
            "torch", f"a head size of {widest}; the Triton kernels take up to {MAX_HEAD_SIZE}"
        )
    return choice


def packed_pass(
    rows: Iterable[tuple[int, int, "array[int]", tuple[int, ...]]], page_size: int,
    device: torch.device,
) -> "PackedPass":  # fmt: skip
    """A pass of Triton kernels over (rows, context, pages, parents) of every sequence."""
    from specdec.kernels.packed import PackedPass, pieces_of

    pieces = [piece for its in rows for piece in pieces_of(*its)]
    return PackedPass(pieces, page_size, device)


def layer_table(tensors: Sequence[Tensor]) -> "LayerTable":
    """Pages of all layers, for commit_paths."""
    from specdec.kernels.cache import LayerTable

    return LayerTable.of(tensors)


def commit_paths(
    layers: "LayerTable", moves: Sequence[tuple["array[int]", int, Sequence[int]]]
) -> None:
    """Of every (pages, slots before the tree, accepted nodes) the nodes' slots close up, in all
    layers, by one Triton kernel."""
    from specdec.kernels.packed import Move, commit

    commit(layers, [Move(*move) for move in moves])


def fused_rules() -> tuple[str, ...]:
    """The acceptance rules that verify_fused knows."""
    from specdec.kernels.verify import RULES

    return RULES


def trees_of(
    parents: Sequence[Sequence[int]], draws: Sequence[tuple[int, int, int, bool]], laws: int,
    device: torch.device,
) -> "Trees":  # fmt: skip
    """The shape of a batch of trees as verify_fused reads it: kernels.verify.Trees.of."""
    from specdec.kernels.verify import Trees

    tokens = torch.empty(sum(map(len, parents)), dtype=torch.long, device=device)
    return Trees.of(tokens, parents, draws, laws)


def verify_fused(
    rule: str, logits: Tensor, trees: "Trees", tokens: Tensor, keys: Tensor, positions: Tensor, *,
    temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    q: Tensor | None,
) -> "Verified":  # fmt: skip
    """What a fused rule decides on trees of these tokens (nodes,), by Triton kernels:
    kernels.verify.verify."""
    from specdec.kernels.packed import on
    from specdec.kernels.verify import verify

    with on(logits.device):
        return verify(
            rule, logits, replace(trees, tokens=tokens), keys, positions, temperature=temperature,
            top_k=top_k, top_p=top_p, min_p=min_p, q=q,
        )  # fmt: skip


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
