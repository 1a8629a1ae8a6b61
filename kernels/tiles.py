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
    ("sm_80", 2, 64): (Tile(64, 64, 4, 5),),
    ("sm_80", 2, 128): (Tile(64, 64, 4, 5),),
    ("sm_80", 2, 256): (Tile(64, 32, 8, 3),),
    ("sm_80", 4, 64): (Tile(32, 32, 4, 3),),
    ("sm_80", 4, 128): (Tile(32, 32, 4, 3),),
    ("sm_80", 4, 256): (Tile(16, 32, 4, 2),),
    ("sm_90", 2, 64): (Tile(64, 64, 4, 5), Tile(128, 64, 8, 5)),
    ("sm_90", 2, 128): (Tile(64, 64, 4, 5), Tile(128, 64, 8, 5)),
    ("sm_90", 2, 256): (Tile(64, 32, 8, 5),),
    ("sm_90", 4, 64): (Tile(32, 32, 4, 3),),
    ("sm_90", 4, 128): (Tile(32, 32, 4, 3),),
    ("sm_90", 4, 256): (Tile(16, 32, 4, 3),),
    ("sm_100", 2, 64): (Tile(128, 64, 8, 5),),
    ("sm_100", 2, 128): (Tile(128, 64, 8, 5),),
    ("sm_100", 2, 256): (Tile(128, 32, 8, 5),),
    ("sm_100", 4, 64): (Tile(32, 32, 4, 3),),
    ("sm_100", 4, 128): (Tile(32, 32, 4, 3),),
    ("sm_100", 4, 256): (Tile(16, 32, 4, 3),),
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


def tile_for(device_family: str, product_bytes: int, head_size: int, packed_rows: int) -> Tile:
    """The smallest tile that holds packed_rows, the rows of a mean tree; else the largest."""
    size = max(64, 1 << (head_size - 1).bit_length())
    tiles = _TILES[device_family, product_bytes, size]
    return next((tile for tile in tiles if packed_rows <= tile.rows), tiles[-1])


def split_unit(kv_heads: int) -> int:
    """Slots of the first splits. One sequence must fill a device: fewer heads, shorter splits."""
    return min(max(64, 32 * (1 << (kv_heads - 1).bit_length())), 512)


# Eight splits of one unit, 12 of two, 24 of four, then of eight: all short at the front, so that a
# short context is work for many programs, few and long at the back, where partial results cost.
def split_of(slot: int, unit: int) -> int:
    """The split that a slot falls into."""
    u = slot // unit
    if u < 8:
        return u
    if u < 32:
        return 4 + u // 2
    return 12 + u // 4 if u < 128 else 28 + u // 8


def split_start(split: int, unit: int) -> int:
    """The first slot of a split."""
    if split < 8:
        return split * unit
    if split < 20:
        return 2 * (split - 4) * unit
    return (4 * (split - 12) if split < 44 else 8 * (split - 28)) * unit


def num_splits(slots: int, unit: int) -> int:
    """Splits that reach into the first `slots` slots."""
    return split_of(slots - 1, unit) + 1 if slots else 0
