"""Where figures were made, and with what."""

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Commit, versions, machine and date."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    return {
        "commit": commit,
        "versions": {n: version(n) for n in ("torch", "transformers", "specdec")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "date": time.strftime("%Y-%m-%d"),
    }


def prompts_sha256(prompts: Iterable[Sequence[int]]) -> str:
    """Of the token ids that were read: the same only for the same texts and tokenizer."""
    digest = hashlib.sha256()
    for tokens in prompts:
        digest.update(json.dumps([int(token) for token in tokens]).encode())
    return digest.hexdigest()


def model_facts(model: Any) -> dict[str, Any]:
    """What a model is: class, size, dtype, and the SHA-256 of its weights by name."""
    digest, count = hashlib.sha256(), 0
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        count += weight.numel()
    return {
        "class": type(model).__name__,
        "parameters": count,
        "dtype": str(model.dtype).removeprefix("torch."),
        "sha256": digest.hexdigest(),
    }
