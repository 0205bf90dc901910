"""Block FP8 becomes bf16: a part of a matrix when it is loaded, or a whole checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import INDEX
from .quantization import SETTINGS, is_scale
from .staging import Staging, fingerprint

if TYPE_CHECKING:
    from .reader import HFCheckpoint

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


def write_dequantized(
    source: HFCheckpoint,
    output: str | Path,
    advance: Callable[[str], None] = lambda file: None,
) -> int:
    """Write a checkpoint of block FP8 in bf16, in files of the same names; one in memory at a time.

    The output appears under its name when it is complete. An interrupted run is continued by the
    same call.

    Args:
        source: the checkpoint.
        output: a directory that does not exist, or is empty.
        advance: called with the name of each finished file of weights.

    Returns:
        How many tensors became bf16.

    Raises:
        CheckpointError: nothing is quantised, ``output`` has files in it or can't be written, or
            another run's files are in the way.
    """
    from .writer import write_tensors, write_weight_map

    if not source.scales:
        raise CheckpointError(f"{source.directory}: no tensor is float8; nothing was written")
    own = source.own_files()
    manifest = {"dequantize": str(source.directory.resolve()), "files": fingerprint(own)}
    # A byte of float8 becomes two.
    grown = sum(source.tensors[name].nbytes for name in source.scales)
    needed = grown + sum(path.stat().st_size for path in own)
    staging = Staging(output, manifest, needed, source.directory)
    if staging.complete:
        return len(source.scales)
    weight_map, total = {}, 0
    for path in source.headers:
        file = str(path.relative_to(source.directory))
        names = [name for name in source.headers[path].tensors if not is_scale(name)]
        weight_map.update(dict.fromkeys(names, file))
        total += sum(source.headers[path].tensors[name].nbytes for name in names)
        if not staging.has(file):
            tensors = source.read_file(path)
            with staging.file(file) as target:
                write_tensors(tensors, target, source.headers[path].metadata or {"format": "pt"})
        advance(path.name)
    raw = {key: value for key, value in source.config.raw.items() if key not in SETTINGS}
    with staging.file("config.json") as target:
        target.write_text(json.dumps({**raw, "dtype": "bfloat16"}, indent=2) + "\n")
    if INDEX in {path.name for path in own}:
        write_weight_map(weight_map, total + grown, staging)
    extra = list(source.extra_files())
    for path in extra:
        staging.copy(path, path.name)
    staging.publish({*weight_map.values(), "config.json", INDEX, *(path.name for path in extra)})
    return len(source.scales)
