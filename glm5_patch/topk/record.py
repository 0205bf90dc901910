"""Recordings of selected keys: of one document each, whatever layout it had in its batch."""

from __future__ import annotations

import functools
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as futures_wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from ..errors import GLM5PatchError
from .codec import FRAME_ROWS, Frame, frames_of
from .context import recorder

if TYPE_CHECKING:
    from .tokens import Layout

MAGIC = b"GLM5TOPK"
HEAD = struct.Struct("<II")
"""Bytes of the header, and the CRC-32 of the header and the data."""
LARGEST = 2**31 - 1
"""Keys are int32."""
MOST_PENDING = 3
"""Layers of a forward whose keys may lie in memory uncompressed; the next one waits."""


def workers() -> ThreadPoolExecutor:
    """Threads of this process that compress and decompress beside the model."""
    return _workers_of(os.getpid())  # a forked process has none of its parent's


@functools.cache
def _workers_of(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="glm5_patch_topk")


@dataclass(frozen=True)
class TopkRecording:
    """The selected keys of one document, by layer number.

    Queries are named by their position in the document, so a recording made in one layout replays
    in every other. The queries at positions below ``index_topk`` see no more keys than are
    selected; nothing is stored of them. Keys are stored compressed, see ``nbytes``.
    """

    index_topk: int
    """Keys that a query selects."""
    length: int
    """Positions of the document that the recording is about, from 0 on. Not all need be recorded:
    of the others the indexer selects."""
    layers: Mapping[int, tuple[Frame, ...]]
    """Layer number, from 1, of each computing layer -> its frames, by position."""

    @classmethod
    def of_keys(
        cls, index_topk: int, length: int, layers: Mapping[int, tuple[np.ndarray, np.ndarray]]
    ) -> TopkRecording:
        """Check and compress.

        Args:
            index_topk: keys that a query selects.
            length: positions of the document.
            layers: layer number -> positions, ascending, int [rows], and the keys of the query at
                each, int [rows, index_topk], in any order, -1 for an empty place.

        Raises:
            GLM5PatchError: the positions do not ascend or are not positions of the document; a
                query has too few keys, a key twice, or one that it does not see. The message names
                layer and position.
        """
        for number, (positions, _) in layers.items():
            _check_positions(number, length, positions)
        return cls(
            int(index_topk),  # NumPy's integers are not JSON
            int(length),
            {int(n): tuple(frames_of(n, index_topk, *rows)) for n, rows in sorted(layers.items())},
        )

    @classmethod
    def merge(cls, parts: Iterable[TopkRecording]) -> TopkRecording:
        """One recording of parts of the same document: layers of pipeline stages, positions of
        ranks that split the sequence.

        Raises:
            GLM5PatchError: the parts are not of one document, or two have other keys for a query.
        """
        parts = list(parts)
        for name in ("index_topk", "length"):
            values = sorted({getattr(part, name) for part in parts})
            if len(values) != 1:
                raise GLM5PatchError(
                    f"recordings with {name}={values} are not of one document; merge the parts of "
                    "one"
                )
        layers: dict[int, tuple[Frame, ...]] = {}
        for number in sorted({n for part in parts for n in part.layers}):
            frames = sorted({f for part in parts for f in part.layers.get(number, ())})
            for before, after in zip(frames, frames[1:]):
                if before.first + before.rows > after.first:
                    raise GLM5PatchError(
                        f"layer {number}: two parts have other keys for position {after.first}; "
                        "merge parts of one forward"
                    )
            layers[number] = tuple(frames)
        return cls(parts[0].index_topk, parts[0].length, layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed keys of all layers."""
        return sum(len(frame.data) for frames in self.layers.values() for frame in frames)

    def covers(self, layer_number: int, length: int) -> bool:
        """Whether every query below that position is recorded, or sees no more keys than are
        selected."""
        covered = self.index_topk
        for frame in self.layers[layer_number]:
            if frame.first > covered:
                break
            covered = max(covered, frame.first + frame.rows)
        return min(covered, max(self.length, self.index_topk)) >= length

    def keys(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """The recorded queries of one layer: positions, int64 [rows], and keys, int32
        [rows, index_topk], ascending."""
        frames = self.layers[layer_number]
        positions = [torch.arange(frame.first, frame.first + frame.rows) for frame in frames]
        keys = [frame.inflate().keys(self.index_topk, "cpu") for frame in frames]
        none = torch.empty((0, self.index_topk), dtype=torch.int32)
        return torch.cat([torch.arange(0), *positions]), torch.cat([none, *keys])

    def save(self, path: str | Path) -> None:
        """Write the recording to a file. If several processes save to one path, the last wins."""
        header = {"index_topk": self.index_topk, "length": self.length, "layers": {}}
        for number, frames in self.layers.items():
            header["layers"][number] = [(f.first, f.rows, len(f.data)) for f in frames]
        text = json.dumps(header).encode()
        parts = [text, *(frame.data for frames in self.layers.values() for frame in frames)]
        checksum = functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0)
        path = Path(path)
        # Processes of several hosts may have the same id.
        partial = path.with_name(f".{path.name}.{os.getpid()}.{uuid4().hex}.partial")
        try:
            partial.write_bytes(b"".join([MAGIC, HEAD.pack(len(text), checksum), *parts]))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> TopkRecording:
        """Read a recording that ``save`` wrote.

        Raises:
            GLM5PatchError: the file is not a recording, is cut off or is damaged. The message
                names the file and what is wrong in it.
        """
        content = Path(path).read_bytes()
        begin = len(MAGIC) + HEAD.size
        if not content.startswith(MAGIC):
            raise GLM5PatchError(f"{path} is not a recording; give a file of TopkRecording.save")
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
        layers: dict[int, tuple[Frame, ...]] = {}
        for number, frames in header["layers"].items():
            found = []
            for first, rows, length in frames:
                found.append(Frame(first, rows, content[begin : begin + length]))
                begin += length
            layers[int(number)] = tuple(found)
        if begin != len(content):
            raise _damaged(path, f"it has {len(content)} bytes, its header says {begin}")
        return cls(header["index_topk"], header["length"], layers)


def _damaged(path: str | Path, what: str) -> GLM5PatchError:
    return GLM5PatchError(f"{path} is cut off or damaged: {what}; copy it or record it again")


def _check_header(header: Any, path: str | Path) -> None:
    """Check the types and bounds of all that the header of a file says."""
    fields = ["index_topk", "layers", "length"]
    if not isinstance(header, dict) or sorted(header) != fields:
        raise _damaged(path, f"its header is {_short(header)}, not an object with {fields}")
    for field, least in (("index_topk", 1), ("length", 0)):
        if not _is_integer(header[field], least, LARGEST):
            raise _damaged(
                path, f"{field}={_short(header[field])} is not an integer from {least} to {LARGEST}"
            )
    if not isinstance(header["layers"], dict):
        raise _damaged(path, f"layers={_short(header['layers'])} is not an object")
    for number, frames in header["layers"].items():
        if not re.fullmatch("[1-9][0-9]{0,8}", number):
            raise _damaged(path, f"layers has {_short(number)}, which is not a layer number")
        if not isinstance(frames, list):
            raise _damaged(path, f"layer {number} is {_short(frames)}, not a list of frames")
        end = header["index_topk"]
        for frame in frames:
            bounds = (end, LARGEST), (1, FRAME_ROWS), (1, LARGEST)
            if (
                not isinstance(frame, list)
                or len(frame) != len(bounds)
                or not all(_is_integer(value, *bound) for value, bound in zip(frame, bounds))
            ):
                raise _damaged(
                    path,
                    f"layer {number} has a frame {_short(frame)}, not [position, rows, bytes] with "
                    f"a position from {end} on and at most {FRAME_ROWS} rows",
                )
            end = frame[0] + frame[1]


def _is_integer(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most  # True is an int too


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_positions(layer_number: int, length: int, positions: np.ndarray) -> None:
    what = f"recording, layer {layer_number}"
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


class TopkRecorder:
    """What ``record_topk`` gives: the keys of one forward of one microbatch."""

    def __init__(self) -> None:
        self._lengths: list[int] | None = None
        self._index_topk = 0
        self._layers: dict[int, list[Future]] = {}

    @property
    def recordings(self) -> list[TopkRecording]:
        """One recording for each sequence of the batch, or for each document of the pack, empty
        ones included. They hold this rank's queries and this stage's computing layers; ``merge``
        joins those of several ranks. Read it after the forward: it waits for the compression.

        Raises:
            GLM5PatchError: no layer of this package's attention ran.
        """
        if self._lengths is None:
            raise GLM5PatchError(
                "nothing was recorded: no layer of this package's attention ran in the block. "
                "Build the model with GLM5_PATCH_ATTENTION=plugin, and call it in the block; a "
                "pipeline stage without attention layers has nothing to record"
            )
        return [
            TopkRecording(
                self._index_topk,
                length,
                {n: tuple(documents[number].result()) for n, documents in self._layers.items()},
            )
            for number, length in enumerate(self._lengths)
        ]

    def begin(self, layout: Layout, index_topk: int, b: int) -> list[int]:
        """Keep of which documents the forward is, also on a stage without a computing layer.

        Args:
            layout: where the tokens stand.
            index_topk: keys of a query.
            b: sequences of the batch.

        Returns:
            Tokens of each document.

        Raises:
            GLM5PatchError: another forward has run in the block.
        """
        lengths = layout.documents.lengths * b
        if self._lengths not in (None, lengths):
            raise _another_forward()
        self._lengths, self._index_topk = lengths, index_topk
        return lengths

    def add(
        self,
        layer_number: int,
        topk_indices: Tensor | None,
        layout: Layout,
        index_topk: int,
        b: int,
    ) -> None:
        """Keep a computing layer's top-k.

        Args:
            layer_number: of the layer.
            topk_indices: int32 [b, s, k] of this rank's queries; None: every key fits.
            layout: where they stand.
            index_topk: keys of a query.
            b: sequences of the batch.

        Raises:
            GLM5PatchError: another forward has run in the block.
        """
        if layer_number in self._layers:
            raise _another_forward(layer_number)
        lengths = self.begin(layout, index_topk, b)
        parts = []
        on_host = None if topk_indices is None else topk_indices.cpu().numpy()
        for document, (batch, rows, positions) in enumerate(layout.documents.rows(b)):
            real = positions < lengths[document]
            rows, positions = rows[real].numpy(), positions[real].numpy()
            order = positions.argsort()
            rows, positions = rows[order], positions[order]
            if on_host is None:
                keys = np.empty((0, index_topk), dtype=np.int32)
                rows = positions = positions[:0]
            else:
                keys = on_host[batch, rows]
            part = layer_number, index_topk, positions, keys
            parts.append(workers().submit(lambda part=part: list(frames_of(*part))))
        self._layers[layer_number] = parts
        for part in list(self._layers.values())[:-MOST_PENDING][-1:]:
            futures_wait(part)


def _another_forward(layer_number: int | None = None) -> GLM5PatchError:
    what = "two forwards run" if layer_number is None else f"layer {layer_number} runs twice"
    return GLM5PatchError(
        f"{what} in one record_topk block; use a block for each forward of each microbatch"
    )


@contextmanager
def record_topk() -> Iterator[TopkRecorder]:
    """Record the keys that a forward selects, or replays.

    One block is one forward of one microbatch. A recompute in the backward pass, inside or outside
    the block, is not recorded again.

    Yields:
        An object whose ``recordings`` are, after the forward, one ``TopkRecording`` for each
        sequence of the batch or each document of the pack, with this rank's queries and this
        stage's computing layers.

    Raises:
        GLM5PatchError: in the forward: a layer runs twice in the block, or megatron-core's own
            attention runs.
    """
    found = TopkRecorder()
    token = recorder.set(found)
    try:
        yield found
    finally:
        recorder.reset(token)
