"""Verification of a ragged batch of trees, from logits to emitted tokens, without a wait.

The rules are those of specdec.acceptance.batched on the laws of specdec.sampling, which are the
twin: with the same seeds both emit the same tokens, unless a coin lies within rounding of a
boundary (sums are taken in another order, exp and log differ in the last bit). Launches: greedy 2,
gumbel 2, walk 3, recursive 3, token 4, block 4; with truncation gumbel, walk, recursive and token
4, block 5. Logits are read once, or twice with truncation, beside single tiles.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.checks import check_tensor
from specdec.kernels.configuration import Configuration
from specdec.kernels.laws import (
    GROUP,
    close_up,
    entries,
    filter_kernel,
    heat_of,
    pick_tile,
    pick_token,
    row_weights,
    score,
    stats_kernel,
    truncate,
)
from specdec.kernels.philox import philox, uniform

RULES = ("greedy", "gumbel", "walk", "token", "block", "recursive")
BLOCK = 4096  # tokens per program; part of the definition of a result's last bits
MOST_ROWS = 256  # of one tree, its root included

_ACCEPT, _RESIDUAL, _BONUS = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
_COUPLED = tl.constexpr(0)


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """The trees of one step on the device; all int64. Rows are packed: per sequence its root, then
    its nodes, parents before children. A function of the shape alone, but for tokens."""

    tokens: Tensor  # (nodes,) node of row r of sequence b: r - b - 1
    cu_rows: Tensor  # (B + 1,) first row of each sequence
    sequences: Tensor  # (R,)
    parents: Tensor  # (R,) row, -1 for a root
    depths: Tensor  # (R,) a root's is 0
    cu_draws: Tensor  # (R + 1,) first proposal of each row; proposals in draw order
    draw_rows: Tensor  # (P,) the row that it names
    draw_laws: Tensor  # (P,) stored law, -1 for a point mass
    draw_places: Tensor  # (P,) which of the parent's laws that is
    draw_copies: Tensor  # (P,) earlier proposals of the same row
    draw_reduced: Tensor  # (P,) 1: drawn from what earlier siblings left of their law, else 0
    used_laws: Tensor  # (R, places) the different stored laws of a row's proposals, -1 pads
    most_rows: int  # of one tree, its root included
    depth: int  # of the deepest tree
    laws: int  # stored laws of all trees
    is_chain: bool  # no row has two proposals

    @staticmethod
    def of(
        tokens: Tensor,
        parents: Sequence[Sequence[int]],
        draws: Sequence[tuple[int, int, int, bool]],
        laws: int = 0,
    ) -> "Trees":
        """tokens: (nodes,) packed. parents: per tree, each node's, -1 for the root. draws: in draw
        order (parent row, row, stored law or -1, drawn from what earlier siblings left of it).

        Raises ValueError for a parent that is not an earlier node, a proposal that does not name a
        child of its parent or a stored law, and for a tree of more than 256 rows.
        """
        device, cu_rows, ups, depths = tokens.device, [0], list[int](), list[int]()
        for tree in parents:
            first = cu_rows[-1]
            ups.append(-1)
            depths.append(0)
            for node, parent in enumerate(tree):
                if not -1 <= parent < node:
                    raise ValueError(
                        f"parents: node {node}: expected -1 to {node - 1}, an earlier node or the "
                        f"root, got {parent}"
                    )
                ups.append(first + parent + 1)
                depths.append(depths[first + parent + 1] + 1)
            if len(tree) >= MOST_ROWS:
                raise ValueError(
                    f"parents: expected at most {MOST_ROWS} rows per tree, root included, got "
                    f"{len(tree) + 1}"
                )
            cu_rows.append(first + len(tree) + 1)
        rows = cu_rows[-1]
        nodes = rows - len(parents)
        check_tensor("tokens", tokens, (nodes,), (torch.int64,), device)
        proposals: list[list[tuple[int, int, bool]]] = [[] for _ in range(rows)]
        for parent, row, law, reduced in draws:
            if not (0 <= row < rows and ups[row] == parent >= 0):
                raise ValueError(f"draws: expected row {row} to be a child of row {parent}")
            if not -1 <= law < laws:
                raise ValueError(f"draws: expected a stored law -1 to {laws - 1}, got {law}")
            proposals[parent].append((row, law, reduced))
        used = [list(dict.fromkeys(law for _, law, _ in ps if law >= 0)) for ps in proposals]
        places = max(map(len, used), default=0)
        starts = [0]
        flat: list[tuple[int, int, int, int, int]] = []
        for own, ps in zip(used, proposals, strict=True):
            for i, (row, law, reduced) in enumerate(ps):
                copy = sum(earlier == row for earlier, _, _ in ps[:i])
                flat.append((row, law, own.index(law) if law >= 0 else 0, copy, int(reduced)))
            starts.append(len(flat))

        def tensor(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        rows_of, laws_of, places_of, copies_of, reduced_of = (
            tensor([entry[i] for entry in flat]) for i in range(5)
        )
        return Trees(
            tokens, tensor(cu_rows),
            tensor([b for b, tree in enumerate(parents) for _ in range(len(tree) + 1)]),
            tensor(ups), tensor(depths), tensor(starts), rows_of, laws_of, places_of, copies_of,
            reduced_of,
            tensor([own + [-1] * (places - len(own)) for own in used]).view(rows, places),
            max((len(tree) + 1 for tree in parents), default=1), max(depths, default=0), laws,
            len(flat) == nodes
            and all(list(tree) == list(range(-1, len(tree) - 1)) for tree in parents),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Verified:
    """What the rule decided, per sequence; -1 pads. The fields of acceptance.Outcome."""

    accepted: Tensor  # (B,) drafted tokens kept
    tokens: Tensor  # (B, depth + 1) the accepted path, then exactly one extra token
    path: Tensor  # (B, depth) packed rows of the accepted nodes
    valid: Tensor  # (B,) bool: False where what was read was no law


@triton.jit
def _coin(keys, positions, sequence, node, copy, PURPOSE: tl.constexpr):
    """The uniforms of specdec.rng of some nodes of a step."""
    c1 = node.to(tl.uint32)
    none = c1 * 0
    c0 = none + (copy // 4).to(tl.uint32)
    c2 = none + tl.load(positions + sequence).to(tl.uint32)
    k0 = none + tl.load(keys + 2 * sequence).to(tl.uint32)
    k1 = none + tl.load(keys + 2 * sequence + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, none + PURPOSE, k0, k1)
    lane = copy % 4
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return uniform(word)


@triton.jit
def _gumbel(word):
    """-log(-log u), u = ((word >> 8) + 1/2) / 2**24: float32, accurate at both ends."""
    odd = (word >> 8) * 2 + 1
    is_low = odd < 16777216
    far = (33554432 - odd).to(tl.float32) * 2.9802322387695312e-08  # 1 - u, exact where u > 1/2
    near = tl.where(is_low, 0.5, 1 - far)
    lost = 1 - near
    slope = far / tl.where(lost == 0, 1.0, lost)  # what rounding 1 - far took from it
    high = tl.where(lost == 0, far, -tl.log(near) * slope)
    low = -tl.log(tl.where(is_low, odd.to(tl.float32) * 2.9802322387695312e-08, 0.5))
    return -tl.log(tl.where(is_low, low, high))


@triton.jit
def _best_kernel(
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
        w0, w1, w2, w3 = philox(c0, none, none + at.to(tl.uint32), none + _COUPLED, k0, k1)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        s += _gumbel(tl.reshape(words, (BLOCK,)))
    peak = tl.max(s, 0)
    unsound = tl.sum((s != s).to(tl.int32)) > 0
    tl.store(peaks + row * C + tile, tl.where(unsound, float("nan"), peak))
    tl.store(picks + row * C + tile, tl.min(tl.where((s == peak) & (x < V), x, V - 1)))


@triton.jit
def _without(x, left, first, last, tokens, draw_rows, draw_laws, law, sequence):
    """Zero at the tokens of proposals first .. last - 1, of all (law -2) or of those from a law."""
    for d in range(first, last):
        token = tl.load(tokens + tl.load(draw_rows + d) - sequence - 1)
        taken = (law == -2) | (tl.load(draw_laws + d) == law)
        left = tl.where((x == token) & taken, 0.0, left)
    return left


@triton.jit
def _rest_of(
    q, law, V, first, last, tokens, draw_rows, draw_laws, sequence, BLOCK: tl.constexpr
):  # fmt: skip
    """The mass that earlier siblings left of their law, float64."""
    rest = tl.full((), 0.0, tl.float64)
    for begin in range(0, V, BLOCK):
        x = begin + tl.arange(0, BLOCK)
        held = tl.load(q + law * V + x, x < V, other=0.0).to(tl.float32)
        held = _without(x, held, first, last, tokens, draw_rows, draw_laws, law, sequence)
        rest += tl.sum(held).to(tl.float64)
    return rest


@triton.jit
def _remainder(
    x, e, total, q, V, used_laws, row, shares, first, last, tokens, draw_rows, draw_laws, sequence,
    PLACES: tl.constexpr, PLACES_HELD: tl.constexpr,
):  # fmt: skip
    """What rejected proposals first .. last - 1 left of p, on one tile."""
    left = e / total
    for s in tl.static_range(PLACES):
        share = tl.sum(tl.where(tl.arange(0, PLACES_HELD) == s, shares, 0.0))
        if share > 0:
            law = tl.load(used_laws + row * PLACES + s)
            left -= share * tl.load(q + law * V + x, (x < V) & (e > 0), other=0.0).to(tl.float32)
    left = tl.maximum(left, 0.0)
    return _without(x, left, first, last, tokens, draw_rows, draw_laws, -2, sequence)


@triton.jit
def _law_kernel(
    logits, stride, temperature, top_k, top_p, min_p, peaks, sums, list_tokens, list_scores,
    counts, dropped, parts, row_peaks, row_totals, row_cuts, row_lengths, sound, best, child,
    keys, positions, tokens, cu_rows, sequences, depths, cu_draws, draw_rows, draw_laws,
    draw_places, draw_copies, draw_reduced, used_laws, q, V, C,
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
    tl.store(row_peaks + row, peak)
    tl.store(row_totals + row, mass)
    tl.store(row_cuts + row, cut)
    tl.store(row_lengths + row, length)
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
            w0, w1, w2, w3 = philox(c0, none, none + at.to(tl.uint32), none + _COUPLED, k0, k1)
            o = x % 4
            word = tl.where(o == 0, w0, tl.where(o == 1, w1, tl.where(o == 2, w2, w3)))
            s = tl.where((lane < length) & (s >= cut), s + _gumbel(word), float("-inf"))
            top = tl.max(s, 0)
            token = tl.min(tl.where(s == top, x, V - 1)).to(tl.int64)
            found = tl.where(top > score_found, token, found)
            score_found = tl.maximum(top, score_found)
        tl.store(best + row, found)
    if (RULE == "walk") | (RULE == "recursive"):
        local = row - tl.load(cu_rows + sequence)
        first = tl.load(cu_draws + row)
        last = first
        taken = tl.full((), -1, tl.int64)
        shares = tl.zeros([PLACES_HELD], tl.float32)
        kept = tl.full((), 1.0, tl.float64)  # mass of the remainder
        if RULE == "recursive":
            end = tl.load(cu_draws + row + 1)
            while (last < end) & (taken < 0):
                node = tl.load(draw_rows + last)
                token = tl.load(tokens + node - sequence - 1)
                inside = (token >= 0) & (token < V)
                is_sound = is_sound & inside
                x = tl.minimum(tl.maximum(token, 0), V - 1)
                law = tl.load(draw_laws + last)
                copy = tl.load(draw_copies + last)
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
                        if tl.load(draw_reduced + last) > 0:
                            rest = _rest_of(
                                q, law, V, first, last, tokens, draw_rows, draw_laws, sequence,
                                BLOCK,
                            )  # fmt: skip
                            scale = 1 / rest
                            had = _without(
                                x, had, first, last, tokens, draw_rows, draw_laws, law, sequence
                            )
                        is_sound = is_sound & (had > 0)
                        drawn = had.to(tl.float64) * scale
                left = tl.where(copy > 0, 0.0, tl.maximum(left, 0.0))
                ratio = left.to(tl.float64) / kept / drawn
                coin = _coin(keys, positions, sequence, node - row + local, copy, _ACCEPT)
                if coin.to(tl.float64) < ratio:
                    taken = node
                else:
                    before = shares
                    own = tl.load(draw_places + last)
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
                            xs, e, mass, q, V, used_laws, row, shares, first, last, tokens,
                            draw_rows, draw_laws, sequence, PLACES, PLACES_HELD,
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
            tl.store(child + row, taken)
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
            bonus = _coin(keys, positions, sequence, local, first * 0, _BONUS)
            residual = _coin(keys, positions, sequence, local, first * 0, _RESIDUAL)
            coin = tl.where(last == first, bonus, residual)
            tile, left_over = pick_tile(weights, coin, TILES)
            xs, e = entries(
                logits, stride, list_tokens, list_scores, row, tile, length, C, peak, cut, heat,
                HAS_HEAT, SPARSE, BLOCK,
            )  # fmt: skip
            if RULE == "recursive":
                left_here = _remainder(
                    xs, e, mass, q, V, used_laws, row, shares, first, last, tokens, draw_rows,
                    draw_laws, sequence, PLACES, PLACES_HELD,
                )  # fmt: skip
                e = tl.where(is_plain, e, left_here)
            tl.store(best + row, pick_token(xs, e, left_over, BLOCK))
    tl.store(sound + row, is_sound.to(tl.int32))


@triton.jit
def _follow_kernel(
    peaks, picks, best, child, sound, tokens, cu_rows, parents, cu_draws, draw_rows, draw_laws, q,
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
            tl.store(best + row, token.to(tl.int64), row < end)
        tl.debug_barrier()
        is_sound = unsound == 0
    else:
        is_sound = tl.min(tl.load(sound + first + r, inside, other=1)) > 0
    is_node = inside & (r > 0)
    parent = tl.load(parents + first + r, is_node, other=-1)
    token = tl.load(tokens + first + r - sequence - 1, is_node, other=-1)
    if BY_CHILD:
        passed = is_node & (tl.load(child + parent, is_node, other=-1) == first + r)
    else:
        passed = is_node & (tl.load(best + parent, is_node, other=-1) == token)
    if CHECKED:
        is_sound = is_sound & (tl.min(tl.where(is_node, (token >= 0) & (token < V), 1)) > 0)
        if HAS_Q:
            for d in range(tl.load(cu_draws + first), tl.load(cu_draws + end), ROWS):
                at = d + r
                held = at < tl.load(cu_draws + end)
                node = tl.load(draw_rows + at, held, other=0)
                x = tl.load(tokens + node - sequence - 1, held, other=-1)
                law = tl.load(draw_laws + at, held, other=-1)
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
    emitted = tl.where(step == accepted, tl.load(best + at), emitted)
    tl.store(accepted_out + sequence, accepted)
    tl.store(tokens_out + sequence * (depth + 1) + step, emitted, step <= depth)
    tl.store(path_out + sequence * depth + step, path, step < depth)
    tl.store(valid_out + sequence, is_sound.to(tl.uint8))


@triton.jit
def _chain(
    sequence, first, end, logits, stride, temperature, row_peaks, row_totals, row_cuts, tokens,
    cu_draws, draw_laws, q, V, HAS_HEAT: tl.constexpr, HAS_Q: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of row r of a chain, for its node below: is there one, token, stored law, p, q, in order."""
    row = first + tl.arange(0, ROWS)
    has_node = row + 1 < end
    token = tl.load(tokens + row - sequence, has_node, other=0)
    x = tl.minimum(tl.maximum(token, 0), V - 1)
    heat = heat_of(temperature, sequence, HAS_HEAT)
    s = score(logits, stride, row, x, has_node, heat, HAS_HEAT)
    peak = tl.load(row_peaks + row, has_node, other=0.0)
    total = tl.load(row_totals + row, has_node, other=1.0)
    cut = tl.load(row_cuts + row, has_node, other=0.0)
    p = tl.where(s >= cut, tl.exp(s - peak) / total, 0.0)
    law = tl.load(draw_laws + tl.load(cu_draws + row, has_node, other=0), has_node, other=-1)
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
    coin = _coin(keys, positions, sequence, r + 1, r * 0, _ACCEPT)
    # u * q < p rather than u < p / q: u in [0, 1) must never accept p == 0
    failed = has_node & (coin * had >= p)
    return tl.min(tl.where(failed, r, tl.sum(has_node.to(tl.int32))))


@triton.jit
def _left_of(x, e, total, weight, token, law, q, V, HAS_Q: tl.constexpr):
    """[weight p - q]+ on one tile; q a point mass at the token where there is no law."""
    wanted = e / total * weight
    if HAS_Q:
        other = tl.load(q + law * V + x, (x < V) & (law >= 0) & (e > 0), other=0.0)
        wanted = tl.maximum(wanted - other.to(tl.float32), 0.0)
    return tl.where((law < 0) & (x == token), 0.0, wanted)


@triton.jit
def _residual_kernel(
    logits, stride, temperature, list_tokens, list_scores, parts, row_peaks, row_totals, row_cuts,
    row_lengths, keys, positions, tokens, cu_rows, sequences, cu_draws, draw_laws, q, V, C,
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
        sequence, first, end, logits, stride, temperature, row_peaks, row_totals, row_cuts, tokens,
        cu_draws, draw_laws, q, V, HAS_HEAT, HAS_Q, ROWS,
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
        length = tl.load(row_lengths + row)
        heat = heat_of(temperature, sequence, HAS_HEAT)
        xs, e = entries(
            logits, stride, list_tokens, list_scores, row, tile, length, C,
            tl.load(row_peaks + row), tl.load(row_cuts + row), heat, HAS_HEAT, SPARSE, BLOCK,
        )  # fmt: skip
        token = tl.sum(tl.where(r == at, x, 0))
        own = tl.sum(tl.where(r == at, law, 0))
        left = _left_of(xs, e, tl.load(row_totals + row), weight, token, own, q, V, HAS_Q)
        tl.store(parts + index * C + tile, tl.sum(left))


@triton.jit
def _chain_kernel(
    logits, stride, temperature, peaks, sums, list_tokens, list_scores, parts, plain_parts,
    row_peaks, row_totals, row_cuts, row_lengths, sound, keys, positions, tokens, cu_rows,
    cu_draws, draw_laws, q, accepted_out, tokens_out, path_out, valid_out, V, C, depth,
    HAS_HEAT: tl.constexpr, HAS_Q: tl.constexpr, SPARSE: tl.constexpr, WHOLE: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Token-wise speculative sampling, or block verification (WHOLE), of one chain."""
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_rows + sequence)
    end = tl.load(cu_rows + sequence + 1)
    has_node, x, law, p, had, is_sound = _chain(
        sequence, first, end, logits, stride, temperature, row_peaks, row_totals, row_cuts, tokens,
        cu_draws, draw_laws, q, V, HAS_HEAT, HAS_Q, ROWS,
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
        coin = _coin(keys, positions, sequence, r, r * 0, _ACCEPT)
        passed = (r > 0) & (r <= count) & (coin < h)
        # the LARGEST success: the coins are independent, and a failed one stops nothing
        accepted = tl.max(tl.where(passed, r, 0)).to(tl.int64)
        weight = tl.sum(tl.where(r == accepted, weights, 0.0))
        part = first + accepted
    else:
        accepted = _first_rejected(has_node, p, had, keys, positions, sequence, ROWS).to(tl.int64)
        part = sequence
    row = first + accepted
    peak = tl.load(row_peaks + row)
    total = tl.load(row_totals + row)
    cut = tl.load(row_cuts + row)
    length = tl.load(row_lengths + row)
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
            rest = _left_of(xs, e, total, weight, token, own, q, V, HAS_Q)
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
    bonus = _coin(keys, positions, sequence, accepted, accepted * 0, _BONUS)
    redrawn = _coin(keys, positions, sequence, accepted, accepted * 0, _RESIDUAL)
    coin = tl.where(is_whole, bonus, redrawn)
    tile, left_over = pick_tile(tl.where(use_p, plain, residual), coin, TILES)
    xs, e = entries(
        logits, stride, list_tokens, list_scores, row, tile, length, C, peak, cut, heat, HAS_HEAT,
        SPARSE, BLOCK,
    )  # fmt: skip
    rest = _left_of(xs, e, total, weight, token, own, q, V, HAS_Q)
    extra = pick_token(xs, tl.where(use_p, e, rest), left_over, BLOCK)
    step = tl.arange(0, STEPS)
    drafted = tl.load(tokens + first - sequence + step, step < accepted, other=-1)
    emitted = tl.where(step == accepted, extra, drafted)
    tl.store(accepted_out + sequence, accepted)
    tl.store(tokens_out + sequence * (depth + 1) + step, emitted, step <= depth)
    path = tl.where(step < accepted, first + 1 + step, -1)
    tl.store(path_out + sequence * depth + step, path, step < depth)
    rows_sound = tl.min(tl.load(sound + first + r, first + r < end, other=1)) > 0
    tl.store(valid_out + sequence, (is_sound & rows_sound).to(tl.uint8))


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
        self.best = empty(self.R)
        self.child = empty(self.R) if self.rule == "recursive" else None
        self.sound = empty(self.R, dtype=torch.int32)
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

    def _best(self) -> None:
        t, is_gumbel = self.trees, self.rule == "gumbel"
        heat = self.temperature if is_gumbel else None
        _best_kernel[(self.C, self.R)](
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
        self.row_peaks, self.row_totals, self.row_cuts = (
            empty(self.R, dtype=torch.float32) for _ in range(3)
        )
        self.row_lengths = empty(self.R, dtype=torch.int32)
        places = t.used_laws.shape[1] if self.rule == "recursive" else 0
        rule = self.rule if self.rule in ("walk", "gumbel", "recursive") else "law"
        _law_kernel[(self.R,)](
            self.logits, self.logits.stride(0), self.temperature, self.top_k, self.top_p,
            self.min_p, self.peaks, self.sums, self.list_tokens, self.list_scores, counts, dropped,
            self.parts, self.row_peaks, self.row_totals, self.row_cuts, self.row_lengths,
            self.sound, self.best, self.child, self.keys, self.positions, t.tokens, t.cu_rows,
            t.sequences, t.depths, t.cu_draws, t.draw_rows, t.draw_laws, t.draw_places,
            t.draw_copies, t.draw_reduced, t.used_laws, self.q, self.V, self.C, **flags,
            SPARSE=self.sparse, RULE=rule, PLACES=places,
            PLACES_HELD=triton.next_power_of_2(max(1, places)), TILES=self._tiles,
            BLOCK=self.block, **held_options(self.block),
        )  # fmt: skip

    def _follow(self, out: Verified, from_tiles: bool) -> None:
        t, tiles = self.trees, self._tiles
        _follow_kernel[(self.B,)](
            self.peaks, self.picks, self.best, self.child, self.sound, t.tokens, t.cu_rows,
            t.parents, t.cu_draws, t.draw_rows, t.draw_laws, self.q, out.accepted, out.tokens,
            out.path, out.valid, self.V, self.C, t.depth, FROM_TILES=from_tiles,
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
            _residual_kernel[(self.C, self.R if whole else self.B)](
                self.logits, self.logits.stride(0), self.temperature, self.list_tokens,
                self.list_scores, self.parts, self.row_peaks, self.row_totals, self.row_cuts,
                self.row_lengths, self.keys, self.positions, t.tokens, t.cu_rows, t.sequences,
                t.cu_draws, t.draw_laws, self.q, self.V, self.C, **shared, WHOLE=whole, ROWS=rows,
                BLOCK=self.block, num_warps=self._warps,
            )  # fmt: skip
        plain = self._empty(self.B, self.C, dtype=torch.float32) if self.sparse else None
        _chain_kernel[(self.B,)](
            self.logits, self.logits.stride(0), self.temperature, self.peaks, self.sums,
            self.list_tokens, self.list_scores, self.parts, plain, self.row_peaks, self.row_totals,
            self.row_cuts, self.row_lengths, self.sound, self.keys, self.positions, t.tokens,
            t.cu_rows, t.cu_draws, t.draw_laws, self.q, out.accepted, out.tokens, out.path,
            out.valid, self.V, self.C, t.depth, **shared, WHOLE=whole, TILES=self._tiles,
            ROWS=rows, STEPS=triton.next_power_of_2(t.depth + 1), BLOCK=self.block,
            **held_options(self.block),
        )  # fmt: skip


def warps(block: int) -> int:
    """Sixteen tokens per thread."""
    return max(1, min(8, block // 512))


def held_options(block: int) -> dict[str, int]:
    """Of kernels that hold several numbers of each token. Left to itself ptxas aims at two programs
    per multiprocessor and spills; there is one program per row or sequence."""
    limit = {"maxnreg": 255} if torch.version.hip is None else {}
    return {"num_warps": warps(block), **limit}


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


_F32 = (
    "peaks", "sums", "groups", "list_scores", "dropped", "parts", "plain_parts", "row_peaks",
    "row_totals", "row_cuts", "q",
)  # fmt: skip
_I32 = ("picks", "list_tokens", "counts", "row_lengths", "sound")
_F64 = ("temperature", "top_p", "min_p")


def configurations() -> list[Configuration]:
    """What the kernels are compiled with at a vocabulary of 152k tokens, for the compile test and
    the report: every launch of every rule, plain and with all of temperature, top-k, top-p, min-p.
    """
    found: dict[str, Configuration] = {}
    for logits in ("bf16", "fp16", "fp32"):
        for sparse in (False, True):
            for configuration in _configurations(logits, sparse):
                found.setdefault(configuration.name, configuration)
    return list(found.values())


def _configurations(logits: str, sparse: bool) -> Iterator[Configuration]:
    tiles, rows = 64, 64
    heat: dict[str, Any] = {"HAS_HEAT": sparse}
    limits: dict[str, Any] = {**heat, "HAS_TOP_K": sparse, "HAS_TOP_P": sparse, "HAS_MIN_P": sparse}
    name = f"{logits}, truncated" if sparse else logits
    shared: dict[str, Any] = {"BLOCK": BLOCK, "TILES": tiles}

    def made(title: str, kernel: Any, held: dict[str, Any], absent: set[str]) -> Configuration:
        signature = {}
        for argument in kernel.arg_names:
            kind = "*i64"
            if argument in ("V", "C", "depth"):
                kind = "i32"
            elif argument == "stride":
                kind = "i64"
            elif argument == "logits":
                kind = f"*{logits}"
            elif argument == "valid_out":
                kind = "*u8"
            for kinds, element in ((_F32, "*fp32"), (_I32, "*i32"), (_F64, "*fp64")):
                kind = element if argument in kinds else kind
            is_held = argument.isupper() and argument not in ("V", "C")
            signature[argument] = "constexpr" if is_held or argument in absent else kind
        constants = {a: held[a] for a in signature if a in held}
        constants.update({a: None for a in signature if a in absent})
        aligned = ("logits", "stride") if "logits" in signature else ()
        options = {"num_warps": warps(BLOCK)}
        if kernel in (_law_kernel, _chain_kernel):
            options = held_options(BLOCK)
        if kernel is _follow_kernel:
            options = {"num_warps": 4}
        return Configuration(f"{title} {name}", kernel, signature, constants, aligned, options)

    unlimited: set[str] = set() if sparse else {"temperature", "top_k", "top_p", "min_p"}
    unlisted: set[str] = (
        set() if sparse else {"groups", "list_tokens", "list_scores", "counts", "dropped"}
    )
    for rule in ("greedy", "gumbel"):
        held = {**shared, **heat, "GUMBEL": rule == "gumbel"}
        if rule == "greedy" and sparse:
            continue
        yield made(f"best {rule}", _best_kernel, held, unlimited)
    grouped = {**shared, **limits, "GROUP": GROUP, "GROUPS": 4096}
    yield made("stats", stats_kernel, grouped, unlimited | unlisted)
    if sparse:
        yield made("filter", filter_kernel, grouped, set())
    for rule, places in (
        ("law", 0),
        ("walk", 0),
        ("gumbel", 0),
        ("recursive", 1),
        ("recursive", 2),
    ):
        if rule == "gumbel" and not sparse:
            continue
        held = {
            **shared, **limits, "SPARSE": sparse, "RULE": rule, "PLACES": places,
            "PLACES_HELD": max(1, places),
        }  # fmt: skip
        absent = unlimited | unlisted | (set() if places else {"q", "child"})
        title = f"law {rule}{places or ''}"
        yield made(title, _law_kernel, held, absent)
    for rule in ("greedy", "walk", "recursive"):
        held = {
            **shared, "FROM_TILES": rule == "greedy", "BY_CHILD": rule == "recursive",
            "HAS_Q": rule == "walk", "CHECKED": rule == "walk", "ROWS": MOST_ROWS, "STEPS": 64,
            "SOME": 1024 // tiles,
        }  # fmt: skip
        unread = {"greedy": {"sound", "child", "q"}, "walk": {"peaks", "picks", "child"}}
        yield made(
            f"follow {rule}", _follow_kernel, held, unread.get(rule, {"peaks", "picks", "q"})
        )
    for rule in ("token", "block"):
        held = {
            **shared, **heat, "HAS_Q": True, "SPARSE": sparse, "WHOLE": rule == "block",
            "ROWS": rows, "STEPS": 64,
        }  # fmt: skip
        unplain: set[str] = set() if sparse else {"plain_parts"}
        if rule == "block" or not sparse:
            yield made(f"residual {rule}", _residual_kernel, held, unlimited | unlisted)
        yield made(f"chain {rule}", _chain_kernel, held, unlimited | unlisted | unplain)
