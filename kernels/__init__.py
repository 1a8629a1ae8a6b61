"""Kernels for the device, each with a twin in plain torch that defines what it computes.

Torch and Triton only: a file here imports nothing of specdec but other kernels, so each can be
read, tested and lifted out alone. Exported functions load on first use, so that a machine which
never calls a kernel never imports Triton.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specdec.kernels.dispatch import tree_attention
    from specdec.kernels.philox import philox_words

__all__ = ["philox_words", "tree_attention"]


def __getattr__(name: str) -> object:
    if name == "tree_attention":
        from specdec.kernels.dispatch import tree_attention

        return tree_attention
    if name == "philox_words":
        from specdec.kernels.philox import philox_words

        return philox_words
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
