"""Attention of absorbed queries over selected rows of the latent, in Triton.

A program works on one query and up to 64 of its heads. All heads share the query's keys, and a key
is its own value (the latent without the rotary part), so one gathered tile serves both products.
The latent comes in pieces of its columns, so that no product has all of them in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


@triton.jit
def load_columns(base, offsets, first, WIDTH: tl.constexpr, mask):
    """[rows, WIDTH] from column ``first`` on of the rows at ``offsets``; zeros where masked."""
    columns = first + tl.arange(0, WIDTH)
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def gather_columns(base, offsets, first, WIDTH: tl.constexpr):
    columns = first + tl.arange(0, WIDTH)
    return tl.load(base + offsets[:, None] + columns[None, :])


@triton.jit
def store_columns(base, offsets, first, WIDTH: tl.constexpr, tile, mask):
    columns = first + tl.arange(0, WIDTH)
    place = base + offsets[:, None] + columns[None, :]
    tl.store(place, tile.to(base.dtype.element_ty), mask=mask[:, None])


@triton.jit
def query_of_program(end_row, batch, heads, HEADS: tl.constexpr):
    """Row and batch of this program, the places of its heads in [s, b, n], and which there are.
    The last rows come first: they have most keys."""
    row = end_row - 1 - tl.program_id(0) // batch
    b = tl.program_id(0) % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    return row, b, (row * batch + b).to(tl.int64) * heads + head, head < heads


@triton.jit
def load_span(STARTS, POSITIONS, row):
    start = tl.load(STARTS + row)
    return start, tl.load(POSITIONS + row) - start + 1


@triton.jit
def tile_of_keys(TOPK, first, count, start, batch, b, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of the latents that a tile of the top-k names, and which of its places name one."""
    place = first + tl.arange(0, KEYS)
    local = tl.load(TOPK + place, mask=place < count, other=-1)
    return (tl.maximum(local, 0) + start).to(tl.int64) * batch * WIDTH + b * WIDTH, local >= 0


@triton.jit
def _forward(
    Q, KV, TOPK, STARTS, POSITIONS, OUT, LSE,
    rows, batch, heads, k, scale_log2,
    LATENT: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = LATENT + ROPE
    HALF: tl.constexpr = LATENT // 2
    row, b, query, own = query_of_program(rows, batch, heads, HEADS)
    q_0 = load_columns(Q, query * WIDTH, 0, HALF, own)
    q_1 = load_columns(Q, query * WIDTH, HALF, HALF, own)
    q_rope = load_columns(Q, query * WIDTH, LATENT, ROPE, own)
    start, visible = load_span(STARTS, POSITIONS, row)
    count = tl.minimum(visible, k)
    TOPK += (b.to(tl.int64) * rows + row) * k
    largest = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out_0 = tl.zeros([HEADS, HALF], tl.float32)
    out_1 = tl.zeros([HEADS, HALF], tl.float32)
    for first in tl.range(0, count, KEYS, num_stages=STAGES):
        key, valid = tile_of_keys(TOPK, first, count, start, batch, b, KEYS, WIDTH)
        latent_0 = gather_columns(KV, key, 0, HALF)
        latent_1 = gather_columns(KV, key, HALF, HALF)
        rope = gather_columns(KV, key, LATENT, ROPE)
        logits = tl.dot(q_0, tl.trans(latent_0), input_precision=PRECISION)
        logits = tl.dot(q_1, tl.trans(latent_1), logits, input_precision=PRECISION)
        logits = tl.dot(q_rope, tl.trans(rope), logits, input_precision=PRECISION) * scale_log2
        logits = tl.where(valid[None, :], logits, -1e30)
        larger = tl.maximum(largest, tl.max(logits, 1))
        # A tile without a valid key would otherwise count exp2(-1e30 + 1e30).
        probs = tl.where(valid[None, :], tl.exp2(logits - larger[:, None]), 0.0)
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(probs, 1)
        probs = probs.to(latent_0.dtype)
        out_0 = tl.dot(probs, latent_0, out_0 * shrink[:, None], input_precision=PRECISION)
        out_1 = tl.dot(probs, latent_1, out_1 * shrink[:, None], input_precision=PRECISION)
        largest = larger
    total = tl.where(total > 0, total, 1.0)
    store_columns(OUT, query * LATENT, 0, HALF, out_0 / total[:, None], own)
    store_columns(OUT, query * LATENT, HALF, HALF, out_1 / total[:, None], own)
    tl.store(LSE + query, largest + tl.log2(total), mask=own)


@triton.jit
def _delta(OUT, D_OUT, DELTA, LATENT: tl.constexpr, ROWS: tl.constexpr, rows):
    """Row term of the softmax's backward: out . d_out, one number a query and head."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = row.to(tl.int64) * LATENT
    out = load_columns(OUT, offsets, 0, LATENT, row < rows).to(tl.float32)
    d_out = load_columns(D_OUT, offsets, 0, LATENT, row < rows).to(tl.float32)
    tl.store(DELTA + row, tl.sum(out * d_out, 1), mask=row < rows)


@triton.jit
def _add_to_keys(
    D_KV, target, first, WIDTH: tl.constexpr, d_logits, q, probs, d_out, valid,
    ATOMIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a query adds to the gradient of its keys, in some columns of the latent."""
    part = tl.dot(d_logits, q, input_precision=PRECISION)
    part = tl.dot(probs, d_out, part, input_precision=PRECISION)
    add_rows(D_KV, target, first, WIDTH, part, valid, ATOMIC)


@triton.jit
def add_rows(D_KV, target, first, WIDTH: tl.constexpr, tile, valid, ATOMIC: tl.constexpr):
    place = D_KV + target[:, None] + (first + tl.arange(0, WIDTH))[None, :]
    if ATOMIC:
        tl.atomic_add(place, tile, mask=valid[:, None], sem="relaxed")
    else:
        tl.store(place, tile, mask=valid[:, None])


@triton.jit
def _backward(
    Q, KV, TOPK, STARTS, POSITIONS, D_OUT, LSE, DELTA, D_Q, D_KV,
    first_row, end_row, rows, batch, heads, k, scale, scale_log2,
    LATENT: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    ATOMIC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one query, and what it adds to those of its keys: to ``D_KV`` [t, b, WIDTH] by
    atomics, or to its own rows of [rows of this launch, b, k, head groups, WIDTH]."""
    WIDTH: tl.constexpr = LATENT + ROPE
    PART: tl.constexpr = LATENT // 4
    row, b, query, own = query_of_program(end_row, batch, heads, HEADS)
    q_0 = load_columns(Q, query * WIDTH, 0, PART, own)
    q_1 = load_columns(Q, query * WIDTH, PART, PART, own)
    q_2 = load_columns(Q, query * WIDTH, 2 * PART, PART, own)
    q_3 = load_columns(Q, query * WIDTH, 3 * PART, PART, own)
    q_rope = load_columns(Q, query * WIDTH, LATENT, ROPE, own)
    d_out_0 = load_columns(D_OUT, query * LATENT, 0, PART, own)
    d_out_1 = load_columns(D_OUT, query * LATENT, PART, PART, own)
    d_out_2 = load_columns(D_OUT, query * LATENT, 2 * PART, PART, own)
    d_out_3 = load_columns(D_OUT, query * LATENT, 3 * PART, PART, own)
    lse = tl.load(LSE + query, mask=own, other=0.0)
    delta = tl.load(DELTA + query, mask=own, other=0.0)
    start, visible = load_span(STARTS, POSITIONS, row)
    count = tl.minimum(visible, k)
    TOPK += (b.to(tl.int64) * rows + row) * k
    d_q_0 = tl.zeros([HEADS, PART], tl.float32)
    d_q_1 = tl.zeros([HEADS, PART], tl.float32)
    d_q_2 = tl.zeros([HEADS, PART], tl.float32)
    d_q_3 = tl.zeros([HEADS, PART], tl.float32)
    d_q_rope = tl.zeros([HEADS, ROPE], tl.float32)
    for first in tl.range(0, count, KEYS, num_stages=STAGES):
        key, valid = tile_of_keys(TOPK, first, count, start, batch, b, KEYS, WIDTH)
        latent_0 = gather_columns(KV, key, 0, PART)
        latent_1 = gather_columns(KV, key, PART, PART)
        latent_2 = gather_columns(KV, key, 2 * PART, PART)
        latent_3 = gather_columns(KV, key, 3 * PART, PART)
        rope = gather_columns(KV, key, LATENT, ROPE)
        logits = tl.dot(q_0, tl.trans(latent_0), input_precision=PRECISION)
        logits = tl.dot(q_1, tl.trans(latent_1), logits, input_precision=PRECISION)
        logits = tl.dot(q_2, tl.trans(latent_2), logits, input_precision=PRECISION)
        logits = tl.dot(q_3, tl.trans(latent_3), logits, input_precision=PRECISION)
        logits = tl.dot(q_rope, tl.trans(rope), logits, input_precision=PRECISION)
        d_probs = tl.dot(d_out_0, tl.trans(latent_0), input_precision=PRECISION)
        d_probs = tl.dot(d_out_1, tl.trans(latent_1), d_probs, input_precision=PRECISION)
        d_probs = tl.dot(d_out_2, tl.trans(latent_2), d_probs, input_precision=PRECISION)
        d_probs = tl.dot(d_out_3, tl.trans(latent_3), d_probs, input_precision=PRECISION)
        probs = tl.exp2(logits * scale_log2 - lse[:, None])
        probs = tl.where(valid[None, :], probs, 0.0)
        d_logits = (probs * (d_probs - delta[:, None]) * scale).to(latent_0.dtype)
        probs = probs.to(latent_0.dtype)
        d_q_0 = tl.dot(d_logits, latent_0, d_q_0, input_precision=PRECISION)
        d_q_1 = tl.dot(d_logits, latent_1, d_q_1, input_precision=PRECISION)
        d_q_2 = tl.dot(d_logits, latent_2, d_q_2, input_precision=PRECISION)
        d_q_3 = tl.dot(d_logits, latent_3, d_q_3, input_precision=PRECISION)
        d_q_rope = tl.dot(d_logits, rope, d_q_rope, input_precision=PRECISION)
        if ATOMIC:
            target = key
        else:
            pair = ((row - first_row) * batch + b).to(tl.int64) * k + first + tl.arange(0, KEYS)
            target = (pair * tl.num_programs(1) + tl.program_id(1)) * WIDTH
        d_logits = tl.trans(d_logits)
        probs = tl.trans(probs)
        _add_to_keys(D_KV, target, 0, PART, d_logits, q_0, probs, d_out_0, valid, ATOMIC, PRECISION)
        _add_to_keys(
            D_KV, target, PART, PART, d_logits, q_1, probs, d_out_1, valid, ATOMIC, PRECISION
        )
        _add_to_keys(
            D_KV, target, 2 * PART, PART, d_logits, q_2, probs, d_out_2, valid, ATOMIC, PRECISION
        )
        _add_to_keys(
            D_KV, target, 3 * PART, PART, d_logits, q_3, probs, d_out_3, valid, ATOMIC, PRECISION
        )
        part = tl.dot(d_logits, q_rope, input_precision=PRECISION)
        add_rows(D_KV, target, LATENT, ROPE, part, valid, ATOMIC)
    store_columns(D_Q, query * WIDTH, 0, PART, d_q_0, own)
    store_columns(D_Q, query * WIDTH, PART, PART, d_q_1, own)
    store_columns(D_Q, query * WIDTH, 2 * PART, PART, d_q_2, own)
    store_columns(D_Q, query * WIDTH, 3 * PART, PART, d_q_3, own)
    store_columns(D_Q, query * WIDTH, LATENT, ROPE, d_q_rope, own)


@triton.jit
def _add_pairs(
    PAIRS, ORDER, BOUNDS, D_KV, groups,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add to one key's gradient what its queries left, in their order."""
    key = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    total = tl.load(D_KV + key * WIDTH + columns, mask=inside)
    for number in range(tl.load(BOUNDS + key), tl.load(BOUNDS + key + 1)):
        pair = tl.load(ORDER + number).to(tl.int64) * groups
        for group in range(groups):
            total += tl.load(PAIRS + (pair + group) * WIDTH + columns, mask=inside)
    tl.store(D_KV + key * WIDTH + columns, total, mask=inside)


PAIR_BYTES = 512 << 20
"""Upper bound of what the deterministic backward keeps of (query, key) pairs at a time."""


@triton.jit
def _flat_keys(
    TOPK, STARTS, KEYS, rows, batch, k, BLOCK: tl.constexpr
):  # fmt: skip
    row, b = tl.program_id(0) // batch, tl.program_id(0) % batch
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < k
    local = tl.load(TOPK + (b.to(tl.int64) * rows + row) * k + place, mask=inside, other=-1)
    key = (local + tl.load(STARTS + row)) * batch + b
    place += tl.program_id(0).to(tl.int64) * k
    tl.store(KEYS + place, tl.where(local < 0, -1, key), mask=inside)


def flat_keys(topk_indices: Tensor, starts: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The selected keys of each query in [s * b, k], as other libraries count them: rows of the
    latent [t * b], -1 for an empty place; and how many each query has, int32 [s * b].

    Args:
        topk_indices: int32 [b, s, k], contiguous, see ``blocks.selected_keys``.
        starts: int32 [s], where each query's document starts.
        positions: int32 [s], where each query stands.
    """
    b, s, k = topk_indices.shape
    keys = torch.empty((s * b, k), dtype=torch.int32, device=topk_indices.device)
    block = min(1024, triton.next_power_of_2(k))
    _flat_keys[(s * b, triton.cdiv(k, block))](topk_indices, starts, keys, s, b, k, BLOCK=block)
    return keys, (positions - starts + 1).clamp(max=k).repeat_interleave(b)


def heads_of_a_program(heads: int, at_most: int) -> int:
    return min(at_most, max(16, triton.next_power_of_2(heads)))


def precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype.itemsize == 2 else "ieee"


def forward(
    query: Tensor,
    latent: Tensor,
    topk_indices: Tensor,
    starts: Tensor,
    positions: Tensor,
    latent_dim: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of each query over the latents that its top-k names.

    Args:
        query: [s, b, n, latent + rope], contiguous.
        latent: [t, b, latent + rope], contiguous.
        topk_indices: int32 [b, s, k], contiguous, see ``blocks.selected_keys``.
        starts: int32 [s], where each query's document starts.
        positions: int32 [s], where each query stands.
        latent_dim: how much of a key is its value; the rest is rotary.
        softmax_scale: factor of the logits.

    Returns:
        [s, b, n, latent], zeros for a query without keys, and the log2-sum-exp2 of the logits,
        fp32 [s, b, n].
    """
    s, b, heads, width = query.shape
    out = torch.empty((s, b, heads, latent_dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((s, b, heads), dtype=torch.float32, device=query.device)
    block = heads_of_a_program(heads, 64)
    _forward[(s * b, triton.cdiv(heads, block))](
        query, latent, topk_indices, starts, positions, out, lse,
        s, b, heads, topk_indices.shape[-1], softmax_scale * LOG2_E,
        LATENT=latent_dim, ROPE=width - latent_dim, HEADS=block, KEYS=64,
        PRECISION=precision(query.dtype), STAGES=2, num_warps=8 if block > 32 else 4,
    )  # fmt: skip
    return out, lse


def row_terms(out: Tensor, d_out: Tensor) -> Tensor:
    """out . d_out over the last dimension, in fp32: [s, b, n]."""
    delta = torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device)
    rows = delta.numel()
    _delta[(triton.cdiv(rows, 16),)](out, d_out, delta, LATENT=out.shape[-1], ROWS=16, rows=rows)
    return delta


def backward(
    query: Tensor,
    latent: Tensor,
    topk_indices: Tensor,
    starts: Tensor,
    positions: Tensor,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``forward``.

    Args:
        d_out: [s, b, n, latent], contiguous.
        lse: as ``forward`` returned it.
        delta: ``row_terms`` of its output.
        deterministic: add up a key's gradient in the order of its queries, not as they come.

    Returns:
        Of the queries, in their dtype, and of the latents, fp32 [t, b, latent + rope].
    """
    s, b, heads, width = query.shape
    k = topk_indices.shape[-1]
    latent_dim = d_out.shape[-1]
    block = heads_of_a_program(heads, 32)
    groups = triton.cdiv(heads, block)
    d_query = torch.empty_like(query)
    d_latent = torch.zeros(latent.shape, dtype=torch.float32, device=latent.device)

    def launch(first: int, end: int, target: Tensor) -> None:
        _backward[((end - first) * b, groups)](
            query, latent, topk_indices, starts, positions, d_out, lse, delta, d_query, target,
            first, end, s, b, heads, k, softmax_scale, softmax_scale * LOG2_E,
            LATENT=latent_dim, ROPE=width - latent_dim, HEADS=block, KEYS=32,
            ATOMIC=not deterministic, PRECISION=precision(query.dtype), STAGES=2, num_warps=4,
        )  # fmt: skip

    if deterministic:
        add_in_order(launch, topk_indices, starts, d_latent, groups)
    else:
        launch(0, s, d_latent)
    return d_query, d_latent


def add_in_order(launch, topk_indices: Tensor, starts: Tensor, d_keys: Tensor, groups: int) -> None:
    """Add to the gradients of keys what their queries contribute, in the order of the queries.

    Args:
        launch: computes the queries [first, end), given first, end, and where their contributions
            go, fp32 [end - first, b, k, groups, width].
        topk_indices: int32 [b, s, k].
        starts: int32 [s].
        d_keys: fp32 [t, b, width], added to.
        groups: contributions that a query makes to each of its keys.
    """
    s, k = topk_indices.shape[1:]
    keys, b, width = d_keys.shape
    rows = max(1, PAIR_BYTES // (b * k * groups * width * 4))
    for first in range(0, s, rows):
        end = min(first + rows, s)
        pairs = torch.empty((end - first, b, k, groups, width), device=d_keys.device)
        launch(first, end, pairs)
        order, bounds = _pairs_of_each_key(topk_indices[:, first:end], starts[first:end], keys)
        _add_pairs[(keys * b,)](
            pairs, order, bounds, d_keys, groups,
            WIDTH=width, COLUMNS=triton.next_power_of_2(width),
        )  # fmt: skip


def _pairs_of_each_key(topk_indices: Tensor, starts: Tensor, keys: int):
    """Pairs [rows, b, k], flat, in the order of their keys, and where each key's begin."""
    b = len(topk_indices)
    batch = torch.arange(b, device=starts.device)[:, None, None]
    key = (topk_indices.long() + starts[:, None]) * b + batch
    key = torch.where(topk_indices < 0, keys * b, key).transpose(0, 1).flatten()
    key, order = key.sort(stable=True)
    edges = torch.arange(keys * b + 1, device=starts.device)
    return order, torch.searchsorted(key, edges)
