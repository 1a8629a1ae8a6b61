"""Tree attention on the device: the Triton kernels that kernels/attention.py launches.

A unit of work is (sequence, tile of packed rows, KV head, split of the KV axis). The query heads of
one KV head and the rows of one tree are packed into the rows of one matrix, row-major by tree row,
so that a page is read once for all of them; BLOCK_M of these packed rows are a tile. Splits are cut
by KV slot alone: see split_of. A program finds its unit by counting those of every sequence, so
that nothing about the batch need be known on the host: programs beyond the last unit end at once.

Blocks of slots are cut by slot too, and one loop meets all of them, whether a block needs its mask
or not, so that a row's bits depend on what it sees and on nothing else.
"""

import triton
import triton.language as tl

RUNNING, UNIFIED = tl.constexpr(0), tl.constexpr(1)
NO_WINDOW, SLIDING, CHUNKED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_FP8, FP8_BYTES, FP8_NATIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
# Splits met by one step of the combination; part of the order of its sum, so never tuned per batch.
COMBINE = tl.constexpr(16)


@triton.jit
def split_of(slot, unit):
    """The split that a slot falls into, as tiles.split_of."""
    u = slot // unit
    far = tl.where(u < 32, 8 + u // 4, tl.where(u < 128, 12 + u // 8, 20 + u // 16))
    return tl.where(u < 8, u, tl.where(u < 16, 4 + u // 2, far))


@triton.jit
def split_start(split, unit):
    """The first slot of a split."""
    far = tl.where(split < 28, 8 * (split - 12), 16 * (split - 20))
    middle = tl.where(split < 12, 2 * (split - 4), 4 * (split - 8))
    return tl.where(split < 8, split, tl.where(split < 16, middle, far)) * unit


@triton.jit
def _first_visible(position, window, WINDOW: tl.constexpr):
    """The lowest position that a row at this position may see."""
    if WINDOW == SLIDING:
        return tl.maximum(position - window + 1, 0)
    elif WINDOW == CHUNKED:
        return position // window * window
    else:
        return position * 0


@triton.jit
def _extent(
    which, inside, cu_nodes, context_lens, shared_groups, shared_slots, window, unit,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Of sequences (of sharing groups with PREFIX): first and past row, slots below the tree, past
    slot, first split of the row's sum, first and past split to do here, row of the block table."""
    if PREFIX:
        owner = tl.load(shared_groups + which, inside, other=0)
        past_owner = tl.load(shared_groups + which + 1, inside, other=0)
        begin = tl.load(cu_nodes + owner, inside, other=0).to(tl.int32)
        end = tl.load(cu_nodes + past_owner, inside, other=0).to(tl.int32)
        shared = tl.load(shared_slots + owner, inside, other=0).to(tl.int32)
        context = split_start(split_of(shared, unit), unit)
        stop = context
    else:
        owner = which
        begin = tl.load(cu_nodes + which, inside, other=0).to(tl.int32)
        end = tl.load(cu_nodes + which + 1, inside, other=0).to(tl.int32)
        context = tl.load(context_lens + which, inside, other=0).to(tl.int32)
        stop = context + end - begin
    base = split_of(_first_visible(context, window, WINDOW), unit)
    low = base
    if shared_slots is not None:
        if not PREFIX:
            low = tl.maximum(
                low, split_of(tl.load(shared_slots + which, inside, other=0).to(tl.int32), unit)
            )
    high = tl.where(stop > 0, split_of(tl.maximum(stop, 1) - 1, unit) + 1, 0)
    return begin, end, context, stop, base, low, high, owner


@triton.jit
def _popcount(x):
    """Set bits of each uint64, as int32."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return ((x + (x >> 32)) & 0x7F).to(tl.int32)


@triton.jit
def _positions(bits, rows, inside, context, bits_row, words):
    """Position of each tree row: the context plus the number of its ancestors."""
    depth = tl.zeros(rows.shape, tl.int32) - 1
    for word in range(words):
        depth += _popcount(tl.load(bits + rows * bits_row + word, inside, other=0).to(tl.uint64))
    return context + depth


@triton.jit
def _tree_word(bits, rows, live, first, bits_row, words):
    """Bits of the 64 tree slots from `first` on, one uint64 per row; slots below 0 are the prefix
    and read as seen."""
    word = first >> 6  # rounds down, below zero too
    shift = (first & 63).to(tl.uint64)
    here = tl.load(bits + rows * bits_row + word, live & (word >= 0) & (word < words), other=0).to(
        tl.uint64
    )
    here = tl.where(word < 0, 0xFFFFFFFFFFFFFFFF, here)
    after = tl.load(
        bits + rows * bits_row + word + 1, live & (word >= -1) & (word + 1 < words), other=0
    ).to(tl.uint64)
    after = tl.where(word < -1, 0xFFFFFFFFFFFFFFFF, after)
    # Two shifts: one by 64 would be undefined.
    return (here >> shift) | ((after << 1) << (63 - shift))


@triton.jit
def _from_pages(
    pages, at, present, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK) of one KV head's keys or values, `at` the offset of each slot."""
    index = tl.arange(0, BLOCK)
    seen = present[:, None]
    if SIZE != BLOCK:
        seen = seen & (index < SIZE)[None, :]
    return tl.load(pages + at[:, None] + index[None, :], seen, other=0)


@triton.jit
def _decode(x, FP8: tl.constexpr):
    """Page content as the product wants it. Bytes become float16 of 2**-8 times their value: the
    bits of e4m3 fit under float16's, whose exponent is biased by 8 more."""
    if FP8 == FP8_BYTES:
        wide = x.to(tl.uint16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), half)
    elif FP8 == FP8_NATIVE:
        return x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        return x


@triton.jit
def _masked(
    scores, start, bits, row, rows, live, reach, context, begin, stop, bits_row, words,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The scores of a block that not all rows see whole, -inf where a row does not."""
    # Few comparisons: AMD keeps what comes of each, for every element, in scalar registers.
    offsets = tl.arange(0, BLOCK_N)
    slots = start + offsets
    positions = slots
    if WINDOW != NO_WINDOW:
        among = (slots >= context) & (slots < stop)
        tree = bits + begin.to(tl.int64) * bits_row
        deep = _positions(tree, slots - context, among, context, bits_row, words)
        positions = tl.where(among, deep, slots)
    word = _tree_word(bits + row * bits_row, rows, live, start - context, bits_row, words)
    present = tl.minimum(stop - start, 64)
    word = word & (tl.full((), 0xFFFFFFFFFFFFFFFF, tl.uint64) >> (64 - present).to(tl.uint64))
    # Halves of 32 bits: shifting 64 bits per element would cost twice the registers.
    bit = tl.full((BLOCK_N,), 1, tl.uint32) << (offsets & 31).to(tl.uint32)
    low = tl.where(offsets < 32, bit, 0)
    high = tl.where(offsets >= 32, bit, 0)
    low_word, high_word = word.to(tl.uint32), (word >> 32).to(tl.uint32)
    seen = (low_word[:, None] & low[None, :]) | (high_word[:, None] & high[None, :])
    if WINDOW != NO_WINDOW:
        before = (positions[None, :] - reach[:, None]) >> 31  # all bits, or none
        seen = seen & (~before).to(tl.uint32)
    return tl.where(seen != 0, scores, float("-inf"))


@triton.jit
def _tree_attention_kernel(
    q, k_pages, v_pages, block_table, context_lens, cu_nodes, bits, k_scale, v_scale, sinks,
    shared_groups, shared_slots, out, partial, tops, totals, flags,
    scale, softcap, unified_max, window, unit, num_owners, kv_heads, max_splits, words,
    q_row, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, table_row, bits_row,
    out_row, out_head,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FP8: tl.constexpr, SOFTMAX: tl.constexpr,
    PREFIX: tl.constexpr, FLAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Partial sums of every unit of work; the result itself where a sequence has one split.

    PREFIX: owners are sharing groups and the rows of a group's sequences one matrix. FLAGGED: only
    rows that the combination flagged at flags[1:], flags[0] telling whether there are any.
    """
    heads = kv_heads * GROUP
    which = tl.arange(0, BLOCK_B)
    begins, ends, _, _, _, lows, highs, _ = _extent(
        which, which < num_owners, cu_nodes, context_lens, shared_groups, shared_slots, window,
        unit, WINDOW, PREFIX,
    )  # fmt: skip
    highs = tl.minimum(highs, max_splits)
    units = tl.cdiv((ends - begins) * GROUP, BLOCK_M) * kv_heads * tl.maximum(highs - lows, 0)
    past_units = tl.cumsum(units, 0)
    num_units = tl.sum(units, 0)
    if FLAGGED:
        num_units = tl.where(tl.load(flags) != 0, num_units, 0)
    if SOFTMAX == UNIFIED:
        if tl.program_id(0) == 0:
            tl.store(flags, 0)  # raised by the combination, a later launch
    item = tl.program_id(0)
    if item < num_units:
        owner = tl.sum((past_units <= item).to(tl.int32), 0)
        local = item - tl.sum(tl.where(which < owner, units, 0), 0)
        begin, end, context, stop, base, _low, high, table_at = _extent(
            owner, owner < num_owners, cu_nodes, context_lens, shared_groups, shared_slots, window,
            unit, WINDOW, PREFIX,
        )  # fmt: skip
        tiles = tl.cdiv((end - begin) * GROUP, BLOCK_M)
        # Far splits are the long ones: they start first.
        split = tl.minimum(high, max_splits) - 1 - local // (tiles * kv_heads)
        head = local // tiles % kv_heads
        # Addresses: one scalar of 64 bits for the tile's first row, 32 bits from there.
        packed = local % tiles * BLOCK_M
        row = (begin + packed // GROUP).to(tl.int64)
        past_packed = (end - begin) * GROUP - packed
        packed = packed % GROUP + tl.arange(0, BLOCK_M)
        rows, query_heads = packed // GROUP, packed % GROUP
        live = tl.arange(0, BLOCK_M) < past_packed
        first_head = head * GROUP
        if FLAGGED:
            flag = flags + 1 + row * heads + first_head
            live = live & (tl.load(flag + rows * heads + query_heads, live, other=0) != 0)
            wanted = tl.max(live.to(tl.int32), 0) != 0
        else:
            wanted = True
        if wanted:
            d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
            queries = tl.load(
                q + row * q_row + first_head.to(tl.int64) * q_head
                + (rows * q_row + query_heads * q_head)[:, None] + d[None, :],
                live[:, None] & (d < D)[None, :], other=0,
            )  # fmt: skip
            # Decoded pages are float16, and what multiplies them: float32 as a sum of two.
            WIDE: tl.constexpr = FP8 != NO_FP8 and q.dtype.element_ty == tl.float32
            rest = queries
            if WIDE:
                rest = (queries - queries.to(tl.float16).to(tl.float32)).to(tl.float16)
            if FP8 != NO_FP8:
                queries = queries.to(tl.float16)
            product = scale
            if k_scale is not None:
                product = product * tl.load(k_scale + head).to(tl.float32)
            if FP8 == FP8_BYTES:
                product = product * 256.0
            if SOFTCAP:
                inner = product * (2 * LOG2E) / softcap
                factor = softcap * LOG2E
            else:
                inner = product
                factor = product * LOG2E
            visible = _first_visible(context, window, WINDOW)
            start = tl.maximum(split_start(split, unit), visible // BLOCK_N * BLOCK_N)
            past = tl.minimum(split_start(split + 1, unit), stop)
            # All rows see all of the blocks from `edge` up to `whole`.
            whole = context // BLOCK_N * BLOCK_N
            edge = 0
            reach = tl.zeros((BLOCK_M,), tl.int32)
            if WINDOW != NO_WINDOW:
                reach = _first_visible(
                    _positions(bits + row * bits_row, rows, live, context, bits_row, words),
                    window, WINDOW,
                )  # fmt: skip
                edge = _first_visible(context + end - begin - 1, window, WINDOW)
            acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            table = block_table + table_at.to(tl.int64) * table_row
            keys = k_pages + head.to(tl.int64) * k_head
            values = v_pages + head.to(tl.int64) * v_head
            for at in range(start, past, BLOCK_N):
                offsets = tl.arange(0, BLOCK_N)
                present = at + offsets < past
                if PAGE % BLOCK_N == 0:
                    entry = tl.load(table + at // PAGE).to(tl.int64)
                    within = at % PAGE + offsets
                else:
                    entry = tl.load(table + at // PAGE + offsets // PAGE, present, other=0)
                    entry = entry.to(tl.int64)
                    within = offsets % PAGE
                k = _from_pages(keys, entry * k_page + within * k_slot, present, D, BLOCK_D)
                v = _from_pages(values, entry * v_page + within * v_slot, present, DV, BLOCK_DV)
                k = _decode(k, FP8)
                scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
                if WIDE:
                    scores = tl.dot(rest, tl.trans(k), scores)
                if SOFTCAP:
                    # tanh; its limits need no care, exp2 is 0 or infinite there.
                    scores = 1 - 2 / (tl.exp2(scores * inner) + 1)
                if not PREFIX:
                    if (at >= whole) | (at < edge):
                        scores = _masked(
                            scores, at, bits, row, rows, live, reach, context, begin, stop,
                            bits_row, words, WINDOW, BLOCK_N,
                        )  # fmt: skip
                highest = tl.maximum(top, tl.max(scores, 1) * factor)
                if SOFTMAX == UNIFIED:
                    p = tl.exp2(scores * factor - unified_max)
                else:
                    # A row that has seen nothing so far keeps its zeros.
                    anchor = tl.where(highest == float("-inf"), 0.0, highest)
                    p = tl.exp2(scores * factor - anchor[:, None])
                    keep = tl.exp2(top - anchor)
                    total = total * keep
                    acc = acc * keep[:, None]
                top = highest
                total += tl.sum(p, 1)
                v = _decode(v, FP8)
                weights = p.to(v.dtype)
                acc = tl.dot(weights, v, acc, input_precision="ieee")
                if WIDE:
                    acc = tl.dot((p - weights.to(tl.float32)).to(v.dtype), v, acc)
            direct = (high - base == 1) | (max_splits == 1)
            if SOFTMAX == RUNNING and not PREFIX and direct:
                total = tl.where(high <= max_splits, total, float("nan"))
                _store_result(
                    acc, total, top, v_scale, sinks,
                    out + row * out_row + first_head.to(tl.int64) * out_head, head,
                    first_head + query_heads, rows * out_row + query_heads * out_head, live, FP8,
                    DV, BLOCK_DV,
                )  # fmt: skip
            else:
                base_at = (row * heads + first_head) * max_splits + split
                to = (rows * heads + query_heads) * max_splits
                tl.store(
                    partial + base_at * DV + (to.to(tl.int64) * DV)[:, None] + dv[None, :], acc,
                    live[:, None] & (dv < DV)[None, :],
                )  # fmt: skip
                tl.store(tops + base_at + to, top, live)
                tl.store(totals + base_at + to, total, live)


@triton.jit
def _store_result(
    acc, total, top, v_scale, sinks, out, head, query_heads, at, live,
    FP8: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Divides by the denominator, which the sinks join, and writes rows of (M, BLOCK_DV)."""
    if sinks is not None:
        sink = tl.load(sinks + query_heads, live, other=0).to(tl.float32) * LOG2E
        highest = tl.maximum(top, sink)
        keep = tl.exp2(top - highest)
        acc = acc * keep[:, None]
        total = total * keep + tl.exp2(sink - highest)
    result = acc / tl.where(live, total, 1.0)[:, None]
    if v_scale is not None:
        result = result * tl.load(v_scale + head).to(tl.float32)
    if FP8 == FP8_BYTES:
        result = result * 256.0
    dv = tl.arange(0, BLOCK_DV)
    tl.store(
        out + at[:, None] + dv[None, :], result.to(out.dtype.element_ty),
        live[:, None] & (dv < DV)[None, :],
    )  # fmt: skip


@triton.jit
def _combine_kernel(
    context_lens, cu_nodes, v_scale, sinks, out, partial, tops, totals, flags,
    unified_max, lowest, highest, window, unit, num_sequences, max_splits, out_row, out_head,
    GROUP: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, FP8: tl.constexpr,
    SOFTMAX: tl.constexpr, FLAGGED: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one (row, query head), always in the same order.

    With a unified maximum partial sums need no factor. A row whose true maximum is not between
    lowest and highest, powers of two relative to the unified one, is flagged instead of written.
    """
    row, query_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    which = tl.arange(0, BLOCK_B)
    past_rows = tl.load(cu_nodes + which + 1, which < num_sequences, other=2147483647)
    owner = tl.sum((past_rows <= row).to(tl.int32), 0)
    _, _, _, _, base, _, high, _ = _extent(
        owner, owner < num_sequences, cu_nodes, context_lens, None, None, window, unit, WINDOW,
        False,
    )  # fmt: skip
    here = row * tl.num_programs(1) + query_head
    wanted = owner < num_sequences
    if FLAGGED:
        wanted = wanted & (tl.load(flags + 1 + here) != 0)
    if SOFTMAX == RUNNING:  # one split: written where it was summed
        wanted = wanted & (high - base > 1)
    # More splits than the caller's bound has room for: no number is better than a wrong one.
    fits = high <= max_splits
    high = tl.minimum(high, max_splits)
    if wanted:
        splits = tl.arange(0, COMBINE)
        first = base // COMBINE * COMBINE
        top = tl.full((1,), float("-inf"), tl.float32)
        for at in range(first, high, COMBINE):
            inside = (at + splits >= base) & (at + splits < high)
            found = tl.load(tops + here * max_splits + at + splits, inside, other=float("-inf"))
            top = tl.maximum(top, tl.max(found, 0))
        dv = tl.arange(0, BLOCK_DV)
        acc = tl.zeros((1, BLOCK_DV), tl.float32)
        total = tl.zeros((1,), tl.float32)
        for at in range(first, high, COMBINE):
            inside = (at + splits >= base) & (at + splits < high)
            to = here * max_splits + at + splits
            weight = inside.to(tl.float32)
            if SOFTMAX == RUNNING:
                weight = tl.exp2(tl.load(tops + to, inside, other=float("-inf")) - top)
            sums = tl.load(
                partial + (to * DV)[:, None] + dv[None, :],
                inside[:, None] & (dv < DV)[None, :], other=0,
            )  # fmt: skip
            acc += tl.sum(sums * weight[:, None], 0)[None, :]
            total += tl.sum(tl.load(totals + to, inside, other=0) * weight, 0)
        total = tl.where(fits, total, float("nan"))
        fine = top == top
        if SOFTMAX == UNIFIED:
            fine = (top >= unified_max + lowest) & (top <= unified_max + highest)
            bad = tl.max((~fine).to(tl.int32), 0)
            tl.store(flags + 1 + here, bad)
            if bad != 0:
                tl.store(flags, 1)
            top = tl.zeros((1,), tl.float32) + unified_max
        _store_result(
            acc, total, top, v_scale, sinks, out, query_head // GROUP,
            tl.zeros((1,), tl.int32) + query_head,
            tl.zeros((1,), tl.int64) + row * out_row + query_head * out_head,
            fine | (SOFTMAX == RUNNING), FP8, DV, BLOCK_DV,
        )  # fmt: skip
