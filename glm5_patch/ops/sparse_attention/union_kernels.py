"""Triton kernels that unite the keys of neighbouring queries.

A group is QUERIES neighbouring rows of one sequence, of whatever documents. Its union names each
key once, and says which of the queries attend to it. Kernels work on a block of groups, from
``first`` on.

=========== =======================================================================
MEMBERS     int32 [groups of the block, b, words], a byte for each key, zeros between launches
ENTRIES     int32 [groups of the block, b, capacity], ascending: row of the flat latent
            [t * b] << 8, and a bit for each query that attends to it
COUNTS      int32 [all groups, b], entries of a union; 0: the queries are better off alone
=========== =======================================================================

TOPK, STARTS and POSITIONS are those of ``triton_kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import keys_of_query

cdiv, next_power_of_2 = triton.cdiv, triton.next_power_of_2


@triton.jit
def mark(
    TOPK, STARTS, POSITIONS, MEMBERS, first, rows, batch, k, words,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the bit of a query for BLOCK of its keys."""
    place_of_row = tl.program_id(0) // batch
    b = tl.program_id(0) % batch
    row = first * QUERIES + place_of_row
    if row >= rows:
        return
    start, count, line = keys_of_query(STARTS, POSITIONS, row, b, rows, k)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(TOPK + line + place, mask=place < count, other=-1)
    key = tl.maximum(local, 0) + start
    group = (place_of_row // QUERIES * batch + b).to(tl.int64)
    bit = (1 << place_of_row % QUERIES) << key % 4 * 8
    tl.atomic_or(MEMBERS + group * words + key // 4, bit, mask=local >= 0, sem="relaxed")


@triton.jit
def unite(
    MEMBERS, STARTS, POSITIONS, ENTRIES, COUNTS, first, rows, batch, k, words, capacity, share,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the union of a group, and how many keys it has if these are at most ``share`` of all
    that its queries have. MEMBERS in bytes, [groups of the block, b, 4 * words]; BLOCK at a time
    are read, and cleared."""
    group = tl.program_id(0) // batch
    b = tl.program_id(0) % batch
    row = (first + group) * QUERIES + tl.arange(0, QUERIES)
    there = row < rows
    start = tl.load(STARTS + row, mask=there, other=2147483647)
    position = tl.load(POSITIONS + row, mask=there, other=-1)
    named = tl.sum(tl.where(there, tl.minimum(position - start + 1, k), 0), 0)
    MEMBERS += tl.program_id(0).to(tl.int64) * words * 4
    ENTRIES += tl.program_id(0).to(tl.int64) * capacity
    last = tl.max(position, 0)
    united = 0
    for begin in range(tl.min(start, 0), last + 1, BLOCK):
        key = begin + tl.arange(0, BLOCK)
        bits = tl.load(MEMBERS + key, mask=key <= last, other=0).to(tl.int32)
        member = bits != 0
        tl.store(MEMBERS + key, tl.zeros([BLOCK], tl.uint8), mask=member)
        place = united + tl.cumsum(member.to(tl.int32), 0) - 1
        tl.store(ENTRIES + place, ((key * batch + b) << 8) | bits, mask=member & (place < capacity))
        united += tl.sum(member.to(tl.int32), 0)
    serves = united.to(tl.float32) <= share * named.to(tl.float32)
    tl.store(COUNTS + first * batch + tl.program_id(0), tl.where(serves, united, 0))
