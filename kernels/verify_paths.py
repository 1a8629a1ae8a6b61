"""The path through each tree that its rows' decisions make, and what a sequence emits."""

import triton
import triton.language as tl

from specdec.kernels.verify_records import CHILD, DECIDED, DRAW, LAW, NODE, SOUND, TOKEN


@triton.jit
def follow_kernel(
    peaks, picks, decided, tokens, cu_rows, parents, cu_draws, draws, q,
    accepted_out, tokens_out, path_out, valid_out, V, C, depth,
    FROM_TILES: tl.constexpr, BY_CHILD: tl.constexpr, HAS_Q: tl.constexpr, CHECKED: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Emits each visited row's token, or goes on to the child that carries it."""
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_rows + sequence)
    end = tl.load(cu_rows + sequence + 1)
    r = tl.arange(0, ROWS)
    inside = first + r < end
    if FROM_TILES:
        unsound = tl.full((), 0, tl.int32)
        c = tl.arange(0, TILES)
        for begin in range(first, end, SOME):
            row = begin + tl.arange(0, SOME)
            where = row[:, None] * C + c[None, :]
            held = (row < end)[:, None] & (c < C)[None, :]
            m = tl.load(peaks + where, held, other=float("-inf"))
            unsound += tl.sum((m != m).to(tl.int32))
            top = tl.max(m, 1)
            x = tl.load(picks + where, held, other=V)
            token = tl.min(tl.where(m == top[:, None], x, V - 1), 1)
            unsound += tl.sum(
                ((row < end) & ((top == float("-inf")) | (top == float("inf")))).to(tl.int32)
            )
            tl.store(decided + row * DECIDED + TOKEN, token.to(tl.int64), row < end)
        tl.debug_barrier()
        is_sound = unsound == 0
    else:
        is_sound = tl.min(tl.load(decided + (first + r) * DECIDED + SOUND, inside, other=1)) > 0
    is_node = inside & (r > 0)
    parent = tl.load(parents + first + r, is_node, other=-1)
    token = tl.load(tokens + first + r - sequence - 1, is_node, other=-1)
    chosen = decided + parent * DECIDED + (CHILD if BY_CHILD else TOKEN)
    wanted = first + r if BY_CHILD else token
    passed = is_node & (tl.load(chosen, is_node, other=-1) == wanted)
    if CHECKED:
        is_sound = is_sound & (tl.min(tl.where(is_node, (token >= 0) & (token < V), 1)) > 0)
        if HAS_Q:
            for d in range(tl.load(cu_draws + first), tl.load(cu_draws + end), ROWS):
                at = d + r
                held = at < tl.load(cu_draws + end)
                node = tl.load(draws + at * DRAW + NODE, held, other=0)
                x = tl.load(tokens + node - sequence - 1, held, other=-1)
                law = tl.load(draws + at * DRAW + LAW, held, other=-1)
                known = held & (law >= 0) & (x >= 0) & (x < V)
                mass = tl.load(q + law * V + x, known, other=1.0).to(tl.float32)
                is_sound = is_sound & (tl.min((mass > 0).to(tl.int32)) > 0)
    step = tl.arange(0, STEPS)
    emitted, path = tl.full([STEPS], -1, tl.int64), tl.full([STEPS], -1, tl.int64)
    at, accepted = first, tl.full((), 0, tl.int64)
    below = tl.max(tl.where(passed & (parent == at), first + r, -1))
    while below >= 0:
        path = tl.where(step == accepted, below, path)
        carried = tl.sum(tl.where(first + r == below, token, 0))
        emitted = tl.where(step == accepted, carried, emitted)
        accepted += 1
        at = below
        below = tl.max(tl.where(passed & (parent == at), first + r, -1))
    emitted = tl.where(step == accepted, tl.load(decided + at * DECIDED + TOKEN), emitted)
    tl.store(accepted_out + sequence, accepted)
    tl.store(tokens_out + sequence * (depth + 1) + step, emitted, step <= depth)
    tl.store(path_out + sequence * depth + step, path, step < depth)
    tl.store(valid_out + sequence, is_sound.to(tl.uint8))
