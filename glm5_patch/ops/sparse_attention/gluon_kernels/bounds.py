"""Gluon kernel of the bounds of keys' gradients, for the deterministic backward on Hopper."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..triton_kernels import most_of_keys
from .tiles import (
    LOGITS,
    ROWS,
    SHARED,
    K,
    L,
    N,
    R,
    gather,
    load_rows,
    named_keys,
    owned,
    place_of_rows,
    query_of_program,
    start_logits,
    thread_barrier,
)


@gluon.jit
def add_bounds(
    Q, LATENTS, TOPK, D_OUT, LSE, TERMS, BOUNDS, UNIT,
    query, stride, present, HEADS: gl.constexpr, start, count, batch, b, scale, scale_log2,
):  # fmt: skip
    """What 64 rows add at most to any number of a key's gradient; arguments as of
    ``work_in_parts``."""
    dtype: gl.constexpr = Q.dtype.element_ty
    by_row: gl.constexpr = gl.SliceLayout(1, ROWS)
    by_column: gl.constexpr = gl.SliceLayout(0, ROWS)
    by_head: gl.constexpr = gl.SliceLayout(1, LOGITS)
    by_key: gl.constexpr = gl.SliceLayout(0, LOGITS)
    q_latent = gl.allocate_shared_memory(dtype, [N, L], SHARED)
    q_rope = gl.allocate_shared_memory(dtype, [N, R], SHARED)
    d_out = gl.allocate_shared_memory(dtype, [N, L], SHARED)
    latent = gl.allocate_shared_memory(dtype, [K, L], SHARED)
    rope = gl.allocate_shared_memory(dtype, [K, R], SHARED)
    gather(LATENTS, named_keys(TOPK, 0, count, start, batch, b, HEADS, by_row), latent, rope)
    key = named_keys(TOPK, K, count, start, batch, b, HEADS, by_row)
    row = place_of_rows(query, stride, present, HEADS, by_row)
    load_rows(Q, row, q_latent, q_rope)
    column = gl.arange(0, L, layout=by_column)
    d_out.store(gl.load((D_OUT + row * L)[:, None] + column[None, :]))
    thread_barrier()
    most_q = gl.maximum(_largest(q_latent.load(ROWS)), _largest(q_rope.load(ROWS)))
    most_q = gl.convert_layout(most_q, by_head) * scale
    most_d_out = gl.convert_layout(_largest(d_out.load(ROWS)), by_head)
    own = place_of_rows(query, stride, present, HEADS, by_head)
    lse = gl.load(LSE + own)
    terms = gl.load(TERMS + own)
    unit = gl.load(UNIT)
    zeros = gl.full([N, K], 0.0, gl.float32, layout=LOGITS)
    for first in range(0, count, K):
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        logits = start_logits(q_latent, q_rope, latent, rope, zeros)
        d_probs = warpgroup_mma(d_out, latent.permute((1, 0)), zeros, use_acc=False, is_async=True)
        logits, d_probs = warpgroup_mma_wait(num_outstanding=0, deps=[logits, d_probs])
        thread_barrier()
        if first + K < count:
            gather(LATENTS, key, latent, rope)
        key = named_keys(TOPK, first + 2 * K, count, start, batch, b, HEADS, by_row)
        probs = gl.exp2(logits * scale_log2 - lse[:, None])
        if HEADS != N:
            probs = gl.where(owned(TOPK, first, count, HEADS, LOGITS), probs, 0.0)
        most = most_of_keys(probs, d_probs, terms, most_q, most_d_out)
        inside = first + gl.arange(0, K, layout=by_key) < count
        gl.atomic_add(
            BOUNDS + named_keys(TOPK, first, count, start, batch, b, HEADS, by_key),
            (most * unit).to(gl.int64) + 1,
            mask=inside,
            sem="relaxed",
        )


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


@gluon.jit
def _largest(tile):
    tile = tile.to(gl.float32)
    return gl.max(gl.maximum(tile, -tile), 1)
