"""Gluon kernel of sparse attention's forward for GLM-5's own shape on Hopper.

A program works on pairs of tiles of 64 keys. Its warps are in three
parts. The producer copies the rows of the latent that the top-k names to shared memory. Two
consumers share out the products: one computes the logits and probabilities of the first tile of
each pair and the left half of the output's columns, the other those of the second tile and the
right half. So the tensor cores multiply for one consumer while the other computes exponentials.

Each tile lies in two halves of 256 columns and the rotary part. A half that has served is filled
again at once, while the other is still in use. Where the rotary part of a tile was, its
probabilities go, for the consumer that did not compute them.
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
    copy_rows,
    keys_of_tile,
    query_of_program,
    tell,
    write_heads,
    zero_of,
)

_LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))

# Halves of the first and the second tile, in ``ready`` (filled) and ``free`` (to be filled).
_LEFT = gl.constexpr(0)
_RIGHT = gl.constexpr(2)
_QUERY = gl.constexpr(4)
# What the first and the second consumer tell each other, in ``told``.
_LARGEST = gl.constexpr(0)
_PROBS = gl.constexpr(2)
_TOTAL = gl.constexpr(4)


@gluon.jit
def _produce(
    Q, LATENTS, TOPK, query, start, count, batch, b, pairs,
    q_latent, q_rope, left, right, rope, ready, free,
):  # fmt: skip
    """Halves in the order in which the consumers need them, and let go of them."""
    by_row: gl.constexpr = gl.SliceLayout(1, PART_ROWS)
    heads = Q + (query + gl.arange(0, N, layout=by_row)) * W
    copy_rows(heads, q_latent.index(0), q_rope.index(0), PART_ROWS)
    async_copy.mbarrier_arrive(ready.index(_QUERY), increment_count=False)
    first = keys_of_tile(TOPK, 0, count, start, batch, b, by_row)
    second = keys_of_tile(TOPK, K, count, start, batch, b, by_row)
    for pair in range(0, pairs):
        phase = (pair + 1) % 2
        first_rows = LATENTS + first.to(gl.int64) * W
        second_rows = LATENTS + second.to(gl.int64) * W
        mbarrier.wait(free.index(_LEFT), phase)
        copy_columns(first_rows, 0, left.index(0), H)
        async_copy.mbarrier_arrive(ready.index(_LEFT), increment_count=False)
        mbarrier.wait(free.index(_RIGHT + 1), phase)
        copy_columns(second_rows, H, right.index(1), H)
        async_copy.mbarrier_arrive(ready.index(_RIGHT + 1), increment_count=False)
        mbarrier.wait(free.index(_RIGHT), phase)
        copy_columns(first_rows, H, right.index(0), H)
        copy_columns(first_rows, L, rope.index(0), R)
        async_copy.mbarrier_arrive(ready.index(_RIGHT), increment_count=False)
        mbarrier.wait(free.index(_LEFT + 1), phase)
        copy_columns(second_rows, 0, left.index(1), H)
        copy_columns(second_rows, L, rope.index(1), R)
        async_copy.mbarrier_arrive(ready.index(_LEFT + 1), increment_count=False)
        first = keys_of_tile(TOPK, (2 * pair + 2) * K, count, start, batch, b, by_row)
        second = keys_of_tile(TOPK, (2 * pair + 3) * K, count, start, batch, b, by_row)


@gluon.jit
def _logits(
    q_early, early, early_ready, q_late, late, late_ready, q_rope, rope, phase, place, count, scale
):
    """Of a tile, [64, 64]; its half that comes later brings the rotary part. ``place`` [64] of its
    keys in the top-k: those past ``count`` are none."""
    zeros = gl.full([N, K], 0.0, gl.float32, layout=PART_LOGITS)
    mbarrier.wait(early_ready, phase)
    fence_async_shared()
    logits = warpgroup_mma(q_early, early.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(late_ready, phase)
    fence_async_shared()
    logits = warpgroup_mma(q_late, late.permute((1, 0)), logits, is_async=True)
    logits = warpgroup_mma(q_rope, rope.permute((1, 0)), logits, is_async=True)
    logits = warpgroup_mma_wait(num_outstanding=0, deps=[logits])
    return gl.where(place[None, :] < count, logits * scale, -1e30)


@gluon.jit
def _shrunk(out, shrink):
    return out * gl.convert_layout(shrink, gl.SliceLayout(1, PART_HALF))[:, None]


@gluon.jit
def _start_values(probs, half, out):
    """Start adding the values of a tile's half of columns, by probabilities of this consumer."""
    probs = gl.convert_layout(probs.to(half.dtype), gl.DotOperandLayout(0, PART_HALF, 2))
    return warpgroup_mma(probs, half, out, is_async=True)


@gluon.jit
def _add_values(probs, half, out):
    """The same by probabilities of the other consumer, in shared memory; finished."""
    out = warpgroup_mma(probs, half, out, is_async=True)
    return warpgroup_mma_wait(num_outstanding=0, deps=[out])


@gluon.jit
def _finish(out, total, buffer, OUT, query, column):
    """Normalise, and write by way of ``buffer``."""
    total = gl.convert_layout(gl.where(total > 0, total, 1.0), gl.SliceLayout(1, PART_HALF))
    write_heads(out / total[:, None], buffer, OUT, query, L, column, H)


@gluon.jit
def _consume_first(
    OUT, LSE, query, count, pairs, scale_log2,
    q_latent, q_rope, left, right, rope, rows, ready, free, told,
):  # fmt: skip
    """First tiles, and the left half of the columns. Tells the largest logits up to its tile, and
    hears them up to the second one."""
    by_head: gl.constexpr = gl.SliceLayout(1, PART_LOGITS)
    place = gl.arange(0, K, layout=gl.SliceLayout(0, PART_LOGITS))
    largest = gl.full([N], -1e30, gl.float32, layout=by_head)
    total = gl.full([N], 0.0, gl.float32, layout=by_head)
    out = gl.full([N, H], 0.0, gl.float32, layout=PART_HALF)
    mbarrier.wait(ready.index(_QUERY), 0)
    for pair in range(0, pairs):
        phase = pair % 2
        logits = _logits(
            q_latent.index(0).slice(0, H, dim=1), left.index(0), ready.index(_LEFT),
            q_latent.index(0).slice(H, H, dim=1), right.index(0), ready.index(_RIGHT),
            q_rope.index(0), rope.index(0), phase, 2 * pair * K + place, count, scale_log2,
        )  # fmt: skip
        larger = gl.maximum(largest, gl.max(logits, 1))
        rows.index(0).store(larger)
        tell(told.index(_LARGEST))
        probs = gl.exp2(logits - larger[:, None])
        shrink = gl.exp2(largest - larger)
        out = _start_values(probs, left.index(0), _shrunk(out, shrink))
        total = total * shrink + gl.sum(probs, 1)
        mbarrier.wait(told.index(_LARGEST + 1), phase)
        largest = rows.index(1).load(by_head)
        shrink = gl.exp2(larger - largest)
        total = total * shrink
        rope.index(0).store((probs * shrink[:, None]).to(rope.dtype))
        fence_async_shared()
        tell(told.index(_PROBS))
        out = warpgroup_mma_wait(num_outstanding=0, deps=[out])
        tell(free.index(_LEFT))
        out = _shrunk(out, shrink)
        mbarrier.wait(told.index(_PROBS + 1), phase)
        out = _add_values(rope.index(1), left.index(1), out)
        tell(free.index(_LEFT + 1))
    rows.index(2).store(total)
    tell(told.index(_TOTAL))
    mbarrier.wait(told.index(_TOTAL + 1), 0)
    total += rows.index(3).load(by_head)
    _finish(out, total, left.index(0), OUT, query, 0)
    lse = largest + gl.log2(gl.where(total > 0, total, 1.0))
    gl.store(LSE + query + gl.arange(0, N, layout=by_head), lse)


@gluon.jit
def _consume_second(
    OUT, query, count, pairs, scale_log2,
    q_latent, q_rope, left, right, rope, rows, ready, free, told,
):  # fmt: skip
    """Second tiles, and the right half of the columns. Hears the largest logits up to the first
    tile, and tells them up to its own."""
    by_head: gl.constexpr = gl.SliceLayout(1, PART_LOGITS)
    place = K + gl.arange(0, K, layout=gl.SliceLayout(0, PART_LOGITS))
    largest = gl.full([N], -1e30, gl.float32, layout=by_head)
    total = gl.full([N], 0.0, gl.float32, layout=by_head)
    out = gl.full([N, H], 0.0, gl.float32, layout=PART_HALF)
    mbarrier.wait(ready.index(_QUERY), 0)
    for pair in range(0, pairs):
        phase = pair % 2
        zero = zero_of(pair)
        one = zero + 1
        logits = _logits(
            q_latent.index(zero).slice(H, H, dim=1), right.index(one), ready.index(_RIGHT + 1),
            q_latent.index(zero).slice(0, H, dim=1), left.index(one), ready.index(_LEFT + 1),
            q_rope.index(zero), rope.index(one), phase, 2 * pair * K + place, count, scale_log2,
        )  # fmt: skip
        larger = gl.max(logits, 1)
        mbarrier.wait(told.index(_LARGEST), phase)
        larger = gl.maximum(rows.index(0).load(by_head), larger)
        rows.index(1).store(larger)
        tell(told.index(_LARGEST + 1))
        probs = gl.exp2(logits - larger[:, None])
        shrink = gl.exp2(largest - larger)
        largest = larger
        out = _start_values(probs, right.index(one), _shrunk(out, shrink))
        total = total * shrink + gl.sum(probs, 1)
        rope.index(one).store(probs.to(rope.dtype))
        fence_async_shared()
        tell(told.index(_PROBS + 1))
        out = warpgroup_mma_wait(num_outstanding=0, deps=[out])
        tell(free.index(_RIGHT + 1))
        mbarrier.wait(told.index(_PROBS), phase)
        out = _add_values(rope.index(zero), right.index(zero), out)
        tell(free.index(_RIGHT))
    rows.index(3).store(total)
    tell(told.index(_TOTAL + 1))
    mbarrier.wait(told.index(_TOTAL), 0)
    total += rows.index(2).load(by_head)
    _finish(out, total, right.index(1), OUT, query, H)


@gluon.jit
def forward(
    Q, LATENTS, TOPK, STARTS, POSITIONS, OUT, LSE,
    topk_rows, batch, groups, k, scale_log2,
):  # fmt: skip
    dtype: gl.constexpr = Q.dtype.element_ty
    b, query, start, count, TOPK = query_of_program(
        TOPK, STARTS, POSITIONS, topk_rows, batch, groups, k
    )
    pairs = (count + 2 * K - 1) // (2 * K)
    q_latent = gl.allocate_shared_memory(dtype, [1, N, L], SHARED)
    q_rope = gl.allocate_shared_memory(dtype, [1, N, R], SHARED)
    left = gl.allocate_shared_memory(dtype, [2, K, H], SHARED)
    right = gl.allocate_shared_memory(dtype, [2, K, H], SHARED)
    rope = gl.allocate_shared_memory(dtype, [2, K, R], SHARED)
    rows = gl.allocate_shared_memory(gl.float32, [4, N], _LINE)
    ready = gl.allocate_shared_memory(gl.int64, [5, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    told = gl.allocate_shared_memory(gl.int64, [6, 1], BARRIER)
    for number in gl.static_range(5):
        mbarrier.init(ready.index(number), count=PART_THREADS)
    for number in gl.static_range(4):
        mbarrier.init(free.index(number), count=1)
    for number in gl.static_range(6):
        mbarrier.init(told.index(number), count=1)
    gl.warp_specialize(
        [
            (
                _consume_first,
                (
                    OUT, LSE, query, count, pairs, scale_log2,
                    q_latent, q_rope, left, right, rope, rows, ready, free, told,
                ),
            ),
            (
                _consume_second,
                (
                    OUT, query, count, pairs, scale_log2,
                    q_latent, q_rope, left, right, rope, rows, ready, free, told,
                ),
            ),
            (
                _produce,
                (
                    Q, LATENTS, TOPK, query, start, count, batch, b, pairs,
                    q_latent, q_rope, left, right, rope, ready, free,
                ),
            ),
        ],
        [PART_WARPS, PART_WARPS],
        [216, 72],  # registers of a thread; the first consumer has what is left, 216
    )  # fmt: skip
