"""Triton kernels of sparse attention: absorbed queries over selected rows of the latent.

A program works on one query and up to 64 of its heads. All heads share the query's keys, and a key
is its own value (the latent without the rotary part), so one gathered tile serves both products.
The latent comes in pieces of its columns, so that no product has all of them in registers.

Shapes: s queries (``rows``), t keys, b sequences (``batch``), n heads, k places of a top-k.
WIDTH = LATENT + ROPE.

==================== ======================================================================
Q, D_Q               [s, b, n, WIDTH], absorbed queries and their gradient
LATENTS, D_LATENTS   [t, b, WIDTH], keys and their gradient, fp32; with UNITS int64, half as wide
UNITS                fp32 [t, b], of ``ExactPairs``; or None
BOUNDS, UNIT         int64 [t, b] and fp32 [], ``ExactSums`` of bounds of the keys' gradients
TOPK                 int32 [b, s, k], counted from the query's document start, -1: no key
STARTS, POSITIONS    int32 [s], the first and the last key that each query sees
OUT, D_OUT           [s, b, n, LATENT]
LSE, TERMS           fp32 [s, b, n], log2-sum-exp2 of the logits; out . d_out
UNITED               int32 [s / QUERIES, b]: 0 where this kernel is to compute; None: everywhere
==================== ======================================================================

Tiles: HEADS (of one program) x KEYS (of one step), in pieces of the WIDTH columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

cdiv, next_power_of_2 = triton.cdiv, triton.next_power_of_2


@triton.jit
def load_columns(base, offsets, first, WIDTH: tl.constexpr, mask):
    """[rows, WIDTH] from column ``first`` on of the rows at ``offsets``; zeros where masked."""
    columns = first + tl.arange(0, WIDTH)
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def gather_columns(base, offsets, first, WIDTH: tl.constexpr):
    """As ``load_columns``, of rows that all exist."""
    columns = first + tl.arange(0, WIDTH)
    return tl.load(base + offsets[:, None] + columns[None, :])


@triton.jit
def store_columns(base, offsets, first, WIDTH: tl.constexpr, tile, mask):
    """Store ``tile`` [rows, WIDTH] where ``load_columns`` would read it."""
    columns = first + tl.arange(0, WIDTH)
    place = base + offsets[:, None] + columns[None, :]
    tl.store(place, tile.to(base.dtype.element_ty), mask=mask[:, None])


@triton.jit
def query_of_program(rows, batch, heads, HEADS: tl.constexpr):
    """Row and batch of this program, the places of its heads in [s, b, n], and which there are.
    The last rows come first: they have most keys."""
    row = rows - 1 - tl.program_id(0) // batch
    b = tl.program_id(0) % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    return row, b, (row * batch + b).to(tl.int64) * heads + head, head < heads


@triton.jit
def keys_of_query(STARTS, POSITIONS, row, b, rows, k):
    """The first key that a query sees, how many its top-k names, and where that begins in TOPK."""
    start = tl.load(STARTS + row)
    count = tl.minimum(tl.load(POSITIONS + row) - start + 1, k)
    return start, count, (b.to(tl.int64) * rows + row) * k


@triton.jit
def tile_of_keys(TOPK, first, count, start, batch, b, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of the latents that places ``first`` to ``first + KEYS`` of the top-k name, and which
    of these places name one; both [KEYS]."""
    place = first + tl.arange(0, KEYS)
    local = tl.load(TOPK + place, mask=place < count, other=-1)
    return (tl.maximum(local, 0) + start).to(tl.int64) * batch * WIDTH + b * WIDTH, local >= 0


@triton.jit
def project(
    ROWS_IN, PROJECTION, ROWS_OUT,
    rows, row_in, head_in, head_of, inner_of, column_of, row_out, head_out,
    INNER: tl.constexpr, COLUMNS: tl.constexpr, COPIED: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A product of each head, [rows, INNER] by [INNER, COLUMNS]; the COPIED columns after INNER are
    copied behind it. Strides of the three tensors are given by their dimensions. A program computes
    ROWS of one head and PART of its columns, adding up STEP at a time."""
    parts: tl.constexpr = (COLUMNS + PART - 1) // PART
    programs: tl.constexpr = parts + (1 if COPIED else 0)
    part = tl.program_id(0) % programs
    head = tl.program_id(1)
    row = tl.program_id(0) // programs * ROWS + tl.arange(0, ROWS)
    there = row < rows
    ROWS_IN += row.to(tl.int64)[:, None] * row_in + head * head_in
    ROWS_OUT += row.to(tl.int64)[:, None] * row_out + head * head_out
    if part == parts:
        if COPIED:
            column = tl.arange(0, COPIED)[None, :]
            copied = tl.load(ROWS_IN + INNER + column, mask=there[:, None])
            tl.store(ROWS_OUT + COLUMNS + column, copied, mask=there[:, None])
        return
    column = part * PART + tl.arange(0, PART)
    PROJECTION += head.to(tl.int64) * head_of + column[None, :] * column_of
    found = tl.zeros([ROWS, PART], tl.float32)
    for first in range(0, INNER, STEP):
        inner = first + tl.arange(0, STEP)
        left = tl.load(
            ROWS_IN + inner[None, :], mask=there[:, None] & (inner < INNER)[None, :], other=0.0
        )
        right = tl.load(
            PROJECTION + inner[:, None] * inner_of,
            mask=(inner < INNER)[:, None] & (column < COLUMNS)[None, :],
            other=0.0,
        )
        found = tl.dot(left, right, found, input_precision=PRECISION)
    tl.store(
        ROWS_OUT + column[None, :],
        found.to(ROWS_OUT.dtype.element_ty),
        mask=there[:, None] & (column < COLUMNS)[None, :],
    )


@triton.jit
def logits_of(q_0, q_1, q_rope, latent_0, latent_1, rope, PRECISION: tl.constexpr):
    """[HEADS, KEYS], of queries and keys in two halves of the latent and the rotary part."""
    logits = tl.dot(q_0, tl.trans(latent_0), input_precision=PRECISION)
    logits = tl.dot(q_1, tl.trans(latent_1), logits, input_precision=PRECISION)
    return tl.dot(q_rope, tl.trans(rope), logits, input_precision=PRECISION)


@triton.jit
def forward(
    Q, LATENTS, TOPK, STARTS, POSITIONS, OUT, LSE,
    rows, batch, heads, k, scale_log2,
    LATENT: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one query's HEADS over its keys, KEYS at a time, with a running softmax."""
    WIDTH: tl.constexpr = LATENT + ROPE
    HALF: tl.constexpr = LATENT // 2
    row, b, query, own = query_of_program(rows, batch, heads, HEADS)
    q_0 = load_columns(Q, query * WIDTH, 0, HALF, own)  # [HEADS, HALF]
    q_1 = load_columns(Q, query * WIDTH, HALF, HALF, own)
    q_rope = load_columns(Q, query * WIDTH, LATENT, ROPE, own)  # [HEADS, ROPE]
    start, count, line = keys_of_query(STARTS, POSITIONS, row, b, rows, k)
    TOPK += line
    largest = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out_0 = tl.zeros([HEADS, HALF], tl.float32)
    out_1 = tl.zeros([HEADS, HALF], tl.float32)
    for first in tl.range(0, count, KEYS, num_stages=STAGES):
        key, valid = tile_of_keys(TOPK, first, count, start, batch, b, KEYS, WIDTH)
        latent_0 = gather_columns(LATENTS, key, 0, HALF)  # [KEYS, HALF]
        latent_1 = gather_columns(LATENTS, key, HALF, HALF)
        rope = gather_columns(LATENTS, key, LATENT, ROPE)  # [KEYS, ROPE]
        logits = logits_of(q_0, q_1, q_rope, latent_0, latent_1, rope, PRECISION) * scale_log2
        logits = tl.where(valid[None, :], logits, -1e30)
        larger = tl.maximum(largest, tl.max(logits, 1))
        # A tile without a valid key would otherwise count exp2(-1e30 + 1e30).
        probs = tl.where(valid[None, :], tl.exp2(logits - larger[:, None]), 0.0)
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(probs, 1)
        probs = probs.to(latent_0.dtype)
        # The latent is the value too.
        out_0 = tl.dot(probs, latent_0, out_0 * shrink[:, None], input_precision=PRECISION)
        out_1 = tl.dot(probs, latent_1, out_1 * shrink[:, None], input_precision=PRECISION)
        largest = larger
    total = tl.where(total > 0, total, 1.0)
    store_columns(OUT, query * LATENT, 0, HALF, out_0 / total[:, None], own)
    store_columns(OUT, query * LATENT, HALF, HALF, out_1 / total[:, None], own)
    tl.store(LSE + query, largest + tl.log2(total), mask=own)


@triton.jit
def row_terms(OUT, D_OUT, TERMS, LATENT: tl.constexpr, ROWS: tl.constexpr, rows):
    """Row term of the softmax's backward: out . d_out, one number a query and head."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = row.to(tl.int64) * LATENT
    out = load_columns(OUT, offsets, 0, LATENT, row < rows).to(tl.float32)
    d_out = load_columns(D_OUT, offsets, 0, LATENT, row < rows).to(tl.float32)
    tl.store(TERMS + row, tl.sum(out * d_out, 1), mask=row < rows)


@triton.jit
def _add_to_keys(
    D_LATENTS, key, first, PART: tl.constexpr, WIDTH: tl.constexpr, d_logits, q, probs, d_out,
    valid, UNITS, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a query adds to the gradient of its keys, in PART columns of the latent: as keys by
    ``d_logits`` [KEYS, HEADS] and ``q`` [HEADS, PART], as values by ``probs`` and ``d_out``."""
    part = tl.dot(d_logits, q, input_precision=PRECISION)
    part = tl.dot(probs, d_out, part, input_precision=PRECISION)
    _add_rows(D_LATENTS, key, first, PART, WIDTH, part, valid, UNITS)


@triton.jit
def _add_rows(D_LATENTS, key, first, PART: tl.constexpr, WIDTH: tl.constexpr, tile, valid, UNITS):
    """Add ``tile`` [KEYS, PART] to the rows at ``key``; in their UNITS if there are some."""
    if UNITS is None:
        place = D_LATENTS + key[:, None] + (first + tl.arange(0, PART))[None, :]
        tl.atomic_add(place, tile, mask=valid[:, None], sem="relaxed")
    else:
        units = tl.load(UNITS + key // WIDTH)
        pairs = tl.reshape(tile * units[:, None], [tile.shape[0], PART // 2, 2])
        lower, upper = tl.split(pairs)
        place = D_LATENTS + (key // 2)[:, None] + (first // 2 + tl.arange(0, PART // 2))[None, :]
        integers = rounded(lower) + (rounded(upper) << 32)
        tl.atomic_add(place, integers, mask=valid[:, None], sem="relaxed")


@triton.jit
def rounded(number):
    """To the nearest integer, of 32 bits, in 64."""
    return (number + tl.where(number > 0, 0.5, -0.5)).to(tl.int32).to(tl.int64)


@triton.jit
def bounds(
    Q, LATENTS, TOPK, STARTS, POSITIONS, D_OUT, LSE, TERMS, BOUNDS, UNIT,
    rows, batch, heads, k, scale, scale_log2, UNITED,
    LATENT: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """What one query adds at most to any number of a key's gradient, as ``backward`` adds it."""
    WIDTH: tl.constexpr = LATENT + ROPE
    HALF: tl.constexpr = LATENT // 2
    row, b, query, own = query_of_program(rows, batch, heads, HEADS)
    if UNITED is not None:
        if tl.load(UNITED + row // QUERIES * batch + b) > 0:
            return
    q_0 = load_columns(Q, query * WIDTH, 0, HALF, own)  # [HEADS, HALF]
    q_1 = load_columns(Q, query * WIDTH, HALF, HALF, own)
    q_rope = load_columns(Q, query * WIDTH, LATENT, ROPE, own)
    d_out_0 = load_columns(D_OUT, query * LATENT, 0, HALF, own)
    d_out_1 = load_columns(D_OUT, query * LATENT, HALF, HALF, own)
    most_q = tl.maximum(tl.maximum(_largest(q_0), _largest(q_1)), _largest(q_rope))
    most_d_out = tl.maximum(_largest(d_out_0), _largest(d_out_1))
    lse = tl.load(LSE + query, mask=own, other=0.0)
    terms = tl.load(TERMS + query, mask=own, other=0.0)
    unit = tl.load(UNIT)
    start, count, line = keys_of_query(STARTS, POSITIONS, row, b, rows, k)
    TOPK += line
    for first in tl.range(0, count, KEYS, num_stages=STAGES):
        key, valid = tile_of_keys(TOPK, first, count, start, batch, b, KEYS, WIDTH)
        latent_0 = gather_columns(LATENTS, key, 0, HALF)  # [KEYS, HALF]
        latent_1 = gather_columns(LATENTS, key, HALF, HALF)
        rope = gather_columns(LATENTS, key, LATENT, ROPE)
        logits = logits_of(q_0, q_1, q_rope, latent_0, latent_1, rope, PRECISION)
        d_probs = tl.dot(d_out_0, tl.trans(latent_0), input_precision=PRECISION)
        d_probs = tl.dot(d_out_1, tl.trans(latent_1), d_probs, input_precision=PRECISION)
        probs = tl.exp2(logits * scale_log2 - lse[:, None])
        most = most_of_keys(probs, d_probs, terms, most_q * scale, most_d_out)  # [KEYS]
        tl.atomic_add(
            BOUNDS + key // WIDTH, (most * unit).to(tl.int64) + 1, mask=valid, sem="relaxed"
        )


@triton.jit
def _largest(tile):
    return tl.max(tl.abs(tile.to(tl.float32)), 1)


@triton.jit
def most_of_keys(probs, d_probs, terms, most_q, most_d_out):
    """The sum over heads of what each adds at most, with room for rounding of the probabilities and
    of a difference that cancels. Probabilities and their gradients [heads, keys], the rest [heads].
    """
    difference = tl.abs(d_probs - terms[:, None])
    difference += (tl.abs(d_probs) + tl.abs(terms)[:, None]) * (1 / 8192)
    most = probs * (difference * most_q[:, None] + most_d_out[:, None])
    return tl.sum(most, 0) * (1 + 1 / 64)


@triton.jit
def backward(
    Q, LATENTS, TOPK, STARTS, POSITIONS, D_OUT, LSE, TERMS, D_Q, D_LATENTS, UNITS,
    rows, batch, heads, k, scale, scale_log2, UNITED,
    LATENT: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Gradients of one query, and what it adds to those of its keys."""
    WIDTH: tl.constexpr = LATENT + ROPE
    PART: tl.constexpr = LATENT // 4
    row, b, query, own = query_of_program(rows, batch, heads, HEADS)
    if UNITED is not None:
        if tl.load(UNITED + row // QUERIES * batch + b) > 0:
            return
    q_0 = load_columns(Q, query * WIDTH, 0, PART, own)  # [HEADS, PART]
    q_1 = load_columns(Q, query * WIDTH, PART, PART, own)
    q_2 = load_columns(Q, query * WIDTH, 2 * PART, PART, own)
    q_3 = load_columns(Q, query * WIDTH, 3 * PART, PART, own)
    q_rope = load_columns(Q, query * WIDTH, LATENT, ROPE, own)
    d_out_0 = load_columns(D_OUT, query * LATENT, 0, PART, own)
    d_out_1 = load_columns(D_OUT, query * LATENT, PART, PART, own)
    d_out_2 = load_columns(D_OUT, query * LATENT, 2 * PART, PART, own)
    d_out_3 = load_columns(D_OUT, query * LATENT, 3 * PART, PART, own)
    lse = tl.load(LSE + query, mask=own, other=0.0)
    terms = tl.load(TERMS + query, mask=own, other=0.0)
    start, count, line = keys_of_query(STARTS, POSITIONS, row, b, rows, k)
    TOPK += line
    d_q_0 = tl.zeros([HEADS, PART], tl.float32)
    d_q_1 = tl.zeros([HEADS, PART], tl.float32)
    d_q_2 = tl.zeros([HEADS, PART], tl.float32)
    d_q_3 = tl.zeros([HEADS, PART], tl.float32)
    d_q_rope = tl.zeros([HEADS, ROPE], tl.float32)
    for first in tl.range(0, count, KEYS, num_stages=STAGES):
        key, valid = tile_of_keys(TOPK, first, count, start, batch, b, KEYS, WIDTH)
        latent_0 = gather_columns(LATENTS, key, 0, PART)  # [KEYS, PART]
        latent_1 = gather_columns(LATENTS, key, PART, PART)
        latent_2 = gather_columns(LATENTS, key, 2 * PART, PART)
        latent_3 = gather_columns(LATENTS, key, 3 * PART, PART)
        rope = gather_columns(LATENTS, key, LATENT, ROPE)
        logits = tl.dot(q_0, tl.trans(latent_0), input_precision=PRECISION)  # [HEADS, KEYS]
        logits = tl.dot(q_1, tl.trans(latent_1), logits, input_precision=PRECISION)
        logits = tl.dot(q_2, tl.trans(latent_2), logits, input_precision=PRECISION)
        logits = tl.dot(q_3, tl.trans(latent_3), logits, input_precision=PRECISION)
        logits = tl.dot(q_rope, tl.trans(rope), logits, input_precision=PRECISION)
        d_probs = tl.dot(d_out_0, tl.trans(latent_0), input_precision=PRECISION)
        d_probs = tl.dot(d_out_1, tl.trans(latent_1), d_probs, input_precision=PRECISION)
        d_probs = tl.dot(d_out_2, tl.trans(latent_2), d_probs, input_precision=PRECISION)
        d_probs = tl.dot(d_out_3, tl.trans(latent_3), d_probs, input_precision=PRECISION)
        probs = tl.exp2(logits * scale_log2 - lse[:, None])
        probs = tl.where(valid[None, :], probs, 0.0)
        d_logits = (probs * (d_probs - terms[:, None]) * scale).to(latent_0.dtype)
        probs = probs.to(latent_0.dtype)
        d_q_0 = tl.dot(d_logits, latent_0, d_q_0, input_precision=PRECISION)
        d_q_1 = tl.dot(d_logits, latent_1, d_q_1, input_precision=PRECISION)
        d_q_2 = tl.dot(d_logits, latent_2, d_q_2, input_precision=PRECISION)
        d_q_3 = tl.dot(d_logits, latent_3, d_q_3, input_precision=PRECISION)
        d_q_rope = tl.dot(d_logits, rope, d_q_rope, input_precision=PRECISION)
        d_logits = tl.trans(d_logits)
        probs = tl.trans(probs)
        _add_to_keys(
            D_LATENTS, key, 0, PART, WIDTH, d_logits, q_0, probs, d_out_0, valid, UNITS,
            PRECISION,
        )  # fmt: skip
        _add_to_keys(
            D_LATENTS, key, PART, PART, WIDTH, d_logits, q_1, probs, d_out_1, valid, UNITS,
            PRECISION,
        )  # fmt: skip
        _add_to_keys(
            D_LATENTS, key, 2 * PART, PART, WIDTH, d_logits, q_2, probs, d_out_2, valid, UNITS,
            PRECISION,
        )  # fmt: skip
        _add_to_keys(
            D_LATENTS, key, 3 * PART, PART, WIDTH, d_logits, q_3, probs, d_out_3, valid, UNITS,
            PRECISION,
        )  # fmt: skip
        part = tl.dot(d_logits, q_rope, input_precision=PRECISION)
        _add_rows(D_LATENTS, key, LATENT, ROPE, WIDTH, part, valid, UNITS)
    store_columns(D_Q, query * WIDTH, 0, PART, d_q_0, own)
    store_columns(D_Q, query * WIDTH, PART, PART, d_q_1, own)
    store_columns(D_Q, query * WIDTH, 2 * PART, PART, d_q_2, own)
    store_columns(D_Q, query * WIDTH, 3 * PART, PART, d_q_3, own)
    store_columns(D_Q, query * WIDTH, LATENT, ROPE, d_q_rope, own)


@triton.jit
def flat_keys(
    TOPK, STARTS, KEYS, rows, batch, k, BLOCK: tl.constexpr
):  # fmt: skip
    """KEYS int32 [s, b, k]: the top-k as rows of the latent seen as [t * b, WIDTH]; -1: no key.
    A program names BLOCK of one query."""
    row, b = tl.program_id(0) // batch, tl.program_id(0) % batch
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < k
    local = tl.load(TOPK + (b.to(tl.int64) * rows + row) * k + place, mask=inside, other=-1)
    key = (local + tl.load(STARTS + row)) * batch + b
    place += tl.program_id(0).to(tl.int64) * k
    tl.store(KEYS + place, tl.where(local < 0, -1, key), mask=inside)
