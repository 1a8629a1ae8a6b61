"""The shared paged KV cache: pages.py says who holds which page, kv.py holds the tensors."""

from specdec.cache.kv import (
    CachedSequence,
    CacheGroup,
    LayerShape,
    Paged,
    kernels_for,
    pages_for_memory,
)
from specdec.cache.pages import BlockTable, PagePool

__all__ = [
    "BlockTable",
    "CacheGroup",
    "CachedSequence",
    "LayerShape",
    "PagePool",
    "Paged",
    "kernels_for",
    "pages_for_memory",
]
