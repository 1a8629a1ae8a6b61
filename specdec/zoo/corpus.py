"""The text the built-in pair learns from: the Python standard library's own sources, split by file.

A file is held out by the hash of its path inside the library, so the split is the same for every
Python version and a module never changes sides. Tests and installed packages are left out.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 20
_EXCLUDED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the corpus."""

    name: str  # path inside the standard library, with forward slashes
    text: str
    held_out: bool


def is_held_out(name: str) -> bool:
    """Whether the file of this name is kept away from training."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def read_corpus(root: Path | None = None) -> list[SourceFile]:
    """Every source file below root (default: this Python's standard library), sorted by name."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _EXCLUDED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of files exist to exercise other encodings
        if text.strip():
            name = relative.as_posix()
            files.append(SourceFile(name=name, text=text, held_out=is_held_out(name)))
    return files
