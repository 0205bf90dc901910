"""Replay: layers attend to the keys of a recording, in any layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import GLM5PatchError
from ..ops.fallback import compute
from ..ops.index_topk.reference import IndexerInputs
from ..ops.query_positions import QueryPositions, query_blocks, visible_topk
from .codec import Frame, Marks
from .context import replay
from .record import TopkRecording, workers
from .tokens import Layout


class Replayed(NamedTuple):
    """What recordings say of one layer."""

    topk_indices: Tensor
    """int32 [b, s, k] of this rank's queries, ascending, then -1."""
    missing: Tensor | None
    """bool [b, s]: which queries are not recorded, so that the indexer must select their keys. None
    where every query is recorded, on all ranks."""
    report: ReplayReport | None
    """Where to count how many of these keys the indexer would have selected."""

    @property
    def wants_scores(self) -> bool:
        """Whether the layer's index scores are needed; the same on all ranks."""
        return self.missing is not None or self.report is not None


class ReplayReport:
    """Counts of recorded keys by layer, over the forwards of one ``replay_topk`` block and of this
    rank's queries. Only queries that have a choice count."""

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}  # int64 [2]: kept, all

    @property
    def counts(self) -> dict[int, tuple[int, int]]:
        """Layer number -> how many recorded keys the layer's indexer would have selected, and how
        many there are. To sum them up over ranks, add them up first and divide then."""
        return {n: tuple(found.tolist()) for n, found in sorted(self._counts.items())}

    @property
    def shares(self) -> dict[int, float]:
        """Layer number -> share of the recorded keys that its indexer would have selected; 1.0
        where no query has a choice."""
        return {n: kept / all_ if all_ else 1.0 for n, (kept, all_) in self.counts.items()}

    @torch.no_grad()
    def add(
        self,
        layer_number: int,
        inputs: IndexerInputs,
        scale: float,
        queries: QueryPositions,
        replayed: Replayed,
        real: Tensor | None = None,
    ) -> None:
        """Compare the recorded keys of one layer with its scores.

        A key counts as selected if its score is at least the lowest that would be selected: of
        equal scores, mostly 0 after ReLU, it says nothing which are selected.

        Args:
            layer_number: of the layer.
            inputs: what the scores of its indexer are made of.
            scale: of the products of the indexer's queries and keys.
            queries: of this rank.
            replayed: the recorded keys.
            real: int64, the queries that are not padding; None: all of them.
        """
        inputs = IndexerInputs(*(tensor.detach().contiguous() for tensor in inputs))
        topk_indices = replayed.topk_indices
        b, s, k = topk_indices.shape
        counted = (queries.local_positions >= k).expand(b, -1)
        if replayed.missing is not None:
            counted = counted & ~replayed.missing
        if real is not None:
            is_real = torch.zeros(s, dtype=torch.bool, device=counted.device)
            is_real[real] = True
            counted = counted & is_real
        keys = torch.arange(queries.keys, device=counted.device)
        found = self._counts.setdefault(layer_number, torch.zeros(2, dtype=torch.int64))
        for block in query_blocks(s, b * queries.keys * 4):
            scores = compute("index_scores", inputs.call, inputs, queries, block, scale)
            starts, places = queries.starts[block, None], queries.places[block, None]
            visible = (keys >= starts) & (keys <= places)
            scores = scores.masked_fill(~visible, float("-inf"))  # [b, block, t]
            lowest = scores.topk(k, sorted=False)[0].amin(-1, keepdim=True)
            columns = topk_indices[:, block].clamp_min(0).long() + starts
            recorded = counted[:, block, None] & (topk_indices[:, block] >= 0)
            kept = (scores.gather(-1, columns) >= lowest) & recorded
            found += torch.stack([kept.sum(), recorded.sum()]).cpu()


class Replay:
    """The recordings of one microbatch."""

    def __init__(self, recordings: Sequence[TopkRecording | None], report: bool) -> None:
        self.recordings = list(recordings)
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

    def begin(self) -> ForwardReplay:
        """For one forward."""
        return ForwardReplay(self)


class ForwardReplay:
    """A replay in one forward of one stack of layers; its rows stand in one layout."""

    def __init__(self, replay: Replay) -> None:
        self._report = replay.report
        self._recordings = replay.recordings
        self._documents: list[_Document] | None = None
        self._inflating: dict[int, list[list[Future]]] = {}

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

    def keys(self, layer_number: int, queries: QueryPositions, b: int, k: int) -> Replayed:
        """The keys of one layer.

        Args:
            layer_number: a computing layer.
            queries: of this rank.
            b: sequences of the batch.
            k: places of the top-k.
        """
        device = queries.starts.device
        inflating = self._inflating.pop(layer_number, None) or self._inflate(layer_number)
        following = self._following(layer_number)
        if following is not None and following not in self._inflating:
            self._inflating[following] = self._inflate(following)
        # Where no more keys are visible than are selected, these are the keys.
        topk_indices = visible_topk(queries._replace(longest=k), b).clone()
        local = queries.local_positions
        missing = torch.zeros((b, len(local)), dtype=torch.bool, device=device)
        complete = True
        for document, frames in zip(self._documents, inflating):
            complete &= document.is_covered(layer_number)
            document.mark_missing(missing)
            for marks in frames:
                document.fill(marks.result(), topk_indices, missing, k)
        return Replayed(topk_indices, None if complete else missing, self._report)

    def end_forward(self) -> None:
        """Drop what was to be decompressed for a layer of the next pipeline stage."""
        for future in itertools.chain(*itertools.chain(*self._inflating.values())):
            future.cancel()
        self._inflating.clear()

    def _inflate(self, layer_number: int) -> list[list[Future]]:
        return [
            [workers().submit(frame.inflate) for frame in document.frames(layer_number)]
            for document in self._documents
        ]

    def _following(self, layer_number: int) -> int | None:
        layers = {n for one in self._recordings if one is not None for n in one.layers}
        return min((n for n in layers if n > layer_number), default=None)


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

    def is_covered(self, layer_number: int) -> bool:
        """Whether the recording covers the queries of all ranks; every rank answers alike."""
        if self.recording is None:
            return self.length <= self.index_topk
        return self.recording.covers(layer_number, self.length)

    def frames(self, layer_number: int) -> list[Frame]:
        """Those with queries of this rank."""
        frames = () if self.recording is None else self.recording.layers[layer_number]
        return [frame for frame in frames if len(self._of(frame)[0])]

    def mark_missing(self, missing: Tensor) -> None:
        """Nothing is recorded yet of the queries with a choice; padding needs no keys of its
        own."""
        rows = self.rows[(self.positions >= self.index_topk) & (self.positions < self.length)]
        missing[self.batch, rows.to(missing.device)] = True

    def fill(self, marks: Marks, topk_indices: Tensor, missing: Tensor, k: int) -> None:
        """Write the recorded queries of a frame."""
        rows, positions = self._of(marks.frame)
        device = topk_indices.device
        keys = marks.keys(k, device)[(positions - marks.frame.first).to(device)]
        rows = rows.to(device)
        topk_indices[self.batch, rows] = keys
        missing[self.batch, rows] = False

    def _of(self, frame: Frame) -> tuple[Tensor, Tensor]:
        """The queries of a frame that this rank has: rows and positions."""
        end = min(frame.first + frame.rows, self.recording.length)
        begin, end = torch.searchsorted(self.positions, torch.tensor([frame.first, end])).tolist()
        return self.rows[begin:end], self.positions[begin:end]


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
    recordings: Sequence[TopkRecording | None], *, report: bool = False
) -> Iterator[ReplayReport | None]:
    """Let computing layers attend to recorded keys instead of what their indexers select.

    Put each call of the model into a block with the recordings of its microbatch: in Megatron's
    schedules, the call in ``forward_step_func``. Every rank gets the whole recordings, and takes
    its layers and its queries from them. A recompute replays the same keys, also outside the block.
    Queries that are not recorded select by the indexer, which also computes its loss as without
    replay. Multi-token prediction selects for itself.

    Args:
        recordings: one for each sequence of the batch or each document of the pack, in order; None
            for a document without. Every tensor- and context-parallel rank must give the same ones
            and the same ``report``: ranks that disagree wait for each other forever.
        report: count how many of the recorded keys the model's own indexers would have selected.
            Every computing layer then computes its index scores, and once more to compare.

    Yields:
        The counts, if they were asked for: ``shares`` by layer, and ``counts`` of the keys that
        the layer's indexer would have selected, and of all.

    Raises:
        GLM5PatchError: the recordings differ in ``index_topk`` or layers. In the forward, at its
            first layer: they do not fit the batch or the model.
    """
    found = Replay(recordings, report)
    token = replay.set(found)
    try:
        yield found.report
    finally:
        replay.reset(token)
