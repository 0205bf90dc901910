"""Block FP8 becomes bf16."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 2048
"""Bounds the fp32 copies."""


def dequantized(
    matrix: Tensor, scales: Tensor, block: tuple[int, int], slices: tuple[slice, slice]
) -> Tensor:
    """bf16 [rows, columns] of a float8 matrix or of a part of it.

    Args:
        matrix: float8, that part.
        scales: of the whole matrix, one for each block; the last ones of a dimension may cover less
            than a block.
        block: rows and columns of a block.
        slices: where the part lies in the whole matrix.
    """
    down, across = (
        torch.arange(part.start, part.stop) // size for part, size in zip(slices, block)
    )
    scales = scales.float()[:, across]  # [blocks of rows, columns]
    found = torch.empty(matrix.shape, dtype=torch.bfloat16)
    for first in range(0, matrix.shape[0], _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        found[rows] = matrix[rows].float() * scales[down[rows]]
    return found
