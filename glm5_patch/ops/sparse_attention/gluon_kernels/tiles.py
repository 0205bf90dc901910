"""What the Gluon kernels share: layouts, and how rows come to shared memory.

Tiles of keys are [64, 512] of the latent and [64, 64] of the rotary part.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..gluon import HEADS, KEYS, LATENT, ROPE, WARPS, WIDTH

# Triton 3.6 has other names than the versions after it.
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

N = gl.constexpr(HEADS)
L = gl.constexpr(LATENT)
H = gl.constexpr(LATENT // 2)
R = gl.constexpr(ROPE)
W = gl.constexpr(WIDTH)
K = gl.constexpr(KEYS)

SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())

# Of the warps of one part.
PART_LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16]))
PART_HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, LATENT // 2, 16]))
PART_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))
PART_WARPS = gl.constexpr(WARPS)
PART_THREADS = gl.constexpr(32 * WARPS)


@gluon.jit
def query_of_program(TOPK, STARTS, POSITIONS, rows, batch, groups, k):
    """Batch of this program, the place of its first head in [s, b, n], where its document starts,
    how many keys it has and which. The last rows come first: they have most keys."""
    row = rows - 1 - gl.program_id(0) // batch
    b = gl.program_id(0) % batch
    query = ((row * batch + b) * groups + gl.program_id(1)).to(gl.int64) * N
    start = gl.load(STARTS + row)
    count = gl.minimum(gl.load(POSITIONS + row) - start + 1, k)
    return b, query, start, count, TOPK + (b.to(gl.int64) * rows + row) * k


@gluon.jit
def keys_of_tile(TOPK, first, count, start, batch, b, layout: gl.constexpr):
    """Rows of the latent that a tile of the top-k names; past its end, some row."""
    place = first + gl.arange(0, K, layout=layout)
    local = gl.load(TOPK + place, mask=place < count, other=0)
    return (local + start) * batch + b


@gluon.jit
def union_of_program(ENTRIES, COUNTS, first, rows, batch, capacity, HEADS: gl.constexpr):
    """Batch of this program, the place of its first head in [s, b, n], how many of its queries
    there are, how many keys these have together and which. Pointers are those of ``unions``."""
    number = gl.num_programs(0) // batch - 1 - gl.program_id(0) // batch
    b = gl.program_id(0) % batch
    row = (first + number) * (N // HEADS)
    count = gl.load(COUNTS + row // (N // HEADS) * batch + b)
    query = (row * batch + b).to(gl.int64) * HEADS
    present = gl.minimum(rows - row, N // HEADS)
    return b, query, present, count, ENTRIES + (number * batch + b).to(gl.int64) * capacity


@gluon.jit
def place_of_rows(query, stride, present, HEADS: gl.constexpr, layout: gl.constexpr):
    """Places in [s, b, n] of the rows of a tile: 64 heads of a query, or the HEADS of each of the
    queries that are ``present``, ``stride`` apart; past those, of the last one again."""
    row = gl.arange(0, N, layout=layout)
    if HEADS == N:
        place = query + row
    else:
        place = query + gl.minimum(row // HEADS, present - 1) * stride + row % HEADS
    return place


@gluon.jit
def keys_of_union(ENTRIES, first, count, layout: gl.constexpr):
    """Rows of the latent that a tile of a union names; past its end, the last one again."""
    place = gl.minimum(first + gl.arange(0, K, layout=layout), count - 1)
    return gl.load(ENTRIES + place) >> 8


@gluon.jit
def named_keys(
    TOPK, first, count, start, batch, b, HEADS: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Of a tile of a top-k, or with fewer than 64 HEADS of a union."""
    if HEADS == N:
        key = keys_of_tile(TOPK, first, count, start, batch, b, layout)
    else:
        key = keys_of_union(TOPK, first, count, layout)
    return key


@gluon.jit
def owned(ENTRIES, first, count, HEADS: gl.constexpr, layout: gl.constexpr):
    """Which of the rows of a tile attend to which keys of a tile of a union, [64, 64]."""
    place = first + gl.arange(0, K, layout=gl.SliceLayout(0, layout))
    entry = gl.load(ENTRIES + place, mask=place < count, other=0)
    own = 1 << gl.arange(0, N, layout=gl.SliceLayout(1, layout)) // HEADS
    return (entry[None, :] & own[:, None]) != 0


@gluon.jit
def copy_rows(rows, latent, rope, layout: gl.constexpr):
    """Start copying the rows at some pointers, latent and rotary part, to shared memory."""
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    rows = rows[:, None]
    async_load(latent, rows + gl.arange(0, L, layout=columns)[None, :])
    async_load(rope, rows + L + gl.arange(0, R, layout=columns)[None, :])


@gluon.jit
def copy_columns(rows, column, target, columns: gl.constexpr):
    """Start copying ``columns`` of the rows at some pointers."""
    column += gl.arange(0, columns, layout=gl.SliceLayout(0, PART_ROWS))
    async_load(target, rows[:, None] + column[None, :])


@gluon.jit
def fetch_query(
    Q, D_OUT, query, stride, present, HEADS: gl.constexpr, q_latent, q_rope, d_out, filled
):  # fmt: skip
    """Start copying the rows of ``place_of_rows``, and of the gradient of what came out of them."""
    column = gl.arange(0, L, layout=gl.SliceLayout(0, PART_ROWS))
    head = place_of_rows(query, stride, present, HEADS, gl.SliceLayout(1, PART_ROWS))
    copy_rows(Q + head * W, q_latent, q_rope, PART_ROWS)
    async_load(d_out, (D_OUT + head * L)[:, None] + column[None, :])
    async_copy.mbarrier_arrive(filled, increment_count=False)


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
def write_heads(
    tile, buffer, OUT, query, WIDTH: gl.constexpr, column, columns: gl.constexpr,
    stride=None, present=None, HEADS: gl.constexpr = N,
):  # fmt: skip
    """Write ``tile`` [64, columns] to the heads of a query, rows of WIDTH, from ``column`` on; by
    way of ``buffer``. Or to those of several queries, see ``place_of_rows``."""
    by_row: gl.constexpr = gl.SliceLayout(1, PART_ROWS)
    buffer.store(tile.to(buffer.dtype))
    thread_barrier()
    row = place_of_rows(query, stride, present, HEADS, by_row)
    column += gl.arange(0, columns, layout=gl.SliceLayout(0, PART_ROWS))
    place = OUT + row[:, None] * WIDTH + column[None, :]
    if HEADS == N:
        gl.store(place, buffer.load(PART_ROWS))
    else:
        there = gl.arange(0, N, layout=by_row) // HEADS < present
        gl.store(place, buffer.load(PART_ROWS), mask=there[:, None])
