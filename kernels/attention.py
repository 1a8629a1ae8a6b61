"""Tree attention over paged keys and values, for a ragged batch of trees (Triton).

Split-KV attention (Dao et al. 2023, Flash-Decoding) with the rows of a tree and the query heads of
one KV head packed into one matrix. See attention_device.py for the kernels, tiles.py for how the
work is cut, reference.py for the twin that defines the result.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from specdec.kernels import attention_device as device_code
from specdec.kernels.attention_checks import check_tree_attention, check_tree_values
from specdec.kernels.configuration import Configuration
from specdec.kernels.reference import SharedPrefix, Window
from specdec.kernels.tiles import (
    MAX_ROWS,
    Tile,
    family,
    num_splits,
    split_unit,
    tile_for,
)

_LOG2E = 1.4426950408889634
# Unified maximum: powers of two relative to it between which a row's true maximum must lie. Above,
# the weights overflow; below, they lose bits in the pages' type.
TRUSTED = {
    torch.float16: (-4.0, 15.0),
    torch.bfloat16: (-60.0, 60.0),
    torch.float32: (-60.0, 60.0),
}


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_nodes: Tensor,
    ancestor_bits: Tensor,
    *,
    scale: float,
    window: int | Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    softmax: Literal["running", "unified"] = "running",
    unified_max: float = 0.0,
    shared_prefix: SharedPrefix | None = None,
    max_context: int | None = None,
    split: int | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Attention of the rows of a ragged batch of trees over paged keys and values.

    q: (rows, H, D) float32, float16 or bfloat16. k_pages (P, page, K, D) and v_pages (P, page, K,
    Dv): of q's type, or float8_e4m3fn (or its bytes, uint8) with k_scale and v_scale (K,) float32;
    page a power of two; D and Dv at most 256, so absorbed MLA (576 and 512) has no kernel yet.
    block_table: (B, max pages) int32. context_lens: (B,) slots before each tree. cu_nodes: (B + 1,)
    row offsets; a tree has at most 256 rows, and its row i is in slot context + i. ancestor_bits:
    (rows, words) int64, which rows of its own tree a row sees, itself included: bit b of word w
    stands for row 64 w + b. window: by position, a row's being context + number of its ancestors.
    sinks: (H,), a score per query head that takes weight and gives no value. Returns (rows, H, Dv),
    written to out when given. Sums are in float32.

    A row's bits depend on what it sees and on nothing else: neither on the batch, nor on the size
    of its tree, nor on shared_prefix. Splits and blocks are cut by slot: the rows of a chain have
    the bits of plain decoding. `split`, slots of the shortest splits, a multiple of 64, moves the
    cuts.

    softmax "unified" (Hong et al. 2023, FlashDecoding++, section 3): weights relative to
    unified_max, a score, instead of each row's own maximum; rows whose maximum is too far from it
    are found on the device and computed again with their own. shared_prefix: see SharedPrefix.
    max_context: no context is longer; where known it spares programs and workspace that only the
    width of the block table would ask for. Rows beyond it come out as NaN.

    Two launches (one where the bound leaves a single split; three with a shared prefix; up to six
    with a unified maximum, whose last end at once where no row was out of range), and no wait for
    the device, unless validate is true, which reads the index tensors to check them; None means
    true on the CPU, where the kernels run in Triton's interpreter. Raises ValueError naming the
    argument.
    """
    window = Window(window) if isinstance(window, int) else window
    check_tree_attention(
        q, k_pages, v_pages, block_table, context_lens, cu_nodes, ancestor_bits, scale=scale,
        window=window, softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale, out=out,
        softmax=softmax, shared_prefix=shared_prefix, max_context=max_context, split=split,
    )  # fmt: skip
    if validate or (validate is None and q.device.type == "cpu"):
        check_tree_values(
            k_pages.shape, block_table, context_lens, cu_nodes, ancestor_bits,
            rows=q.shape[0], shared_prefix=shared_prefix, max_context=max_context,
        )  # fmt: skip
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], v_pages.shape[3])
    if out.numel() == 0:
        return out
    plan = Plan.of(
        q, k_pages, v_pages, block_table, window=window, softcap=softcap, max_context=max_context,
        unit=split,
    )  # fmt: skip
    attend(
        plan, q, k_pages, v_pages, block_table, context_lens, cu_nodes, ancestor_bits, out,
        scale=scale, window=window, softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
        softmax=softmax, unified_max=unified_max, shared_prefix=shared_prefix,
    )  # fmt: skip
    return out


def attend(
    plan: "Plan", q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor,
    context_lens: Tensor, cu_nodes: Tensor, ancestor_bits: Tensor, out: Tensor, *, scale: float,
    window: Window | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    softmax: Literal["running", "unified"] = "running", unified_max: float = 0.0,
    shared_prefix: SharedPrefix | None = None,
) -> None:  # fmt: skip
    """tree_attention's launches, of a plan that fits and with nothing checked: for the layers of a
    pass, which share all but q and the pages."""
    if window is not None:
        shared_prefix = None  # a windowed row reads little of the prefix, and no two alike
    if plan.fp8:
        k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    launch = _Launch(
        plan, q, k_pages, v_pages, block_table, context_lens, cu_nodes, ancestor_bits, scale,
        window, softcap, sinks, k_scale, v_scale, out, unified_max * _LOG2E, shared_prefix,
    )  # fmt: skip
    if softmax == "running":
        launch.run(device_code.RUNNING.value)
    else:
        launch.run(device_code.UNIFIED.value)
        launch.run(device_code.RUNNING.value, flagged=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the host knows of a call: the kernels' constants, the bounds of grid and splits."""

    tile: Tile
    unit: int
    max_splits: int
    units: int  # at least as many as there are units of work
    group: int
    key_size: int
    value_size: int
    page: int
    window: int
    softcap: bool
    fp8: int
    block_b: int

    @staticmethod
    def of(
        q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, *,
        window: Window | None, softcap: float | None, max_context: int | None, unit: int | None,
        most_rows: int = MAX_ROWS,
    ) -> "Plan":  # fmt: skip
        """most_rows: no tree has more."""
        rows, heads, key_size = q.shape
        _, page, kv_heads, value_size = v_pages.shape
        sequences, group = block_table.shape[0], heads // kv_heads
        device_family = family(q.device)
        fp8 = device_code.NO_FP8.value
        if k_pages.dtype in (torch.float8_e4m3fn, torch.uint8):
            fp8 = _fp8_kind(q.device)
        tile = tile_for(
            device_family, q.element_size(), max(key_size, value_size),
            -(-rows // sequences) * group, fp8=bool(fp8),
        )  # fmt: skip
        unit = split_unit(kv_heads) if unit is None else unit
        slots = block_table.shape[1] * page
        if max_context is not None:
            slots = min(slots, max_context + min(rows, most_rows))
        max_splits = max(num_splits(slots, unit), 1)
        visible = max_splits
        if window is not None:
            visible = min(visible, (window.size + min(rows, most_rows)) // unit + 2)
        tiles = rows * group // tile.rows + sequences
        return Plan(
            tile, unit, max_splits, tiles * kv_heads * visible, group, key_size, value_size, page,
            _window_kind(window), softcap is not None, fp8, _block_b(sequences),
        )  # fmt: skip

    def constants(self, softmax: int, *, prefix: bool, flagged: bool) -> dict[str, Any]:
        """The constexpr arguments of the attention kernel."""
        tile = self.tile
        return {
            "GROUP": self.group, "D": self.key_size, "DV": self.value_size, "PAGE": self.page,
            "WINDOW": self.window, "SOFTCAP": self.softcap, "FP8": self.fp8, "SOFTMAX": softmax,
            "PREFIX": prefix, "FLAGGED": flagged, "BLOCK_M": tile.rows, "BLOCK_N": tile.slots,
            "BLOCK_D": max(16, triton.next_power_of_2(self.key_size)),
            "BLOCK_DV": max(16, triton.next_power_of_2(self.value_size)),
            "BLOCK_B": self.block_b,
        }  # fmt: skip

    def combine_constants(self, softmax: int, *, flagged: bool) -> dict[str, Any]:
        """The constexpr arguments of the combination."""
        return {
            "GROUP": self.group, "DV": self.value_size, "WINDOW": self.window, "FP8": self.fp8,
            "SOFTMAX": softmax, "FLAGGED": flagged,
            "BLOCK_DV": max(16, triton.next_power_of_2(self.value_size)), "BLOCK_B": self.block_b,
        }  # fmt: skip


def _window_kind(window: Window | None) -> int:
    if window is None:
        return int(device_code.NO_WINDOW)
    return int(device_code.CHUNKED if window.chunked else device_code.SLIDING)


def _fp8_kind(device: torch.device) -> int:
    """Who decodes e4m3: the device where it can, else the kernel."""
    native = (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )
    return int(device_code.FP8_NATIVE if native else device_code.FP8_BYTES)


def _combine_options(*, hip: bool) -> dict[str, int]:
    """Of the combination. Left to itself ptxas aims at 32 registers on sm_80, and spills."""
    return {"num_warps": 4} if hip else {"num_warps": 4, "maxnreg": 128}


def _block_b(sequences: int) -> int:
    """Lanes over the batch: few different values, since each is a kernel of its own."""
    return next((n for n in (32, 256) if sequences <= n), 1 << (sequences - 1).bit_length())


class _Launch:
    """The launches of one call; workspace (rows, H, splits, Dv) and (rows, H, splits) float32."""

    def __init__(
        self, plan: Plan, q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor,
        context_lens: Tensor, cu_nodes: Tensor, ancestor_bits: Tensor, scale: float,
        window: Window | None, softcap: float | None, sinks: Tensor | None,
        k_scale: Tensor | None, v_scale: Tensor | None, out: Tensor, unified_max: float,
        shared: SharedPrefix | None,
    ) -> None:  # fmt: skip
        rows, heads, _ = q.shape
        self.plan, self.out, self.shared = plan, out, shared
        self.rows, self.heads, self.sequences = rows, heads, block_table.shape[0]
        self.lists = (context_lens, cu_nodes)
        self.factors = (v_scale, sinks)
        self.unified_max, self.window = unified_max, 0 if window is None else window.size
        sums = (rows, heads, plan.max_splits)
        self.partial = q.new_empty((*sums, plan.value_size), dtype=torch.float32)
        self.tops, self.totals = (q.new_empty(sums, dtype=torch.float32) for _ in range(2))
        self.low, self.high = TRUSTED[torch.float16 if plan.fp8 else q.dtype]
        self.trusted = (self.low, self.high)
        self.flags: Tensor | None = None
        # In the order of the kernel's arguments.
        self.tensors = (
            q, k_pages, v_pages, block_table, context_lens, cu_nodes, ancestor_bits, k_scale,
            v_scale, sinks,
        )  # fmt: skip
        self.scale, self.softcap = scale, 1.0 if softcap is None else softcap
        self.kv_heads, self.words = k_pages.shape[2], ancestor_bits.shape[1]
        self.strides = (
            q.stride(0), q.stride(1), *k_pages.stride()[:3], *v_pages.stride()[:3],
            block_table.stride(0), ancestor_bits.stride(0), out.stride(0), out.stride(1),
        )  # fmt: skip

    def run(self, softmax: int, *, flagged: bool = False) -> None:
        unified = softmax == device_code.UNIFIED.value
        if unified:
            self.flags = self.out.new_empty(1 + self.rows * self.heads, dtype=torch.int32)
        if self.shared is not None:
            self._attend(softmax, prefix=True, flagged=flagged)
        self._attend(softmax, prefix=False, flagged=flagged)
        if self.plan.max_splits > 1 or unified:
            self._combine(softmax, flagged=flagged)

    def _attend(self, softmax: int, *, prefix: bool, flagged: bool) -> None:
        plan, shared = self.plan, self.shared
        groups, slots = (None, None) if shared is None else (shared.groups, shared.slots)
        owners = self.sequences if not prefix or groups is None else groups.shape[0] - 1
        device_code._tree_attention_kernel[(plan.units,)](
            *self.tensors, groups if prefix else None, slots, self.out, self.partial, self.tops,
            self.totals, self.flags, self.scale, self.softcap, self.unified_max, self.window,
            plan.unit, owners, self.kv_heads, plan.max_splits, self.words, *self.strides,
            **plan.constants(softmax, prefix=prefix, flagged=flagged),
            num_warps=plan.tile.num_warps, num_stages=plan.tile.num_stages,
        )  # fmt: skip

    def _combine(self, softmax: int, *, flagged: bool) -> None:
        plan = self.plan
        device_code._combine_kernel[(self.rows, self.heads)](
            *self.lists, *self.factors, self.out, self.partial, self.tops, self.totals,
            self.flags, self.unified_max, *self.trusted, self.window, plan.unit, self.sequences,
            plan.max_splits, self.out.stride(0), self.out.stride(1),
            **plan.combine_constants(softmax, flagged=flagged),
            **_combine_options(hip=torch.version.hip is not None),
        )  # fmt: skip


# name, type of queries, of pages, head sizes, page, and what else differs from a plain call
_CASES: tuple[tuple[str, str, str, int, int, int, dict[str, Any]], ...] = (
    ("plain", "bf16", "bf16", 128, 128, 16, {}),
    ("plain", "bf16", "bf16", 128, 128, 1, {}),
    ("plain", "bf16", "bf16", 128, 128, 128, {}),
    ("plain", "fp16", "fp16", 128, 128, 16, {}),
    ("plain", "fp32", "fp32", 128, 128, 16, {}),
    ("plain", "bf16", "bf16", 64, 64, 16, {}),
    ("plain", "bf16", "bf16", 100, 100, 16, {}),
    ("plain", "bf16", "bf16", 256, 256, 16, {}),
    ("plain", "bf16", "bf16", 192, 128, 16, {}),
    ("plain", "fp32", "fp32", 64, 64, 16, {}),
    ("plain", "fp32", "fp32", 256, 256, 16, {}),
    ("fp8 pages", "bf16", "u8", 128, 128, 16, {}),
    ("fp8 pages", "fp32", "u8", 128, 128, 16, {}),
    ("fp8 pages", "bf16", "u8", 256, 256, 16, {}),
    ("fp8 pages", "fp32", "u8", 256, 256, 16, {}),
    ("fp8 pages decoded by the device", "bf16", "u8", 128, 128, 16, {"fp8": 2}),
    ("fp8 pages decoded by the device", "fp32", "u8", 128, 128, 16, {"fp8": 2}),
    ("window, softcap, sinks", "bf16", "bf16", 128, 128, 16, {"window": 1, "softcap": True}),
    ("chunked window", "bf16", "bf16", 128, 128, 16, {"window": 2}),
    ("unified", "bf16", "bf16", 128, 128, 16, {"softmax": 1}),
    ("recomputed", "bf16", "bf16", 128, 128, 16, {"flagged": True}),
    ("shared prefix", "bf16", "bf16", 128, 128, 16, {"prefix": True}),
    ("after a shared prefix", "bf16", "bf16", 128, 128, 16, {"shared": True}),
)


def configurations(target: str) -> list[Configuration]:
    """What the kernels are compiled with for a target of configuration.TARGETS: every kind of call,
    at 4 query heads per KV head, with every tile that the target's table has for it."""
    found = []
    for kind, dtype, stored, key_size, value_size, page, extra in _CASES:
        if "fp8" in extra and target not in ("sm_90", "sm_100"):
            continue  # the kernel decodes there
        width, group = 4 if dtype == "fp32" else 2, 4
        heads = max(key_size, value_size)
        tiles = {tile_for(target, width, heads, rows, fp8=stored == "u8") for rows in (16, 1024)}
        for tile in sorted(tiles, key=lambda tile: tile.rows):
            fp8 = extra.get("fp8", int(device_code.FP8_BYTES)) if stored == "u8" else 0
            plan = Plan(
                tile, 256, 28, 0, group, key_size, value_size, page, extra.get("window", 0),
                extra.get("softcap", False), fp8, 32,
            )  # fmt: skip
            name = f"{kind} {dtype}{f' {stored}' if stored != dtype else ''} {key_size}"
            name += f"/{value_size}" if value_size != key_size else ""
            name += f" page {page} rows {tile.rows}"
            found.extend(_configurations(name, plan, dtype, stored, extra, hip=target == "gfx942"))
    return found


def _configurations(
    name: str, plan: Plan, dtype: str, stored: str, extra: dict[str, Any], *, hip: bool
) -> list[Configuration]:
    """The attention kernel and, in the first page size, the combination of one kind of call."""
    softmax, prefix = extra.get("softmax", 0), extra.get("prefix", False)
    flagged, tile = extra.get("flagged", False), plan.tile
    pointers = {
        "q": dtype, "k_pages": stored, "v_pages": stored, "block_table": "i32",
        "context_lens": "i64", "cu_nodes": "i64", "bits": "i64", "out": dtype, "partial": "fp32",
        "tops": "fp32", "totals": "fp32",
    }  # fmt: skip
    if plan.fp8:
        pointers |= {"k_scale": "fp32", "v_scale": "fp32"}
    if plan.softcap:
        pointers |= {"sinks": "fp32"}
    if prefix:
        pointers |= {"shared_groups": "i32"}
    if prefix or "shared" in extra:
        pointers |= {"shared_slots": "i32"}
    if softmax or flagged:
        pointers |= {"flags": "i32"}
    attend = _configuration(
        f"attend {name}", device_code._tree_attention_kernel, pointers,
        plan.constants(softmax, prefix=prefix, flagged=flagged),
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip
    combine = _configuration(
        f"combine {name}", device_code._combine_kernel, pointers,
        plan.combine_constants(softmax, flagged=flagged), _combine_options(hip=hip),
    )  # fmt: skip
    return [attend] if prefix or "shared" in extra else [attend, combine]


_FLOATS = ("scale", "softcap", "unified_max", "lowest", "highest")
_OPTIONAL = ("k_scale", "v_scale", "sinks", "shared_groups", "shared_slots", "flags")
_STRIDES = (
    "unit", "q_row", "q_head", "k_page", "k_slot", "k_head", "v_page", "v_slot", "v_head",
    "out_row", "out_head",
)  # fmt: skip


def _configuration(
    name: str, kernel: Any, pointers: dict[str, str], constants: dict[str, Any],
    options: dict[str, int],
) -> Configuration:  # fmt: skip
    held = dict(constants)
    signature = {}
    for argument in kernel.arg_names:
        if argument in held:
            signature[argument] = "constexpr"
        elif argument in pointers:
            signature[argument] = f"*{pointers[argument]}"
        elif argument in _OPTIONAL:
            signature[argument], held[argument] = "constexpr", None
        else:
            signature[argument] = "fp32" if argument in _FLOATS else "i32"
    aligned = tuple(n for n, t in signature.items() if t.startswith("*") or n in _STRIDES)
    return Configuration(name, kernel, signature, held, aligned, options)
