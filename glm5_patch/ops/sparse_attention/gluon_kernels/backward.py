"""Gluon kernels of sparse attention's backward for GLM-5's own shape on Hopper."""

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

from ..gluon import KEYS, WARPS
from ..triton_kernels import rounded
from .tiles import (
    BARRIER,
    PART_HALF,
    PART_LOGITS,
    PART_ROWS,
    PART_THREADS,
    PART_WARPS,
    SHARED,
    H,
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
    thread_barrier,
    write_heads,
    zero_of,
)

COLUMNS = 32
"""Columns of the latent's gradient that are computed, and added to memory, at a time."""
ALONE = 12
"""How many times ``COLUMNS``, of 18, the part of the warps that does nothing else adds up."""
SWEEP = 4096
"""About what a program adds to ``PROGRESS``; more than it has tiles."""


def fours() -> gl.DistributedLinearLayout:
    """Of an accumulator [64, 32] whose columns are renamed: four values of a thread are neighbours,
    for one 16-byte atomic, and eight threads add to one line of 128."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[KEYS, COLUMNS],
    )


def pairs() -> gl.DistributedLinearLayout:
    """Of every second column of an accumulator [64, 32]: four threads have four neighbours, 32
    bytes of 64-bit integers, for one transaction."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[KEYS, COLUMNS // 2],
    )


_COLUMNS = gl.constexpr(COLUMNS)
_FOURS = gl.constexpr(fours())
_PAIRS = gl.constexpr(pairs())
_ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16]))
_ALONE = gl.constexpr(ALONE)
_SWEEP = gl.constexpr(SWEEP)

# In ``filled`` (to be read) and ``free`` (to be filled).
_TILE = gl.constexpr(0)
_PROBS = gl.constexpr(1)
_QUERY = gl.constexpr(2)
_RIGHT = gl.constexpr(3)


@gluon.jit
def _fetch_tile(LATENTS, key, latent, rope, filled):
    """Start copying the rows of a tile's keys: the left half of the latent, then the rest."""
    rows = LATENTS + key.to(gl.int64) * W
    copy_columns(rows, 0, latent.slice(0, H, dim=1), H)
    async_copy.mbarrier_arrive(filled.index(_TILE), increment_count=False)
    copy_columns(rows, H, latent.slice(H, H, dim=1), H)
    copy_columns(rows, L, rope, R)
    async_copy.mbarrier_arrive(filled.index(_RIGHT), increment_count=False)


@gluon.jit
def _tile_of_step(step, begin, tiles):
    """Tile ``begin`` comes first; after the last comes number 0."""
    tile = step + begin
    return gl.where(tile < tiles, tile, tile - tiles)


@gluon.jit
def _attend(
    LSE, TERMS, D_Q, TOPK, query, stride, present, HEADS: gl.constexpr, count, tiles, begin,
    scale, scale_log2,
    q_latent, q_rope, d_out, latent, rope, probs_shared, d_logits_shared, filled, free,
):  # fmt: skip
    """Probabilities and their gradients, and the right half of the query's gradient."""
    dtype: gl.constexpr = latent.dtype
    by_head: gl.constexpr = gl.SliceLayout(1, PART_LOGITS)
    place = gl.arange(0, K, layout=gl.SliceLayout(0, PART_LOGITS))
    own = place_of_rows(query, stride, present, HEADS, by_head)
    lse = gl.load(LSE + own)
    terms = gl.load(TERMS + own)
    zeros = gl.full([N, K], 0.0, gl.float32, layout=PART_LOGITS)
    d_q = gl.full([N, H], 0.0, gl.float32, layout=PART_HALF)
    mbarrier.wait(filled.index(_QUERY), 0)
    for step in range(0, tiles):
        tile = _tile_of_step(step, begin, tiles)
        phase = step % 2
        zero = zero_of(step)
        keys = latent.index(zero)
        if HEADS == N:
            inside = (tile * K + place)[None, :] < count
        else:
            inside = owned(TOPK, tile * K, count, HEADS, PART_LOGITS)
        mbarrier.wait(filled.index(_TILE), phase)
        fence_async_shared()
        left = keys.slice(0, H, dim=1).permute((1, 0))
        right = keys.slice(H, H, dim=1).permute((1, 0))
        q = q_latent.index(zero)
        upstream = d_out.index(zero)
        logits = warpgroup_mma(q.slice(0, H, dim=1), left, zeros, use_acc=False, is_async=True)
        d_probs = warpgroup_mma(
            upstream.slice(0, H, dim=1), left, zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(filled.index(_RIGHT), phase)
        fence_async_shared()
        logits = warpgroup_mma(q.slice(H, H, dim=1), right, logits, is_async=True)
        logits = warpgroup_mma(
            q_rope.index(zero), rope.index(zero).permute((1, 0)), logits, is_async=True
        )
        d_probs = warpgroup_mma(upstream.slice(H, H, dim=1), right, d_probs, is_async=True)
        logits = warpgroup_mma_wait(num_outstanding=1, deps=[logits])
        probs = gl.exp2(logits * scale_log2 - lse[:, None])
        probs = gl.where(inside, probs, 0.0)
        mbarrier.wait(free.index(_PROBS), (step + 1) % 2)
        probs_shared.index(0).store(probs.to(dtype))
        d_probs = warpgroup_mma_wait(num_outstanding=0, deps=[d_probs])
        d_logits_shared.index(0).store((probs * (d_probs - terms[:, None]) * scale).to(dtype))
        fence_async_shared()
        tell(filled.index(_PROBS))
        d_q = warpgroup_mma(
            d_logits_shared.index(zero), keys.slice(H, H, dim=1), d_q, is_async=True
        )
        d_q = warpgroup_mma_wait(num_outstanding=0, deps=[d_q])
        tell(free.index(_TILE))
    buffer = latent.index(0).slice(H, H, dim=1)
    write_heads(d_q, buffer, D_Q, query, W, H, H, stride, present, HEADS)


@gluon.jit
def _start_of_keys(d_logits, q, number: gl.constexpr, zeros):
    """Start the product of some columns of the keys' gradient, [64, 32], as keys alone."""
    columns = q.slice(number * _COLUMNS, _COLUMNS, dim=1)
    return warpgroup_mma(d_logits, columns, zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_columns(probs, d_logits, q_latent, d_out, number: gl.constexpr, zeros):
    """As ``_start_of_keys``, and as values."""
    part = _start_of_keys(d_logits, q_latent, number, zeros)
    values = d_out.slice(number * _COLUMNS, _COLUMNS, dim=1)
    return warpgroup_mma(probs, values, part, is_async=True)


@gluon.jit
def _copy_and_add_up(
    Q, LATENTS, D_OUT, D_Q, D_LATENTS, UNITS, TOPK, query, stride, present,
    HEADS: gl.constexpr, start, count, batch, b, tiles, begin,
    q_latent, q_rope, d_out, latent, rope, probs_shared, d_logits_shared, filled, free,
):  # fmt: skip
    """Copies the rows of the query, and of the next tile when this one has served. The left half of
    the query's gradient, and its rotary part; and the last columns of the keys' gradient."""
    ADDED: gl.constexpr = _FOURS if UNITS is None else _PAIRS
    by_key: gl.constexpr = gl.SliceLayout(1, ADDED)
    by_row: gl.constexpr = gl.SliceLayout(1, PART_ROWS)
    zeros = gl.full([K, _COLUMNS], 0.0, gl.float32, layout=_ACCUMULATOR)
    fetch_query(
        Q, D_OUT, query, stride, present, HEADS,
        q_latent.index(0), q_rope.index(0), d_out.index(0), filled.index(_QUERY),
    )  # fmt: skip
    first = _tile_of_step(0, begin, tiles) * K
    key = named_keys(TOPK, first, count, start, batch, b, HEADS, by_row)
    _fetch_tile(LATENTS, key, latent.index(0), rope.index(0), filled)
    d_q = gl.full([N, H], 0.0, gl.float32, layout=PART_HALF)
    d_q_rope = gl.full([N, R], 0.0, gl.float32, layout=PART_LOGITS)
    for step in range(0, tiles):
        phase = step % 2
        zero = zero_of(step)
        d_logits = d_logits_shared.index(zero)
        first = _tile_of_step(step + 1, begin, tiles) * K
        key = named_keys(TOPK, first, count, start, batch, b, HEADS, by_row)
        mbarrier.wait(filled.index(_TILE), phase)
        mbarrier.wait(filled.index(_RIGHT), phase)
        mbarrier.wait(filled.index(_PROBS), phase)  # the query has come by then
        fence_async_shared()
        d_q = warpgroup_mma(d_logits, latent.index(zero).slice(0, H, dim=1), d_q, is_async=True)
        d_q_rope = warpgroup_mma(d_logits, rope.index(zero), d_q_rope, is_async=True)
        d_q, d_q_rope = warpgroup_mma_wait(num_outstanding=0, deps=[d_q, d_q_rope])
        thread_barrier()
        if step + 1 < tiles:
            mbarrier.wait(free.index(_TILE), phase)
            _fetch_tile(LATENTS, key, latent.index(0), rope.index(0), filled)
        first = _tile_of_step(step, begin, tiles) * K
        own = named_keys(TOPK, first, count, start, batch, b, HEADS, by_key)
        inside = first + gl.arange(0, K, layout=by_key) < count
        place = _places(D_LATENTS, UNITS, own)
        probs = probs_shared.index(zero).permute((1, 0))
        d_logits = d_logits.permute((1, 0))
        for number in gl.static_range(_ALONE, L // _COLUMNS):
            part = _start_columns(
                probs, d_logits, q_latent.index(zero), d_out.index(zero), number, zeros
            )
            part = warpgroup_mma_wait(num_outstanding=0, deps=[part])
            _add_to_keys(place, UNITS, own, inside, part, number * _COLUMNS)
        for number in gl.static_range(R // _COLUMNS):
            part = _start_of_keys(d_logits, q_rope.index(zero), number, zeros)
            part = warpgroup_mma_wait(num_outstanding=0, deps=[part])
            if number == R // _COLUMNS - 1:
                tell(free.index(_PROBS))
            _add_to_keys(place, UNITS, own, inside, part, L + number * _COLUMNS)
    buffer = latent.index(0).slice(0, H, dim=1)
    write_heads(d_q, buffer, D_Q, query, W, 0, H, stride, present, HEADS)
    write_heads(d_q_rope, rope.index(0), D_Q, query, W, L, R, stride, present, HEADS)


@gluon.jit
def _add_up_keys(
    D_LATENTS, UNITS, PROGRESS, TOPK, HEADS: gl.constexpr, start, count, batch, b, tiles, begin,
    q_latent, d_out, probs_shared, d_logits_shared, filled, free,
):  # fmt: skip
    """The first columns of the keys' gradient: some are multiplied while those before are added to
    memory."""
    ADDED: gl.constexpr = _FOURS if UNITS is None else _PAIRS
    by_key: gl.constexpr = gl.SliceLayout(1, ADDED)
    zeros = gl.full([K, _COLUMNS], 0.0, gl.float32, layout=_ACCUMULATOR)
    mbarrier.wait(filled.index(_QUERY), 0)
    for step in range(0, tiles):
        first = _tile_of_step(step, begin, tiles) * K
        zero = zero_of(step)
        probs = probs_shared.index(zero).permute((1, 0))
        d_logits = d_logits_shared.index(zero).permute((1, 0))
        q = q_latent.index(zero)
        upstream = d_out.index(zero)
        key = named_keys(TOPK, first, count, start, batch, b, HEADS, by_key)
        inside = first + gl.arange(0, K, layout=by_key) < count
        place = _places(D_LATENTS, UNITS, key)
        if PROGRESS is not None:
            gl.atomic_add(PROGRESS, _SWEEP // tiles, sem="relaxed")
        mbarrier.wait(filled.index(_PROBS), step % 2)
        fence_async_shared()
        part = _start_columns(probs, d_logits, q, upstream, 0, zeros)
        for number in gl.static_range(1, _ALONE):
            later = _start_columns(probs, d_logits, q, upstream, number, zeros)
            part = warpgroup_mma_wait(num_outstanding=2, deps=[part])
            _add_to_keys(place, UNITS, key, inside, part, (number - 1) * _COLUMNS)
            part = later
        part = warpgroup_mma_wait(num_outstanding=0, deps=[part])
        tell(free.index(_PROBS))
        _add_to_keys(place, UNITS, key, inside, part, (_ALONE - 1) * _COLUMNS)


@gluon.jit
def _places(D_LATENTS, UNITS, key):
    """Where the first columns of some keys' gradient are added."""
    if UNITS is None:
        column = gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, _FOURS))
        place = D_LATENTS + key[:, None] * W + column[None, :]
    else:
        column = gl.arange(0, _COLUMNS // 2, layout=gl.SliceLayout(0, _PAIRS))
        place = D_LATENTS + key[:, None] * (W // 2) + column[None, :]
    return place


@gluon.jit
def _add_to_keys(place, UNITS, key, inside, tile, first):
    """Add ``tile`` [64, 32] to the gradient of a tile's keys, from column ``first`` on: in fours,
    the columns 8 h + 2 r + e of every 16 renamed to 4 r + 2 h + e; or with ``UNITS`` in pairs."""
    if UNITS is None:
        tile = tile.reshape([K, _COLUMNS // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
        tile = gl.convert_layout(tile.reshape([K, _COLUMNS]), _FOURS)
        gl.atomic_add(place + first, tile, mask=inside[:, None], sem="relaxed")
    else:
        units = gl.load(UNITS + key)[:, None]
        lower, upper = gl.split(tile.reshape([K, _COLUMNS // 2, 2]))
        lower = rounded(gl.convert_layout(lower, _PAIRS) * units)
        upper = rounded(gl.convert_layout(upper, _PAIRS) * units)
        integers = lower + (upper << 32)
        gl.atomic_add(place + first // 2, integers, mask=inside[:, None], sem="relaxed")


@gluon.jit
def work_in_parts(
    Q, LATENTS, TOPK, D_OUT, LSE, TERMS, D_Q, D_LATENTS, UNITS, PROGRESS, at_once,
    query, stride, present, HEADS: gl.constexpr, start, count, batch, b, scale, scale_log2,
):  # fmt: skip
    """The warps are in three parts. The first computes probabilities and half of the query's
    gradient; the second copies, computes the other half, and adds up some columns of the keys'
    gradient; the third adds up the others. Rows are those of ``place_of_rows``; with fewer than 64
    HEADS, TOPK is a union.

    Args:
        PROGRESS: int64 [1], what all programs have done, each about ``SWEEP``. A program begins
            with the tile that the ``at_once`` that run beside it have come to, so that they add to
            the same keys at the same time; None: with its first.
    """
    dtype: gl.constexpr = Q.dtype.element_ty
    tiles = (count + K - 1) // K
    if PROGRESS is None:
        begin = 0
    else:
        begin = gl.atomic_add(PROGRESS, 0, sem="relaxed") // at_once % _SWEEP
        begin = begin.to(gl.int32) * tiles // _SWEEP
    q_latent = gl.allocate_shared_memory(dtype, [1, N, L], SHARED)
    q_rope = gl.allocate_shared_memory(dtype, [1, N, R], SHARED)
    d_out = gl.allocate_shared_memory(dtype, [1, N, L], SHARED)
    latent = gl.allocate_shared_memory(dtype, [1, K, L], SHARED)
    rope = gl.allocate_shared_memory(dtype, [1, K, R], SHARED)
    probs = gl.allocate_shared_memory(dtype, [1, N, K], SHARED)
    d_logits = gl.allocate_shared_memory(dtype, [1, N, K], SHARED)
    filled = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(filled.index(_TILE), count=PART_THREADS)
    mbarrier.init(filled.index(_RIGHT), count=PART_THREADS)
    mbarrier.init(filled.index(_PROBS), count=1)
    mbarrier.init(filled.index(_QUERY), count=PART_THREADS)
    mbarrier.init(free.index(_TILE), count=1)
    mbarrier.init(free.index(_PROBS), count=2)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    LSE, TERMS, D_Q, TOPK, query, stride, present, HEADS, count, tiles, begin,
                    scale, scale_log2,
                    q_latent, q_rope, d_out, latent, rope, probs, d_logits, filled, free,
                ),
            ),
            (
                _copy_and_add_up,
                (
                    Q, LATENTS, D_OUT, D_Q, D_LATENTS, UNITS, TOPK, query, stride, present,
                    HEADS, start, count, batch, b, tiles, begin,
                    q_latent, q_rope, d_out, latent, rope, probs, d_logits, filled, free,
                ),
            ),
            (
                _add_up_keys,
                (
                    D_LATENTS, UNITS, PROGRESS, TOPK, HEADS, start, count, batch, b, tiles, begin,
                    q_latent, d_out, probs, d_logits, filled, free,
                ),
            ),
        ],
        [PART_WARPS, PART_WARPS],
        [208, 64],  # registers of a thread; 232 are left
    )  # fmt: skip


@gluon.jit
def backward(
    Q, LATENTS, TOPK, STARTS, POSITIONS, D_OUT, LSE, TERMS, D_Q, D_LATENTS, UNITS, PROGRESS,
    rows, batch, groups, k, scale, scale_log2, at_once,
):  # fmt: skip
    """Gradients of 64 heads of a query, and what they add to those of its keys."""
    b, query, start, count, TOPK = query_of_program(TOPK, STARTS, POSITIONS, rows, batch, groups, k)
    work_in_parts(
        Q, LATENTS, TOPK, D_OUT, LSE, TERMS, D_Q, D_LATENTS, UNITS, PROGRESS, at_once,
        query, None, None, N, start, count, batch, b, scale, scale_log2,
    )  # fmt: skip
