"""Triton kernel that turns a part of each head. A program works on some heads of one token.

==================== ======================================================================
IN                   [s, b, g, n, WIDTH], of the strides ``row``, ``sequence``, ``group`` and
                     ``head``
COS, SIN             [s, ROPE]
OUT                  [s, b, g * n, WIDTH]
==================== ======================================================================

Tiles: HEADS x columns; KEPT columns at a time of those that stay.
"""

from __future__ import annotations

import triton
import triton.language as tl

cdiv, next_power_of_2 = triton.cdiv, triton.next_power_of_2


@triton.jit
def rotate(
    IN, COS, SIN, OUT,
    batch, heads, of_group, row, sequence, group, head,
    FIRST: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, KEPT: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The columns FIRST to FIRST + ROPE; ``BACKWARD``: of a gradient, the other way."""
    HALF: tl.constexpr = ROPE // 2
    token = (tl.program_id(0) // batch).to(tl.int64)
    b = tl.program_id(0) % batch
    number = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    there = (number < heads)[:, None]
    place = token * row + b * sequence + number // of_group * group + number % of_group * head
    given = IN + place[:, None]
    found = OUT + ((token * batch + b) * heads + number)[:, None] * WIDTH
    kept = tl.arange(0, KEPT)[None, :]
    if FIRST:
        inside = there & (kept < FIRST)
        tl.store(found + kept, tl.load(given + kept, mask=inside), mask=inside)
    if FIRST + ROPE < WIDTH:
        inside = there & (kept < WIDTH - FIRST - ROPE)
        last = FIRST + ROPE + kept
        tl.store(found + last, tl.load(given + last, mask=inside), mask=inside)
    column = tl.arange(0, HALF)[None, :]
    cos_0, cos_1 = _halves(COS + token * ROPE, column, HALF)
    sin_0, sin_1 = _halves(SIN + token * ROPE, column, HALF)
    given += FIRST
    found += FIRST
    pairs = tl.arange(0, ROPE)[None, :]
    if INTERLEAVED and not BACKWARD:
        left, right = tl.split(tl.reshape(tl.load(given + pairs, mask=there), [HEADS, HALF, 2]))
    else:
        left = tl.load(given + column, mask=there)
        right = tl.load(given + HALF + column, mask=there)
    if BACKWARD:
        first = _product(left, cos_0) + _product(right, sin_1)
        second = _product(right, cos_1) - _product(left, sin_0)
    else:
        first = _product(left, cos_0) - _product(right, sin_0)
        second = _product(right, cos_1) + _product(left, sin_1)
    dtype = OUT.dtype.element_ty
    if INTERLEAVED and BACKWARD:
        both = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), [HEADS, ROPE])
        tl.store(found + pairs, both, mask=there)
    else:
        tl.store(found + column, first.to(dtype), mask=there)
        tl.store(found + HALF + column, second.to(dtype), mask=there)


@triton.jit
def _halves(base, column, HALF: tl.constexpr):
    return tl.load(base + column), tl.load(base + HALF + column)


@triton.jit
def _product(left, right):
    """Rounded to the dtype, in fp32."""
    return (left.to(tl.float32) * right.to(tl.float32)).to(left.dtype).to(tl.float32)
