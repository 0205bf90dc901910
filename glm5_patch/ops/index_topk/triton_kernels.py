"""Triton kernels of the index scores and of the selection from them.

Shapes: s queries (``rows``), t keys (``num_keys``), b sequences (``batch``); one launch works on a
block of the queries, from ``first_row`` on, of one sequence.

================== ========================================================================
Q, K               [s, b, HEADS, DIM] and [t, b, DIM], the indexer's queries and keys
WEIGHTS            fp32 [s, b, HEADS]
STARTS, POSITIONS  int32, the first and the last key that each query sees
SCORES             fp32 [block, t]
VALUES, NAMES      fp32 and int32 [block, CAPACITY], candidates and their places
COUNTS             int32 [block], how many candidates
BARS               fp32 [block], what candidates reach
SAMPLES            fp32 [block, width], scores of one key of every ``stride``
TOPK               int32 [block, k], places counted from the query's document start
================== ========================================================================

Tiles of ``scores``: KEYS x (QUERIES * HEADS) products. The selection has a program a query, which
reads BLOCK scores at a time, or keeps SAMPLE or LENGTH of them in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

cdiv, next_power_of_2 = triton.cdiv, triton.next_power_of_2


@triton.jit
def scores(
    Q, K, WEIGHTS, STARTS, POSITIONS, SCORES,
    first_row, end_row, batch, b, num_keys, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """SCORES[row - first_row, key] of the keys that the queries see; the rest stays as it is."""
    first = first_row + tl.program_id(0) * QUERIES
    row = first + tl.arange(0, QUERIES)
    inside = row < end_row
    start = tl.load(STARTS + row, mask=inside, other=2147483647)
    last = tl.load(POSITIONS + row, mask=inside, other=-1)
    # Programs of one block of queries share its keys out between them.
    begin = tl.min(start, 0) // KEYS
    tiles = tl.cdiv(tl.max(last, 0) + 1, KEYS) - begin
    share = tl.cdiv(tiles, tl.num_programs(1))
    begin += tl.program_id(1) * share
    end = begin + tl.minimum(share, tiles - tl.program_id(1) * share)
    lines = SCORES + (row - first_row).to(tl.int64) * num_keys
    q, weights = _queries(Q, WEIGHTS, first, end_row, batch, b, scale, HEADS, DIM, QUERIES)
    for tile in tl.range(begin, end, num_stages=STAGES):
        _store_tile(
            lines, K, q, weights, tile, start, last, batch, b, num_keys,
            HEADS, DIM, QUERIES, KEYS, PRECISION,
        )  # fmt: skip


@triton.jit
def _queries(
    Q, WEIGHTS, first, end_row, batch, b, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """All heads of some queries, [QUERIES * HEADS, DIM] for one product with each tile of keys, and
    their weights."""
    row = first + tl.arange(0, QUERIES * HEADS) // HEADS
    head = tl.arange(0, QUERIES * HEADS) % HEADS
    query = (row * batch + b).to(tl.int64) * HEADS + head
    dim = tl.arange(0, DIM)
    own = row < end_row
    q = tl.load(Q + query[:, None] * DIM + dim[None, :], mask=own[:, None], other=0.0)
    return q, tl.load(WEIGHTS + query, mask=own, other=0.0) * scale


@triton.jit
def _store_tile(
    lines, K, q, weights, tile, start, last, batch, b, num_keys,
    HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of a tile of keys, of those queries that see them, into their lines. The sum over
    the heads is in the same order for each."""
    key = tile * KEYS + tl.arange(0, KEYS)
    offsets = (key * batch + b).to(tl.int64) * DIM
    dim = tl.arange(0, DIM)
    k = tl.load(K + offsets[:, None] + dim[None, :], mask=key[:, None] < num_keys, other=0.0)
    products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    products = tl.maximum(products, 0.0) * weights[None, :]
    scores = tl.sum(tl.reshape(products, (KEYS, QUERIES, HEADS)), 2)
    scores = tl.where(scores == 0, 0.0, scores)  # a negative weight makes it -0.0
    seen = (key[:, None] >= start[None, :]) & (key[:, None] <= last[None, :])
    tl.store(lines[None, :] + key[:, None], scores, mask=seen)


@triton.jit
def _ordered(bits):
    """Between the bits of a float and an integer that orders as the float does; its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _rank(score):
    """An integer that orders as the score does; below the largest one, which a NaN may be. Both
    zeros have the same."""
    score = tl.where(score == 0, 0.0, score)
    return tl.minimum(_ordered(score.to(tl.int32, bitcast=True)), 2147483646)


@triton.jit
def _between(low, high, count_low, count_high, k):
    """A value strictly between two others that about k scores reach, by linear interpolation."""
    low_value = _ordered(low).to(tl.float32, bitcast=True)
    high_value = _ordered(high).to(tl.float32, bitcast=True)
    share = (count_low - k) / (count_low - count_high)
    guess = _ordered((low_value + (high_value - low_value) * share).to(tl.int32, bitcast=True))
    return tl.minimum(tl.maximum(guess, low + 1), high - 1)


@triton.jit
def _next(low, high, count_low, count_high, k, step):
    """Where to count next: by interpolation, and every third step halfway, which bounds them."""
    if step % 3 == 2:
        middle = (low & high) + ((low ^ high) >> 1)
    else:
        middle = _between(low, high, count_low, count_high, k)
    return middle


@triton.jit
def _narrowed(low, high, count_low, count_high, middle, reached, k, slack):
    """What is left of the search once ``reached`` scores are known to reach ``middle``."""
    if reached >= k:
        low, count_low = middle, reached
        if reached <= k + slack:
            high = middle + 1
    else:
        high, count_high = middle, reached
    return low, high, count_low, count_high


@triton.jit
def _kth_largest(value, inside, count, k, slack):
    """A value that at least k of ``count`` reach, and how many do: the largest such, or the first
    found that at most k + slack reach."""
    low = tl.min(tl.where(inside, value, 2147483647), 0)
    value = tl.where(inside, value, -2147483648)
    high = tl.max(value, 0) + 1
    count_low, count_high = count, 0
    step = 0
    while low + 1 < high:
        middle = _next(low, high, count_low, count_high, k, step)
        reached = tl.sum((value >= middle).to(tl.int32), 0)
        low, high, count_low, count_high = _narrowed(
            low, high, count_low, count_high, middle, reached, k, slack
        )
        step += 1
    return low, count_low


@triton.jit
def _kth_largest_of_line(line, count, k, BLOCK: tl.constexpr):
    """As ``_kth_largest`` without slack, reading the scores again for every step."""
    low, high = 2147483647, -2147483648
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        value = _value(line, place, place < count)
        low = tl.minimum(low, tl.min(tl.where(place < count, value, 2147483647), 0))
        high = tl.maximum(high, tl.max(tl.where(place < count, value, -2147483648), 0))
    high += 1
    count_low, count_high = count, 0
    step = 0
    while low + 1 < high:
        middle = _next(low, high, count_low, count_high, k, step)
        reached = 0
        for first in range(0, count, BLOCK):
            place = first + tl.arange(0, BLOCK)
            value = _value(line, place, place < count)
            reached += tl.sum(((value >= middle) & (place < count)).to(tl.int32), 0)
        low, high, count_low, count_high = _narrowed(
            low, high, count_low, count_high, middle, reached, k, 0
        )
        step += 1
    return low, count_low


@triton.jit
def _value(line, place, inside):
    """The ranks of the scores at these places of a line."""
    return _rank(tl.load(line + place, mask=inside, other=0))


@triton.jit
def _count_above(line, count, kth, BLOCK: tl.constexpr):
    """How many of a line's first ``count`` ranks are above ``kth``."""
    above = 0
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        value = _value(line, place, place < count)
        above += tl.sum(((value > kth) & (place < count)).to(tl.int32), 0)
    return above


@triton.jit
def _write_chosen(
    line, names, out, count, kth, reached, k, NAMED: tl.constexpr, BLOCK: tl.constexpr
):
    """The places, or their names, of what reaches the k-th largest, ascending; of its equals only
    the first, if there are too many."""
    spare = k
    if reached > k:
        spare = k - _count_above(line, count, kth, BLOCK)
    written, equals = 0, 0
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        value = _value(line, place, place < count)
        chosen = (value >= kth) & (place < count)
        if reached > k:
            equal = chosen & (value == kth)
            order = equals + tl.cumsum(equal.to(tl.int32), 0)
            equals += tl.sum(equal.to(tl.int32), 0)
            chosen = chosen & ((value > kth) | (order <= spare))
        number = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        if NAMED:
            place = tl.load(names + place, mask=chosen, other=0)
        tl.store(out + number, place, mask=chosen & (number < k))
        written += tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def _bar(value, inside, count, visible, k, DEVIATIONS: tl.constexpr):
    """What somewhat more than k of a row's ``visible`` scores reach, by a sample of ``count``."""
    expected = k * count / visible
    wanted = (expected + DEVIATIONS * tl.sqrt(expected)).to(tl.int32) + 1
    bar, _ = _kth_largest(value, inside, count, tl.minimum(wanted, count), wanted // 16)
    return bar


@triton.jit
def bars(
    SAMPLES, STARTS, POSITIONS, BARS, width, k, stride,
    LENGTH: tl.constexpr, CAPACITY: tl.constexpr, DEVIATIONS: tl.constexpr,
):  # fmt: skip
    """The scores from which on a row's keys are candidates; of rows for which there is room,
    every score."""
    row = tl.program_id(0)
    start = tl.load(STARTS + row)
    end = tl.load(POSITIONS + row) + 1
    bar = float("-inf")
    if end - start > CAPACITY:
        first = (start + stride - 1) // stride
        count = end // stride - first
        place = tl.arange(0, LENGTH)
        value = _value(SAMPLES + row.to(tl.int64) * width + first, place, place < count)
        rank = _bar(value, place < count, count, end - start, k, DEVIATIONS)
        bar = _ordered(rank).to(tl.float32, bitcast=True)
    tl.store(BARS + row, bar)


@triton.jit
def candidates(
    SCORES, STARTS, POSITIONS, VALUES, NAMES, COUNTS, num_keys, k,
    SAMPLE: tl.constexpr, CAPACITY: tl.constexpr, DEVIATIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The scores, and their places, above a bar that a sample says somewhat more than k reach.

    COUNTS gets how many, or -1 where the sample misled: fewer than k, or more than there is room.
    """
    row = tl.program_id(0)
    start = tl.load(STARTS + row)
    visible = tl.load(POSITIONS + row) - start + 1
    line = SCORES + row.to(tl.int64) * num_keys + start
    bar = -2147483648
    if visible > CAPACITY:
        number = tl.arange(0, SAMPLE)
        stride = visible // SAMPLE
        value = _value(line, number * stride + number * 7919 % stride, number >= 0)
        bar = _bar(value, number >= 0, SAMPLE, visible, k, DEVIATIONS)
    values = VALUES + row.to(tl.int64) * CAPACITY
    names = NAMES + row.to(tl.int64) * CAPACITY
    written = 0
    if visible > k:
        for first in range(0, visible, BLOCK):
            place = first + tl.arange(0, BLOCK)
            score = tl.load(line + place, mask=place < visible, other=0)
            chosen = (_rank(score) >= bar) & (place < visible)
            number = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
            chosen_fit = chosen & (number < CAPACITY)
            tl.store(values + number, score, mask=chosen_fit)
            tl.store(names + number, place, mask=chosen_fit)
            written += tl.sum(chosen.to(tl.int32), 0)
    found = (written >= k) & (written <= CAPACITY)
    tl.store(COUNTS + row, tl.where(found, written, -1))


@triton.jit
def topk(
    SCORES, STARTS, POSITIONS, VALUES, NAMES, COUNTS, TOPK, num_keys, k,
    LENGTH: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The places of the k largest of a row's visible scores, ascending; the lower wins among
    equals. LENGTH scores are kept in registers: the whole row's, or the candidates'. Rows that
    their sample misled are left to ``topk_of_misled``."""
    row = tl.program_id(0)
    start = tl.load(STARTS + row)
    visible = tl.load(POSITIONS + row) - start + 1
    out = TOPK + row.to(tl.int64) * k
    place = tl.arange(0, LENGTH)
    if visible <= k:
        for first in range(0, k, BLOCK):
            number = first + tl.arange(0, BLOCK)
            tl.store(out + number, tl.where(number < visible, number, -1), mask=number < k)
    elif CANDIDATES:
        count = tl.load(COUNTS + row)
        if count >= 0:
            values = VALUES + row.to(tl.int64) * LENGTH
            value = _value(values, place, place < count)
            kth, reached = _kth_largest(value, place < count, count, k, 0)
            names = NAMES + row.to(tl.int64) * LENGTH
            _write_chosen(values, names, out, count, kth, reached, k, True, BLOCK)
    else:
        line = SCORES + row.to(tl.int64) * num_keys + start
        value = _value(line, place, place < visible)
        kth, reached = _kth_largest(value, place < visible, visible, k, 0)
        _write_chosen(line, line, out, visible, kth, reached, k, False, BLOCK)


@triton.jit
def topk_of_misled(
    SCORES, STARTS, POSITIONS, COUNTS, TOPK, num_keys, k, BLOCK: tl.constexpr
):  # fmt: skip
    """As ``topk``, from all scores of those rows that see more than k keys, and whose count of
    candidates is -1."""
    row = tl.program_id(0)
    line, out = SCORES + row.to(tl.int64) * num_keys, TOPK + row.to(tl.int64) * k
    _topk_if_misled(STARTS, POSITIONS, COUNTS, row, line, out, k, BLOCK)


@triton.jit
def _topk_if_misled(STARTS, POSITIONS, COUNTS, row, line, out, k, BLOCK: tl.constexpr):
    """As ``topk_of_misled``, of one row, whose scores of all keys are in ``line``."""
    start = tl.load(STARTS + row)
    visible = tl.load(POSITIONS + row) - start + 1
    if visible > k:
        if tl.load(COUNTS + row) < 0:
            line += start
            kth, reached = _kth_largest_of_line(line, visible, k, BLOCK)
            _write_chosen(line, line, out, visible, kth, reached, k, False, BLOCK)


@triton.jit
def scores_and_topk_of_misled(
    Q, K, WEIGHTS, STARTS, POSITIONS, COUNTS, SCORES, TOPK,
    rows, batch, b, num_keys, k, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``topk_of_misled``, of all queries of a sequence, whose scores are computed here: into
    QUERIES lines of SCORES that are this program's, one group of queries after another."""
    begin_row, stride = tl.program_id(0) * QUERIES, tl.num_programs(0) * QUERIES
    own = SCORES + begin_row.to(tl.int64) * num_keys
    out = TOPK + begin_row.to(tl.int64) * k
    lines = own + tl.arange(0, QUERIES) * num_keys
    for first in range(begin_row, rows, stride):
        row = first + tl.arange(0, QUERIES)
        start = tl.load(STARTS + row, mask=row < rows, other=0)
        last = tl.load(POSITIONS + row, mask=row < rows, other=-1)
        count = tl.load(COUNTS + row, mask=row < rows, other=0)
        misled = (last - start >= k) & (count < 0)
        start = tl.where(misled, start, 2147483647)
        begin = tl.min(start, 0) // KEYS
        end = tl.cdiv(tl.max(tl.where(misled, last, -1), 0) + 1, KEYS)
        if begin < end:
            q, weights = _queries(Q, WEIGHTS, first, rows, batch, b, scale, HEADS, DIM, QUERIES)
            for tile in tl.range(begin, end, num_stages=STAGES):
                _store_tile(
                    lines, K, q, weights, tile, start, last, batch, b, num_keys,
                    HEADS, DIM, QUERIES, KEYS, PRECISION,
                )  # fmt: skip
            tl.debug_barrier()  # each warp reads what others have written
            for number in range(QUERIES):
                if first + number < rows:
                    line, top = own + number * num_keys, out + number * k
                    _topk_if_misled(
                        STARTS, POSITIONS, COUNTS, first + number, line, top, k, BLOCK
                    )  # fmt: skip
            tl.debug_barrier()  # before the lines have the next scores
        out += stride.to(tl.int64) * k
