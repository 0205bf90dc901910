"""Gluon kernels of the index scores and of the candidates for the selection, for Hopper.

A program computes the scores of some queries against all keys that they see. Its warps are in three
parts. The producer copies tiles of 64 keys to shared memory. Each of two consumers multiplies every
tile with the heads of its own QUERIES, and adds the products up over the heads. The consumers take
turns, so that the tensor cores multiply for one while the other adds up.

Pointers and shapes are those of ``triton_kernels``. Where ``stride`` is more than 1, the keys are a
sample: one of every ``stride`` keys, and a column of SCORES is the number of a sampled key.
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

from ..sparse_attention.gluon_kernels.tiles import (
    BARRIER,
    PART_ROWS,
    PART_THREADS,
    PART_WARPS,
    SHARED,
    async_load,
    tell,
)
from .gluon import COLUMNS, DIM, KEYS, STAGES

_D = gl.constexpr(DIM)
_K = gl.constexpr(KEYS)
_N = gl.constexpr(COLUMNS)
_S = gl.constexpr(STAGES)
_HALVES = gl.constexpr(KEYS // 32)

_PRODUCTS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [PART_WARPS, 1], [16, COLUMNS, 16]))
# Scores of a tile, [KEYS / 32, 32, QUERIES]: a warp has all keys of some queries, a key a lane.
_SCORES = gl.constexpr(gl.BlockedLayout([1, 1, 1], [1, 32, 1], [1, 1, PART_WARPS], [1, 2, 0]))
_BY_LANE_AND_QUERY = gl.constexpr(gl.SliceLayout(0, _SCORES))
_BY_HALF = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, _SCORES)))
_BY_LANE = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(2, _SCORES)))
_BY_QUERY = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(1, _SCORES)))
# Which vary from launch to launch, and need not be known to the compiler.
_VARIES = "first_row", "end_row", "b", "num_keys", "width", "least"

_LINE = gl.constexpr(gl.BlockedLayout([1], [32], [PART_WARPS], [0]))

# In ``turns``: the first and the second consumer may multiply, and the queries are there.
_QUERIES_READY = gl.constexpr(2)


@gluon.jit
def _spans(STARTS, POSITIONS, row, end_row, stride, least):
    """The first column that each query sees, and the one after its last; none of those that are
    left out, since they see at most ``least`` keys. And the first key."""
    inside = row < end_row
    start = gl.load(STARTS + row, mask=inside, other=0)
    end = gl.load(POSITIONS + row, mask=inside, other=-1) + 1
    inside = inside & (end - start > least)
    begin = (start + stride - 1) // stride
    return gl.where(inside, begin, 2147483647), gl.where(inside, end // stride, 0), start


@gluon.jit
def _produce(
    Q, KEY, row, end_row, batch, b, num_keys, stride, first_tile, tiles,
    q, keys, ready, free, turns,
    HEADS: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    by_row: gl.constexpr = gl.SliceLayout(1, PART_ROWS)
    dim = gl.arange(0, _D, layout=gl.SliceLayout(0, PART_ROWS))[None, :]
    column = gl.arange(0, _N, layout=by_row)
    for consumer in gl.static_range(2):
        query = gl.minimum(row + consumer * QUERIES + column // HEADS, end_row - 1)
        head = (query * batch + b).to(gl.int64) * HEADS + column % HEADS
        async_load(q.index(consumer), (Q + head * _D)[:, None] + dim)
    async_copy.mbarrier_arrive(turns.index(_QUERIES_READY), increment_count=False)
    number = first_tile * _K + gl.arange(0, _K, layout=by_row)
    for tile in range(0, tiles):
        # A sampled key is at an irregular place among those that it stands for.
        key = number * stride + ((number * -1640531527) >> 16 & 0x7FFF) % stride
        key = gl.minimum(key, num_keys - 1) * batch + b
        stage = tile % _S
        mbarrier.wait(free.index(stage), (tile // _S + 1) % 2)
        async_load(keys.index(stage), (KEY + key.to(gl.int64) * _D)[:, None] + dim)
        async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
        number += _K


@gluon.jit
def _weights(WEIGHTS, row, end_row, batch, b, scale, HEADS: gl.constexpr):
    """Of the columns of a consumer's products."""
    column = gl.arange(0, _N, layout=gl.SliceLayout(0, _PRODUCTS))
    query = gl.minimum(row + column // HEADS, end_row - 1)
    return gl.load(WEIGHTS + (query * batch + b).to(gl.int64) * HEADS + column % HEADS) * scale


@gluon.jit
def _scores(
    q, keys, weights, tile, ready, free, turns,
    CONSUMER: gl.constexpr, HEADS: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """Of a tile and a consumer's queries. The sum over the heads is in the same order for each."""
    stage = tile % _S
    mbarrier.wait(ready.index(stage), tile // _S % 2)
    mbarrier.wait(turns.index(CONSUMER), (tile + 1 - CONSUMER) % 2)
    fence_async_shared()
    zeros = gl.full([_K, _N], 0.0, gl.float32, layout=_PRODUCTS)
    products = warpgroup_mma(
        keys.index(stage), q.index(CONSUMER).permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    tell(turns.index(1 - CONSUMER))
    products = warpgroup_mma_wait(num_outstanding=0, deps=[products])
    tell(free.index(stage))
    products = gl.maximum(products, 0.0) * weights[None, :]
    scores = gl.sum(products.reshape([_K, QUERIES, HEADS]), 2)
    scores = gl.where(scores == 0, 0.0, scores)  # a negative weight makes it -0.0
    return gl.convert_layout(scores.reshape([_HALVES, 32, QUERIES]), _SCORES)


@gluon.jit
def _columns(tile):
    """Of the scores of a tile, [KEYS / 32, 32, 1]."""
    half = gl.arange(0, _HALVES, layout=_BY_HALF)[:, None][:, :, None]
    return tile * _K + half * 32 + gl.arange(0, 32, layout=_BY_LANE)[None, :][:, :, None]


@gluon.jit
def _store_scores(
    WEIGHTS, STARTS, POSITIONS, SCORES, row, first_row, end_row, batch, b, width,
    stride, least, scale, first_tile, tiles, q, keys, ready, free, turns,
    CONSUMER: gl.constexpr, HEADS: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    row += CONSUMER * QUERIES
    own = row + gl.arange(0, QUERIES, layout=_BY_QUERY)
    begin, end, _ = _spans(STARTS, POSITIONS, own, end_row, stride, least)
    begin = begin[None, :][:, None, :]
    end = end[None, :][:, None, :]
    lines = SCORES + (own - first_row)[None, :][:, None, :].to(gl.int64) * width
    weights = _weights(WEIGHTS, row, end_row, batch, b, scale, HEADS)
    mbarrier.wait(turns.index(_QUERIES_READY), 0)
    for tile in range(0, tiles):
        scores = _scores(q, keys, weights, tile, ready, free, turns, CONSUMER, HEADS, QUERIES)
        column = _columns(first_tile + tile)
        gl.store(lines + column, scores, mask=(column >= begin) & (column < end))


@gluon.jit
def _ballot(flag):
    """Of the lanes of a warp, for each of a thread's numbers: which of them are not 0, in bits."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
        "=r,r", [flag.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _ones(bits):
    return gl.inline_asm_elementwise(
        "popc.b32 $0, $1;", "=r,r", [bits], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _write_candidates(
    WEIGHTS, STARTS, POSITIONS, BARS, VALUES, NAMES, COUNTS, row, first_row, end_row, batch, b,
    k, scale, first_tile, tiles, q, keys, ready, free, turns,
    CONSUMER: gl.constexpr, HEADS: gl.constexpr, QUERIES: gl.constexpr, CAPACITY: gl.constexpr,
):  # fmt: skip
    row += CONSUMER * QUERIES
    own = row + gl.arange(0, QUERIES, layout=_BY_QUERY)
    begin, end, start = _spans(STARTS, POSITIONS, own, end_row, 1, k)
    bar = gl.load(BARS + own - first_row, mask=begin < end, other=float("inf"))
    begin = begin[None, :][:, None, :]
    end = end[None, :][:, None, :]
    start = start[None, :][:, None, :]
    bar = bar[None, :][:, None, :]
    line = (own - first_row)[None, :][:, None, :] * CAPACITY
    lower = ((1 << gl.arange(0, 32, layout=_BY_LANE)) - 1)[None, :][:, :, None]
    half = gl.arange(0, _HALVES, layout=_BY_HALF)[:, None][:, :, None]
    written = gl.full([32, QUERIES], 0, gl.int32, layout=_BY_LANE_AND_QUERY)
    weights = _weights(WEIGHTS, row, end_row, batch, b, scale, HEADS)
    mbarrier.wait(turns.index(_QUERIES_READY), 0)
    for tile in range(0, tiles):
        scores = _scores(q, keys, weights, tile, ready, free, turns, CONSUMER, HEADS, QUERIES)
        key = _columns(first_tile + tile)
        passes = (scores >= bar) & (key >= begin) & (key < end)
        ballot = _ballot(passes)
        count = _ones(ballot)
        of_first_half = gl.sum(gl.where(half == 0, count, 0), 0)
        number = _ones(ballot & lower) + gl.where(half == 0, 0, of_first_half[None, :, :])
        number += written[None, :, :]
        written += gl.sum(count, 0)
        fits = passes & (number < CAPACITY)
        gl.store(VALUES + (line + number), scores, mask=fits)
        gl.store(NAMES + (line + number), key - start, mask=fits)
    # Every lane has the same counts.
    query = row + gl.arange(0, QUERIES, layout=gl.SliceLayout(0, _BY_LANE_AND_QUERY))[None, :]
    lane = gl.arange(0, 32, layout=gl.SliceLayout(1, _BY_LANE_AND_QUERY))[:, None]
    found = (written >= k) & (written <= CAPACITY)
    gl.store(
        COUNTS + (query - first_row + 0 * lane),
        gl.where(found, written, -1),
        mask=(lane == 0) & (query < end_row),
    )


@gluon.jit
def _tiles(begin, end):
    """Of the keys that any query sees: the first, and how many."""
    first = gl.min(begin, 0) // _K
    return first, gl.maximum((gl.max(end, 0) + _K - 1) // _K - first, 0)


@gluon.jit
def _room(dtype: gl.constexpr):
    """Shared memory for queries and tiles of keys, and the barriers."""
    q = gl.allocate_shared_memory(dtype, [2, _N, _D], SHARED)
    keys = gl.allocate_shared_memory(dtype, [_S, _K, _D], SHARED)
    ready = gl.allocate_shared_memory(gl.int64, [_S, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [_S, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [3, 1], BARRIER)
    for stage in gl.static_range(_S):
        mbarrier.init(ready.index(stage), count=PART_THREADS)
        mbarrier.init(free.index(stage), count=2)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    mbarrier.init(turns.index(_QUERIES_READY), count=PART_THREADS)
    return q, keys, ready, free, turns


@gluon.jit
def _row_of_program(first_row, QUERIES: gl.constexpr):
    """Its first query. The last ones come first: they see most keys."""
    return first_row + (gl.num_programs(0) - 1 - gl.program_id(0)) * 2 * QUERIES


@gluon.jit(do_not_specialize=[*_VARIES])
def scores(
    Q, KEY, WEIGHTS, STARTS, POSITIONS, SCORES,
    first_row, end_row, batch, b, num_keys, width, stride, least, scale,
    HEADS: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """SCORES[row - first_row, column], rows of ``width``, of the keys that the queries see; the
    rest stays as it is, as do the rows of queries that ``_spans`` leaves out."""
    row = _row_of_program(first_row, QUERIES)
    begin, end, _ = _spans(
        STARTS, POSITIONS, row + gl.arange(0, 2 * QUERIES, layout=_LINE), end_row, stride, least
    )  # fmt: skip
    first_tile, tiles = _tiles(begin, end)
    # Programs of the same queries share their keys out between them.
    share = (tiles + gl.num_programs(1) - 1) // gl.num_programs(1)
    first_tile += gl.program_id(1) * share
    tiles = gl.minimum(share, tiles - gl.program_id(1) * share)
    q, keys, ready, free, turns = _room(Q.dtype.element_ty)
    if tiles > 0:
        gl.warp_specialize(
            [
                (
                    _store_scores,
                    (
                        WEIGHTS, STARTS, POSITIONS, SCORES, row, first_row, end_row,
                        batch, b, width, stride, least, scale, first_tile, tiles,
                        q, keys, ready, free, turns, gl.constexpr(0), HEADS, QUERIES,
                    ),
                ),
                (
                    _store_scores,
                    (
                        WEIGHTS, STARTS, POSITIONS, SCORES, row, first_row, end_row,
                        batch, b, width, stride, least, scale, first_tile, tiles,
                        q, keys, ready, free, turns, gl.constexpr(1), HEADS, QUERIES,
                    ),
                ),
                (
                    _produce,
                    (
                        Q, KEY, row, end_row, batch, b, num_keys, stride, first_tile, tiles,
                        q, keys, ready, free, turns, HEADS, QUERIES,
                    ),
                ),
            ],
            [PART_WARPS, PART_WARPS],
            [232, 40],  # registers of a thread; the first consumer has what is left, 232
        )  # fmt: skip


@gluon.jit(do_not_specialize=_VARIES[:4])
def candidates(
    Q, KEY, WEIGHTS, STARTS, POSITIONS, BARS, VALUES, NAMES, COUNTS,
    first_row, end_row, batch, b, num_keys, k, scale,
    HEADS: gl.constexpr, QUERIES: gl.constexpr, CAPACITY: gl.constexpr,
):  # fmt: skip
    """The scores that reach the bar of their row, and their places, in the order of the keys, of
    queries that see more than k keys.

    COUNTS gets how many, or -1 where they are fewer than k, or more than there is room.
    """
    row = _row_of_program(first_row, QUERIES)
    begin, end, _ = _spans(
        STARTS, POSITIONS, row + gl.arange(0, 2 * QUERIES, layout=_LINE), end_row, 1, k
    )  # fmt: skip
    first_tile, tiles = _tiles(begin, end)
    q, keys, ready, free, turns = _room(Q.dtype.element_ty)
    if tiles > 0:
        gl.warp_specialize(
            [
                (
                    _write_candidates,
                    (
                        WEIGHTS, STARTS, POSITIONS, BARS, VALUES, NAMES, COUNTS,
                        row, first_row, end_row, batch, b, k, scale, first_tile, tiles,
                        q, keys, ready, free, turns,
                        gl.constexpr(0), HEADS, QUERIES, CAPACITY,
                    ),
                ),
                (
                    _write_candidates,
                    (
                        WEIGHTS, STARTS, POSITIONS, BARS, VALUES, NAMES, COUNTS,
                        row, first_row, end_row, batch, b, k, scale, first_tile, tiles,
                        q, keys, ready, free, turns,
                        gl.constexpr(1), HEADS, QUERIES, CAPACITY,
                    ),
                ),
                (
                    _produce,
                    (
                        Q, KEY, row, end_row, batch, b, num_keys, 1, first_tile, tiles,
                        q, keys, ready, free, turns, HEADS, QUERIES,
                    ),
                ),
            ],
            [PART_WARPS, PART_WARPS],
            [232, 40],  # registers of a thread; the first consumer has what is left, 232
        )  # fmt: skip
