"""Selected keys as bytes: what changes from earlier queries.

A frame holds consecutive queries of one document, at most ``FRAME_ROWS``. Each refers to up to
three earlier queries of its frame, the ones that share most keys with it. These sort the positions
into eight classes, by which of the three select them. In each class most positions are selected, or
most are not. The others are its marks. A mark is named by its rank among the positions of its
class, and stored as the number of positions between it and the mark before, in Rice's code: the
upper bits in unary, the lower ones as they are.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np

from ...errors import GLM5PatchError

FRAME_ROWS = 256
"""Most queries of a frame. One without an earlier query takes 2 to 4 times the bytes."""
REFERENCES = 3
CLASSES = 1 << REFERENCES
"""Bit n of the number of a class says whether reference n selects its positions."""
COMPARED = 2048
"""Positions, drawn at random, at which the queries of a frame are compared."""
LARGEST_SHIFT = 31

_HEAD = struct.Struct("<II")
"""Bytes of the compressed table, and of the unary parts."""
_FLIPPED = 128
_OF_A_ROW = REFERENCES + (CLASSES + 1) * 4 + CLASSES
"""Bytes that the table has for each row."""


class Frame(NamedTuple):
    """Consecutive queries of one document in one layer."""

    first: int
    """Position of the first query."""
    rows: int
    data: bytes

    @classmethod
    def encode(cls, first: int, keys: np.ndarray) -> Frame:
        """Compress the keys of each query, [rows, k], distinct positions in any order."""
        keys = np.sort(keys, axis=1).astype(np.int64)
        rows = len(keys)
        chosen = np.zeros((rows + 1, int(keys.max(initial=0)) + 1), dtype=bool)
        np.put_along_axis(chosen[:rows], keys, True, axis=1)
        references = _references(chosen[:rows])
        segments, ranks, flips = _marks(keys, chosen, references)
        counts = np.bincount(segments, minlength=rows * CLASSES)
        gaps = ranks - np.concatenate([[-1], ranks[:-1]]) - 1
        begins = np.flatnonzero(np.diff(segments, prepend=-1))
        gaps[begins] = ranks[begins]
        shifts = _shifts(segments, gaps, counts)
        shift_of_mark = shifts[segments]
        unary, low = _rice(gaps, shift_of_mark)
        uppers = (gaps >> shift_of_mark) + 1
        unary_bits = np.bincount(segments // CLASSES, weights=uppers, minlength=rows)
        table = [
            references.astype(np.uint8).T.tobytes(),
            _planes(np.column_stack([counts.reshape(rows, CLASSES), unary_bits])),
            (shifts.reshape(rows, CLASSES) + _FLIPPED * flips).astype(np.uint8).T.tobytes(),
        ]
        compressed = zlib.compress(b"".join(table), 6)
        data = _HEAD.pack(len(compressed), len(unary)) + compressed + unary + low
        return cls(first, rows, data)

    def unpack(self) -> Unpacked:
        """Take the data apart, and check that its parts fit.

        Raises:
            GLM5PatchError: the data is not that of ``rows`` queries.
        """
        try:
            return self._unpack()
        except (zlib.error, struct.error, ValueError, MemoryError) as error:
            raise self.damaged(error) from error

    def damaged(self, what: object) -> GLM5PatchError:
        """The error for data that can't be decoded."""
        return GLM5PatchError(
            f"the data of positions {self.first} to {self.first + self.rows - 1} of a recording "
            f"is damaged ({what}); record again"
        )

    def _unpack(self) -> Unpacked:
        rows, data = self.rows, memoryview(self.data)
        size, unary_size = _HEAD.unpack(data[: _HEAD.size])
        begin = _HEAD.size + size
        table = zlib.decompressobj().decompress(data[_HEAD.size : begin], rows * _OF_A_ROW + 1)
        if len(table) != rows * _OF_A_ROW:
            raise ValueError(f"its table has {len(table)} bytes, not {rows * _OF_A_ROW}")
        table = np.frombuffer(table, dtype=np.uint8)
        references, numbers, shifts = np.split(
            table, [rows * REFERENCES, rows * (_OF_A_ROW - CLASSES)]
        )
        references = references.reshape(REFERENCES, rows).T
        numbers = numbers.reshape(4, -1).T.copy().view("<u4").reshape(CLASSES + 1, rows).T
        numbers = numbers.astype(np.int64)
        shifts = shifts.reshape(CLASSES, rows).T
        found = Unpacked(
            self,
            references.astype(np.int32),
            numbers[:, :CLASSES].reshape(-1),
            numbers[:, CLASSES],
            (shifts & (_FLIPPED - 1)).astype(np.int64).reshape(-1),
            shifts >= _FLIPPED,
            np.frombuffer(data[begin : begin + unary_size], dtype=np.uint8),
            np.frombuffer(data[begin + unary_size :], dtype=np.uint8),
        )
        if (references > np.arange(rows)[:, None]).any():
            raise ValueError("a query refers to one before the first")
        if found.shifts.max(initial=0) > LARGEST_SHIFT:
            raise ValueError("a mark is wider than 32 bits")
        bits = int(found.unary_bits.sum()), int((found.counts * found.shifts).sum())
        if (len(found.unary), len(found.low)) != tuple(-(-size // 8) for size in bits):
            raise ValueError("its length is not that of its marks")
        if int.from_bytes(found.unary, "little").bit_count() != found.marks:
            raise ValueError("its marks are not as many as its table says")
        return found


class Unpacked(NamedTuple):
    """A frame's parts. A segment is the marks of one class of one row, row after row."""

    frame: Frame
    references: np.ndarray
    """int32 [rows, REFERENCES]: how many rows up; 0: none."""
    counts: np.ndarray
    """int64 [rows * CLASSES]: marks of each segment."""
    unary_bits: np.ndarray
    """int64 [rows]: bits of the upper parts of each row."""
    shifts: np.ndarray
    """int64 [rows * CLASSES]: lower bits that each gap of a segment has."""
    flips: np.ndarray
    """bool [rows, CLASSES]: whether the positions of a class are selected unless marked."""
    unary: np.ndarray
    """uint8: the upper parts of all gaps, bit by bit, the low bit of a byte first: as many zeros as
    its value, then a one."""
    low: np.ndarray
    """uint8: the lower bits of all gaps, likewise."""

    @property
    def marks(self) -> int:
        return int(self.counts.sum())

    @property
    def width(self) -> int:
        """No query of the frame sees more keys."""
        return self.frame.first + self.frame.rows


def _references(chosen: np.ndarray) -> np.ndarray:
    """The rows that share most keys with each, int64 [rows, REFERENCES], as how many rows up they
    are; 0: none shares any.

    Args:
        chosen: bool [rows, positions].
    """
    rows, width = chosen.shape
    if width > COMPARED:
        columns = np.random.default_rng(0).choice(width, COMPARED, replace=False)
        chosen = chosen[:, np.sort(columns)]
    chosen = chosen.astype(np.float32)
    common = np.tril(chosen @ chosen.T, -1)
    found = np.zeros((rows, REFERENCES), dtype=np.int64)
    every = np.arange(rows)
    for number in range(min(REFERENCES, rows - 1)):
        best = rows - 1 - common[:, ::-1].argmax(1)  # of equals the nearest
        found[:, number] = np.where(common[every, best] > 0, every - best, 0)
        common[every, best] = 0
    return found


def _marks(
    keys: np.ndarray, chosen: np.ndarray, references: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The marks of all rows.

    Args:
        keys: int64 [rows, k], ascending.
        chosen: bool [rows + 1, positions], the last row empty.
        references: of ``_references``.

    Returns:
        Segment and rank of each mark, int64, in order; and whether the positions of each class are
        selected unless marked, bool [rows, CLASSES].
    """
    rows, width = len(keys), chosen.shape[1]
    chosen, every = chosen.reshape(-1), np.arange(rows)
    parents = np.where(references > 0, every[:, None] - references, rows).T  # rows: none

    def selects(row: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return chosen[positions + (row * width)[:, None]]

    flips = np.zeros((rows, CLASSES), dtype=bool)
    marks, in_classes = [], []
    added = np.ones(keys.shape, dtype=bool)
    for number, parent in enumerate(parents):
        # The positions that this reference selects, and none before it.
        positions = keys[np.minimum(parent, rows - 1)]
        inside = np.broadcast_to((parent < rows)[:, None], keys.shape)
        for other in parents[:number]:
            inside = inside & ~selects(other, positions)
        in_classes.append((positions, inside))
        added &= ~selects(parent, keys)
        of_class = np.full(keys.shape, 1 << number)
        for later, other in enumerate(parents[number + 1 :], number + 1):
            of_class |= selects(other, positions).astype(np.int64) << later
        selected = selects(every, positions)
        for name in range(1 << number, CLASSES, 2 << number):
            own = inside & (of_class == name)
            flips[:, name] = flip = 2 * (selected & own).sum(1) > own.sum(1)
            marked = own & (selected != flip[:, None])
            marks.append(_ordered(marked, name, own.cumsum(1, dtype=np.int32)[marked] - 1))
    row, place = added.nonzero()
    ranks = keys[row, place]
    added_at = ranks + row * width
    for positions, inside in in_classes:
        before_row = np.concatenate([[0], inside.sum(1).cumsum()[:-1]])
        members = (positions + (every * width)[:, None])[inside]
        ranks = ranks - np.searchsorted(members, added_at) + before_row[row]
    marks.append(row * CLASSES << 32 | ranks)
    ordered = np.sort(np.concatenate(marks))
    return ordered >> 32, ordered & 0xFFFFFFFF, flips


def _ordered(marked: np.ndarray, name: int, ranks: np.ndarray) -> np.ndarray:
    """Segment and rank of marks of one class in one number, which orders them."""
    return (marked.nonzero()[0] * CLASSES + name) << 32 | ranks


def _shifts(segments: np.ndarray, gaps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How many lower bits make each segment smallest, int64 [rows * CLASSES]."""
    total = np.bincount(segments, weights=gaps, minlength=len(counts))
    # A geometric distribution has its median at ln 2 of its mean.
    guess = np.log2(np.maximum(0.69 * total / np.maximum(counts, 1), 1)).astype(np.int64)
    candidates = np.clip(np.stack([guess - 1, guess, guess + 1]), 0, LARGEST_SHIFT)
    bits = [
        counts * shift
        + np.bincount(segments, weights=gaps >> shift[segments], minlength=len(counts))
        for shift in candidates
    ]
    return np.take_along_axis(candidates, np.argmin(bits, 0)[None], 0)[0]


def _rice(gaps: np.ndarray, shifts: np.ndarray) -> tuple[bytes, bytes]:
    ends = ((gaps >> shifts) + 1).cumsum() - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=bool)
    unary[ends] = True
    begins = shifts.cumsum() - shifts
    low = np.zeros(int(shifts.sum()), dtype=bool)
    for bit in range(int(shifts.max(initial=0))):
        wide = shifts > bit
        low[begins[wide] + bit] = gaps[wide] >> bit & 1
    return tuple(np.packbits(bits, bitorder="little").tobytes() for bits in (unary, low))


def _planes(numbers: np.ndarray) -> bytes:
    """Numbers below 2**32, column by column, byte by byte of all: the high bytes are mostly
    zero."""
    return numbers.T.astype("<u4").reshape(-1).view(np.uint8).reshape(-1, 4).T.tobytes()
