"""Lossless speculative decoding for Hugging Face models."""

from specdec import acceptance, errors, kernels
from specdec.engine import Engine, RequestOutput
from specdec.hf import SpecModel, wrap
from specdec.proposers import Proposer
from specdec.sampling import SamplingParams
from specdec.stats import RunStats, StepRecord
from specdec.tree import TokenTree

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "Proposer",
    "RequestOutput",
    "RunStats",
    "SamplingParams",
    "SpecModel",
    "StepRecord",
    "TokenTree",
    "__version__",
    "acceptance",
    "errors",
    "kernels",
    "wrap",
]
