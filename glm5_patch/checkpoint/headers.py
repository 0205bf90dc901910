"""The headers of safetensors files. Needs no torch and reads no tensor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from ..config.hf_fields import shown
from ..config.json_file import LFS_POINTER, lfs_pointer, regular_size, unreadable
from ..errors import CheckpointError

_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000
"""The limit of the safetensors format."""

_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "I64": 64,
    "U64": 64,
    "I32": 32,
    "U32": 32,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
}


class Stored(NamedTuple):
    """The place of a tensor."""

    path: Path
    name: str
    """The tensor's name in the file."""
    dtype: str
    """The name that safetensors uses."""
    shape: tuple[int, ...]
    begin: int
    """Its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


class Header(NamedTuple):
    """The header of one safetensors file."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        CheckpointError: it is no regular file, unreadable, a Git LFS pointer, truncated, or its
            header is not one.
    """
    size = regular_size(path)
    try:
        with open(path, "rb") as file:
            start = file.read(_LENGTH_BYTES)
            length = int.from_bytes(start, "little")
            if LFS_POINTER.startswith(start) and len(start) == _LENGTH_BYTES:
                raise lfs_pointer(path)
            if len(start) < _LENGTH_BYTES or _LENGTH_BYTES + length > size:
                raise _damaged(path, f"{size} bytes are less than its header needs")
            if length > _MAX_HEADER:
                raise _damaged(path, f"a header of {length} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(path, f"its header is not JSON: {error}") from None
    except RecursionError:
        raise _damaged(path, "its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a {type(header).__name__}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise _damaged(path, f"its metadata is {shown(metadata)}")
    data = _LENGTH_BYTES + length
    tensors = {name: _stored(path, name, entry, data) for name, entry in header.items()}
    end = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.nbytes)):
        if tensor.begin != end:
            raise _damaged(path, f"{tensor.name} starts at byte {tensor.begin}, not at {end}")
        end += tensor.nbytes
    if end != size:
        raise _damaged(path, f"{size} bytes, but its header describes {end}")
    return Header(tensors, metadata)


def _stored(path: Path, name: str, entry: object, data: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"the entry of {name} is {shown(entry)}") from None
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(path, f"{name} has the unknown dtype {shown(dtype)}")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _damaged(path, f"the shape or offsets of {name} are {shown(numbers)}")
    stored = Stored(path, name, dtype, tuple(shape), data + begin)
    if stored.nbytes != end - begin:
        raise _damaged(
            path,
            f"{name} has {end - begin} bytes, but {shown(shape)} of {dtype} are {stored.nbytes}",
        )
    return stored


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or truncated: {how}")
