"""Replay: layers attend to the keys of a recording, in any layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import GLM5PatchError
from ..ops.query_positions import QueryPositions, visible_topk
from ..ops.recorded_keys.frame import Frame
from ..ops.recorded_keys.operation import recorded_keys, upload
from .ahead import Ahead, Decoded
from .context import replay
from .record import LayerName, TopkRecording
from .recordings.report import ReplayReport
from .tokens import Layout


class Replayed(NamedTuple):
    """What recordings say of one layer."""

    decoded: Decoded
    """The recorded keys; the indexer must select those of the queries that are missing."""
    report: ReplayReport | None
    """Where to count how many of these keys the indexer would have selected."""

    @property
    def wants_scores(self) -> bool:
        """Whether the layer's index scores are needed; the same on all ranks."""
        return self.decoded.missing is not None or self.report is not None


class Replay:
    """The recordings of one microbatch."""

    def __init__(
        self, recordings: Sequence[TopkRecording | None], report: bool, require_mtp: bool
    ) -> None:
        if isinstance(recordings, TopkRecording) or not isinstance(recordings, Iterable):
            raise GLM5PatchError(
                f"recordings is a {type(recordings).__name__}; give a list, with one TopkRecording "
                "or None for each sequence of the batch or each document of the pack"
            )
        self.recordings, self.require_mtp = list(recordings), require_mtp
        for number, one in enumerate(self.recordings):
            if one is not None and not isinstance(one, TopkRecording):
                raise GLM5PatchError(
                    f"recording {number} of the batch is a {type(one).__name__}; give a "
                    "TopkRecording, as topk_from_array and TopkRecording.load return, or None"
                )
        self.report = ReplayReport() if report else None
        given = [one for one in self.recordings if one is not None]
        for name, values in (
            ("index_topk", {one.index_topk for one in given}),
            ("layers", {tuple(sorted(one.layers)) for one in given}),
        ):
            if len(values) > 1:
                raise GLM5PatchError(
                    f"the recordings of one batch have {name}={' and '.join(map(str, values))}; "
                    "record them by one model"
                )

        self._left: ForwardReplay | None = None

    def begin(self) -> ForwardReplay:
        """For one forward."""
        return ForwardReplay(self)

    def leave(self, forward: ForwardReplay | None) -> ForwardReplay | None:
        """Keep a forward whose keys of multi-token prediction are decoded for the next stack, and
        return the one that was kept."""
        left, self._left = self._left, forward
        return left


class ForwardReplay:
    """A replay in one forward of one stack of layers; its rows stand in one layout."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._recordings = replay.recordings
        self._documents: list[_Document] | None = None
        self._ahead: Ahead | None = None
        self._ended = False
        self.layers: Sequence[LayerName] = ()
        """The computing layers of the stack and of multi-token prediction after it, if it tells:
        each is decoded beside the one before."""

    def check(self, layout: Layout, b: int, index_topk: int, computing: Sequence[int]) -> None:
        """Compare the recordings with a batch, at the first layer of a forward.

        Args:
            layout: of the batch.
            b: sequences of the batch.
            index_topk: keys of a query, of the model.
            computing: the numbers of the model's computing layers.

        Raises:
            GLM5PatchError: number, length, layers or ``index_topk`` differ.
        """
        if self._documents is not None:
            return
        lengths = layout.documents.lengths * b
        if len(self._recordings) != len(lengths):
            kind = "documents" if layout.documents.packed else "sequences"
            raise GLM5PatchError(
                f"{len(self._recordings)} recordings for a batch of {len(lengths)} {kind}; give "
                "replay_topk one for each, None where there is none"
            )
        for number, (recording, length) in enumerate(zip(self._recordings, lengths)):
            if recording is not None:
                least = layout.documents.least(number)
                _check(number, recording, length, least, index_topk, computing)
        self._documents = [
            _Document(recording, index_topk, length, batch, rows, positions)
            for recording, length, (batch, rows, positions) in zip(
                self._recordings, lengths, layout.documents.rows(b)
            )
        ]
        left = self._replay.leave(None)
        if left is not None:
            if left.rows_are_those_of(self):
                self._ahead, left._ahead = left._ahead, None
            left.drop()

    def rows_are_those_of(self, other: ForwardReplay) -> bool:
        """Whether two forwards of the same recordings have the same queries in the same places."""
        return len(self._documents) == len(other._documents) and all(
            one.batch == two.batch
            and torch.equal(one.rows, two.rows)
            and torch.equal(one.positions, two.positions)
            for one, two in zip(self._documents, other._documents)
        )

    def replays(self, name: LayerName) -> bool:
        """Whether a layer replays. One of multi-token prediction does where it is recorded.

        Raises:
            GLM5PatchError: it is not, and ``require_mtp`` asks for it.
        """
        if not name.is_mtp:
            return True
        lacking = [
            number
            for number, one in enumerate(self._recordings)
            if one is not None and name.number not in one.mtp_layers
        ]
        if lacking and self._replay.require_mtp:
            raise GLM5PatchError(
                f"recording {lacking[0]} of the batch has no {name}, and require_mtp=True; record "
                "a model with mtp_num_layers, or set require_mtp=False to let the layer select"
            )
        return any(one is not None and name.number in one.mtp_layers for one in self._recordings)

    def keys(self, name: LayerName, queries: QueryPositions, b: int, k: int) -> Replayed:
        """The keys of one layer, after ``check``.

        Args:
            name: of the layer.
            queries: of this rank.
            b: sequences of the batch.
            k: places of the top-k.
        """
        if self._ahead is None:
            decode = lambda name: self._decode(name, queries, b, k)
            self._ahead = Ahead(decode, queries.starts.device)
        self._ahead.begin(name)
        recorded = {name for one in self._recordings if one is not None for name in one.names}
        following = min((n for n in self.layers if n > name and n in recorded), default=None)
        if following is not None and not self._ended:
            self._ahead.begin(following)
        return Replayed(self._ahead.take(name), self._replay.report)

    def end_forward(self) -> None:
        """Leave what is decoded of multi-token prediction to the next stack, and drop the rest. In
        a recompute, layers run last to first, and none is decoded beside another."""
        self._ended = True
        if self._ahead is not None and any(name.is_mtp for name in self._ahead.begun):
            left = self._replay.leave(self)
            if left is not None:
                left.drop()
        else:
            self.drop()

    def drop(self) -> None:
        """Forget what was begun."""
        if self._ahead is not None:
            self._ahead.drop()

    def _decode(self, name: LayerName, queries: QueryPositions, b: int, k: int) -> Decoded:
        """All documents of the batch. Nothing here waits for the device."""
        device, s = queries.starts.device, len(queries.starts)
        # Where no more keys are visible than are selected, these are the keys.
        topk_indices = visible_topk(dataclasses.replace(queries, longest=k), b).clone()
        missing = torch.zeros((b, s), dtype=torch.bool)
        frames, wanted, places, rows = [], [], [], 0
        complete = True
        for document in self._documents:
            complete &= document.is_covered(name)
            document.mark_missing(missing)
            for frame, of_rows, positions in document.frames(name):
                frames.append(frame.unpack())
                wanted.append(positions - frame.first + rows)
                places.append(of_rows + document.batch * s)
                rows += frame.rows
        if frames:
            place = torch.cat(places)
            missing.view(-1)[place] = False
            keys = recorded_keys(frames, torch.cat(wanted), k, device)
            topk_indices.view(-1, k)[upload(place, device)] = keys
        if complete:
            return Decoded(topk_indices, None, None)
        missing_rows = missing.any(0).nonzero().squeeze(1)
        return Decoded(topk_indices, upload(missing, device), upload(missing_rows, device))


class _Document:
    """One document of the batch, and the queries of it that this rank has."""

    def __init__(
        self,
        recording: TopkRecording | None,
        index_topk: int,
        length: int,
        batch: int,
        rows: Tensor,
        positions: Tensor,
    ) -> None:
        self.recording, self.index_topk = recording, index_topk
        self.length, self.batch = length, batch
        positions, order = positions.sort()
        self.rows, self.positions = rows[order], positions  # int64, on the CPU

    def is_covered(self, name: LayerName) -> bool:
        """Whether the recording covers the queries of all ranks; every rank answers alike."""
        if self.recording is None:
            return self.length <= self.index_topk
        return self.recording.covers(name, self.length)

    def mark_missing(self, missing: Tensor) -> None:
        """Nothing is recorded yet of the queries with a choice; padding needs no keys of its
        own."""
        rows = self.rows[(self.positions >= self.index_topk) & (self.positions < self.length)]
        missing[self.batch, rows] = True

    def frames(self, name: LayerName) -> Iterator[tuple[Frame, Tensor, Tensor]]:
        """The frames of a layer with queries of this rank, and the rows and positions of these."""
        for frame in () if self.recording is None else self.recording.frames(name):
            end = min(frame.first + frame.rows, self.recording.length)
            bounds = torch.tensor([frame.first, end])
            begin, end = torch.searchsorted(self.positions, bounds).tolist()
            if begin < end:
                yield frame, self.rows[begin:end], self.positions[begin:end]


def _check(
    number: int,
    recording: TopkRecording,
    length: int,
    least: int,
    index_topk: int,
    computing: Sequence[int],
) -> None:
    what = f"recording {number} of the batch"
    if recording.index_topk != index_topk:
        raise GLM5PatchError(
            f"{what} has index_topk={recording.index_topk}, the model has "
            f"dsa_indexer_topk={index_topk}; record with the model's index_topk"
        )
    if sorted(recording.layers) != sorted(computing):
        raise GLM5PatchError(
            f"{what} has layers {sorted(recording.layers)}, the model computes its top-k in layers "
            f"{sorted(computing)}; record with the model's index schedule, and merge the parts of "
            "all pipeline stages"
        )
    if not least <= recording.length <= length:
        raise GLM5PatchError(
            f"{what} has {recording.length} positions, its document has {length} tokens; give the "
            "recording of that document, with one position for each token (the last may be missing)"
        )


@contextmanager
def replay_topk(
    recordings: Sequence[TopkRecording | None], *, report: bool = False, require_mtp: bool = False
) -> Iterator[ReplayReport | None]:
    """Let computing layers attend to recorded keys instead of what their indexers select.

    Put each call of the model into a block with the recordings of its microbatch: in Megatron's
    schedules, the call in ``forward_step_func``. Every rank gets the whole recordings, and takes
    its layers and its queries from them. A recompute replays the same keys, also outside the block.
    Queries that are not recorded select by the indexer, which also computes its loss as without
    replay. So do layers of multi-token prediction that are not recorded.

    Args:
        recordings: one for each sequence of the batch or each document of the pack, in order; None
            for a document without. Every tensor- and context-parallel rank must give the same ones
            and the same ``report``: ranks that disagree wait for each other forever.
        report: count how many of the recorded keys the model's own indexers would have selected.
            Every computing layer then computes its index scores, and once more to compare.
        require_mtp: a layer of multi-token prediction that a recording lacks is an error.

    Yields:
        The counts, if they were asked for: ``shares`` by layer, and ``counts`` of the keys that
        the layer's indexer would have selected, and of all; ``mtp_shares`` and ``mtp_counts``.

    Raises:
        GLM5PatchError: ``recordings`` is no list of them, or they differ in ``index_topk`` or
            layers. In the forward, at its first layer: they do not fit the batch or the model. In a
            layer of multi-token prediction: it is not recorded, and ``require_mtp`` asks for it.
    """
    found = Replay(recordings, report, require_mtp)
    token = replay.set(found)
    try:
        yield found.report
    finally:
        replay.reset(token)
        left = found.leave(None)
        if left is not None:
            left.drop()
