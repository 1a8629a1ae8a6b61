"""What each row of a tree decides by itself: its law, and the token or the child that follows it.

One program per tile of a row where no law is needed (greedy; gumbel without truncation), else one
per row.
"""

import triton
import triton.language as tl

from specdec.kernels.laws import (
    close_up,
    entries,
    heat_of,
    pick_tile,
    pick_token,
    row_weights,
    score,
    truncate,
)
from specdec.kernels.philox import philox
from specdec.kernels.verify_noise import (
    ACCEPT,
    BONUS,
    COUPLED,
    RESIDUAL,
    coin_of,
    gumbel,
)
from specdec.kernels.verify_records import (
    CHILD,
    COPY,
    CUT,
    DECIDED,
    DRAW,
    LAW,
    LAW_NUMBERS,
    LENGTH,
    NODE,
    PEAK,
    PLACE,
    REDUCED,
    SOUND,
    TOKEN,
    TOTAL,
)


@triton.jit
def best_kernel(
    logits, stride, sequences, temperature, depths, keys, positions, peaks, picks, V, C,
    HAS_HEAT: tl.constexpr, GUMBEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one tile of one row: the largest score, noise included, and its lowest token."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    sequence = tl.load(sequences + row)
    heat = heat_of(temperature, sequence, HAS_HEAT)
    x = tile * BLOCK + tl.arange(0, BLOCK)
    s = score(logits, stride, row, x, x < V, heat, HAS_HEAT)
    if GUMBEL:
        c0 = (tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        none = c0 * 0
        at = tl.load(positions + sequence) + tl.load(depths + row)
        k0 = none + tl.load(keys + 2 * sequence).to(tl.uint32)
        k1 = none + tl.load(keys + 2 * sequence + 1).to(tl.uint32)
        w0, w1, w2, w3 = philox(c0, none, none + at.to(tl.uint32), none + COUPLED, k0, k1)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        s += gumbel(tl.reshape(words, (BLOCK,)))
    peak = tl.max(s, 0)
    unsound = tl.sum((s != s).to(tl.int32)) > 0
    tl.store(peaks + row * C + tile, tl.where(unsound, float("nan"), peak))
    tl.store(picks + row * C + tile, tl.min(tl.where((s == peak) & (x < V), x, V - 1)))


@triton.jit
def _without(x, left, first, last, drafted, draws, law):
    """Zero at the tokens of proposals first .. last - 1, of all (law -2) or of those from a law."""
    for d in range(first, last):
        token = tl.load(drafted + tl.load(draws + d * DRAW + NODE))
        taken = (law == -2) | (tl.load(draws + d * DRAW + LAW) == law)
        left = tl.where((x == token) & taken, 0.0, left)
    return left


@triton.jit
def _rest_of(q, law, V, first, last, drafted, draws, BLOCK: tl.constexpr):
    """The mass that earlier siblings left of their law, float64."""
    rest = tl.full((), 0.0, tl.float64)
    for begin in range(0, V, BLOCK):
        x = begin + tl.arange(0, BLOCK)
        held = tl.load(q + law * V + x, x < V, other=0.0).to(tl.float32)
        held = _without(x, held, first, last, drafted, draws, law)
        rest += tl.sum(held).to(tl.float64)
    return rest


@triton.jit
def _remainder(
    x, e, total, q, V, used_laws, row, shares, first, last, drafted, draws,
    PLACES: tl.constexpr, PLACES_HELD: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """What rejected proposals first .. last - 1 left of p, on one tile."""
    left = e / total
    inside = x < V
    if SPARSE:  # elsewhere the mask would make single loads of wide ones
        inside = inside & (e > 0)
    for s in tl.static_range(PLACES):
        share = tl.sum(tl.where(tl.arange(0, PLACES_HELD) == s, shares, 0.0))
        if share > 0:
            law = tl.load(used_laws + row * PLACES + s)
            left -= share * tl.load(q + law * V + x, inside, other=0.0).to(tl.float32)
    left = tl.maximum(left, 0.0)
    return _without(x, left, first, last, drafted, draws, -2)


@triton.jit
def law_kernel(
    sequences, temperature, top_k, top_p, min_p, peaks, sums, counts, dropped, V, C, laws,
    list_tokens, list_scores, logits, stride, parts, decided, keys, positions, tokens,
    cu_rows, depths, cu_draws, draws, used_laws, q,
    HAS_HEAT: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr, SPARSE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr,
    PLACES_HELD: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's law; for walk, gumbel and recursive also what the row decides: the child that its
    proposals' coins took, else the token that follows it."""
    row = tl.program_id(0).to(tl.int64)
    sequence = tl.load(sequences + row)
    heat = heat_of(temperature, sequence, HAS_HEAT)
    peak, weights = row_weights(peaks, sums, row, C, TILES)
    whole = tl.sum(weights)
    cut, length, total = float("-inf"), V, whole
    if SPARSE:
        c = tl.arange(0, TILES)
        below = tl.sum(tl.load(dropped + row * C + c, c < C, other=0.0).to(tl.float64))
        length = close_up(list_tokens, list_scores, counts, row, C, BLOCK)
        cut, total = truncate(
            list_scores + row * C * BLOCK, length, sequence, top_k, top_p, min_p, peak, whole,
            below, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P, BLOCK,
        )  # fmt: skip
    mass = total.to(tl.float32)
    numbers = laws + row * LAW_NUMBERS
    tl.store(numbers + PEAK, peak)
    tl.store(numbers + TOTAL, mass)
    tl.store(numbers + CUT, cut)
    tl.store(numbers + LENGTH, tl.full((), length, tl.int32).to(tl.float32, bitcast=True))
    # NaN and infinity among the logits make the sum of all weights NaN
    is_sound = (whole > 0) & (whole < float("inf")) & (peak < float("inf"))
    if RULE == "gumbel":
        score_found, found = float("-inf"), tl.full((), 0, tl.int64)
        at = tl.load(positions + sequence) + tl.load(depths + row)
        for tile in range(tl.cdiv(length, BLOCK)):
            lane = tile * BLOCK + tl.arange(0, BLOCK)
            base = row * C * BLOCK
            x = tl.load(list_tokens + base + lane, lane < length, other=0)
            s = tl.load(list_scores + base + lane, lane < length, other=float("-inf"))
            c0 = (x // 4).to(tl.uint32)
            none = c0 * 0
            k0 = none + tl.load(keys + 2 * sequence).to(tl.uint32)
            k1 = none + tl.load(keys + 2 * sequence + 1).to(tl.uint32)
            w0, w1, w2, w3 = philox(c0, none, none + at.to(tl.uint32), none + COUPLED, k0, k1)
            o = x % 4
            word = tl.where(o == 0, w0, tl.where(o == 1, w1, tl.where(o == 2, w2, w3)))
            s = tl.where((lane < length) & (s >= cut), s + gumbel(word), float("-inf"))
            top = tl.max(s, 0)
            token = tl.min(tl.where(s == top, x, V - 1)).to(tl.int64)
            found = tl.where(top > score_found, token, found)
            score_found = tl.maximum(top, score_found)
        tl.store(decided + row * DECIDED + TOKEN, found)
    if (RULE == "walk") | (RULE == "recursive"):
        local = row - tl.load(cu_rows + sequence)
        drafted = tokens - sequence - 1  # + row
        first = tl.load(cu_draws + row).to(tl.int32)
        last = first
        taken = tl.full((), -1, tl.int64)
        shares = tl.zeros([PLACES_HELD], tl.float32)
        kept = tl.full((), 1.0, tl.float64)  # mass of the remainder
        if RULE == "recursive":
            end = tl.load(cu_draws + row + 1).to(tl.int32)
            while (last < end) & (taken < 0):
                draw = draws + last * DRAW
                node = tl.load(draw + NODE)
                token = tl.load(drafted + node)
                inside = (token >= 0) & (token < V)
                is_sound = is_sound & inside
                x = tl.minimum(tl.maximum(token, 0), V - 1)
                law = tl.load(draw + LAW)
                copy = tl.load(draw + COPY)
                s = score(logits, stride, row, x, True, heat, HAS_HEAT)
                left = tl.where(s >= cut, tl.exp(s - peak) / mass, 0.0)
                scale = tl.full((), 1.0, tl.float64)
                drawn = tl.full((), 1.0, tl.float64)
                if PLACES > 0:
                    for place in tl.static_range(PLACES):
                        share = tl.sum(tl.where(tl.arange(0, PLACES_HELD) == place, shares, 0.0))
                        other = tl.load(used_laws + row * PLACES + place)
                        held = tl.load(q + other * V + x, share > 0, other=0.0)
                        left -= share * held.to(tl.float32)
                    if law >= 0:
                        had = tl.load(q + law * V + x).to(tl.float32)
                        if tl.load(draw + REDUCED) > 0:
                            rest = _rest_of(q, law, V, first, last, drafted, draws, BLOCK)
                            scale = 1 / rest
                            had = _without(x, had, first, last, drafted, draws, law)
                        is_sound = is_sound & (had > 0)
                        drawn = had.to(tl.float64) * scale
                left = tl.where(copy > 0, 0.0, tl.maximum(left, 0.0))
                ratio = left.to(tl.float64) / kept / drawn
                coin = coin_of(keys, positions, sequence, node - row + local, copy, ACCEPT)
                if coin.to(tl.float64) < ratio:
                    taken = node
                else:
                    before = shares
                    own = tl.load(draw + PLACE)
                    more = (kept * scale).to(tl.float32)
                    here = (tl.arange(0, PLACES_HELD) == own) & (law >= 0)
                    shares = tl.where(here, tl.minimum(shares + more, 1e30), shares)
                    last += 1
                    left_mass = tl.full((), 0.0, tl.float64)
                    for tile in range(tl.cdiv(length, BLOCK)):
                        xs, e = entries(
                            logits, stride, list_tokens, list_scores, row, tile, length, C, peak,
                            cut, heat, HAS_HEAT, SPARSE, BLOCK,
                        )  # fmt: skip
                        rest_here = _remainder(
                            xs, e, mass, q, V, used_laws, row, shares, first, last, drafted,
                            draws, PLACES, PLACES_HELD, SPARSE,
                        )  # fmt: skip
                        held_here = tl.sum(rest_here)
                        tl.store(parts + row * C + tile, held_here)
                        left_mass += held_here.to(tl.float64)
                    # rounding left nothing: what was there before is right
                    if left_mass > 0:
                        kept = left_mass
                    else:
                        if last < end:
                            shares = before
                        else:
                            kept = tl.full((), 0.0, tl.float64)
            tl.store(decided + row * DECIDED + CHILD, taken)
        if taken < 0:
            is_plain = (last == first) | (kept <= 0)
            if SPARSE:
                for tile in range(tl.where(is_plain, tl.cdiv(length, BLOCK), 0)):
                    xs, e = entries(
                        logits, stride, list_tokens, list_scores, row, tile, length, C, peak, cut,
                        heat, HAS_HEAT, SPARSE, BLOCK,
                    )  # fmt: skip
                    tl.store(parts + row * C + tile, tl.sum(e))
            if SPARSE | (RULE == "recursive"):
                tl.debug_barrier()
                c = tl.arange(0, TILES)
                used = c < tl.cdiv(length, BLOCK)
                found_parts = tl.load(parts + row * C + c, used, other=0.0).to(tl.float64)
                weights = found_parts if SPARSE else tl.where(is_plain, weights, found_parts)
            bonus = coin_of(keys, positions, sequence, local, first * 0, BONUS)
            residual = coin_of(keys, positions, sequence, local, first * 0, RESIDUAL)
            coin = tl.where(last == first, bonus, residual)
            tile, left_over = pick_tile(weights, coin, TILES)
            xs, e = entries(
                logits, stride, list_tokens, list_scores, row, tile, length, C, peak, cut, heat,
                HAS_HEAT, SPARSE, BLOCK,
            )  # fmt: skip
            if RULE == "recursive":
                left_here = _remainder(
                    xs, e, mass, q, V, used_laws, row, shares, first, last, drafted, draws,
                    PLACES, PLACES_HELD, SPARSE,
                )  # fmt: skip
                e = tl.where(is_plain, e, left_here)
            tl.store(decided + row * DECIDED + TOKEN, pick_token(xs, e, left_over, BLOCK))
    tl.store(decided + row * DECIDED + SOUND, is_sound.to(tl.int64))
