"""Triton kernel that rounds rows to fp8. A program works on ROWS rows.

==================== ======================================================================
IN                   [rows, DIM]
VALUES               bf16 [rows, DIM]
SCALES               fp32 [rows]
==================== ======================================================================

Numbers are rounded by their bits: not every device, nor Triton's interpreter, converts to e4m3.
"""

from __future__ import annotations

import triton
import triton.language as tl

cdiv = triton.cdiv


@triton.jit
def quantize(
    IN, VALUES, SCALES, rows, norm, largest, smallest_amax,
    ROWS: tl.constexpr, DIM: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """``norm`` makes the Hadamard matrix orthonormal; STEPS is 0 without one, else log2 of DIM."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    place = row[:, None].to(tl.int64) * DIM + tl.arange(0, DIM)[None, :]
    numbers = tl.load(IN + place, mask=there[:, None], other=0).to(tl.float32)
    numbers = _rounded(numbers, 16)  # to bf16
    if STEPS:
        # Neighbours are added up and subtracted; sums come first then, differences second, so
        # that what was two apart is neighbours.
        for _ in tl.static_range(STEPS):
            left, right = tl.split(tl.reshape(numbers, (ROWS, DIM // 2, 2)))
            both = tl.permute(tl.join(left + right, left - right), (0, 2, 1))
            numbers = tl.reshape(both, (ROWS, DIM))
        numbers = _rounded(numbers * norm, 16)
    size = tl.where(numbers == numbers, tl.abs(numbers), float("inf"))
    amax = tl.maximum(tl.max(size, 1), smallest_amax)
    bits = tl.div_rn(amax, largest + tl.zeros_like(amax)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)  # the next power of two
    exponent = tl.where(exponent < 255, exponent, 127)  # a row that is not finite has scale 1
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    values = _e4m3(numbers * inverse[:, None])
    values = tl.where(values > largest, largest, tl.where(values < -largest, -largest, values))
    tl.store(VALUES + place, values.to(tl.bfloat16), mask=there[:, None])
    tl.store(SCALES + row, scale, mask=there)


@triton.jit
def _rounded(number, DROPPED: tl.constexpr):
    """Without its last bits, to the nearest, ties to even; what is no number stays."""
    bits = number.to(tl.int32, bitcast=True)
    bits += (1 << DROPPED - 1) - 1 + ((bits >> DROPPED) & 1)
    kept = ((bits >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)
    return tl.where(number == number, kept, number)


@triton.jit
def _e4m3(number):
    """Rounded to 3 bits of mantissa, or below 2 to -6 to multiples of 2 to -9."""
    shift = 1.5 * 2**14  # beside it a number has its last bit at 2 to -9
    return tl.where(tl.abs(number) < 2**-6, (number + shift) - shift, _rounded(number, 20))
