"""Selected keys as bytes: what changes from an earlier query, as gaps between positions.

A query selects mostly what one of the queries just before it selects. A frame holds consecutive
queries of a document. Each is stored as its keys, or as the keys in which it differs from the most
similar of the ``REFERENCES`` queries before it, if those are fewer. Both are ascending positions,
stored as differences and compressed by zlib.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import GLM5PatchError

FRAME_ROWS = 256
"""Most queries of a frame. Decoding one takes 15 to 17 bytes for each of its queries and each
position of the document."""
REFERENCES = 16
"""A larger window rarely finds a closer query."""

_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


class Frame(NamedTuple):
    """Consecutive queries of one document in one layer."""

    first: int
    """Position of the first query."""
    rows: int
    data: bytes

    @classmethod
    def encode(cls, first: int, keys: np.ndarray) -> Frame:
        """Compress the keys of each query, [rows, k], distinct positions in any order."""
        chosen = np.zeros((len(keys), int(keys.max()) + 1), dtype=bool)
        np.put_along_axis(chosen, keys.astype(np.int64), True, axis=1)
        back = _references(chosen, keys.shape[1])
        marked = chosen.copy()
        referring = back.nonzero()[0]
        marked[referring] ^= chosen[referring - back[referring]]
        return cls(first, len(keys), zlib.compress(back.tobytes() + _gaps(marked), 6))

    def inflate(self) -> Marks:
        """Decompress; the part of decoding that a thread can do beside the model.

        Raises:
            GLM5PatchError: the data is not that of ``rows`` queries.
        """
        try:
            return self._inflate()
        except (zlib.error, ValueError, IndexError) as error:
            raise GLM5PatchError(
                f"the data of positions {self.first} to {self.first + self.rows - 1} of a "
                f"recording is damaged ({error}); record again"
            ) from error

    def _inflate(self) -> Marks:
        data = np.frombuffer(zlib.decompress(self.data), dtype=np.uint8)
        back, planes = data[: self.rows], data[self.rows :].reshape(4, -1)
        numbers = planes.T.reshape(-1).view("<u4").astype(np.int64)
        counts, gaps = numbers[: self.rows], numbers[self.rows :]
        total = np.concatenate([[0], gaps.cumsum()])
        columns = total[1:] - total[counts.cumsum() - counts].repeat(counts)
        parents = np.where(back > 0, np.arange(self.rows) - back, self.rows)
        return Marks(
            self,
            torch.from_numpy(counts),
            torch.from_numpy(columns.astype(np.int32)),
            torch.from_numpy(np.append(parents, self.rows)),
        )


class Marks(NamedTuple):
    """Where the rows of a frame name a key, and which row each refers to."""

    frame: Frame
    counts: Tensor
    """int64: how many each row names, on the CPU."""
    columns: Tensor
    """int32: their positions, row after row, on the CPU."""
    parents: Tensor
    """int64 [rows + 1], on the CPU: the row that each differs from; the last one is empty."""

    def keys(self, k: int, device) -> Tensor:
        """The k keys of each query, ascending: int32 [rows, k].

        Args:
            k: how many each has.
            device: where to decode and to leave them.
        """
        counts, columns = self.counts.to(device), self.columns.to(device)
        size, width = self.frame.rows, self.frame.first + self.frame.rows
        rows = torch.arange(size, device=device)
        rows = rows.repeat_interleave(counts, output_size=len(columns))
        marked = torch.zeros((size + 1, width), dtype=torch.uint8, device=device)
        marked[rows, columns.long()] = 1
        # A row is the sum, modulo 2, of what is marked from it up to a row that refers to none.
        # Each step doubles how far up that is added.
        parents = self.parents
        while (parents < size).any():
            marked = marked ^ marked[parents.to(device)]
            parents = parents[parents]
        marked = marked[:size]
        place = marked.cumsum(1, dtype=torch.int32) - 1
        place = torch.where(marked.bool(), place, k).long()  # one more takes the other positions
        positions = torch.arange(width, dtype=torch.int32, device=device).expand(place.shape)
        found = torch.full((size, k + 1), -1, dtype=torch.int32, device=device)
        return found.scatter_(1, place, positions)[:, :k]


def _references(chosen: np.ndarray, k: int) -> np.ndarray:
    """How many rows up the row is that each is stored against, uint8 [rows]; 0: against none.

    Args:
        chosen: bool [rows, positions], k of each row.
        k: how many.
    """
    bits = np.packbits(chosen, axis=1)
    common = np.zeros((REFERENCES + 1, len(chosen)), dtype=np.int64)
    for back in range(1, min(REFERENCES + 1, len(chosen))):
        common[back, back:] = _ONES[bits[back:] & bits[:-back]].sum(1)
    best = common.argmax(0).astype(np.uint8)
    differences = 2 * (k - common.max(0))
    return np.where(differences < k, best, 0).astype(np.uint8)


def _gaps(marked: np.ndarray) -> bytes:
    """Of bool [rows, positions]: how many each row has, and the gaps between them, byte by byte of
    all numbers, since the high bytes are mostly zero."""
    rows, columns = marked.nonzero()
    before = np.concatenate([[0], columns[:-1]])
    before[np.concatenate([[0], rows[:-1]]) != rows] = 0
    numbers = np.concatenate([marked.sum(1), columns - before]).astype("<u4")
    return numbers.view(np.uint8).reshape(-1, 4).T.tobytes()


def frames_of(
    layer_number: int, index_topk: int, positions: np.ndarray, keys: np.ndarray
) -> Iterator[Frame]:
    """Check and compress the queries that have a choice, in runs of consecutive positions.

    Args:
        layer_number: of the layer, for messages.
        index_topk: keys that a query selects.
        positions: int [rows], ascending.
        keys: int [rows, index_topk], in any order, -1 for an empty place.

    Raises:
        GLM5PatchError: a query has too few keys, a key twice, or one that it does not see.
    """
    _check_keys(layer_number, index_topk, positions, keys)
    choose = positions >= index_topk
    positions, keys = positions[choose], keys[choose]
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for run, of_run in zip(np.split(positions, breaks), np.split(keys, breaks)):
        for begin in range(0, len(run), FRAME_ROWS):
            yield Frame.encode(int(run[begin]), of_run[begin : begin + FRAME_ROWS])


def _check_keys(
    layer_number: int, index_topk: int, positions: np.ndarray, keys: np.ndarray
) -> None:
    if keys.dtype.kind not in "iu":
        raise GLM5PatchError(f"layer {layer_number}: keys of {keys.dtype}; keys must be integers")
    if keys.ndim != 2 or keys.shape != (len(positions), index_topk):
        raise GLM5PatchError(
            f"layer {layer_number}: keys of shape {list(keys.shape)}, where "
            f"[{len(positions)}, {index_topk}] is needed, a row for each query and "
            f"dsa_indexer_topk={index_topk} keys"
        )
    ordered = np.sort(keys, axis=1)
    valid = ordered >= 0
    expected = np.minimum(positions + 1, index_topk)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & valid[:, 1:]).any(1)
    unseen = (ordered > positions[:, None]).any(1)
    for wrong, says in (
        (unseen, "a key after the query; keys are positions in the document, not slots of a cache"),
        (twice, "a key twice; is the recording of another model or layer?"),
        (valid.sum(1) != expected, "too few keys; there must be min(position + 1, index_topk)"),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            raise GLM5PatchError(
                f"recording, layer {layer_number}, position {int(positions[row])}: {says} "
                f"(its keys go from {int(ordered[row].min())} to {int(ordered[row, -1])}, "
                f"index_topk={index_topk})"
            )
