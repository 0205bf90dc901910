"""Gluon kernel of the target of the indexer's loss, for GLM-5's own shape on Hopper; tiles are
those of ``sparse_attention.gluon_kernels``, pointers and shapes of ``triton_kernels``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..sparse_attention.gluon import KEYS
from ..sparse_attention.gluon_kernels.tiles import (
    SHARED,
    K,
    L,
    N,
    R,
    W,
    copy_rows,
    keys_of_tile,
    query_of_program,
    thread_barrier,
)

# Of 8 warps that do the same: 4 x 16 rows of an accumulator, and 2 halves of its columns.
_LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, KEYS // 2, 16]))
_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))


@gluon.jit
def _gather(LATENTS, key, latent, rope):
    """Start copying rows of the latent, by key, to shared memory."""
    copy_rows(LATENTS + key.to(gl.int64) * W, latent, rope, _ROWS)
    async_copy.commit_group()


@gluon.jit
def _load_rows(Q, row, latent, rope):
    """Copy rows of queries to shared memory."""
    columns: gl.constexpr = gl.SliceLayout(0, _ROWS)
    q = Q + row[:, None] * W
    latent.store(gl.load(q + gl.arange(0, L, layout=columns)[None, :]))
    rope.store(gl.load(q + L + gl.arange(0, R, layout=columns)[None, :]))


@gluon.jit
def head_sums(
    Q, LATENTS, TOPK, STARTS, POSITIONS, LSE, SUMS,
    rows, batch, k, scale_log2,
):  # fmt: skip
    """Attention probabilities of one query, summed over its heads. The rows of the next tile are
    copied while this one is multiplied."""
    dtype: gl.constexpr = Q.dtype.element_ty
    by_row: gl.constexpr = gl.SliceLayout(1, _ROWS)
    by_head: gl.constexpr = gl.SliceLayout(1, _LOGITS)
    by_key: gl.constexpr = gl.SliceLayout(0, _LOGITS)
    b, query, start, count, TOPK = query_of_program(TOPK, STARTS, POSITIONS, rows, batch, 1, k)
    line = SUMS + (b.to(gl.int64) * rows + query // N // batch) * k
    tiles = (count + K - 1) // K

    q_latent = gl.allocate_shared_memory(dtype, [N, L], SHARED)
    q_rope = gl.allocate_shared_memory(dtype, [N, R], SHARED)
    latents = gl.allocate_shared_memory(dtype, [2, K, L], SHARED)
    ropes = gl.allocate_shared_memory(dtype, [2, K, R], SHARED)
    key = keys_of_tile(TOPK, 0, count, start, batch, b, by_row)
    _gather(LATENTS, key, latents.index(0), ropes.index(0))
    key = keys_of_tile(TOPK, K, count, start, batch, b, by_row)
    _load_rows(Q, query + gl.arange(0, N, layout=by_row), q_latent, q_rope)
    lse = gl.load(LSE + query + gl.arange(0, N, layout=by_head))
    zeros = gl.full([N, K], 0.0, gl.float32, layout=_LOGITS)
    for tile in range(0, tiles):
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        latent = latents.index(tile % 2)
        rope = ropes.index(tile % 2)
        if tile + 1 < tiles:
            _gather(LATENTS, key, latents.index(1 - tile % 2), ropes.index(1 - tile % 2))
        key = keys_of_tile(TOPK, (tile + 2) * K, count, start, batch, b, by_row)
        logits = warpgroup_mma(
            q_latent, latent.permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        logits = warpgroup_mma(q_rope, rope.permute((1, 0)), logits, is_async=True)
        logits = warpgroup_mma_wait(num_outstanding=0, deps=[logits])
        sums = gl.sum(gl.exp2(logits * scale_log2 - lse[:, None]), 0)
        place = tile * K + gl.arange(0, K, layout=by_key)
        gl.store(line + place, sums, mask=place < count)
