"""What keys a recording may have, and their frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...errors import GLM5PatchError
from ...ops.recorded_keys.frame import FRAME_ROWS, Frame


def check_integer(name: str, value: Any, least: int) -> None:
    """Raises GLM5PatchError unless it is an integer of at least that."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise GLM5PatchError(f"{name}={value!r}; give an integer of at least {least}")


def as_array(name: str, given: Any) -> np.ndarray:
    """An array of an array, a list or a tensor of the CPU.

    Raises:
        GLM5PatchError: there is none of it.
    """
    try:
        return np.asarray(given)
    except Exception as error:  # of a tensor on a GPU, of rows of several lengths
        raise GLM5PatchError(
            f"{name} is a {type(given).__name__} that NumPy takes no array from ({error}); give a "
            "NumPy array"
        ) from error


def frames_of(
    layer: object, index_topk: int, positions: np.ndarray, keys: np.ndarray
) -> Iterator[Frame]:
    """Check and compress the queries that have a choice, in runs of consecutive positions.

    Args:
        layer: what messages call it.
        index_topk: keys that a query selects.
        positions: int [rows], ascending.
        keys: int [rows, index_topk], in any order, -1 for an empty place.

    Raises:
        GLM5PatchError: a query has too few keys, a key twice, one that it does not see, or one
            below -1.
    """
    _check_keys(layer, index_topk, positions, keys)
    choose = positions >= index_topk
    positions, keys = positions[choose], keys[choose]
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for run, of_run in zip(np.split(positions, breaks), np.split(keys, breaks)):
        for begin in range(0, len(run), FRAME_ROWS):
            yield Frame.encode(int(run[begin]), of_run[begin : begin + FRAME_ROWS])


def check_positions(layer: object, length: int, positions: np.ndarray) -> None:
    """Raises GLM5PatchError unless they ascend and are positions of the document.

    Args:
        layer: what messages call it.
        length: positions of the document.
        positions: to be int [rows].
    """
    what = f"recording, {layer}"
    if positions.ndim != 1 or positions.dtype.kind not in "iu":
        given = f"{positions.dtype} {list(positions.shape)}"
        raise GLM5PatchError(f"{what}: positions are {given}; give integers [rows]")
    positions = positions.astype(np.int64)  # differences of unsigned numbers wrap
    outside = (positions < 0) | (positions >= length)
    if outside.any():
        raise GLM5PatchError(
            f"{what}: position {int(positions[outside][0])} is not a position of a document of "
            f"length={length}; positions count from 0, the start of the document"
        )
    unordered = np.flatnonzero(np.diff(positions) <= 0)
    if len(unordered):
        before, after = positions[unordered[0] : unordered[0] + 2].tolist()
        raise GLM5PatchError(
            f"{what}: position {after} follows {before}; sort the rows, one for each position"
        )


def _check_keys(layer: object, index_topk: int, positions: np.ndarray, keys: np.ndarray) -> None:
    if keys.dtype.kind not in "iu":
        raise GLM5PatchError(f"{layer}: keys of {keys.dtype}; keys must be integers")
    if keys.ndim != 2 or keys.shape != (len(positions), index_topk):
        raise GLM5PatchError(
            f"{layer}: keys of shape {list(keys.shape)}, where [{len(positions)}, {index_topk}] is "
            f"needed, a row for each query and dsa_indexer_topk={index_topk} keys"
        )
    ordered = np.sort(keys, axis=1)
    valid = ordered >= 0
    expected = np.minimum(positions + 1, index_topk)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & valid[:, 1:]).any(1)
    unseen = (ordered > positions[:, None]).any(1)
    for wrong, says in (
        ((ordered < -1).any(1), "a key below -1; an empty place is -1"),
        (unseen, "a key after the query; keys are positions in the document, not slots of a cache"),
        (twice, "a key twice; is the recording of another model or layer?"),
        (valid.sum(1) != expected, "too few keys; there must be min(position + 1, index_topk)"),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            raise GLM5PatchError(
                f"recording, {layer}, position {int(positions[row])}: {says} "
                f"(its keys go from {int(ordered[row].min())} to {int(ordered[row, -1])}, "
                f"index_topk={index_topk})"
            )
