"""The file of a recording: a magic number with a version, a checksum, a JSON header, the frames."""

from __future__ import annotations

import functools
import json
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from ...errors import GLM5PatchError
from ...ops.recorded_keys.frame import FRAME_ROWS, Frame

Layers = Mapping[int, tuple[Frame, ...]]

FAMILY = b"GLM5TOP"
VERSION = b"2"
"""The last character of the magic number. Version 1 has the letter K there, and other frames."""
MAGIC = FAMILY + VERSION
HEAD = struct.Struct("<II")
"""Bytes of the header, and the CRC-32 of the header and the data."""
LARGEST = 2**31 - 1
"""Keys are int32."""
_NUMBERS = {"index_topk": 1, "length": 0}
"""Numbers of the header, and how large each is at least."""
_LAYERS = {"layers": "layer", "mtp_layers": "MTP layer"}
"""Fields of the header, and what messages call a layer of each."""


def write(path: str | Path, numbers: Mapping[str, int], layers: Mapping[str, Layers]) -> None:
    """Write a recording. If several processes write to one path, the last wins.

    Args:
        path: of the file.
        numbers: ``index_topk`` and ``length``.
        layers: ``layers`` and ``mtp_layers``, with the frames of each layer.
    """
    header: dict[str, Any] = dict(numbers)
    frames = []
    for kind in _LAYERS:
        header[kind] = {}
        for number, of_layer in layers[kind].items():
            header[kind][number] = [(f.first, f.rows, len(f.data)) for f in of_layer]
            frames += of_layer
    text = json.dumps(header).encode()
    parts = [text, *(frame.data for frame in frames)]
    checksum = functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0)
    path = Path(path)
    # Processes of several hosts may have the same id.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{uuid4().hex}.partial")
    try:
        partial.write_bytes(b"".join([MAGIC, HEAD.pack(len(text), checksum), *parts]))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path) -> tuple[dict[str, int], dict[str, Layers]]:
    """What ``write`` was given.

    Raises:
        GLM5PatchError: the file is not a recording, is of another version, is cut off or is
            damaged. The message names the file and what is wrong in it.
    """
    content = Path(path).read_bytes()
    begin = len(MAGIC) + HEAD.size
    if not content.startswith(FAMILY):
        raise GLM5PatchError(f"{path} is not a recording; give a file of TopkRecording.save")
    version = content[len(FAMILY) : len(MAGIC)]
    if version != VERSION:
        raise GLM5PatchError(
            f"{path} is a recording of another version of glm5-patch: its format is {version!r}, "
            f"this one reads {VERSION!r}; record it again"
        )
    size, expected = HEAD.unpack(content[len(MAGIC) : begin].ljust(HEAD.size, b"\0"))
    checksum = zlib.crc32(memoryview(content)[begin:])
    if checksum != expected:
        raise _damaged(path, f"its checksum is {checksum:#010x}, not {expected:#010x}")
    try:
        header = json.loads(content[begin : begin + size])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    _check_header(header, path)
    begin += size
    layers: dict[str, Layers] = {}
    for kind in _LAYERS:
        layers[kind] = {}
        for number, frames in header[kind].items():
            found = []
            for first, rows, length in frames:
                found.append(Frame(first, rows, content[begin : begin + length]))
                begin += length
            layers[kind][int(number)] = tuple(found)
    if begin != len(content):
        raise _damaged(path, f"it has {len(content)} bytes, its header says {begin}")
    return {name: header[name] for name in _NUMBERS}, layers


def _damaged(path: str | Path, what: str) -> GLM5PatchError:
    return GLM5PatchError(f"{path} is cut off or damaged: {what}; copy it or record it again")


def _check_header(header: Any, path: str | Path) -> None:
    """Check the types and bounds of all that the header of a file says."""
    fields = sorted([*_NUMBERS, *_LAYERS])
    if not isinstance(header, dict) or sorted(header) != fields:
        raise _damaged(path, f"its header is {_short(header)}, not an object with {fields}")
    for field, least in _NUMBERS.items():
        if not _is_integer(header[field], least, LARGEST):
            raise _damaged(
                path, f"{field}={_short(header[field])} is not an integer from {least} to {LARGEST}"
            )
    for kind, what in _LAYERS.items():
        if not isinstance(header[kind], dict):
            raise _damaged(path, f"{kind}={_short(header[kind])} is not an object")
        for number, frames in header[kind].items():
            if not re.fullmatch("[1-9][0-9]{0,8}", number):
                raise _damaged(path, f"{kind} has {_short(number)}, which is not a layer number")
            _check_frames(f"{what} {number}", frames, header["index_topk"], path)


def _check_frames(what: str, frames: Any, end: int, path: str | Path) -> None:
    """Of one layer; ``end`` is the first position that has a choice."""
    if not isinstance(frames, list):
        raise _damaged(path, f"{what} is {_short(frames)}, not a list of frames")
    for frame in frames:
        bounds = (end, LARGEST), (1, FRAME_ROWS), (1, LARGEST)
        if (
            not isinstance(frame, list)
            or len(frame) != len(bounds)
            or not all(_is_integer(value, *bound) for value, bound in zip(frame, bounds))
        ):
            raise _damaged(
                path,
                f"{what} has a frame {_short(frame)}, not [position, rows, bytes] with a position "
                f"from {end} on and at most {FRAME_ROWS} rows",
            )
        end = frame[0] + frame[1]


def _is_integer(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most  # True is an int too


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
