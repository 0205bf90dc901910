"""Gluon kernel of the bounds of keys' gradients, for the deterministic backward on Hopper.

A program's warps are in three parts. The producer copies tiles of 64 keys to shared memory, 256
columns of the latent at a time, each as soon as the columns that were there have served. Two
consumers take turns with the tiles: the tensor cores multiply for one while the other computes
exponentials.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..gluon import LATENT
from ..triton_kernels import most_of_keys
from .tiles import (
    BARRIER,
    PART_LOGITS,
    PART_ROWS,
    PART_THREADS,
    PART_WARPS,
    SHARED,
    K,
    L,
    N,
    R,
    W,
    copy_columns,
    fetch_query,
    named_keys,
    owned,
    place_of_rows,
    query_of_program,
    tell,
    zero_of,
)

COLUMNS = 256
"""Of the latent, in one buffer."""

_COLUMNS = gl.constexpr(COLUMNS)
_BUFFERS = gl.constexpr(LATENT // COLUMNS)
# In ``ready``: buffer i for a consumer is 2 i + its number; then what comes with the query.
_QUERY = gl.constexpr(2 * LATENT // COLUMNS)


@gluon.jit
def _produce(
    Q, LATENTS, TOPK, D_OUT, query, stride, present, HEADS: gl.constexpr,
    start, count, batch, b, tiles, q_latent, q_rope, d_out, latent, rope, ready, free,
):  # fmt: skip
    by_row: gl.constexpr = gl.SliceLayout(1, PART_ROWS)
    fetch_query(
        Q, D_OUT, query, stride, present, HEADS,
        q_latent.index(0), q_rope.index(0), d_out.index(0), ready.index(_QUERY),
    )  # fmt: skip
    key = named_keys(TOPK, 0, count, start, batch, b, HEADS, by_row)
    for tile in range(0, tiles):
        rows = LATENTS + key.to(gl.int64) * W
        for number in gl.static_range(_BUFFERS):
            mbarrier.wait(free.index(number), (tile + 1) % 2)
            copy_columns(rows, number * _COLUMNS, latent.index(number), _COLUMNS)
            if number == 0:
                copy_columns(rows, L, rope.index(0), R)
            filled = ready.index(2 * number + tile % 2)
            async_copy.mbarrier_arrive(filled, increment_count=False)
        key = named_keys(TOPK, (tile + 1) * K, count, start, batch, b, HEADS, by_row)


@gluon.jit
def _measure(
    TOPK, LSE, TERMS, BOUNDS, UNIT, query, stride, present, HEADS: gl.constexpr,
    start, count, batch, b, tiles, scale, scale_log2,
    q_latent, q_rope, d_out, latent, rope, ready, free, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Of every second tile."""
    by_head: gl.constexpr = gl.SliceLayout(1, PART_LOGITS)
    by_key: gl.constexpr = gl.SliceLayout(0, PART_LOGITS)
    own = place_of_rows(query, stride, present, HEADS, by_head)
    lse = gl.load(LSE + own)
    terms = gl.load(TERMS + own)
    unit = gl.load(UNIT)
    mbarrier.wait(ready.index(_QUERY), 0)
    most_q = _largest(q_rope.index(0))
    most_d_out = gl.full([N], 0.0, gl.float32, layout=gl.SliceLayout(1, PART_ROWS))
    for number in gl.static_range(_BUFFERS):
        q = q_latent.index(0).slice(number * _COLUMNS, _COLUMNS, dim=1)
        upstream = d_out.index(0).slice(number * _COLUMNS, _COLUMNS, dim=1)
        most_q = gl.maximum(most_q, _largest(q))
        most_d_out = gl.maximum(most_d_out, _largest(upstream))
    most_q = gl.convert_layout(most_q, by_head) * scale
    most_d_out = gl.convert_layout(most_d_out, by_head)
    for tile in range(CONSUMER, tiles, 2):
        zero = zero_of(tile)
        logits = gl.full([N, K], 0.0, gl.float32, layout=PART_LOGITS)
        d_probs = gl.full([N, K], 0.0, gl.float32, layout=PART_LOGITS)
        for number in gl.static_range(_BUFFERS):
            mbarrier.wait(ready.index(2 * number + CONSUMER), tile // 2 % 2)
            fence_async_shared()
            keys = latent.index(zero + number).permute((1, 0))
            q = q_latent.index(zero).slice(number * _COLUMNS, _COLUMNS, dim=1)
            upstream = d_out.index(zero).slice(number * _COLUMNS, _COLUMNS, dim=1)
            if number == 0:
                logits = warpgroup_mma(
                    q_rope.index(zero), rope.index(zero).permute((1, 0)), logits, is_async=True
                )
            logits = warpgroup_mma(q, keys, logits, is_async=True)
            d_probs = warpgroup_mma(upstream, keys, d_probs, is_async=True)
            if number > 0:
                logits, d_probs = warpgroup_mma_wait(num_outstanding=2, deps=[logits, d_probs])
                tell(free.index(number - 1))
        logits, d_probs = warpgroup_mma_wait(num_outstanding=0, deps=[logits, d_probs])
        tell(free.index(_BUFFERS - 1))
        probs = gl.exp2(logits * scale_log2 - lse[:, None])
        if HEADS != N:
            probs = gl.where(owned(TOPK, tile * K, count, HEADS, PART_LOGITS), probs, 0.0)
        most = most_of_keys(probs, d_probs, terms, most_q, most_d_out)
        inside = tile * K + gl.arange(0, K, layout=by_key) < count
        gl.atomic_add(
            BOUNDS + named_keys(TOPK, tile * K, count, start, batch, b, HEADS, by_key),
            (most * unit).to(gl.int64) + 1,
            mask=inside,
            sem="relaxed",
        )


@gluon.jit
def _largest(tile):
    """Of each row in shared memory."""
    tile = tile.load(PART_ROWS).to(gl.float32)
    return gl.max(gl.maximum(tile, -tile), 1)


@gluon.jit
def add_bounds(
    Q, LATENTS, TOPK, D_OUT, LSE, TERMS, BOUNDS, UNIT,
    query, stride, present, HEADS: gl.constexpr, start, count, batch, b, scale, scale_log2,
):  # fmt: skip
    """What 64 rows add at most to any number of a key's gradient; arguments as of
    ``work_in_parts``."""
    dtype: gl.constexpr = Q.dtype.element_ty
    tiles = (count + K - 1) // K
    q_latent = gl.allocate_shared_memory(dtype, [1, N, L], SHARED)
    q_rope = gl.allocate_shared_memory(dtype, [1, N, R], SHARED)
    d_out = gl.allocate_shared_memory(dtype, [1, N, L], SHARED)
    latent = gl.allocate_shared_memory(dtype, [_BUFFERS, K, _COLUMNS], SHARED)
    rope = gl.allocate_shared_memory(dtype, [1, K, R], SHARED)
    ready = gl.allocate_shared_memory(gl.int64, [_QUERY + 1, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [_BUFFERS, 1], BARRIER)
    for number in gl.static_range(_QUERY + 1):
        mbarrier.init(ready.index(number), count=PART_THREADS)
    for number in gl.static_range(_BUFFERS):
        mbarrier.init(free.index(number), count=1)
    gl.warp_specialize(
        [
            (
                _measure,
                (
                    TOPK, LSE, TERMS, BOUNDS, UNIT, query, stride, present, HEADS,
                    start, count, batch, b, tiles, scale, scale_log2,
                    q_latent, q_rope, d_out, latent, rope, ready, free, gl.constexpr(0),
                ),
            ),
            (
                _measure,
                (
                    TOPK, LSE, TERMS, BOUNDS, UNIT, query, stride, present, HEADS,
                    start, count, batch, b, tiles, scale, scale_log2,
                    q_latent, q_rope, d_out, latent, rope, ready, free, gl.constexpr(1),
                ),
            ),
            (
                _produce,
                (
                    Q, LATENTS, TOPK, D_OUT, query, stride, present, HEADS,
                    start, count, batch, b, tiles,
                    q_latent, q_rope, d_out, latent, rope, ready, free,
                ),
            ),
        ],
        [PART_WARPS, PART_WARPS],
        [208, 88],  # registers of a thread; the first consumer has what is left, 208
    )  # fmt: skip


@gluon.jit
def bounds(
    Q, LATENTS, TOPK, STARTS, POSITIONS, D_OUT, LSE, TERMS, BOUNDS, UNIT,
    rows, batch, groups, k, scale, scale_log2,
):  # fmt: skip
    """What one query adds at most to any number of a key's gradient, as ``backward`` adds it."""
    b, query, start, count, TOPK = query_of_program(TOPK, STARTS, POSITIONS, rows, batch, groups, k)
    add_bounds(
        Q, LATENTS, TOPK, D_OUT, LSE, TERMS, BOUNDS, UNIT,
        query, None, None, N, start, count, batch, b, scale, scale_log2,
    )  # fmt: skip
