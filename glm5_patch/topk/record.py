"""Recordings of selected keys: of one document each, whatever layout it had in its batch."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as futures_wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import GLM5PatchError
from ..ops.recorded_keys.frame import Frame
from ..ops.recorded_keys.reference import recorded_keys
from .context import recorder
from .recordings import file
from .recordings.checks import as_array, check_integer, check_positions, frames_of

if TYPE_CHECKING:
    from .tokens import Layout

MOST_PENDING = 3
"""Layers of a forward whose keys may lie in memory uncompressed; the next one waits."""

Rows = tuple[np.ndarray, np.ndarray]
"""Positions, ascending, int [rows]; and the keys of the query at each, int [rows, index_topk], in
any order, -1 for an empty place."""


@functools.cache
def _workers_of(process: int) -> ThreadPoolExecutor:
    """Threads that compress; a forked process has none of its parent's."""
    return ThreadPoolExecutor(2, thread_name_prefix="glm5_patch_topk_record")


class LayerName(NamedTuple):
    """A computing layer, as recordings know it."""

    is_mtp: bool
    number: int
    """From 1: as ``layer_number`` in a GPTModel, or the depth of multi-token prediction."""

    def __str__(self) -> str:
        return f"MTP layer {self.number}" if self.is_mtp else f"layer {self.number}"


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
    mtp_layers: Mapping[int, tuple[Frame, ...]] = field(default_factory=dict)
    """Likewise by the depth of multi-token prediction, from 1. The query of a position is the one
    whose hidden state comes from that position. Empty where these layers are not recorded."""

    @classmethod
    def of_keys(
        cls,
        index_topk: int,
        length: int,
        layers: Mapping[int, Rows],
        mtp_layers: Mapping[int, Rows] | None = None,
    ) -> TopkRecording:
        """Check and compress.

        Args:
            index_topk: keys that a query selects.
            length: positions of the document.
            layers: layer number -> positions, ascending, int [rows], and the keys of the query at
                each, int [rows, index_topk], in any order, -1 for an empty place.
            mtp_layers: likewise by the depth of multi-token prediction, from 1.

        Raises:
            GLM5PatchError: the positions do not ascend or are not positions of the document; a
                query has too few keys, a key twice, or one that it does not see. The message names
                layer and position. A number is not an integer, or too small.
        """
        check_integer("index_topk", index_topk, 1)
        check_integer("length", length, 0)
        compressed: tuple[dict, dict] = {}, {}
        for is_mtp, given in enumerate((layers, mtp_layers or {})):
            for number, (positions, keys) in sorted(given.items()):
                check_integer("layer number", number, 1)
                name = LayerName(bool(is_mtp), int(number))
                positions = as_array(f"recording, {name}: positions", positions)
                keys = as_array(f"recording, {name}: keys", keys)
                check_positions(name, length, positions)
                frames = tuple(frames_of(name, index_topk, positions, keys))
                compressed[is_mtp][name.number] = frames
        return cls(int(index_topk), int(length), *compressed)  # NumPy's integers are not JSON

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
        merged: tuple[dict, dict] = {}, {}
        for name in sorted({name for part in parts for name in part.names}):
            frames = sorted({frame for part in parts for frame in part.frames(name)})
            for before, after in zip(frames, frames[1:]):
                if before.first + before.rows > after.first:
                    raise GLM5PatchError(
                        f"{name}: two parts have other keys for position {after.first}; merge "
                        "parts of one forward"
                    )
            merged[name.is_mtp][name.number] = tuple(frames)
        return cls(parts[0].index_topk, parts[0].length, *merged)

    @property
    def names(self) -> list[LayerName]:
        """All its layers."""
        return [
            LayerName(bool(is_mtp), number)
            for is_mtp, layers in enumerate((self.layers, self.mtp_layers))
            for number in layers
        ]

    def frames(self, name: LayerName) -> tuple[Frame, ...]:
        """Of one layer; none of a layer that is not recorded."""
        return (self.mtp_layers if name.is_mtp else self.layers).get(name.number, ())

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed keys of all layers."""
        return sum(len(frame.data) for name in self.names for frame in self.frames(name))

    def covers(self, name: LayerName, length: int) -> bool:
        """Whether every query below that position is recorded, or sees no more keys than are
        selected."""
        covered = self.index_topk
        for frame in self.frames(name):
            if frame.first > covered:
                break
            covered = max(covered, frame.first + frame.rows)
        return min(covered, max(self.length, self.index_topk)) >= length

    def keys(self, layer_number: int, *, mtp: bool = False) -> tuple[Tensor, Tensor]:
        """The recorded queries of one layer: positions, int64 [rows], and keys, int32
        [rows, index_topk], ascending.

        Args:
            layer_number: of a computing layer, from 1.
            mtp: it is a depth of multi-token prediction instead.

        Raises:
            KeyError: the layer is not recorded.
            GLM5PatchError: its data is damaged.
        """
        frames = (self.mtp_layers if mtp else self.layers)[layer_number]
        positions = [torch.arange(frame.first, frame.first + frame.rows) for frame in frames]
        rows = torch.arange(sum(frame.rows for frame in frames))
        unpacked = [frame.unpack() for frame in frames]
        keys = recorded_keys(unpacked, rows, self.index_topk, "cpu")
        return torch.cat([torch.arange(0), *positions]), keys

    def save(self, path: str | Path) -> None:
        """Write the recording to a file. If several processes save to one path, the last wins."""
        numbers = {"index_topk": self.index_topk, "length": self.length}
        file.write(path, numbers, {"layers": self.layers, "mtp_layers": self.mtp_layers})

    @classmethod
    def load(cls, path: str | Path) -> TopkRecording:
        """Read a recording that ``save`` wrote.

        Raises:
            GLM5PatchError: the file is not a recording, is of another version, is cut off or is
                damaged. The message names the file and what is wrong in it.
        """
        numbers, layers = file.read(path)
        return cls(**numbers, **layers)


class TopkRecorder:
    """What ``record_topk`` gives: the keys of one forward of one microbatch."""

    def __init__(self) -> None:
        self._lengths: list[int] | None = None
        self._index_topk = 0
        self._layers: dict[LayerName, list[Future]] = {}

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
        found = []
        for document, length in enumerate(self._lengths):
            layers: tuple[dict, dict] = {}, {}
            for name, documents in sorted(self._layers.items()):
                layers[name.is_mtp][name.number] = tuple(documents[document].result())
            found.append(TopkRecording(self._index_topk, length, *layers))
        return found

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
        name: LayerName,
        topk_indices: Tensor | None,
        layout: Layout,
        index_topk: int,
        b: int,
    ) -> None:
        """Keep a computing layer's top-k.

        Args:
            name: of the layer.
            topk_indices: int32 [b, s, k] of this rank's queries; None: every key fits.
            layout: where they stand.
            index_topk: keys of a query.
            b: sequences of the batch.

        Raises:
            GLM5PatchError: another forward has run in the block.
        """
        if name in self._layers:
            raise _another_forward(name)
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
            part = name, index_topk, positions, keys
            parts.append(_workers_of(os.getpid()).submit(lambda part=part: list(frames_of(*part))))
        self._layers[name] = parts
        for part in list(self._layers.values())[:-MOST_PENDING][-1:]:
            futures_wait(part)


def _another_forward(name: LayerName | None = None) -> GLM5PatchError:
    what = "two forwards run" if name is None else f"{name} runs twice"
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
