"""The lightning indexer in Triton: scores of a block of queries, and the top-k of each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Rows, query_blocks

LONGEST_ROW = 65536
"""Keys of a document that a program can hold in registers to select from."""


@triton.jit
def _scores(
    Q, K, WEIGHTS, STARTS, POSITIONS, SCORES,
    first_row, end_row, batch, b, num_keys, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """SCORES[row - first_row, key] of the keys that the queries see; the rest stays as it is."""
    row = first_row + tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = row < end_row
    start = tl.load(STARTS + row, mask=inside, other=2147483647)
    last = tl.load(POSITIONS + row, mask=inside, other=-1)
    # Programs of one block of queries share its keys out between them.
    begin = tl.min(start, 0) // KEYS
    tiles = tl.cdiv(tl.max(last, 0) + 1, KEYS) - begin
    share = tl.cdiv(tiles, tl.num_programs(1))
    begin += tl.program_id(1) * share
    end = begin + tl.minimum(share, tiles - tl.program_id(1) * share)

    per_head = first_row + tl.program_id(0) * QUERIES + tl.arange(0, QUERIES * HEADS) // HEADS
    head = tl.arange(0, QUERIES * HEADS) % HEADS
    query = (per_head * batch + b).to(tl.int64) * HEADS + head
    dim = tl.arange(0, DIM)
    own = per_head < end_row
    q = tl.load(Q + query[:, None] * DIM + dim[None, :], mask=own[:, None], other=0.0)
    weights = tl.load(WEIGHTS + query, mask=own, other=0.0) * scale
    for tile in tl.range(begin, end, num_stages=STAGES):
        key = tile * KEYS + tl.arange(0, KEYS)
        offsets = (key * batch + b).to(tl.int64) * DIM
        k = tl.load(K + offsets[:, None] + dim[None, :], mask=key[:, None] < num_keys, other=0.0)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        products = tl.maximum(products, 0.0) * weights[None, :]
        scores = tl.sum(tl.reshape(products, (KEYS, QUERIES, HEADS)), 2)
        seen = (key[:, None] >= start[None, :]) & (key[:, None] <= last[None, :])
        place = SCORES + (row - first_row)[None, :].to(tl.int64) * num_keys + key[:, None]
        tl.store(place, scores, mask=seen & inside[None, :])


@triton.jit
def _topk(SCORES, STARTS, POSITIONS, TOPK, first_row, num_keys, k, LENGTH: tl.constexpr):
    """The places of the k largest of a row's visible scores; the lower wins among equals.

    Bisects the k-th largest value over the bits of the scores, ordered as integers.
    """
    row = tl.program_id(0)
    start = tl.load(STARTS + first_row + row)
    visible = tl.load(POSITIONS + first_row + row) - start + 1
    out = TOPK + row.to(tl.int64) * k
    place = tl.arange(0, LENGTH)
    if visible <= k:
        tl.store(out + place, tl.where(place < visible, place, -1), mask=place < k)
    else:
        inside = place < visible
        scores = tl.load(SCORES + row.to(tl.int64) * num_keys + start + place, mask=inside, other=0)
        bits = scores.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        low = tl.min(tl.where(inside, bits, 2147483647), 0)
        bits = tl.where(inside, bits, -2147483648)
        high = tl.max(bits, 0)
        while low < high:  # the largest value that at least k scores reach
            middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)
            reached = tl.sum((bits >= middle).to(tl.int32), 0)
            low = tl.where(reached >= k, middle, low)
            high = tl.where(reached == k, middle, tl.where(reached > k, high, middle - 1))
        above = (bits > low).to(tl.int32)
        equal = ((bits == low) & inside).to(tl.int32)
        order = tl.cumsum(above, 0)
        number = tl.where(above > 0, order - 1, tl.sum(above, 0) + tl.cumsum(equal, 0) - 1)
        chosen = ((above + equal) > 0) & (number < k)
        tl.store(out + number, place, mask=chosen)


def scores(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    starts: Tensor,
    positions: Tensor,
    block: slice,
    b: int,
    scale: float,
    out: Tensor,
) -> None:
    """Index scores of a block of queries against the keys that they see.

    Args:
        query: [s, b, heads, dim], contiguous.
        key: [t, b, dim], contiguous.
        weights: fp32 [s, b, heads], contiguous.
        starts: int32 [s], where each query's document starts.
        positions: int32 [s], where each query stands.
        block: the queries.
        b: which sequence of the batch.
        scale: of the products, before the weights.
        out: fp32 [block, t]; what a query does not see is left as it is.
    """
    _, batch, heads, dim = query.shape
    queries = max(1, 128 // heads)
    rows = block.stop - block.start
    half = query.dtype.itemsize == 2
    _scores[(triton.cdiv(rows, queries), 4)](
        query, key, weights, starts, positions, out,
        block.start, block.stop, batch, b, len(key), scale,
        HEADS=heads, DIM=dim, QUERIES=queries, KEYS=128 if half else 32,
        PRECISION="tf32" if half else "ieee", STAGES=3, num_warps=8,
    )  # fmt: skip


def topk(
    scores: Tensor, starts: Tensor, positions: Tensor, block: slice, longest: int, out: Tensor
) -> None:
    """The top-k of each row of ``scores``, [block, t], as places counted from the document's start.

    Args:
        longest: no query of the block sees more keys; at most ``LONGEST_ROW``.
        out: int32 [block, k], contiguous; -1 where fewer keys are visible.
    """
    rows, k = out.shape
    length = triton.next_power_of_2(max(longest, k))
    _topk[(rows,)](
        scores, starts, positions, out, block.start, scores.shape[1], k,
        LENGTH=length, num_warps=min(32, max(4, length // 2048)),
    )  # fmt: skip


@torch.no_grad()
def select(query: Tensor, key: Tensor, weights: Tensor, rows: Rows, k: int, scale: float) -> Tensor:
    """As ``LightningIndexer.select``; among equal scores the lower position wins.

    Args:
        query, key, weights: as of ``scores``.
        rows: where the queries stand.
        k: size of the top-k.
        scale: as of ``scores``.
    """
    s, b = query.shape[:2]
    query, key, weights = (tensor.contiguous() for tensor in (query, key, weights))
    starts = rows.starts.int()
    positions = (rows.starts + rows.local_positions).int()
    topk_indices = torch.empty((b, s, k), dtype=torch.int32, device=query.device)
    for block in query_blocks(s, rows.keys * 4):
        longest = min(rows.longest or rows.keys, rows.end(block))
        out = torch.empty((block.stop - block.start, rows.keys), device=query.device)
        for batch in range(b):
            scores(query, key, weights, starts, positions, block, batch, scale, out)
            topk(out, starts, positions, block, longest, topk_indices[batch, block])
    return topk_indices
