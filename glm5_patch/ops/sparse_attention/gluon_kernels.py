"""Gluon kernel of sparse attention's backward for GLM-5's own shape on Hopper, and what its other
Gluon kernels share.

In Gluon, because the layouts matter: the two warpgroups of a program share every product out by
columns, where Triton gives both the same 64 x 64 logits to compute.

A program works on one query and 64 heads. Pointers and their shapes are those of
``triton_kernels``, with n = ``groups`` * 64; tiles of keys are [64, 512] of the latent and [64, 64]
of the rotary part, in shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .gluon import HEADS, KEYS, LATENT, ROPE, WIDTH
from .triton_kernels import most_of_keys

# Triton 3.6 has other names than the versions after it.
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

_N = gl.constexpr(HEADS)
_L = gl.constexpr(LATENT)
_R = gl.constexpr(ROPE)
_W = gl.constexpr(WIDTH)
_K = gl.constexpr(KEYS)

PART = ROPE
"""Columns of the latent's gradient that are computed, and added to memory, at a time."""

# 8 warps: 4 x 16 rows of an accumulator, and 2 halves of its columns.
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, KEYS // 2, 16]))
_WIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, LATENT // 2, 16]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


def accumulator(columns: int) -> gl.NVMMADistributedLayout:
    """Of a product [64, columns]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 2], [16, columns // 2, 16])


def fours(columns: int) -> gl.DistributedLinearLayout:
    """Of an accumulator [64, columns] whose columns ``_in_fours`` has renamed: four values of a
    thread are neighbours, for one 16-byte atomic, and eight threads add to one line of 128."""
    further = [[0, 1 << bit] for bit in range(5, columns.bit_length() - 2)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [8, 0], *further],
        lane_bases=[[0, 4], [0, 8], [0, 16], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [0, columns // 2]],
        block_bases=[],
        shape=[64, columns],
    )


def pairs(columns: int) -> gl.DistributedLinearLayout:
    """Of every second column of an accumulator [64, columns]: four threads have four neighbours,
    32 bytes of 64-bit integers, for one transaction."""
    further = [[0, 1 << bit] for bit in range(2, columns.bit_length() - 3)]
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0], *further],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [0, columns // 4]],
        block_bases=[],
        shape=[64, columns // 2],
    )


_PART = gl.constexpr(PART)
_ACCUMULATOR = gl.constexpr(accumulator(PART))
_FOURS = gl.constexpr(fours(PART))
_PAIRS = gl.constexpr(pairs(PART))


@gluon.jit
def query_of_program(TOPK, STARTS, POSITIONS, rows, batch, groups, k):
    """Batch of this program, the place of its first head in [s, b, n], where its document starts,
    how many keys it has and which. The last rows come first: they have most keys."""
    row = rows - 1 - gl.program_id(0) // batch
    b = gl.program_id(0) % batch
    query = ((row * batch + b) * groups + gl.program_id(1)).to(gl.int64) * _N
    start = gl.load(STARTS + row)
    count = gl.minimum(gl.load(POSITIONS + row) - start + 1, k)
    return b, query, start, count, TOPK + (b.to(gl.int64) * rows + row) * k


@gluon.jit
def gather(LATENTS, key, latent, rope):
    """Start copying rows of the latent, by key, to shared memory."""
    columns: gl.constexpr = gl.SliceLayout(0, ROWS)
    row = LATENTS + key.to(gl.int64)[:, None] * _W
    async_load(latent, row + gl.arange(0, _L, layout=columns)[None, :])
    async_load(rope, row + _L + gl.arange(0, _R, layout=columns)[None, :])
    async_copy.commit_group()


@gluon.jit
def keys_of_tile(TOPK, first, count, start, batch, b, layout: gl.constexpr):
    """Rows of the latent that a tile of the top-k names; past its end, some row."""
    place = first + gl.arange(0, _K, layout=layout)
    local = gl.load(TOPK + place, mask=place < count, other=0)
    return (local + start) * batch + b


@gluon.jit
def load_query(Q, query, latent, rope):
    """Copy the heads of a query to shared memory."""
    columns: gl.constexpr = gl.SliceLayout(0, ROWS)
    q = Q + (query + gl.arange(0, _N, layout=gl.SliceLayout(1, ROWS)))[:, None] * _W
    latent.store(gl.load(q + gl.arange(0, _L, layout=columns)[None, :]))
    rope.store(gl.load(q + _L + gl.arange(0, _R, layout=columns)[None, :]))


@gluon.jit
def start_logits(q_latent, q_rope, latent, rope, zeros):
    """Start the products of a query's heads and a tile of keys, [64, 64]; not to be read before a
    ``warpgroup_mma_wait``."""
    logits = warpgroup_mma(q_latent, latent.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope, rope.permute((1, 0)), logits, is_async=True)


@gluon.jit
def _add_to_keys(D_LATENTS, UNITS, TOPK, first, count, start, batch, b, tile, column):
    """Add ``tile`` [64, 64] to the gradient of a tile's keys, from ``column`` on: in fours, the
    columns 8 h + 2 r + e of every 16 renamed to 4 r + 2 h + e; or with ``UNITS`` in pairs."""
    if UNITS is None:
        tile = tile.reshape([_K, _PART // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
        tile = gl.convert_layout(tile.reshape([_K, _PART]), _FOURS)
        by_key: gl.constexpr = gl.SliceLayout(1, _FOURS)
        key = keys_of_tile(TOPK, first, count, start, batch, b, by_key)
        inside = first + gl.arange(0, _K, layout=by_key) < count
        place = column + gl.arange(0, _PART, layout=gl.SliceLayout(0, _FOURS))
        place = key[:, None] * _W + place[None, :]
        gl.atomic_add(D_LATENTS + place, tile, mask=inside[:, None], sem="relaxed")
    else:
        by_key: gl.constexpr = gl.SliceLayout(1, _PAIRS)
        key = keys_of_tile(TOPK, first, count, start, batch, b, by_key)
        units = gl.load(UNITS + key)[:, None]
        lower, upper = gl.split(tile.reshape([_K, _PART // 2, 2]))
        lower = _rounded(gl.convert_layout(lower, _PAIRS) * units)
        upper = _rounded(gl.convert_layout(upper, _PAIRS) * units)
        inside = first + gl.arange(0, _K, layout=by_key) < count
        place = column // 2 + gl.arange(0, _PART // 2, layout=gl.SliceLayout(0, _PAIRS))
        place = key[:, None] * (_W // 2) + place[None, :]
        integers = lower + (upper << 32)
        gl.atomic_add(D_LATENTS + place, integers, mask=inside[:, None], sem="relaxed")


@gluon.jit
def _rounded(number):
    """To the nearest integer, of 32 bits, in 64."""
    return (number + gl.where(number > 0, 0.5, -0.5)).to(gl.int32).to(gl.int64)


@gluon.jit
def backward(
    Q, LATENTS, TOPK, STARTS, POSITIONS, D_OUT, LSE, TERMS, D_Q, D_LATENTS, UNITS,
    rows, batch, groups, k, scale, scale_log2,
):  # fmt: skip
    """The rows of the next tile are copied while the gradients of this one's keys are added up."""
    dtype: gl.constexpr = Q.dtype.element_ty
    by_row: gl.constexpr = gl.SliceLayout(1, ROWS)
    by_column: gl.constexpr = gl.SliceLayout(0, ROWS)
    by_head: gl.constexpr = gl.SliceLayout(1, LOGITS)
    b, query, start, count, TOPK = query_of_program(TOPK, STARTS, POSITIONS, rows, batch, groups, k)
    tiles = (count + _K - 1) // _K

    q_latent = gl.allocate_shared_memory(dtype, [_N, _L], SHARED)
    q_rope = gl.allocate_shared_memory(dtype, [_N, _R], SHARED)
    d_out = gl.allocate_shared_memory(dtype, [_N, _L], SHARED)
    latent = gl.allocate_shared_memory(dtype, [_K, _L], SHARED)
    rope = gl.allocate_shared_memory(dtype, [_K, _R], SHARED)
    probs_shared = gl.allocate_shared_memory(dtype, [_N, _K], SHARED)
    d_logits_shared = gl.allocate_shared_memory(dtype, [_N, _K], SHARED)
    gather(LATENTS, keys_of_tile(TOPK, 0, count, start, batch, b, by_row), latent, rope)
    key = keys_of_tile(TOPK, _K, count, start, batch, b, by_row)
    head = gl.arange(0, _N, layout=by_row)
    column = gl.arange(0, _L, layout=by_column)
    rope_column = gl.arange(0, _R, layout=by_column)
    load_query(Q, query, q_latent, q_rope)
    d_out.store(gl.load(D_OUT + (query + head)[:, None] * _L + column[None, :]))

    place = gl.arange(0, _K, layout=gl.SliceLayout(0, LOGITS))
    own = query + gl.arange(0, _N, layout=by_head)
    lse = gl.load(LSE + own)
    terms = gl.load(TERMS + own)
    zeros = gl.full([_N, _K], 0.0, gl.float32, layout=LOGITS)
    zeros_of_part = gl.full([_K, _PART], 0.0, gl.float32, layout=_ACCUMULATOR)
    d_q_latent = warpgroup_mma_init(gl.full([_N, _L], 0.0, gl.float32, layout=_WIDE))
    d_q_rope = warpgroup_mma_init(gl.full([_N, _R], 0.0, gl.float32, layout=LOGITS))
    for tile in range(0, tiles):
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        logits = start_logits(q_latent, q_rope, latent, rope, zeros)
        d_probs = warpgroup_mma(d_out, latent.permute((1, 0)), zeros, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(num_outstanding=1, deps=[logits])
        probs = gl.exp2(logits * scale_log2 - lse[:, None])
        probs = gl.where((tile * _K + place)[None, :] < count, probs, 0.0)
        probs_shared.store(probs.to(dtype))
        d_probs = warpgroup_mma_wait(num_outstanding=0, deps=[d_probs])
        d_logits = probs * (d_probs - terms[:, None]) * scale
        d_logits_shared.store(d_logits.to(dtype))
        fence_async_shared()
        thread_barrier()
        d_q_latent = warpgroup_mma(d_logits_shared, latent, d_q_latent, is_async=True)
        d_q_rope = warpgroup_mma(d_logits_shared, rope, d_q_rope, is_async=True)
        part = warpgroup_mma(
            d_logits_shared.permute((1, 0)), q_rope, zeros, use_acc=False, is_async=True
        )
        latent_done, rope_done, part = warpgroup_mma_wait(
            num_outstanding=0, deps=[d_q_latent, d_q_rope, part]
        )
        d_q_latent = warpgroup_mma_init(latent_done)
        d_q_rope = warpgroup_mma_init(rope_done)
        thread_barrier()
        if tile + 1 < tiles:  # on its way while the gradients of this tile are added up
            gather(LATENTS, key, latent, rope)
        key = keys_of_tile(TOPK, (tile + 2) * _K, count, start, batch, b, by_row)
        _add_to_keys(D_LATENTS, UNITS, TOPK, tile * _K, count, start, batch, b, part, _L)
        for number in gl.static_range(_L // _PART):
            part = warpgroup_mma(
                d_logits_shared.permute((1, 0)),
                q_latent.slice(number * _PART, _PART, dim=1),
                zeros_of_part,
                use_acc=False,
                is_async=True,
            )
            part = warpgroup_mma(
                probs_shared.permute((1, 0)),
                d_out.slice(number * _PART, _PART, dim=1),
                part,
                is_async=True,
            )
            part = warpgroup_mma_wait(num_outstanding=0, deps=[part])
            _add_to_keys(
                D_LATENTS, UNITS, TOPK, tile * _K, count, start, batch, b, part, number * _PART
            )
        thread_barrier()
    latent_done, rope_done = warpgroup_mma_wait(num_outstanding=0, deps=[d_q_latent, d_q_rope])
    thread_barrier()
    q_latent.store(latent_done.to(dtype))
    q_rope.store(rope_done.to(dtype))
    thread_barrier()
    d_q = D_Q + (query + head)[:, None] * _W
    gl.store(d_q + column[None, :], q_latent.load(ROWS))
    gl.store(d_q + _L + rope_column[None, :], q_rope.load(ROWS))


@gluon.jit
def bounds(
    Q, LATENTS, TOPK, STARTS, POSITIONS, D_OUT, LSE, TERMS, BOUNDS, UNIT,
    rows, batch, groups, k, scale, scale_log2,
):  # fmt: skip
    """What one query adds at most to any number of a key's gradient, as ``backward`` adds it."""
    dtype: gl.constexpr = Q.dtype.element_ty
    by_row: gl.constexpr = gl.SliceLayout(1, ROWS)
    by_column: gl.constexpr = gl.SliceLayout(0, ROWS)
    by_head: gl.constexpr = gl.SliceLayout(1, LOGITS)
    by_key: gl.constexpr = gl.SliceLayout(0, LOGITS)
    b, query, start, count, TOPK = query_of_program(TOPK, STARTS, POSITIONS, rows, batch, groups, k)

    q_latent = gl.allocate_shared_memory(dtype, [_N, _L], SHARED)
    q_rope = gl.allocate_shared_memory(dtype, [_N, _R], SHARED)
    d_out = gl.allocate_shared_memory(dtype, [_N, _L], SHARED)
    latent = gl.allocate_shared_memory(dtype, [_K, _L], SHARED)
    rope = gl.allocate_shared_memory(dtype, [_K, _R], SHARED)
    gather(LATENTS, keys_of_tile(TOPK, 0, count, start, batch, b, by_row), latent, rope)
    key = keys_of_tile(TOPK, _K, count, start, batch, b, by_row)
    head = gl.arange(0, _N, layout=by_row)
    load_query(Q, query, q_latent, q_rope)
    column = gl.arange(0, _L, layout=by_column)
    d_out.store(gl.load(D_OUT + (query + head)[:, None] * _L + column[None, :]))
    thread_barrier()
    most_q = gl.maximum(_largest(q_latent.load(ROWS)), _largest(q_rope.load(ROWS)))
    most_q = gl.convert_layout(most_q, by_head) * scale
    most_d_out = gl.convert_layout(_largest(d_out.load(ROWS)), by_head)
    own = query + gl.arange(0, _N, layout=by_head)
    lse = gl.load(LSE + own)
    terms = gl.load(TERMS + own)
    unit = gl.load(UNIT)
    zeros = gl.full([_N, _K], 0.0, gl.float32, layout=LOGITS)
    for first in range(0, count, _K):
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        logits = start_logits(q_latent, q_rope, latent, rope, zeros)
        d_probs = warpgroup_mma(d_out, latent.permute((1, 0)), zeros, use_acc=False, is_async=True)
        logits, d_probs = warpgroup_mma_wait(num_outstanding=0, deps=[logits, d_probs])
        thread_barrier()
        if first + _K < count:
            gather(LATENTS, key, latent, rope)
        key = keys_of_tile(TOPK, first + 2 * _K, count, start, batch, b, by_row)
        probs = gl.exp2(logits * scale_log2 - lse[:, None])
        most = most_of_keys(probs, d_probs, terms, most_q, most_d_out)
        inside = first + gl.arange(0, _K, layout=by_key) < count
        gl.atomic_add(
            BOUNDS + keys_of_tile(TOPK, first, count, start, batch, b, by_key),
            (most * unit).to(gl.int64) + 1,
            mask=inside,
            sem="relaxed",
        )


@gluon.jit
def _largest(tile):
    tile = tile.to(gl.float32)
    return gl.max(gl.maximum(tile, -tile), 1)
