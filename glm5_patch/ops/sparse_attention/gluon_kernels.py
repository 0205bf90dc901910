"""Gluon kernels of sparse attention for GLM-5's own shape on Hopper.

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

_N = gl.constexpr(HEADS)
_L = gl.constexpr(LATENT)
_R = gl.constexpr(ROPE)
_W = gl.constexpr(WIDTH)
_K = gl.constexpr(KEYS)

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


def sectors(columns: int) -> gl.DistributedLinearLayout:
    """Of an accumulator [64, columns] whose columns ``_in_sectors`` has renamed: four threads have
    four neighbours, 32 bytes of 64-bit integers, for one transaction."""
    further = [[0, 1 << bit] for bit in range(3, columns.bit_length() - 2)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 4], [8, 0], *further],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [0, columns // 2]],
        block_bases=[],
        shape=[64, columns],
    )


_ROPE_IN_FOURS = gl.constexpr(fours(ROPE))
_ROPE_IN_SECTORS = gl.constexpr(sectors(ROPE))


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
    async_copy.async_copy_global_to_shared(latent, row + gl.arange(0, _L, layout=columns)[None, :])
    async_copy.async_copy_global_to_shared(
        rope, row + _L + gl.arange(0, _R, layout=columns)[None, :]
    )
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
def forward(
    Q, LATENTS, TOPK, STARTS, POSITIONS, OUT, LSE,
    rows, batch, groups, k, scale_log2,
):  # fmt: skip
    """Two buffers of keys: the rows of the next tile are copied while this one is multiplied."""
    dtype: gl.constexpr = Q.dtype.element_ty
    by_row: gl.constexpr = gl.SliceLayout(1, ROWS)
    by_column: gl.constexpr = gl.SliceLayout(0, ROWS)
    by_head: gl.constexpr = gl.SliceLayout(1, LOGITS)
    b, query, start, count, TOPK = query_of_program(TOPK, STARTS, POSITIONS, rows, batch, groups, k)
    tiles = (count + _K - 1) // _K

    q_latent = gl.allocate_shared_memory(dtype, [_N, _L], SHARED)
    q_rope = gl.allocate_shared_memory(dtype, [_N, _R], SHARED)
    latents = gl.allocate_shared_memory(dtype, [2, _K, _L], SHARED)
    ropes = gl.allocate_shared_memory(dtype, [2, _K, _R], SHARED)
    gather(
        LATENTS,
        keys_of_tile(TOPK, 0, count, start, batch, b, by_row),
        latents.index(0),
        ropes.index(0),
    )
    key = keys_of_tile(TOPK, _K, count, start, batch, b, by_row)
    head = gl.arange(0, _N, layout=by_row)
    column = gl.arange(0, _L, layout=by_column)
    load_query(Q, query, q_latent, q_rope)

    place = gl.arange(0, _K, layout=gl.SliceLayout(0, LOGITS))
    largest = gl.full([_N], -1e30, gl.float32, layout=by_head)
    total = gl.full([_N], 0.0, gl.float32, layout=by_head)
    zeros = gl.full([_N, _K], 0.0, gl.float32, layout=LOGITS)
    out = gl.full([_N, _L], 0.0, gl.float32, layout=_WIDE)
    for tile in range(0, tiles):
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        latent = latents.index(tile % 2)
        rope = ropes.index(tile % 2)
        if tile + 1 < tiles:
            gather(LATENTS, key, latents.index(1 - tile % 2), ropes.index(1 - tile % 2))
        key = keys_of_tile(TOPK, (tile + 2) * _K, count, start, batch, b, by_row)
        logits = start_logits(q_latent, q_rope, latent, rope, zeros)
        logits = warpgroup_mma_wait(num_outstanding=0, deps=[logits])
        logits = gl.where((tile * _K + place)[None, :] < count, logits * scale_log2, -1e30)
        larger = gl.maximum(largest, gl.max(logits, 1))
        probs = gl.exp2(logits - larger[:, None])
        shrink = gl.exp2(largest - larger)
        total = total * shrink + gl.sum(probs, 1)
        largest = larger
        out = out * gl.convert_layout(shrink, gl.SliceLayout(1, _WIDE))[:, None]
        probs = gl.convert_layout(probs.to(dtype), gl.DotOperandLayout(0, _WIDE, 2))
        out = warpgroup_mma(probs, latent, out, is_async=True)
        out = warpgroup_mma_wait(num_outstanding=0, deps=[out])
    total = gl.where(total > 0, total, 1.0)  # a query without keys
    out = out / gl.convert_layout(total, gl.SliceLayout(1, _WIDE))[:, None]
    gl.thread_barrier()
    q_latent.store(out.to(dtype))
    gl.thread_barrier()
    gl.store(OUT + (query + head)[:, None] * _L + column[None, :], q_latent.load(ROWS))
    lse = largest + gl.log2(total)
    gl.store(LSE + query + gl.arange(0, _N, layout=by_head), lse)


@gluon.jit
def _in_fours(tile, columns: gl.constexpr, layout: gl.constexpr):
    """Rename the columns of an accumulator: 8 h + 2 r + e of every 16 becomes 4 r + 2 h + e."""
    tile = tile.reshape([_K, columns // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
    return gl.convert_layout(tile.reshape([_K, columns]), layout)


@gluon.jit
def _in_sectors(tile, columns: gl.constexpr, layout: gl.constexpr):
    """Rename the columns of an accumulator: 2 r + e of every 8 becomes 4 e + r."""
    tile = tile.reshape([_K, columns // 8, 4, 2]).permute((0, 1, 3, 2))
    return gl.convert_layout(tile.reshape([_K, columns]), layout)


@gluon.jit
def _add_to_keys(
    D_LATENTS, UNITS, TOPK, first, count, start, batch, b,
    tile, column, columns: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Add ``tile`` [64, columns] to the gradient of a tile's keys, from ``column`` on; with
    ``UNITS`` as integers, see ``exact_sums``."""
    if UNITS is not None:
        tile = (_in_sectors(tile, columns, layout) * gl.load(UNITS)).to(gl.int64)
    else:
        tile = _in_fours(tile, columns, layout)
    by_key: gl.constexpr = gl.SliceLayout(1, layout)
    key = keys_of_tile(TOPK, first, count, start, batch, b, by_key)
    inside = first + gl.arange(0, _K, layout=by_key) < count
    place = column + gl.arange(0, columns, layout=gl.SliceLayout(0, layout))
    gl.atomic_add(
        D_LATENTS + key[:, None] * _W + place[None, :],
        tile,
        mask=inside[:, None],
        sem="relaxed",
    )


@gluon.jit
def backward(
    Q, LATENTS, TOPK, STARTS, POSITIONS, D_OUT, LSE, TERMS, D_Q, D_LATENTS, UNITS,
    rows, batch, groups, k, scale, scale_log2,
    PART: gl.constexpr, ACCUMULATOR: gl.constexpr, ADDED: gl.constexpr,
):  # fmt: skip
    """The gradient of the keys is computed, and added to memory, in PART columns at a time, whose
    layout there is ADDED."""
    ROPE_ADDED: gl.constexpr = _ROPE_IN_FOURS if UNITS is None else _ROPE_IN_SECTORS
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
    zeros_of_part = gl.full([_K, PART], 0.0, gl.float32, layout=ACCUMULATOR)
    d_q_latent = warpgroup_mma_init(gl.full([_N, _L], 0.0, gl.float32, layout=_WIDE))
    d_q_rope = warpgroup_mma_init(gl.full([_N, _R], 0.0, gl.float32, layout=LOGITS))
    for tile in range(0, tiles):
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
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
        gl.thread_barrier()
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
        gl.thread_barrier()
        if tile + 1 < tiles:  # on its way while the gradients of this tile are added up
            gather(LATENTS, key, latent, rope)
        key = keys_of_tile(TOPK, (tile + 2) * _K, count, start, batch, b, by_row)
        _add_to_keys(
            D_LATENTS, UNITS, TOPK, tile * _K, count, start, batch, b, part, _L, _R, ROPE_ADDED
        )  # fmt: skip
        for number in gl.static_range(_L // PART):
            part = warpgroup_mma(
                d_logits_shared.permute((1, 0)),
                q_latent.slice(number * PART, PART, dim=1),
                zeros_of_part,
                use_acc=False,
                is_async=True,
            )
            part = warpgroup_mma(
                probs_shared.permute((1, 0)),
                d_out.slice(number * PART, PART, dim=1),
                part,
                is_async=True,
            )
            part = warpgroup_mma_wait(num_outstanding=0, deps=[part])
            _add_to_keys(
                D_LATENTS, UNITS, TOPK, tile * _K, count, start, batch, b,
                part, number * PART, PART, ADDED,
            )  # fmt: skip
        gl.thread_barrier()
    latent_done, rope_done = warpgroup_mma_wait(num_outstanding=0, deps=[d_q_latent, d_q_rope])
    gl.thread_barrier()
    q_latent.store(latent_done.to(dtype))
    q_rope.store(rope_done.to(dtype))
    gl.thread_barrier()
    d_q = D_Q + (query + head)[:, None] * _W
    gl.store(d_q + column[None, :], q_latent.load(ROWS))
    gl.store(d_q + _L + rope_column[None, :], q_rope.load(ROWS))
