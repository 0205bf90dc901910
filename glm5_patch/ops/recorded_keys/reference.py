"""Decoding frames of recorded keys in NumPy, on the CPU: what ``frame`` has put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..registry import backend
from .frame import CLASSES, Unpacked


@backend("recorded_keys", name="torch")
def recorded_keys(frames: Sequence[Unpacked], wanted: Tensor, k: int, device) -> Tensor:
    """As ``operation.recorded_keys``; each frame on its own.

    Raises:
        GLM5PatchError: a frame is damaged.
    """
    keys = [_keys(frame, k) for frame in frames]
    found = torch.from_numpy(np.concatenate([np.empty((0, k), dtype=np.int32), *keys]))
    return found[wanted].to(device)


def _keys(frame: Unpacked, k: int) -> np.ndarray:
    """Of all rows of a frame, int32 [rows, k]."""
    rows = frame.frame.rows
    ranks, ends = _ranks(frame), frame.counts.cumsum()
    chosen = np.zeros((rows + 1, frame.width), dtype=bool)  # the last row is empty
    parents = np.where(
        frame.references > 0, np.arange(rows)[:, None] - frame.references, rows
    ).tolist()
    for row, of_row in enumerate(parents):
        classes = np.zeros(frame.width, dtype=np.uint8)
        for number, parent in enumerate(of_row):
            classes += chosen[parent].view(np.uint8) << number
        chosen[row] = frame.flips[row][classes]
        for number in range(CLASSES):
            segment = row * CLASSES + number
            if frame.counts[segment]:
                marks = ranks[ends[segment] - frame.counts[segment] : ends[segment]]
                places = np.flatnonzero(classes == number)
                if marks[-1] >= len(places):
                    raise frame.frame.damaged(f"row {row} has a mark beyond its positions")
                chosen[row, places[marks]] ^= True
    if (chosen[:rows].sum(1) != k).any():
        raise frame.frame.damaged(f"a row has another number of keys than {k}")
    return chosen[:rows].nonzero()[1].astype(np.int32).reshape(rows, k)


def _ranks(frame: Unpacked) -> np.ndarray:
    """The rank of each mark among the positions of its class, int64 [marks]."""
    shifts = frame.shifts.repeat(frame.counts)
    ends = np.flatnonzero(np.unpackbits(frame.unary, bitorder="little"))
    gaps = np.diff(ends, prepend=-1) - 1 << shifts
    low = np.unpackbits(frame.low, bitorder="little").astype(np.int64)
    begins = shifts.cumsum() - shifts
    for bit in range(int(shifts.max(initial=0))):
        wide = shifts > bit
        gaps[wide] |= low[begins[wide] + bit] << bit
    ranks = np.concatenate([[0], (gaps + 1).cumsum()])
    before = ranks[(frame.counts.cumsum() - frame.counts)]
    return ranks[1:] - 1 - before.repeat(frame.counts)
