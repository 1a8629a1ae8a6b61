"""What a step costs on this machine: measured seconds by drafted depth, and where they are kept
between runs."""

import hashlib
import json
import os
import platform
import tempfile
import warnings
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
_MAX_BYTES = 1 << 20  # of a file that is read; those that are written have some thousand
_VARIABLE = "SPECDEC_CACHE"


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of one step of `batch` sequences, each drafted to the same depth.

    depths: rising, 0 first, at a context of `context` tokens per sequence. rows: per sequence, root
    included. The slopes are seconds per further token of context.
    """

    batch: int
    context: int
    depths: tuple[int, ...]
    rows: tuple[int, ...]
    draft: tuple[float, ...]
    verify: tuple[float, ...]
    draft_slope: float = 0.0  # per level
    verify_slope: float = 0.0  # per step
    verify_row_slope: float = 0.0  # per row
    catch_up: float = 0.0  # per committed token that the draft has still to read

    def draft_seconds(self, depth: int, context: float) -> float:
        """Drafting every sequence to this depth."""
        if depth == 0:
            return 0.0
        further = max(0.0, context - self.context)
        return _line(depth, self.depths, self.draft) + depth * self.draft_slope * further

    def verify_seconds(self, rows: float, context: float) -> float:
        """One target pass over this many rows per sequence, and its judgement."""
        further = max(0.0, context - self.context)
        slope = self.verify_slope + rows * self.verify_row_slope
        return _line(rows, self.rows, self.verify) + slope * further

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "StepCosts":
        """Raises TypeError or ValueError for what asdict() did not write."""
        lists = {"depths": int, "rows": int, "draft": float, "verify": float}
        given: dict[str, Any] = {
            name: tuple(lists[name](v) for v in value) if name in lists else value
            for name, value in values.items()
        }
        costs = StepCosts(**given)
        sizes = {len(getattr(costs, name)) for name in lists}
        if len(sizes) != 1 or not costs.depths or costs.depths[0] != 0:
            raise ValueError("its lists differ in length")
        return costs


def _line(x: float, xs: tuple[int, ...], ys: tuple[float, ...]) -> float:
    """Linear between the points and beyond the last."""
    if len(xs) == 1:
        return ys[0]
    right = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    left = right - 1
    if xs[right] == xs[left]:
        return ys[right]
    return ys[left] + (ys[right] - ys[left]) * (x - xs[left]) / (xs[right] - xs[left])


def cache_folder() -> Path:
    """Where measured costs are kept: $SPECDEC_CACHE, else ~/.cache/specdec."""
    named = os.environ.get(_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "specdec"


def machine() -> dict[str, str]:
    """What makes costs those of another machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = {name: version(name) for name in ("specdec", "torch", "transformers")}
    return {"device": device, "threads": str(torch.get_num_threads()), **versions}


@lru_cache(maxsize=1)
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} x{os.cpu_count()}"
    return f"{platform.processor() or platform.machine()} x{os.cpu_count()}"


class CostCache:
    """One small JSON file per machine, pair of models and way of drafting; a changed version of
    specdec, torch or transformers is another key."""

    def __init__(self, key: Mapping[str, str]) -> None:
        self.key = dict(sorted(key.items()))
        digest = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:24]
        self.path = cache_folder() / f"costs-{digest}.json"

    def load(self) -> StepCosts | None:
        """What was kept; None, with one warning, where the file is damaged."""
        try:
            with self.path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError:
            return None
        try:
            if len(data) > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES} bytes")
            content = json.loads(data.decode())
            costs, key = content["costs"], content["key"]
            if content["format"] != FORMAT or content["checksum"] != _checksum(costs):
                raise ValueError("its checksum or format is another")
            if key != self.key:
                raise ValueError("it is of another key")
            return StepCosts.from_dict(costs)
        except (
            ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError,
        ) as error:  # fmt: skip
            warnings.warn(
                f"the cost profile {self.path} is damaged ({error}); measuring anew", stacklevel=2
            )
            return None

    def save(self, costs: StepCosts) -> None:
        """Keeps the costs; warns where the folder cannot be written."""
        plain = json.loads(json.dumps(asdict(costs)))
        content = {
            "format": FORMAT, "key": self.key, "costs": plain, "checksum": _checksum(plain),
        }  # fmt: skip
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, delete=False, encoding="utf-8"
            ) as file:
                json.dump(content, file, indent=1)
            Path(file.name).replace(self.path)
        except OSError as error:
            warnings.warn(
                f"measured costs are not kept for the next run: {error}; set {_VARIABLE} to a "
                "folder that can be written", stacklevel=2,
            )  # fmt: skip


def _checksum(costs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(costs, sort_keys=True).encode()).hexdigest()
