"""The rules fused with the laws that they judge, on devices whose kernels are Triton's.

From logits to tokens in a few launches, without laws, noise or residuals in memory. Emits what
batched.py emits, unless a coin lies within rounding of a boundary; see kernels/verify.py.
"""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from specdec import backend
from specdec.acceptance.layout import Outcome, Shape, are_plain, draws_of, shapes_of
from specdec.rng import Noise, PhiloxNoise, split_seed
from specdec.sampling import Law, Truncation
from specdec.tree import TokenTree

MOST_NODES = 255  # of one tree
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHAIN_RULES = ("token", "block")
_PLAIN = Truncation()
# (name, type, its code in an array) of what a truncation says for each sequence
_LIMITS = (
    ("temperature", torch.float64, "d"),
    ("top_k", torch.int64, "q"),
    ("top_p", torch.float64, "d"),
    ("min_p", torch.float64, "d"),
)


def can_judge(
    rule: str, law: Law, trees: Sequence[TokenTree], noise: Noise, dtype: torch.dtype
) -> bool:
    """Whether the kernels know this rule, law, noise and type of logits, and take these trees."""
    if rule not in backend.fused_rules() or not law.is_truncation or dtype not in _DTYPES:
        return False
    if rule == "greedy":
        if not law.truncation.changes_nothing:
            return False
    elif type(noise) is not PhiloxNoise:
        return False
    if any(len(tree) > MOST_NODES for tree in trees):
        return False
    return rule not in _CHAIN_RULES or _are_plain_chains(shapes_of(trees))


@lru_cache(maxsize=256)
def _are_plain_chains(shapes: tuple[Shape, ...]) -> bool:
    are_chains = all(parents == tuple(range(-1, len(parents) - 1)) for parents, _, _ in shapes)
    return are_chains and are_plain(draws_of(shapes), sum(stored for _, _, stored in shapes))


@lru_cache(maxsize=256)
def _trees(shapes: tuple[Shape, ...], device: torch.device) -> Any:
    """As the kernels read them, but for their tokens."""
    draws = [(d.parent, d.row, d.law, bool(d.taken)) for d in draws_of(shapes)]
    stored = sum(stored for _, _, stored in shapes)
    return backend.trees_of([parents for parents, _, _ in shapes], draws, stored, device)


def judge(
    rule: str, trees: Sequence[TokenTree], logits: Tensor, truncations: Sequence[Truncation],
    seeds: Sequence[int], positions: Sequence[int],
) -> Outcome:  # fmt: skip
    """What the rule decides on trees that can_judge takes; nothing waits for the device.

    logits (R, V): per tree its root's row, then its nodes'. positions: tokens committed when the
    step began; with seeds and truncations one per tree.
    """
    device = logits.device
    parts = [
        (array("Q", [word for seed in seeds for word in split_seed(seed)]).tobytes(), torch.int64),
        (array("q", positions).tobytes(), torch.int64),
    ]
    values = {name: [getattr(t, name) for t in truncations] for name, _, _ in _LIMITS}
    parts += [(array(code, values[name]).tobytes(), dtype) for name, dtype, code in _LIMITS]
    keys, places, *limits = backend.upload(parts, device)
    # a limit that changes nothing for anybody is not read
    temperature, top_k, top_p, min_p = (
        limit if any(value != getattr(_PLAIN, name) for value in values[name]) else None
        for limit, (name, _, _) in zip(limits, _LIMITS, strict=True)
    )
    laws = [tree.laws for tree in trees if tree.laws is not None]
    q = None
    if laws and rule not in ("greedy", "gumbel"):
        q = laws[0].contiguous() if len(laws) == 1 else torch.cat(laws)
    tokens = trees[0].tokens if len(trees) == 1 else torch.cat([tree.tokens for tree in trees])
    found = backend.verify_fused(
        rule, logits, _trees(shapes_of(trees), device), tokens.contiguous(), keys.view(-1, 2),
        places, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, q=q,
    )  # fmt: skip
    return Outcome(found.accepted, found.tokens, found.path, found.valid)
