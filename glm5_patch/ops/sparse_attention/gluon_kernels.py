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
    mbarrier,
    warpgroup_mma,
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

PART = 32
"""Columns of the latent's gradient that are computed, and added to memory, at a time."""

# 8 warps: 4 x 16 rows of an accumulator, and 2 halves of its columns.
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, KEYS // 2, 16]))
_WIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, LATENT // 2, 16]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


def accumulator(columns: int) -> gl.NVMMADistributedLayout:
    """Of a product [64, columns]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 2], [16, columns // 2, 16])


PART = 32
"""Columns of the latent's gradient that are computed, and added to memory, at a time."""


def fours() -> gl.DistributedLinearLayout:
    """Of an accumulator [64, 32] whose columns are renamed: four values of a thread are neighbours,
    for one 16-byte atomic, and eight threads add to one line of 128."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[KEYS, PART],
    )


def pairs() -> gl.DistributedLinearLayout:
    """Of every second column of an accumulator [64, 32]: four threads have four neighbours, 32
    bytes of 64-bit integers, for one transaction."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[KEYS, PART // 2],
    )


_PART = gl.constexpr(PART)
_H = gl.constexpr(LATENT // 2)
_FOURS = gl.constexpr(fours())
_PAIRS = gl.constexpr(pairs())
_ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16]))
_LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16]))
_HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LATENT // 2, 16]))
_PART_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
_BARRIER = gl.constexpr(mbarrier.MBarrierLayout())
_FETCHED_AT = gl.constexpr(4)
_TILE = gl.constexpr(0)
_PROBS = gl.constexpr(1)
_QUERY = gl.constexpr(2)


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
def _add_to_keys(D_LATENTS, UNITS, key, inside, tile, column):
    """Add ``tile`` [64, 32] to the gradient of a tile's keys, from ``column`` on: in fours, the
    columns 8 h + 2 r + e of every 16 renamed to 4 r + 2 h + e; or with ``UNITS`` in pairs."""
    if UNITS is None:
        tile = tile.reshape([_K, _PART // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
        tile = gl.convert_layout(tile.reshape([_K, _PART]), _FOURS)
        place = column + gl.arange(0, _PART, layout=gl.SliceLayout(0, _FOURS))
        place = key[:, None] * _W + place[None, :]
        gl.atomic_add(D_LATENTS + place, tile, mask=inside[:, None], sem="relaxed")
    else:
        units = gl.load(UNITS + key)[:, None]
        lower, upper = gl.split(tile.reshape([_K, _PART // 2, 2]))
        lower = _rounded(gl.convert_layout(lower, _PAIRS) * units)
        upper = _rounded(gl.convert_layout(upper, _PAIRS) * units)
        place = column // 2 + gl.arange(0, _PART // 2, layout=gl.SliceLayout(0, _PAIRS))
        place = key[:, None] * (_W // 2) + place[None, :]
        integers = lower + (upper << 32)
        gl.atomic_add(D_LATENTS + place, integers, mask=inside[:, None], sem="relaxed")


@gluon.jit
def _rounded(number):
    """To the nearest integer, of 32 bits, in 64."""
    return (number + gl.where(number > 0, 0.5, -0.5)).to(gl.int32).to(gl.int64)


@gluon.jit
def tell(barrier):
    """All threads of this part have done what came before."""
    thread_barrier()
    mbarrier.arrive(barrier)


@gluon.jit
def zero_of(number):
    """0, of a number that is not negative, unknown to the compiler: addresses that depend on it
    are computed in a loop. Before it, they would take the registers of the output."""
    return gl.inline_asm_elementwise(
        "shr.u32 $0, $1, 31;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _fetch_query(Q, D_OUT, query, q_latent, q_rope, d_out, filled):
    column = gl.arange(0, _L, layout=gl.SliceLayout(0, _PART_ROWS))[None, :]
    rope_column = _L + gl.arange(0, _R, layout=gl.SliceLayout(0, _PART_ROWS))[None, :]
    head = (query + gl.arange(0, _N, layout=gl.SliceLayout(1, _PART_ROWS)))[:, None]
    async_load(q_latent, Q + head * _W + column)
    async_load(q_rope, Q + head * _W + rope_column)
    async_load(d_out, D_OUT + head * _L + column)
    async_copy.mbarrier_arrive(filled, increment_count=False)


@gluon.jit
def _fetch_tile(LATENTS, TOPK, first, count, start, batch, b, latent, rope, filled):
    key = keys_of_tile(TOPK, first, count, start, batch, b, gl.SliceLayout(1, _PART_ROWS))
    row = LATENTS + key.to(gl.int64)[:, None] * _W
    async_load(latent, row + gl.arange(0, _L, layout=gl.SliceLayout(0, _PART_ROWS))[None, :])
    async_load(rope, row + _L + gl.arange(0, _R, layout=gl.SliceLayout(0, _PART_ROWS))[None, :])
    async_copy.mbarrier_arrive(filled, increment_count=False)


@gluon.jit
def _attend(
    LSE, TERMS, D_Q, query, count, tiles, scale, scale_log2,
    q_latent, q_rope, d_out, latent, rope, probs_shared, d_logits_shared, filled, free,
):  # fmt: skip
    """Probabilities and their gradients, and the right half of the query's gradient."""
    dtype: gl.constexpr = latent.dtype
    by_head: gl.constexpr = gl.SliceLayout(1, _LOGITS)
    place = gl.arange(0, _K, layout=gl.SliceLayout(0, _LOGITS))
    own = query + gl.arange(0, _N, layout=by_head)
    lse = gl.load(LSE + own)
    terms = gl.load(TERMS + own)
    zeros = gl.full([_N, _K], 0.0, gl.float32, layout=_LOGITS)
    d_q = gl.full([_N, _H], 0.0, gl.float32, layout=_HALF)
    mbarrier.wait(filled.index(_QUERY), 0)
    for tile in range(0, tiles):
        phase = tile % 2
        zero = zero_of(tile)
        keys = latent.index(zero)
        mbarrier.wait(filled.index(_TILE), phase)
        fence_async_shared()
        logits = start_logits(
            q_latent.index(zero), q_rope.index(zero), keys, rope.index(zero), zeros
        )
        d_probs = warpgroup_mma(
            d_out.index(zero), keys.permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        logits = warpgroup_mma_wait(num_outstanding=1, deps=[logits])
        probs = gl.exp2(logits * scale_log2 - lse[:, None])
        probs = gl.where((tile * _K + place)[None, :] < count, probs, 0.0)
        mbarrier.wait(free.index(_PROBS), (tile + 1) % 2)
        probs_shared.index(0).store(probs.to(dtype))
        d_probs = warpgroup_mma_wait(num_outstanding=0, deps=[d_probs])
        d_logits_shared.index(0).store((probs * (d_probs - terms[:, None]) * scale).to(dtype))
        fence_async_shared()
        tell(filled.index(_PROBS))
        d_q = warpgroup_mma(
            d_logits_shared.index(zero), keys.slice(_H, _H, dim=1), d_q, is_async=True
        )
        d_q = warpgroup_mma_wait(num_outstanding=0, deps=[d_q])
        tell(free.index(_TILE))
    _store_half(d_q, latent.index(0).slice(_H, _H, dim=1), D_Q, query, _H)


@gluon.jit
def _add_up_query(
    D_Q, query, tiles, latent, rope, d_logits_shared, filled, free
):  # fmt: skip
    """The left half of the query's gradient, and its rotary part."""
    d_q = gl.full([_N, _H], 0.0, gl.float32, layout=_HALF)
    d_q_rope = gl.full([_N, _R], 0.0, gl.float32, layout=_LOGITS)
    for tile in range(0, tiles):
        phase = tile % 2
        zero = zero_of(tile)
        d_logits = d_logits_shared.index(zero)
        mbarrier.wait(filled.index(_TILE), phase)
        mbarrier.wait(filled.index(_PROBS), phase)
        fence_async_shared()
        d_q = warpgroup_mma(d_logits, latent.index(zero).slice(0, _H, dim=1), d_q, is_async=True)
        d_q_rope = warpgroup_mma(d_logits, rope.index(zero), d_q_rope, is_async=True)
        d_q, d_q_rope = warpgroup_mma_wait(num_outstanding=0, deps=[d_q, d_q_rope])
        thread_barrier()
        mbarrier.arrive(free.index(_TILE))
        mbarrier.arrive(free.index(_PROBS))
    _store_half(d_q, latent.index(0).slice(0, _H, dim=1), D_Q, query, 0)
    rope = rope.index(0)
    rope.store(d_q_rope.to(rope.dtype))
    thread_barrier()
    row = query + gl.arange(0, _N, layout=gl.SliceLayout(1, _PART_ROWS))
    column = _L + gl.arange(0, _R, layout=gl.SliceLayout(0, _PART_ROWS))
    gl.store(D_Q + row[:, None] * _W + column[None, :], rope.load(_PART_ROWS))


@gluon.jit
def _store_half(d_q, buffer, D_Q, query, column):
    """Write by way of ``buffer``."""
    buffer.store(d_q.to(buffer.dtype))
    thread_barrier()
    row = query + gl.arange(0, _N, layout=gl.SliceLayout(1, _PART_ROWS))
    column += gl.arange(0, _H, layout=gl.SliceLayout(0, _PART_ROWS))
    gl.store(D_Q + row[:, None] * _W + column[None, :], buffer.load(_PART_ROWS))


@gluon.jit
def _start_part(probs, d_logits, q_latent, d_out, number: gl.constexpr, zeros):
    """Start the products of 32 columns of the keys' gradient, [64, 32]."""
    part = warpgroup_mma(
        d_logits, q_latent.slice(number * _PART, _PART, dim=1), zeros, use_acc=False, is_async=True
    )
    values = d_out.slice(number * _PART, _PART, dim=1)
    return warpgroup_mma(probs, values, part, is_async=True)


@gluon.jit
def _add_up_keys(
    Q, LATENTS, D_OUT, D_LATENTS, UNITS, TOPK, query, start, count, batch, b, tiles,
    q_latent, q_rope, d_out, latent, rope, probs_shared, d_logits_shared, filled, free,
):  # fmt: skip
    """The gradient of the keys: 32 columns are multiplied while those before are added up. Copies
    the rows of the query, and of the next tile when this one has served."""
    ADDED: gl.constexpr = _FOURS if UNITS is None else _PAIRS
    by_key: gl.constexpr = gl.SliceLayout(1, ADDED)
    zeros = gl.full([_K, _PART], 0.0, gl.float32, layout=_ACCUMULATOR)
    _fetch_query(
        Q, D_OUT, query, q_latent.index(0), q_rope.index(0), d_out.index(0), filled.index(_QUERY)
    )
    latent = latent.index(0)
    rope = rope.index(0)
    _fetch_tile(LATENTS, TOPK, 0, count, start, batch, b, latent, rope, filled.index(_TILE))
    mbarrier.wait(filled.index(_QUERY), 0)
    for tile in range(0, tiles):
        zero = zero_of(tile)
        probs = probs_shared.index(zero).permute((1, 0))
        d_logits = d_logits_shared.index(zero).permute((1, 0))
        q = q_latent.index(zero)
        upstream = d_out.index(zero)
        key = keys_of_tile(TOPK, tile * _K, count, start, batch, b, by_key)
        inside = tile * _K + gl.arange(0, _K, layout=by_key) < count
        mbarrier.wait(filled.index(_PROBS), tile % 2)
        fence_async_shared()
        part = _start_part(probs, d_logits, q, upstream, 0, zeros)
        for number in gl.static_range(1, _L // _PART):
            later = _start_part(probs, d_logits, q, upstream, number, zeros)
            part = warpgroup_mma_wait(num_outstanding=2, deps=[part])
            _add_to_keys(D_LATENTS, UNITS, key, inside, part, (number - 1) * _PART)
            part = later
            if number == _FETCHED_AT:
                mbarrier.wait(free.index(_TILE), tile % 2)
                if tile + 1 < tiles:
                    _fetch_tile(
                        LATENTS, TOPK, (tile + 1) * _K, count, start, batch, b, latent, rope,
                        filled.index(_TILE),
                    )  # fmt: skip
        for number in gl.static_range(_R // _PART):
            later = warpgroup_mma(
                d_logits,
                q_rope.index(zero).slice(number * _PART, _PART, dim=1),
                zeros,
                use_acc=False,
                is_async=True,
            )
            part = warpgroup_mma_wait(num_outstanding=1, deps=[part])
            _add_to_keys(D_LATENTS, UNITS, key, inside, part, _L + (number - 1) * _PART)
            part = later
        part = warpgroup_mma_wait(num_outstanding=0, deps=[part])
        tell(free.index(_PROBS))
        _add_to_keys(D_LATENTS, UNITS, key, inside, part, _W - _PART)


@gluon.jit
def backward(
    Q, LATENTS, TOPK, STARTS, POSITIONS, D_OUT, LSE, TERMS, D_Q, D_LATENTS, UNITS,
    rows, batch, groups, k, scale, scale_log2,
):  # fmt: skip
    """Three parts of warps, so that adding to memory, which bounds it, hardly ever waits: one
    computes probabilities and half of the query's gradient, one the other half, and one adds up the
    gradient of the keys."""
    dtype: gl.constexpr = Q.dtype.element_ty
    b, query, start, count, TOPK = query_of_program(TOPK, STARTS, POSITIONS, rows, batch, groups, k)
    tiles = (count + _K - 1) // _K
    q_latent = gl.allocate_shared_memory(dtype, [1, _N, _L], SHARED)
    q_rope = gl.allocate_shared_memory(dtype, [1, _N, _R], SHARED)
    d_out = gl.allocate_shared_memory(dtype, [1, _N, _L], SHARED)
    latent = gl.allocate_shared_memory(dtype, [1, _K, _L], SHARED)
    rope = gl.allocate_shared_memory(dtype, [1, _K, _R], SHARED)
    probs = gl.allocate_shared_memory(dtype, [1, _N, _K], SHARED)
    d_logits = gl.allocate_shared_memory(dtype, [1, _N, _K], SHARED)
    filled = gl.allocate_shared_memory(gl.int64, [3, 1], _BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [2, 1], _BARRIER)
    mbarrier.init(filled.index(_TILE), count=128)
    mbarrier.init(filled.index(_PROBS), count=1)
    mbarrier.init(filled.index(_QUERY), count=128)
    mbarrier.init(free.index(_TILE), count=2)
    mbarrier.init(free.index(_PROBS), count=2)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    LSE, TERMS, D_Q, query, count, tiles, scale, scale_log2,
                    q_latent, q_rope, d_out, latent, rope, probs, d_logits, filled, free,
                ),
            ),
            (_add_up_query, (D_Q, query, tiles, latent, rope, d_logits, filled, free)),
            (
                _add_up_keys,
                (
                    Q, LATENTS, D_OUT, D_LATENTS, UNITS, TOPK, query, start, count, batch, b, tiles,
                    q_latent, q_rope, d_out, latent, rope, probs, d_logits, filled, free,
                ),
            ),
        ],
        [4, 4],
        [192, 88],  # registers of a thread; 224 are left
    )  # fmt: skip


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
