"""Verification of a ragged batch of trees, from logits to emitted tokens, without a wait.

The rules are those of specdec.acceptance.batched on the laws of specdec.sampling, which are the
twin: with the same seeds both emit the same tokens, unless a coin lies within rounding of a
boundary (sums are taken in another order, exp and log differ in the last bit). Launches: greedy 2,
gumbel 2, walk 3, recursive 3, token 4, block 4; with truncation gumbel, walk, recursive and token
4, block 5. Logits are read once, or twice with truncation, beside single tiles.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from specdec.kernels.checks import check_tensor
from specdec.kernels.laws import GROUP, filter_kernel, stats_kernel
from specdec.kernels.verify_chains import chain_kernel, residual_kernel
from specdec.kernels.verify_paths import follow_kernel
from specdec.kernels.verify_records import DECIDED, LAW_NUMBERS
from specdec.kernels.verify_rows import best_kernel, law_kernel
from specdec.kernels.verify_trees import Trees

__all__ = ["BLOCK", "RULES", "Trees", "Verified", "held_options", "verify", "warps"]

RULES = ("greedy", "gumbel", "walk", "token", "block", "recursive")
BLOCK = 4096  # tokens per program; part of the definition of a result's last bits


@dataclass(frozen=True, slots=True, eq=False)
class Verified:
    """What the rule decided, per sequence; -1 pads. The fields of acceptance.Outcome."""

    accepted: Tensor  # (B,) drafted tokens kept
    tokens: Tensor  # (B, depth + 1) the accepted path, then exactly one extra token
    path: Tensor  # (B, depth) packed rows of the accepted nodes
    valid: Tensor  # (B,) bool: False where what was read was no law


def verify(
    rule: str,
    logits: Tensor,
    trees: Trees,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    q: Tensor | None = None,
    block: int = BLOCK,
) -> Verified:
    """What a rule of RULES decides on a batch of trees.

    logits: (R, V) float32, float16 or bfloat16, the target's, per sequence its root's row, then its
    nodes'. keys: (B, 2) int64 low and high words of the seeds. positions: (B,) int64 tokens
    committed when the step began. temperature, top_p, min_p: (B,) float64, top_k: (B,) int64, in
    transformers' order and meaning; 1, 1, 0 and 0 change nothing, None neither. Greedy reads none
    of them. q: (L, V) stored laws as they were sampled from, float32, float16 or bfloat16. block:
    tokens per program, a power of two, at least 64.

    `valid` is cleared where a row's logits hold NaN or infinity, and where a proposal that was read
    lies outside the vocabulary or has no mass in its law; sums of q are not read. Raises
    ValueError for a wrong dtype, device, shape or stride, naming the argument, for an unknown rule
    and for one that does not judge these trees. Nothing waits for the device.
    """
    _check(rule, logits, trees, keys, positions, temperature, top_k, top_p, min_p, q, block)
    return _Launches(
        rule, logits, trees, keys, positions, temperature, top_k, top_p, min_p, q, block
    ).run()


class _Launches:
    """The launches of one call, with what they share."""

    def __init__(
        self, rule: str, logits: Tensor, trees: Trees, keys: Tensor, positions: Tensor,
        temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None,
        min_p: Tensor | None, q: Tensor | None, block: int,
    ) -> None:  # fmt: skip
        self.rule, self.logits, self.trees = rule, logits, trees
        self.keys, self.positions, self.q = keys, positions, q
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.R, self.V = logits.shape
        self.B = trees.cu_rows.shape[0] - 1
        self.block = min(block, max(GROUP, triton.next_power_of_2(self.V)))
        self.C = triton.cdiv(self.V, self.block)
        self.sparse = any(limit is not None for limit in (top_k, top_p, min_p))

    def run(self) -> Verified:
        empty = self._empty
        B, depth = self.B, self.trees.depth
        out = Verified(empty(B), empty(B, depth + 1), empty(B, depth), empty(B, dtype=torch.uint8))
        if B == 0:
            return _as_bool(out)
        self.decided = empty(self.R, DECIDED.value)
        self.peaks = empty(self.R, self.C, dtype=torch.float32)
        from_tiles = self.rule == "greedy" or (self.rule == "gumbel" and not self.sparse)
        self.sums: Tensor | None = None
        self.picks: Tensor | None = None
        if from_tiles:
            self.picks = empty(self.R, self.C, dtype=torch.int32)
            self._best()
        else:
            self._laws()
        if self.rule in ("token", "block"):
            self._judge_chains(out)
        else:
            self._follow(out, from_tiles)
        return _as_bool(out)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.logits.device)

    @property
    def _flags(self) -> dict[str, bool]:
        return {
            "HAS_HEAT": self.temperature is not None, "HAS_TOP_K": self.top_k is not None,
            "HAS_TOP_P": self.top_p is not None, "HAS_MIN_P": self.min_p is not None,
        }  # fmt: skip

    @property
    def _tiles(self) -> int:
        tiles: int = triton.next_power_of_2(self.C)
        return tiles

    @property
    def _warps(self) -> int:
        return warps(self.block)

    @property
    def _held_options(self) -> dict[str, int]:
        return held_options(self.block, hip=torch.version.hip is not None)

    def _best(self) -> None:
        t, is_gumbel = self.trees, self.rule == "gumbel"
        heat = self.temperature if is_gumbel else None
        best_kernel[(self.C, self.R)](
            self.logits, self.logits.stride(0), t.sequences, heat, t.depths, self.keys,
            self.positions, self.peaks, self.picks, self.V, self.C, HAS_HEAT=heat is not None,
            GUMBEL=is_gumbel, BLOCK=self.block, num_warps=self._warps,
        )  # fmt: skip

    def _laws(self) -> None:
        t, empty, flags = self.trees, self._empty, self._flags
        self.sums = empty(self.R, self.C, dtype=torch.float32)
        self.parts = empty(self.R, self.C, dtype=torch.float32)
        groups: Tensor | None = None
        if self.top_k is not None:
            groups = empty(self.R, self.C, self.block // GROUP, dtype=torch.float32)
        stats_kernel[(self.C, self.R)](
            self.logits, self.logits.stride(0), t.sequences, self.temperature, self.peaks,
            self.sums, groups, self.V, self.C, HAS_HEAT=flags["HAS_HEAT"],
            HAS_TOP_K=flags["HAS_TOP_K"], GROUP=GROUP, BLOCK=self.block, num_warps=self._warps,
        )  # fmt: skip
        self.list_tokens: Tensor | None = None
        self.list_scores: Tensor | None = None
        counts: Tensor | None = None
        dropped: Tensor | None = None
        if self.sparse:
            listed = (self.R, self.C * self.block)
            self.list_tokens = empty(*listed, dtype=torch.int32)
            self.list_scores = empty(*listed, dtype=torch.float32)
            counts = empty(self.R, self.C, dtype=torch.int32)
            dropped = empty(self.R, self.C, dtype=torch.float32)
            filter_kernel[(self.C, self.R)](
                self.logits, self.logits.stride(0), t.sequences, self.temperature, self.top_k,
                self.top_p, self.min_p, self.peaks, self.sums, groups, self.list_tokens,
                self.list_scores, counts, dropped, self.V, self.C, **flags, GROUP=GROUP,
                GROUPS=triton.next_power_of_2(self.C * (self.block // GROUP)), TILES=self._tiles,
                BLOCK=self.block, num_warps=self._warps,
            )  # fmt: skip
        self.laws = empty(self.R, LAW_NUMBERS.value, dtype=torch.float32)
        places = t.used_laws.shape[1] if self.rule == "recursive" else 0
        rule = self.rule if self.rule in ("walk", "gumbel", "recursive") else "law"
        law_kernel[(self.R,)](
            t.sequences, self.temperature, self.top_k, self.top_p, self.min_p, self.peaks,
            self.sums, counts, dropped, self.V, self.C, self.laws, self.list_tokens,
            self.list_scores, self.logits, self.logits.stride(0), self.parts, self.decided,
            self.keys, self.positions, t.tokens, t.cu_rows, t.depths, t.cu_draws, t.draws,
            t.used_laws, self.q, **flags, SPARSE=self.sparse, RULE=rule, PLACES=places,
            PLACES_HELD=triton.next_power_of_2(max(1, places)), TILES=self._tiles,
            BLOCK=self.block, **self._held_options,
        )  # fmt: skip

    def _follow(self, out: Verified, from_tiles: bool) -> None:
        t, tiles = self.trees, self._tiles
        follow_kernel[(self.B,)](
            self.peaks, self.picks, self.decided, t.tokens, t.cu_rows, t.parents, t.cu_draws,
            t.draws, self.q, out.accepted, out.tokens, out.path, out.valid, self.V, self.C,
            t.depth, FROM_TILES=from_tiles,
            BY_CHILD=self.rule == "recursive", HAS_Q=self.q is not None,
            CHECKED=self.rule == "walk", TILES=tiles, ROWS=triton.next_power_of_2(t.most_rows),
            STEPS=triton.next_power_of_2(t.depth + 1), SOME=max(1, 1024 // tiles), num_warps=4,
        )  # fmt: skip

    def _judge_chains(self, out: Verified) -> None:
        t, whole = self.trees, self.rule == "block"
        rows = triton.next_power_of_2(t.most_rows)
        has_q = self.q is not None
        shared = {"HAS_HEAT": self.temperature is not None, "HAS_Q": has_q, "SPARSE": self.sparse}
        if whole or not self.sparse:
            residual_kernel[(self.C, self.R if whole else self.B)](
                self.logits, self.logits.stride(0), self.temperature, self.list_tokens,
                self.list_scores, self.parts, self.laws, self.keys, self.positions, t.tokens,
                t.cu_rows, t.sequences, t.cu_draws, t.draws, self.q, self.V, self.C, **shared,
                WHOLE=whole, ROWS=rows, BLOCK=self.block, num_warps=self._warps,
            )  # fmt: skip
        plain = self._empty(self.B, self.C, dtype=torch.float32) if self.sparse else None
        chain_kernel[(self.B,)](
            self.logits, self.logits.stride(0), self.temperature, self.peaks, self.sums,
            self.list_tokens, self.list_scores, self.parts, plain, self.laws, self.decided,
            self.keys, self.positions, t.tokens, t.cu_rows, t.cu_draws, t.draws, self.q,
            out.accepted, out.tokens, out.path, out.valid, self.V, self.C, t.depth, **shared,
            WHOLE=whole, TILES=self._tiles, ROWS=rows,
            STEPS=triton.next_power_of_2(t.depth + 1), BLOCK=self.block, **self._held_options,
        )  # fmt: skip


def warps(block: int) -> int:
    """Sixteen tokens per thread."""
    return max(1, min(8, block // 512))


def held_options(block: int, *, hip: bool) -> dict[str, int]:
    """Of kernels that hold several numbers of each token; one program per row or sequence.

    AMD keeps a mask in scalar registers per token of a thread: four tokens, not more. Left to
    itself ptxas aims at two programs per multiprocessor and spills.
    """
    if hip:
        return {"num_warps": max(1, min(16, block // 256))}
    return {"num_warps": warps(block), "maxnreg": 255}


def _as_bool(out: Verified) -> Verified:
    return Verified(out.accepted, out.tokens, out.path, out.valid.view(torch.bool))


def _check(
    rule: str, logits: Tensor, trees: Trees, keys: Tensor, positions: Tensor,
    temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    q: Tensor | None, block: int,
) -> None:  # fmt: skip
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if rule in ("token", "block") and not trees.is_chain:
        raise ValueError(f"trees: rule {rule!r} judges chains; use 'recursive' for other trees")
    device = logits.device
    floats = (torch.float32, torch.float16, torch.bfloat16)
    R, B = trees.sequences.shape[0], trees.cu_rows.shape[0] - 1
    check_tensor("logits", logits, (R, "V"), floats, device, rows_apart=True)
    V = logits.shape[1]
    if V == 0:
        raise ValueError("logits: expected a vocabulary of at least one token")
    if trees.tokens.device != device:
        raise ValueError(f"trees: expected tensors on {device}, got {trees.tokens.device}")
    check_tensor("keys", keys, (B, 2), (torch.int64,), device)
    check_tensor("positions", positions, (B,), (torch.int64,), device)
    for name, limit, dtype in (
        ("temperature", temperature, torch.float64), ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float64), ("min_p", min_p, torch.float64),
    ):  # fmt: skip
        if limit is not None:
            check_tensor(name, limit, (B,), (dtype,), device)
    if q is not None:
        check_tensor("q", q, (trees.laws, V), floats, device)
    elif trees.laws and rule not in ("greedy", "gumbel", "walk"):
        raise ValueError(f"q: expected the {trees.laws} laws that the trees were drawn from")
    if block < GROUP or block & (block - 1):
        raise ValueError(f"block: expected a power of two, at least {GROUP}, got {block}")
