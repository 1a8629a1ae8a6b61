"""Modules import only from earlier layers, and kernels stand alone."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A module imports only from layers before its own; a package also within itself.
LAYERS = [
    "errors",
    "rng",
    "tree",
    "shapes",
    "optimal",
    "stats",
    "costs",
    "memory",
    "backend",
    "sampling",
    "acceptance",
    "cache",
    "attention",
    "forward",
    "selftest",
    "runner",
    "toy",
    "sequence",
    "verifier",
    "proposers",
    "profiling",
    "rates",
    "policy",
    "scheduler",
    "engine",
    "zoo",
    "hf",
    "specdec",  # the package itself: specdec/__init__.py
    "evals",
    "cli",
]
RANK = {layer: rank for rank, layer in enumerate(LAYERS)}

# kernels/ is outside the order: it imports no layer, and only these import it.
KERNEL_USERS = {"backend", "specdec"}
KERNEL_LIBRARIES = {"torch", "triton"}


def modules() -> dict[str, Path]:
    """The module name, once installed, of every file that is."""
    found = {}
    for folder, package in [
        ("specdec", "specdec"),
        ("kernels", "specdec.kernels"),
        ("cli", "specdec.cli"),
        ("evals", "specdec.evals"),
    ]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands: late and typing-only ones count too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            if base != "specdec":
                yield node.lineno, base
                continue
            for alias in node.names:  # `from specdec import tree` names a layer, `wrap` does not
                is_layer = alias.name in RANK or alias.name == "kernels"
                yield node.lineno, f"specdec.{alias.name}" if is_layer else "specdec"


def complaint(importer: str, target: str) -> str | None:
    """Why a module of layer `importer` may not import `target`, or None when it may."""
    if target.startswith("."):
        return "is relative; import absolutely"
    library = target.split(".")[0]
    if library != "specdec":
        allowed = KERNEL_LIBRARIES | sys.stdlib_module_names
        if importer == "kernels" and library not in allowed:
            return "kernels import torch and triton only"
        return None
    layer = layer_of(target)
    if layer == importer:
        return None
    if importer == "kernels":
        return "kernels import nothing of specdec but specdec.kernels"
    if layer == "kernels":
        return None if importer in KERNEL_USERS else "import specdec.backend instead"
    if layer not in RANK:
        return f"unknown layer {layer!r}; add it to LAYERS in tests/test_imports.py"
    return None if RANK[layer] < RANK[importer] else f"{layer!r} is not a layer below {importer!r}"


def violations(module: str, source: str) -> list[str]:
    layer = layer_of(module)
    if layer not in RANK and layer != "kernels":
        return [f"{module}: unknown layer {layer!r}; add it to LAYERS in tests/test_imports.py"]
    found = []
    for line, target in imported(source):
        reason = complaint(layer, target)
        if reason is not None:
            found.append(f"{module}:{line}: import of {target}: {reason}")
    return found


@pytest.mark.parametrize(("module", "path"), modules().items(), ids=modules().keys())
def test_module_imports_only_from_earlier_layers(module: str, path: Path) -> None:
    assert violations(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdec.tree", "from specdec.verifier import verify"),
        ("specdec.tree", "from specdec import verifier"),
        ("specdec.tree", "import specdec.verifier"),
        ("specdec.tree", "def f():\n    from specdec.verifier import verify"),
        ("specdec.tree", "from specdec import wrap"),
        ("specdec.tree", "from specdec.novelty import idea"),
        ("specdec.tree", "from . import errors"),
        ("specdec.tree", "from specdec.kernels import tree_attention"),
        ("specdec.tree", "from specdec import kernels"),
        ("specdec.proposers.draft", "from specdec.engine import Engine"),
        ("specdec.hf", "from specdec.cli.main import main"),
        ("specdec", "from specdec.evals import report"),
        ("specdec.kernels.attention", "from specdec.errors import SpecDecError"),
        ("specdec.kernels.attention", "import numpy as np"),
        ("specdec.novelty", ""),
    ],
)
def test_planted_violation_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdec.verifier", "from specdec.tree import TokenTree"),
        ("specdec.verifier", "from specdec import errors, tree"),
        ("specdec.proposers.draft", "from specdec.proposers.base import Proposer"),
        ("specdec.backend", "from specdec.kernels import reference"),
        ("specdec", "from specdec import acceptance, errors, kernels"),
        ("specdec.cli.main", "import specdec\nfrom specdec.evals.report import write"),
        ("specdec.kernels.attention", "import math\nimport triton.language as tl\nimport torch"),
        ("specdec.kernels", "from specdec.kernels.reference import tree_attention"),
    ],
)
def test_allowed_import_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_unknown_module_says_what_to_do() -> None:
    [message] = violations("specdec.novelty", "")
    assert "add it to LAYERS" in message
