"""Selected keys as bytes: what changes from one query to the next, as gaps between positions.

Neighbouring queries select mostly the same keys. A frame holds consecutive queries of a document,
each either as its keys or as the keys in which it differs from the query before, whichever is
smaller for the frame. Both are ascending positions, stored as differences and compressed by zlib.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FRAME_ROWS = 256
"""Most queries of a frame. Decoding one takes about five bytes for each of its queries and each
position of the document."""


class Frame(NamedTuple):
    """Consecutive queries of one document in one layer."""

    first: int
    """Position of the first query."""
    rows: int
    differences: bool
    """Whether all queries but the first are stored as differences from the query before."""
    data: bytes

    @classmethod
    def encode(cls, first: int, keys: np.ndarray) -> Frame:
        """Of the keys of each query, [rows, k], distinct positions in any order."""
        rows = len(keys)
        chosen = np.zeros((rows, int(keys.max()) + 1), dtype=bool)
        np.put_along_axis(chosen, keys.astype(np.int64), True, axis=1)
        changed = chosen.copy()
        changed[1:] ^= chosen[:-1]
        by_keys, by_changes = _compressed(chosen), _compressed(changed)
        if len(by_changes) < len(by_keys):
            return cls(first, rows, True, by_changes)
        return cls(first, rows, False, by_keys)

    def inflate(self) -> Marks:
        """What it holds, decompressed; the part of decoding that a thread can do beside the
        model."""
        planes = np.frombuffer(zlib.decompress(self.data), dtype=np.uint8)
        numbers = planes.reshape(4, -1).T.reshape(-1).view("<u4").astype(np.int64)
        counts, gaps = numbers[: self.rows], numbers[self.rows :]
        total = np.concatenate([[0], gaps.cumsum()])
        columns = total[1:] - total[counts.cumsum() - counts].repeat(counts)
        return Marks(self, torch.from_numpy(counts), torch.from_numpy(columns.astype(np.int32)))


class Marks(NamedTuple):
    """Where the rows of a frame name a key."""

    frame: Frame
    counts: Tensor
    """int64: how many each row names, on the CPU."""
    columns: Tensor
    """int32: their positions, row after row, on the CPU."""

    def keys(self, k: int, device) -> Tensor:
        """The k keys of each query, ascending: int32 [rows, k].

        Args:
            k: how many each has.
            device: where to decode and to leave them.
        """
        counts, columns = self.counts.to(device), self.columns.to(device)
        rows = torch.arange(self.frame.rows, device=device)
        rows = rows.repeat_interleave(counts, output_size=len(columns))
        width = self.frame.first + self.frame.rows
        marked = torch.zeros((self.frame.rows, width), dtype=torch.uint8, device=device)
        marked[rows, columns.long()] = 1
        if self.frame.differences:
            marked = marked.cumsum(0, dtype=torch.uint8) & 1
        place = marked.cumsum(1, dtype=torch.int32) - 1
        place = torch.where(marked.bool(), place, k).long()  # one more takes the other positions
        positions = torch.arange(width, dtype=torch.int32, device=device).expand(place.shape)
        found = torch.full((len(place), k + 1), -1, dtype=torch.int32, device=device)
        return found.scatter_(1, place, positions)[:, :k]


def _compressed(marked: np.ndarray) -> bytes:
    """Of bool [rows, positions]: how many each row has, and the gaps between them, byte by byte of
    all numbers, since the high bytes are mostly zero."""
    counts = marked.sum(1)
    rows, columns = marked.nonzero()
    before = np.concatenate([[0], columns[:-1]])
    before[np.concatenate([[0], rows[:-1]]) != rows] = 0
    numbers = np.concatenate([counts, columns - before]).astype("<u4")
    return zlib.compress(numbers.view(np.uint8).reshape(-1, 4).T.tobytes(), 6)
