"""How tree attention cuts its work: splits of the KV axis, and the tile of each device and shape.

Plain numbers, no Triton: the launch, the compile report and the traffic model read the same ones.
"""

from dataclasses import dataclass

import torch

MAX_ROWS = 256  # of one tree, the root included
MAX_HEAD_SIZE = 256


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program holds at a time."""

    rows: int  # packed rows: tree rows x query heads of one KV head
    slots: int  # KV slots per step
    num_warps: int
    num_stages: int  # of Triton's pipeline; page numbers and pages share them, 5 hold two steps


# (device family, bytes of a number in the product, larger of the head sizes, a power of two).
# Several tiles may serve one shape only where each row meets its numbers in the same order in all
# of them (warps beside each other along the rows, one instruction shape): the number of rows
# chooses among them, and must not change a bit.
_TILES = {
    ("sm_80", 2, 64): (Tile(64, 64, 8, 5),),
    ("sm_80", 2, 128): (Tile(64, 64, 8, 5),),
    ("sm_80", 2, 256): (Tile(64, 32, 8, 3),),
    ("sm_80", 4, 64): (Tile(32, 32, 4, 3),),
    ("sm_80", 4, 128): (Tile(32, 32, 4, 3),),
    ("sm_80", 4, 256): (Tile(16, 32, 8, 2),),
    ("sm_90", 2, 64): (Tile(64, 64, 4, 5), Tile(128, 64, 8, 5)),
    ("sm_90", 2, 128): (Tile(64, 64, 4, 5), Tile(128, 64, 8, 5)),
    ("sm_90", 2, 256): (Tile(64, 32, 8, 5),),
    ("sm_90", 4, 64): (Tile(32, 32, 4, 3),),
    ("sm_90", 4, 128): (Tile(32, 32, 4, 3),),
    ("sm_90", 4, 256): (Tile(16, 32, 8, 3),),
    ("sm_100", 2, 64): (Tile(128, 64, 8, 5),),
    ("sm_100", 2, 128): (Tile(128, 64, 8, 5),),
    ("sm_100", 2, 256): (Tile(128, 32, 8, 5),),
    ("sm_100", 4, 64): (Tile(32, 32, 4, 3),),
    ("sm_100", 4, 128): (Tile(32, 32, 4, 3),),
    ("sm_100", 4, 256): (Tile(16, 32, 8, 3),),
    ("gfx942", 2, 64): (Tile(64, 64, 4, 2),),
    ("gfx942", 2, 128): (Tile(64, 64, 4, 2),),
    ("gfx942", 2, 256): (Tile(64, 32, 4, 1),),
    ("gfx942", 4, 64): (Tile(32, 32, 4, 2),),
    ("gfx942", 4, 128): (Tile(32, 32, 4, 1),),
    ("gfx942", 4, 256): (Tile(16, 32, 4, 1),),
}


def family(device: torch.device) -> str:
    """The row of the tile table that serves a device; the interpreter's is an H200's."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    # 8.6, 8.9 and 12.x have less shared memory than 9.0 and 10.0; sm_80's tiles fit there.
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def tile_for(
    device_family: str, product_bytes: int, head_size: int, packed_rows: int, *, fp8: bool
) -> Tile:
    """The smallest tile that holds packed_rows, the rows of a mean tree; else the largest."""
    size = max(64, 1 << (head_size - 1).bit_length())
    if fp8 and product_bytes == 4:  # two products of half the width
        if device_family == "gfx942":
            return Tile(32, 32, 4, 1)
        return Tile(64 if device_family == "sm_100" and size == 256 else 32, 32, 8, 3)
    tiles = _TILES[device_family, product_bytes, size]
    return next((tile for tile in tiles if packed_rows <= tile.rows), tiles[-1])


def split_unit(kv_heads: int) -> int:
    """Slots of the first splits. One sequence must fill a device: fewer heads, shorter splits."""
    return min(max(64, 32 * (1 << (kv_heads - 1).bit_length())), 512)


# (slots up to there, splits up to there, units per split), slots in units: short splits at the
# front, so that a short context is work for many programs; few and long ones at the back, where
# what a split costs, writing and reading its partial sums, would add up.
_LADDER = ((8, 8, 1), (16, 12, 2), (32, 16, 4), (128, 28, 8), (None, None, 16))


def split_of(slot: int, unit: int) -> int:
    """The split that a slot falls into."""
    u, start, first = slot // unit, 0, 0
    for end, past, length in _LADDER:
        if end is None or past is None or u < end:
            return first + (u - start) // length
        start, first = end, past
    raise AssertionError("the last step has no end")


def split_start(split: int, unit: int) -> int:
    """The first slot of a split."""
    start, first = 0, 0
    for end, past, length in _LADDER:
        if end is None or past is None or split < past:
            return (start + (split - first) * length) * unit
        start, first = end, past
    raise AssertionError("the last step has no end")


def num_splits(slots: int, unit: int) -> int:
    """Splits that reach into the first `slots` slots."""
    return split_of(slots - 1, unit) + 1 if slots else 0
