"""Logits -> laws without storing them: temperature, top-k, top-p and min-p as three numbers a row.

A row's law is p(x) = exp(s(x) - peak) / total where s(x) >= cut, and zero elsewhere; s are the
logits over the temperature. The vocabulary is cut into tiles of a fixed size, one program each, so
a row's numbers do not depend on its batch. With truncation what can still be in the law is listed
(for top-p: tokens more likely than (1 - top_p) / V, since all others together cannot pass
1 - top_p; for top-k: those above the k-th largest maximum of small groups), the boundary is then
searched among these alone, bit by bit, without a sort. specdec.sampling.Truncation is the twin.
"""

import triton
import triton.language as tl

GROUP = 64  # tokens whose maximum counts as one in the bound on the k-th score


@triton.jit
def score(logits, stride, row, x, inside, heat, HAS_HEAT: tl.constexpr):
    """float32 logits over the temperature, -inf outside."""
    found = tl.load(logits + row * stride + x, inside, other=float("-inf")).to(tl.float32)
    if HAS_HEAT:
        found = tl.div_rn(found, heat)
    return found


@triton.jit
def heat_of(temperature, sequence, HAS_HEAT: tl.constexpr):
    if HAS_HEAT:
        return tl.load(temperature + sequence).to(tl.float32)
    return 1.0


@triton.jit
def ordered(x):
    """Integers in the order of float32 numbers."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # both zeros are one
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def stats_kernel(
    logits, stride, sequences, temperature, peaks, sums, groups, V, C,
    HAS_HEAT: tl.constexpr, HAS_TOP_K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one tile of one row: the largest score, the sum of exp(s - largest), maxima of groups."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    heat = heat_of(temperature, tl.load(sequences + row), HAS_HEAT)
    x = tile * BLOCK + tl.arange(0, BLOCK)
    s = score(logits, stride, row, x, x < V, heat, HAS_HEAT)
    peak = tl.max(s, 0)
    tl.store(peaks + row * C + tile, peak)
    tl.store(sums + row * C + tile, tl.sum(tl.exp(s - tl.where(peak == float("-inf"), 0.0, peak))))
    if HAS_TOP_K:
        per_tile: tl.constexpr = BLOCK // GROUP
        best = tl.max(tl.reshape(s, (per_tile, GROUP)), 1)
        tl.store(groups + (row * C + tile) * per_tile + tl.arange(0, per_tile), best)


@triton.jit
def row_weights(peaks, sums, row, C, TILES: tl.constexpr):
    """A row's largest score and the weight of each of its tiles, float64, before truncation."""
    c = tl.arange(0, TILES)
    m = tl.load(peaks + row * C + c, c < C, other=float("-inf"))
    peak = tl.max(m, 0)
    factor = tl.exp(m - tl.where(peak == float("-inf"), 0.0, peak))
    held = tl.load(sums + row * C + c, c < C, other=0.0)
    return peak, held.to(tl.float64) * factor.to(tl.float64)


@triton.jit
def filter_kernel(
    logits, stride, sequences, temperature, top_k, top_p, min_p, peaks, sums, groups,
    list_tokens, list_scores, counts, dropped, V, C,
    HAS_HEAT: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists, at the start of the tile's part of the row's list, the tokens of one tile that may be
    in the law, in order, and weighs the others."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    sequence = tl.load(sequences + row)
    heat = heat_of(temperature, sequence, HAS_HEAT)
    peak, weights = row_weights(peaks, sums, row, C, TILES)
    lane = tl.arange(0, BLOCK)
    x = tile * BLOCK + lane
    s = score(logits, stride, row, x, x < V, heat, HAS_HEAT)
    e = tl.where(x < V, tl.exp(s - peak), 0.0)
    least = 0.0
    if HAS_MIN_P:
        least = tl.load(min_p + sequence).to(tl.float32)
    if HAS_TOP_P:
        # A little below the bound, so that rounding cannot list too few.
        tail = 1 - tl.load(top_p + sequence)
        least = tl.maximum(least, (tail / V * tl.sum(weights) * 0.999).to(tl.float32))
    lowest = tl.full((), -2147483648, tl.int64)
    if HAS_TOP_K:
        k = tl.load(top_k + sequence)
        if k > 0:
            least = 0.0
            g = tl.arange(0, GROUPS)
            count = C * (BLOCK // GROUP)
            best = tl.load(groups + row * count + g, g < count, other=float("-inf"))
            keys = tl.where(best > float("-inf"), ordered(best), -2147483648).to(tl.int64)
            high = ordered(peak).to(tl.int64)
            for _ in range(18):  # a bound: what is left of the interval lists a few too many
                middle = lowest + (high - lowest + 1) // 2
                enough = tl.sum((keys >= middle).to(tl.int64)) >= k
                lowest = tl.where(enough, middle, lowest)
                high = tl.where(enough, high, middle - 1)
    kept = (s > float("-inf")) & (e >= least) & (ordered(s).to(tl.int64) >= lowest)
    one = kept.to(tl.int32)
    at = (row * C + tile) * BLOCK + tl.cumsum(one, 0) - one
    tl.store(list_tokens + at, x, kept)
    tl.store(list_scores + at, s, kept)
    tl.store(counts + row * C + tile, tl.sum(one))
    tl.store(dropped + row * C + tile, tl.sum(tl.where(kept, 0.0, e)))


@triton.jit
def close_up(list_tokens, list_scores, counts, row, C, BLOCK: tl.constexpr):
    """Moves the parts of a row's list together, in place; returns its length.

    No entry moves up, so nothing is overwritten before it was read, a barrier given.
    """
    first = row * C * BLOCK
    length = tl.full((), 0, tl.int32)
    for c in range(C):
        length += tl.load(counts + row * C + c)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        source, end = at, tl.full((), 0, tl.int32)
        for c in range(C):
            start = end
            end += tl.load(counts + row * C + c)
            source = tl.where((at >= start) & (at < end), c * BLOCK + at - start, source)
        tokens = tl.load(list_tokens + first + source, at < length, other=0)
        scores = tl.load(list_scores + first + source, at < length, other=0.0)
        tl.debug_barrier()
        tl.store(list_tokens + first + at, tokens, at < length)
        tl.store(list_scores + first + at, scores, at < length)
        tl.debug_barrier()
    return length


@triton.jit
def truncate(
    scores, length, sequence, top_k, top_p, min_p, peak, whole, below,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(cut, total) of a row from its list; whole, below: weights of all tokens and of those that
    are not listed, float64.

    The list's first tile stays in registers through both searches, and rarely is there another.
    """
    lane = tl.arange(0, BLOCK)
    s = tl.load(scores + lane, lane < length, other=float("-inf"))
    # Behind the list: a key below all others rather than a mask, which the loops would hold.
    key = tl.where(lane < length, ordered(s), -2147483648)
    e = tl.where(lane < length, tl.exp(s - peak), 0.0)
    least_key = tl.full((), -2147483647, tl.int32)
    if HAS_TOP_K:
        k = tl.load(top_k + sequence)
        if k > 0:
            low = tl.full((), -2147483647, tl.int64)
            high = ordered(peak).to(tl.int64)
            for _ in range(32):
                middle = low + (high - low + 1) // 2
                at_least = middle.to(tl.int32)
                count = tl.sum((key >= at_least).to(tl.int32))
                for begin in range(BLOCK, length, BLOCK):
                    more = tl.load(scores + begin + lane, begin + lane < length, other=0.0)
                    held = (ordered(more) >= at_least) & (begin + lane < length)
                    count += tl.sum(held.to(tl.int32))
                low = tl.where(count >= k, middle, low)
                high = tl.where(count >= k, high, middle - 1)
            least_key = low.to(tl.int32)
            e = tl.where(key >= least_key, e, 0.0)
            whole = tl.sum(e.to(tl.float64))
            for begin in range(BLOCK, length, BLOCK):
                more = tl.load(scores + begin + lane, begin + lane < length, other=float("-inf"))
                held = (ordered(more) >= least_key) & (begin + lane < length)
                whole += tl.sum(tl.where(held, tl.exp(more - peak), 0.0).to(tl.float64))
            below = tl.full((), 0.0, tl.float64)
    least = 0.0
    if HAS_TOP_P:
        wanted = tl.load(top_p + sequence)
        if wanted < 1:
            # The smallest v whose {e <= v} weighs more than 1 - top_p; 1, the largest, if none.
            tail = (1 - wanted).to(tl.float32)
            low_bits = tl.full((), 0, tl.int32)
            high_bits = tl.full((), 0x3F800000, tl.int32)
            for _ in range(30):
                half = (low_bits + high_bits) // 2
                most = half.to(tl.float32, bitcast=True)
                mass = below + tl.sum(tl.where(e <= most, e, 0.0).to(tl.float64))
                for begin in range(BLOCK, length, BLOCK):
                    at = begin + lane
                    more = tl.load(scores + at, at < length, other=float("-inf"))
                    f = tl.exp(more - peak)
                    held = (ordered(more) >= least_key) & (f <= most) & (at < length)
                    mass += tl.sum(tl.where(held, f, 0.0).to(tl.float64))
                passed = (mass / whole).to(tl.float32) > tail
                high_bits = tl.where(passed, half, high_bits)
                low_bits = tl.where(passed, low_bits, tl.minimum(half + 1, high_bits))
            least = high_bits.to(tl.float32, bitcast=True)
    if HAS_MIN_P:
        least = tl.maximum(least, tl.load(min_p + sequence).to(tl.float32))
    held = (key >= least_key) & (e >= least)
    cut_key = tl.min(tl.where(held, key, 0x7F800000))
    total = tl.sum(tl.where(held, e, 0.0).to(tl.float64))
    for begin in range(BLOCK, length, BLOCK):
        more = tl.load(scores + begin + lane, begin + lane < length, other=float("-inf"))
        f = tl.exp(more - peak)
        held = (begin + lane < length) & (ordered(more) >= least_key) & (f >= least)
        cut_key = tl.minimum(cut_key, tl.min(tl.where(held, ordered(more), 0x7F800000)))
        total += tl.sum(tl.where(held, f, 0.0).to(tl.float64))
    bits = tl.where(cut_key < 0, cut_key ^ 0x7FFFFFFF, cut_key)
    return bits.to(tl.float32, bitcast=True), total


@triton.jit
def entries(
    logits, stride, list_tokens, list_scores, row, tile, length, C, peak, cut, heat,
    HAS_HEAT: tl.constexpr, SPARSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens and weights exp(s - peak) of one tile of a law: of the vocabulary, or of the list.

    length: of the vocabulary or of the list; weights are zero behind it and outside the law.
    """
    at = tile * BLOCK + tl.arange(0, BLOCK)
    if SPARSE:
        x = tl.load(list_tokens + row * C * BLOCK + at, at < length, other=0)
        s = tl.load(list_scores + row * C * BLOCK + at, at < length, other=float("-inf"))
    else:
        x = at
        s = score(logits, stride, row, x, at < length, heat, HAS_HEAT)
    return x, tl.where((at < length) & (s >= cut), tl.exp(s - peak), 0.0)


@triton.jit
def pick_tile(weights, coin, TILES: tl.constexpr):
    """The first tile whose cumulative weight exceeds coin * total, and what is left inside it."""
    c = tl.arange(0, TILES)
    sums = tl.cumsum(weights, 0)
    wanted = coin.to(tl.float64) * tl.max(sums)
    first = tl.min(tl.where((sums > wanted) & (weights > 0), c, TILES))
    tile = tl.minimum(first, tl.max(tl.where(weights > 0, c, 0)))
    return tile, wanted - tl.max(tl.where(c < tile, sums, 0.0))


@triton.jit
def pick_token(x, weights, left, BLOCK: tl.constexpr):
    """The first token of a tile whose cumulative weight, float64, exceeds what is left; one of
    weight zero never."""
    lane = tl.arange(0, BLOCK)
    sums = tl.cumsum(weights.to(tl.float64), 0)
    # The tile's own sum was rounded: what is left may reach the sum of its parts, never pass it.
    left = tl.minimum(left, tl.max(sums) * 0.9999999999999999)
    first = tl.min(tl.where((sums > left) & (weights > 0), lane, BLOCK))
    at = tl.minimum(first, tl.max(tl.where(weights > 0, lane, 0)))
    return tl.sum(tl.where(lane == at, x, 0)).to(tl.int64)
