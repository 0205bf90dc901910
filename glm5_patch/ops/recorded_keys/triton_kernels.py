"""Triton kernels that decode frames: bits to ranks, ranks to positions, positions to top-k.

No length is a constant of theirs, so batches of other lengths compile nothing. All numbers are
int32. Bits are in words of 32, the low bit first. See ``frame`` for the terms.

============ ==============================================================================
UNARY        words, the upper parts of the gaps
UNARY_BEGINS [rows], at which bit the upper parts of each row begin
LOW          words, the lower parts
LOW_BEGINS   [rows * 8], at which bit those of each segment begin
SHIFTS       [rows * 8], bits of the lower part of each gap of a segment
BEGINS       [rows * 8 + 1], where the marks of each segment begin
SUMS, RANKS  [marks], scratch, and the ranks
FIRST_ROWS   [frames + 1], where the rows of each frame begin
REFERENCES   [rows, 3], how many rows up; 0: none
FLIPS        [rows], bit c: the positions of class c are selected unless marked
BITS         [rows, words], the selected positions of each row
BELOW        [frames, 8, words], positions of a class before each word, of the row at work
OF_ROWS      [n], which rows of BITS
TO_ROWS      [n], which rows of KEYS
KEYS         [.., k], the top-k
============ ==============================================================================
"""

from __future__ import annotations

import triton
import triton.language as tl

from .frame import CLASSES, REFERENCES

assert (REFERENCES, CLASSES) == (3, 8)


@triton.jit
def _segment(BEGINS, row, mark):
    """Which of the 8 segments of a row each mark is of."""
    found = mark * 0
    for number in tl.static_range(1, 8):
        found += (mark >= tl.load(BEGINS + row * 8 + number)).to(tl.int32)
    return row * 8 + found


@triton.jit(do_not_specialize=["unary_bits"])
def ranks(
    UNARY, UNARY_BEGINS, LOW, LOW_BEGINS, SHIFTS, BEGINS, SUMS, RANKS, unary_bits,
    BITS: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """RANKS of one row. BITS bits, then MARKS marks, are worked on at once."""
    row = tl.program_id(0)
    begin, end = tl.load(BEGINS + row * 8), tl.load(BEGINS + row * 8 + 8)
    # Where the upper part of each gap ends, into RANKS.
    first_bit = tl.load(UNARY_BEGINS + row)
    written, next_bit = begin, first_bit
    while (written < end) & (next_bit < unary_bits):
        bit = next_bit + tl.arange(0, BITS)
        one = tl.load(UNARY + (bit >> 5), mask=bit < unary_bits, other=0) >> (bit & 31) & 1
        number = written + tl.cumsum(one, 0) - 1
        tl.store(RANKS + number, bit - first_bit, mask=(one == 1) & (number < end))
        written += tl.sum(one, 0)
        next_bit += BITS
    tl.debug_barrier()  # other threads read what was stored
    # The sum of all gaps up to each, into SUMS.
    total = 0
    for first in range(begin, end, MARKS):
        mark = first + tl.arange(0, MARKS)
        inside = mark < end
        segment = _segment(BEGINS, row, mark)
        last = tl.load(RANKS + mark, mask=inside, other=0)
        before = tl.load(RANKS + mark - 1, mask=inside & (mark > begin), other=-1)
        shift = tl.load(SHIFTS + segment, mask=inside, other=0)
        number = mark - tl.load(BEGINS + segment, mask=inside, other=0)
        bit = tl.load(LOW_BEGINS + segment, mask=inside, other=0) + number * shift
        word = LOW + (bit >> 5)
        lower = tl.load(word, mask=inside, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        upper = tl.load(word + 1, mask=inside, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        low = ((upper << 32 | lower) >> (bit & 31).to(tl.uint64)).to(tl.int32)
        gap = (last - before - 1) << shift | low & ((1 << shift) - 1)
        step = tl.where(inside, gap + 1, 0)
        tl.store(SUMS + mark, total + tl.cumsum(step, 0), mask=inside)
        total += tl.sum(step, 0)
    tl.debug_barrier()
    for first in range(begin, end, MARKS):
        mark = first + tl.arange(0, MARKS)
        inside = mark < end
        own = tl.load(BEGINS + _segment(BEGINS, row, mark), mask=inside, other=0)
        before = tl.load(SUMS + own - 1, mask=inside & (own > begin), other=0)
        rank = tl.load(SUMS + mark, mask=inside, other=0) - before - 1
        tl.store(RANKS + mark, rank, mask=inside)


@triton.jit
def _count(word):
    """How many bits of a word are ones."""
    x = word.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _nth(word, n):
    """The place of the n-th one of a word, from 0."""
    x = word.to(tl.uint32, bitcast=True)
    place = n * 0
    for step in tl.static_range(5):
        lower = _count((x & ((1 << (16 >> step)) - 1)).to(tl.int32, bitcast=True))
        above = n >= lower
        n = tl.where(above, n - lower, n)
        x = tl.where(above, x >> (16 >> step), x)
        place += tl.where(above, 16 >> step, 0)
    return place


@triton.jit
def _word(BITS, row, up, words, at, inside):
    """Words of the row that a row refers to; zeros where it refers to none."""
    word = tl.load(BITS + (row - up).to(tl.int64) * words + at, mask=inside, other=0)
    return word & -tl.minimum(up, 1)


@triton.jit
def _inverted(bit):
    """All ones where a bit is 0, all zeros where it is 1: what a word is combined with to keep it
    or to invert it."""
    return bit - 1


@triton.jit(do_not_specialize=["words", "half"])
def resolve(
    FIRST_ROWS, REFERENCES, FLIPS, BEGINS, RANKS, BITS, BELOW, words, half,
    WORDS: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """BITS of all rows of a frame, row after row, since a row refers to earlier ones. WORDS words,
    then MARKS marks, are worked on at once. ``half``: the largest power of two below ``words``."""
    frame = tl.program_id(0)
    BELOW += frame.to(tl.int64) * 8 * words
    row, end_row = tl.load(FIRST_ROWS + frame), tl.load(FIRST_ROWS + frame + 1)
    while row < end_row:
        up_0 = tl.load(REFERENCES + 3 * row)
        up_1 = tl.load(REFERENCES + 3 * row + 1)
        up_2 = tl.load(REFERENCES + 3 * row + 2)
        flips = tl.load(FLIPS + row)
        line = BITS + row.to(tl.int64) * words
        name = tl.arange(0, 8)
        total = tl.zeros((8,), tl.int32)
        for first in range(0, words, WORDS):
            at = first + tl.arange(0, WORDS)
            inside = at < words
            a = _word(BITS, row, up_0, words, at, inside)
            b = _word(BITS, row, up_1, words, at, inside)
            c = _word(BITS, row, up_2, words, at, inside)
            of_class = (
                (a[None, :] ^ _inverted(name & 1)[:, None])
                & (b[None, :] ^ _inverted(name >> 1 & 1)[:, None])
                & (c[None, :] ^ _inverted(name >> 2)[:, None])
            )  # [8, WORDS]
            selected = of_class & -(flips >> name & 1)[:, None]
            tl.store(line + at, tl.sum(selected, 0), mask=inside)  # the classes share no bit
            count = tl.where(inside[None, :], _count(of_class), 0)
            below = total[:, None] + tl.cumsum(count, 1) - count
            tl.store(BELOW + name[:, None] * words + at[None, :], below, mask=inside[None, :])
            total += tl.sum(count, 1)
        tl.debug_barrier()  # other threads read what was stored
        begin, end = tl.load(BEGINS + row * 8), tl.load(BEGINS + row * 8 + 8)
        for first in range(begin, end, MARKS):
            mark = first + tl.arange(0, MARKS)
            inside = mark < end
            rank = tl.load(RANKS + mark, mask=inside, other=0)
            own = _segment(BEGINS, row, mark) - row * 8
            at = tl.zeros((MARKS,), tl.int32)
            step = half
            while step > 0:  # the last word before which there are no more than ``rank``
                there = inside & (at + step < words)
                below = tl.load(BELOW + own * words + at + step, mask=there, other=2147483647)
                at = tl.where(below <= rank, at + step, at)
                step = step >> 1
            rank -= tl.load(BELOW + own * words + at, mask=inside, other=0)
            word = (
                (_word(BITS, row, up_0, words, at, inside) ^ _inverted(own & 1))
                & (_word(BITS, row, up_1, words, at, inside) ^ _inverted(own >> 1 & 1))
                & (_word(BITS, row, up_2, words, at, inside) ^ _inverted(own >> 2))
            )
            tl.atomic_xor(line + at, 1 << _nth(word, rank), mask=inside)
        tl.debug_barrier()
        row += 1


@triton.jit(do_not_specialize=["words"])
def expand(BITS, OF_ROWS, TO_ROWS, KEYS, words, k, WORDS: tl.constexpr):
    """KEYS[TO_ROWS[i]], int32 [k], from BITS[OF_ROWS[i]]; WORDS words at once."""
    line = BITS + tl.load(OF_ROWS + tl.program_id(0)).to(tl.int64) * words
    out = KEYS + tl.load(TO_ROWS + tl.program_id(0)).to(tl.int64) * k
    written = 0
    for first in range(0, words, WORDS):
        at = first + tl.arange(0, WORDS)
        word = tl.load(line + at, mask=at < words, other=0)
        bit = tl.reshape(word[:, None] >> tl.arange(0, 32)[None, :] & 1, (WORDS * 32,))
        number = written + tl.cumsum(bit, 0) - 1
        place = first * 32 + tl.arange(0, WORDS * 32)
        tl.store(out + number, place, mask=(bit == 1) & (number < k))
        written += tl.sum(bit, 0)
