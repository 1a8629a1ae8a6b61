"""Logits -> the law really sampled from: processors along each path, temperature, truncation."""

from specdec.sampling.law import Law
from specdec.sampling.params import SamplingParams
from specdec.sampling.paths import Path, Paths, Prefix
from specdec.sampling.shared import SharedLaws
from specdec.sampling.stateful import ForkableProcessor
from specdec.sampling.truncation import Truncation

__all__ = [
    "ForkableProcessor", "Law", "Path", "Paths", "Prefix", "SamplingParams", "SharedLaws",
    "Truncation",
]  # fmt: skip
