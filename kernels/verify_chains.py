"""Chains judged as a whole: token-wise speculative sampling, and block verification."""

import triton
import triton.language as tl

from specdec.kernels.laws import entries, heat_of, pick_tile, pick_token, row_weights, score
from specdec.kernels.verify_noise import ACCEPT, BONUS, RESIDUAL, coin_of
from specdec.kernels.verify_records import (
    CUT,
    DECIDED,
    DRAW,
    LAW,
    LAW_NUMBERS,
    LENGTH,
    PEAK,
    SOUND,
    TOTAL,
)


@triton.jit
def _chain(
    sequence, first, end, logits, stride, temperature, laws, tokens,
    cu_draws, draws, q, V, HAS_HEAT: tl.constexpr, HAS_Q: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of row r of a chain, for its node below: is there one, token, stored law, p, q, in order."""
    row = first + tl.arange(0, ROWS)
    has_node = row + 1 < end
    token = tl.load(tokens + row - sequence, has_node, other=0)
    x = tl.minimum(tl.maximum(token, 0), V - 1)
    heat = heat_of(temperature, sequence, HAS_HEAT)
    s = score(logits, stride, row, x, has_node, heat, HAS_HEAT)
    numbers = laws + row * LAW_NUMBERS
    peak = tl.load(numbers + PEAK, has_node, other=0.0)
    total = tl.load(numbers + TOTAL, has_node, other=1.0)
    cut = tl.load(numbers + CUT, has_node, other=0.0)
    p = tl.where(s >= cut, tl.exp(s - peak) / total, 0.0)
    draw = tl.load(cu_draws + row, has_node, other=0)
    law = tl.load(draws + draw * DRAW + LAW, has_node, other=-1)
    had = tl.full([ROWS], 1.0, tl.float32)
    if HAS_Q:
        had = tl.load(q + law * V + x, has_node & (law >= 0), other=1.0).to(tl.float32)
    sound = tl.where(has_node, (had > 0) & (token == x), 1)
    return has_node, x, law, p, had, tl.min(sound.to(tl.int32)) > 0


@triton.jit
def _chain_weights(has_node, p, had, ROWS: tl.constexpr):
    """w of every row of a chain: w_0 = 1, w_i = min(w_{i-1} p_i / q_i, 1), float64."""
    r = tl.arange(0, ROWS)
    ratios = p.to(tl.float64) / had.to(tl.float64)
    count = tl.sum(has_node.to(tl.int32))
    weights = tl.where(r == 0, 1.0, tl.zeros([ROWS], tl.float64))
    weight = tl.full((), 1.0, tl.float64)
    for i in range(count):
        weight = tl.minimum(weight * tl.sum(tl.where(r == i, ratios, 0.0)), 1.0)
        weights = tl.where(r == i + 1, weight, weights)
    return weights


@triton.jit
def _first_rejected(has_node, p, had, keys, positions, sequence, ROWS: tl.constexpr):
    """How many nodes of a chain the token-wise rule accepts."""
    r = tl.arange(0, ROWS)
    coin = coin_of(keys, positions, sequence, r + 1, r * 0, ACCEPT)
    # u * q < p rather than u < p / q: u in [0, 1) must never accept p == 0
    failed = has_node & (coin * had >= p)
    return tl.min(tl.where(failed, r, tl.sum(has_node.to(tl.int32))))


@triton.jit
def _left_of(
    x, e, total, weight, token, law, q, V, HAS_Q: tl.constexpr, SPARSE: tl.constexpr
):  # fmt: skip
    """[weight p - q]+ on one tile; q a point mass at the token where there is no law."""
    wanted = e / total * weight
    if HAS_Q:
        inside = (x < V) & (law >= 0)
        if SPARSE:  # elsewhere the mask would make single loads of wide ones
            inside = inside & (e > 0)
        other = tl.load(q + law * V + x, inside, other=0.0)
        wanted = tl.maximum(wanted - other.to(tl.float32), 0.0)
    return tl.where((law < 0) & (x == token), 0.0, wanted)


@triton.jit
def residual_kernel(
    logits, stride, temperature, list_tokens, list_scores, parts, laws, keys, positions, tokens,
    cu_rows, sequences, cu_draws, draws, q, V, C,
    HAS_HEAT: tl.constexpr, HAS_Q: tl.constexpr, SPARSE: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mass of one tile of [w p - q]+; WHOLE: of every row that has a node, for the block rule;
    else of the first rejected row, and w is 1."""
    tile = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    sequence = index
    if WHOLE:
        sequence = tl.load(sequences + index)
    first = tl.load(cu_rows + sequence)
    end = tl.load(cu_rows + sequence + 1)
    has_node, x, law, p, had, _ = _chain(
        sequence, first, end, logits, stride, temperature, laws, tokens,
        cu_draws, draws, q, V, HAS_HEAT, HAS_Q, ROWS,
    )  # fmt: skip
    r = tl.arange(0, ROWS)
    weight = 1.0
    if WHOLE:
        at = index - first
        weights = _chain_weights(has_node, p, had, ROWS)
        weight = tl.sum(tl.where(r == at, weights, 0.0)).to(tl.float32)
    else:
        at = _first_rejected(has_node, p, had, keys, positions, sequence, ROWS).to(tl.int64)
    if first + at + 1 < end:
        row = first + at
        numbers = laws + row * LAW_NUMBERS
        length = V
        if SPARSE:
            length = tl.load(numbers + LENGTH).to(tl.int32, bitcast=True)
        heat = heat_of(temperature, sequence, HAS_HEAT)
        xs, e = entries(
            logits, stride, list_tokens, list_scores, row, tile, length, C,
            tl.load(numbers + PEAK), tl.load(numbers + CUT), heat, HAS_HEAT, SPARSE, BLOCK,
        )  # fmt: skip
        token = tl.sum(tl.where(r == at, x, 0))
        own = tl.sum(tl.where(r == at, law, 0))
        left = _left_of(xs, e, tl.load(numbers + TOTAL), weight, token, own, q, V, HAS_Q, SPARSE)
        tl.store(parts + index * C + tile, tl.sum(left))


@triton.jit
def chain_kernel(
    logits, stride, temperature, peaks, sums, list_tokens, list_scores, parts, plain_parts, laws,
    decided, keys, positions, tokens, cu_rows, cu_draws, draws, q, accepted_out, tokens_out,
    path_out, valid_out, V, C, depth,
    HAS_HEAT: tl.constexpr, HAS_Q: tl.constexpr, SPARSE: tl.constexpr, WHOLE: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Token-wise speculative sampling, or block verification (WHOLE), of one chain."""
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_rows + sequence)
    end = tl.load(cu_rows + sequence + 1)
    has_node, x, law, p, had, is_sound = _chain(
        sequence, first, end, logits, stride, temperature, laws, tokens,
        cu_draws, draws, q, V, HAS_HEAT, HAS_Q, ROWS,
    )  # fmt: skip
    r = tl.arange(0, ROWS)
    count = end - first - 1
    weight = 1.0
    if WHOLE:
        weights = _chain_weights(has_node, p, had, ROWS).to(tl.float32)
        mass = tl.zeros([ROWS], tl.float64)
        for c in range(C):
            mass += tl.load(parts + (first + r) * C + c, has_node, other=0.0).to(tl.float64)
        left = mass.to(tl.float32)
        slack = left + (1 - weights)
        h = left / tl.where(slack > 0, slack, 1.0)
        h = tl.where(slack > 0, h, 1.0)  # nothing wanted, nothing offered: the definition accepts
        h = tl.where(r == count, weights, h)
        coin = coin_of(keys, positions, sequence, r, r * 0, ACCEPT)
        passed = (r > 0) & (r <= count) & (coin < h)
        # the LARGEST success: the coins are independent, and a failed one stops nothing
        accepted = tl.max(tl.where(passed, r, 0)).to(tl.int64)
        weight = tl.sum(tl.where(r == accepted, weights, 0.0))
        part = first + accepted
    else:
        accepted = _first_rejected(has_node, p, had, keys, positions, sequence, ROWS).to(tl.int64)
        part = sequence
    row = first + accepted
    numbers = laws + row * LAW_NUMBERS
    peak, total = tl.load(numbers + PEAK), tl.load(numbers + TOTAL)
    cut, length = tl.load(numbers + CUT), V
    if SPARSE:
        length = tl.load(numbers + LENGTH).to(tl.int32, bitcast=True)
    heat = heat_of(temperature, sequence, HAS_HEAT)
    token = tl.sum(tl.where(r == accepted, x, 0))
    own = tl.sum(tl.where(r == accepted, law, 0))
    is_whole = accepted == count
    c = tl.arange(0, TILES)
    if SPARSE:
        for tile in range(tl.cdiv(length, BLOCK)):
            xs, e = entries(
                logits, stride, list_tokens, list_scores, row, tile, length, C, peak, cut, heat,
                HAS_HEAT, SPARSE, BLOCK,
            )  # fmt: skip
            rest = _left_of(xs, e, total, weight, token, own, q, V, HAS_Q, SPARSE)
            tl.store(parts + part * C + tile, tl.sum(rest))
            tl.store(plain_parts + sequence * C + tile, tl.sum(e))
        tl.debug_barrier()
        used = c < tl.cdiv(length, BLOCK)
        plain = tl.load(plain_parts + sequence * C + c, used, other=0.0).to(tl.float64)
    else:
        used = c < C
        _, plain = row_weights(peaks, sums, row, C, TILES)
    residual = tl.load(parts + part * C + c, used & (accepted < count), other=0.0).to(tl.float64)
    # A residual without mass arises only from rounding, where q == p: p itself is then right.
    use_p = is_whole | (tl.sum(residual) <= 0)
    bonus = coin_of(keys, positions, sequence, accepted, accepted * 0, BONUS)
    redrawn = coin_of(keys, positions, sequence, accepted, accepted * 0, RESIDUAL)
    coin = tl.where(is_whole, bonus, redrawn)
    tile, left_over = pick_tile(tl.where(use_p, plain, residual), coin, TILES)
    xs, e = entries(
        logits, stride, list_tokens, list_scores, row, tile, length, C, peak, cut, heat, HAS_HEAT,
        SPARSE, BLOCK,
    )  # fmt: skip
    rest = _left_of(xs, e, total, weight, token, own, q, V, HAS_Q, SPARSE)
    extra = pick_token(xs, tl.where(use_p, e, rest), left_over, BLOCK)
    step = tl.arange(0, STEPS)
    drafted = tl.load(tokens + first - sequence + step, step < accepted, other=-1)
    emitted = tl.where(step == accepted, extra, drafted)
    tl.store(accepted_out + sequence, accepted)
    tl.store(tokens_out + sequence * (depth + 1) + step, emitted, step <= depth)
    path = tl.where(step < accepted, first + 1 + step, -1)
    tl.store(path_out + sequence * depth + step, path, step < depth)
    row_sound = tl.load(decided + (first + r) * DECIDED + SOUND, first + r < end, other=1)
    rows_sound = tl.min(row_sound) > 0
    tl.store(valid_out + sequence, (is_sound & rows_sound).to(tl.uint8))
