"""Pipeline splits: every stage starts on a computing layer, unless the top-k crosses stages."""

from __future__ import annotations

import bisect
import functools
import heapq
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import PipelineSplitError
from .schedule import IndexSchedule

MAX_CHUNKS = 128
"""The largest pipeline size times virtual stages that the search accepts."""


def check_split(
    schedule: IndexSchedule, chunks: Sequence[Sequence[int]], labels: Sequence[str]
) -> None:
    """Check that each layer has its source in its own pipeline chunk.

    Args:
        schedule: the model's index schedule.
        chunks: the layer numbers (from 1) of each chunk, in the order of the forward pass; an
            empty chunk is fine.
        labels: how to call each chunk in a message, e.g. ``"pipeline stage 2"``.

    Raises:
        PipelineSplitError: names the chunk, the layer, its source and the nearest valid split.
    """
    home = {layer: label for chunk, label in zip(chunks, labels) for layer in chunk}
    for chunk, label in zip(chunks, labels):
        for layer in chunk:
            source = schedule.source(layer)
            if source in chunk:
                continue
            sizes = [len(other) for other in chunks]
            raise PipelineSplitError(
                f"{label} holds layer {layer}, a skip layer whose source, layer {source}, is on "
                f"{home.get(source, 'no stage')}; {_suggestion(schedule, sizes)}"
            )


def chunk_label(pp_rank: int, vp_stage: int | None = None) -> str:
    """The name of a chunk in messages and plans. ``vp_stage`` is None without virtual stages."""
    suffix = "" if vp_stage is None else f", virtual stage {vp_stage}"
    return f"pipeline stage {pp_rank}{suffix}"


@dataclass(frozen=True)
class Split:
    """One valid way to cut the layers into pipeline chunks."""

    sizes: tuple[int, ...]
    """Layers of each chunk, in the order of the forward pass: rank 0 to the last, then the next
    virtual stage."""
    times: tuple[float, ...]
    """Estimated time of each chunk, in the unit of the costs."""

    @property
    def bottleneck(self) -> float:
        """Time of the slowest chunk, which the whole pipeline waits for."""
        return max(self.times)


def best_splits(
    schedule: IndexSchedule,
    chunks: int,
    costs: Sequence[float] | None = None,
    *,
    before: float = 0.0,
    after: float = 0.0,
    count: int = 1,
    any_layer: bool = False,
) -> list[Split]:
    """The best valid splits, exactly: by the slowest chunk, then by how even the others are.

    Chunks stay empty only where there are more of them than layers that they may start on.

    Args:
        schedule: the model's index schedule.
        chunks: pipeline size times virtual stages, at most ``MAX_CHUNKS``.
        costs: time of each layer; 1 each by default.
        before: time of the embedding, on the first chunk.
        after: time of the output layer (and multi-token prediction), on the last chunk.
        count: how many splits to return at most; fewer only where there are no more.
        any_layer: chunks may start on any layer, as ``dsa_topk_across_stages`` allows.

    Raises:
        PipelineSplitError: more chunks than the search takes.
    """
    if chunks > MAX_CHUNKS:
        raise PipelineSplitError(
            f"{chunks} chunks (pipeline size times virtual stages) are more than the search takes; "
            f"use at most {MAX_CHUNKS}"
        )
    costs = [1.0] * schedule.num_layers if costs is None else costs
    starts = range(1, schedule.num_layers + 1) if any_layer else schedule.computing_layers
    search = _SplitSearch(starts, schedule.num_layers, chunks, costs, before, after)
    bounds = search.bounds()
    # A split below a bound is also one below every larger bound.
    first = bisect.bisect_left(bounds, True, key=lambda bound: search.is_feasible(bound))
    wanted = min(count, search.number_of_splits())
    found: list[Split] = []
    for bound in bounds[first:]:
        if len(found) >= wanted:
            break
        found += search.evenest(bound, wanted - len(found))
    return found


class _SplitSearch:
    """Splits whose slowest chunk takes exactly a given time.

    Chunks are cut at marks: mark 0 is before the first layer, the last one after the last layer,
    and the others before each other layer that a chunk may start on. A set of marks is an int with
    one bit for each.
    """

    def __init__(self, starts, num_layers, chunks, costs, before, after):
        self._marks = [n - 1 for n in starts] + [num_layers]
        self._last_mark = len(self._marks) - 1
        self._chunks = chunks
        self._until = [0.0, *itertools.accumulate(costs)]
        self._extra = [0.0] * chunks
        self._extra[0] += before
        self._extra[-1] += after
        self._fewest = 0 if chunks > self._last_mark else 1  # marks that a chunk spans at least

    def number_of_splits(self) -> int:
        """How many valid splits there are."""
        filled = range(1, self._chunks + 1) if self._fewest == 0 else (self._chunks,)
        cuts = self._last_mark - 1
        return sum(math.comb(self._chunks, n) * math.comb(cuts, n - 1) for n in filled)

    def bounds(self) -> list[float]:
        """Every time that a chunk can take, ascending."""
        spans = [
            (begin, end)
            for begin in range(self._last_mark + 1)
            for end in range(begin + self._fewest, self._last_mark + 1)
        ]
        kinds = {extra: chunk for chunk, extra in enumerate(self._extra)}.values()
        return sorted({self._time(chunk, *span) for chunk in kinds for span in spans})

    def is_feasible(self, bound: float) -> bool:
        """Whether some split has no chunk above ``bound``."""
        return bool(self._reached(self._reach_of_chunks(bound))[-1] >> self._last_mark)

    def evenest(self, bound: float, count: int) -> list[Split]:
        """The splits whose slowest chunk takes ``bound``, by their sum of squared times."""
        reach = self._reach_of_chunks(bound)
        useful = self._useful(reach)
        if not any(self._slowest(useful, reach, bound)):
            return []
        # (mark, whether a chunk takes bound) -> the best (sum of squares, mark before, its entry).
        best: dict[tuple[int, bool], list[tuple]] = {(0, False): [(0.0, 0, None)]}
        for chunk in range(self._chunks):
            grown: dict[tuple[int, bool], list[tuple]] = {}
            for (begin, hit), entries in best.items():
                for end in _bits(reach[chunk][begin] & useful[chunk + 1]):
                    time = self._time(chunk, begin, end)
                    options = grown.setdefault((end, hit or time == bound), [])
                    options += [(entry[0] + time * time, end, entry) for entry in entries]
            best = {
                state: heapq.nsmallest(count, options, key=operator.itemgetter(0))
                for state, options in grown.items()
            }
        return [self._split(entry) for entry in best.get((self._last_mark, True), [])]

    def _time(self, chunk: int, begin: int, end: int) -> float:
        # The same sum wherever a chunk is timed: bounds are compared for equality.
        span = self._until[self._marks[end]] - self._until[self._marks[begin]]
        return span + self._extra[chunk]

    def _reach_of_chunks(self, bound: float) -> list[list[int]]:
        """For each chunk and each mark where it may begin, the marks where it may end."""
        by_extra = {
            extra: self._reach(chunk, bound)
            for extra, chunk in {extra: c for c, extra in enumerate(self._extra)}.items()
        }
        return [by_extra[extra] for extra in self._extra]

    def _reach(self, chunk: int, bound: float) -> list[int]:
        reach, end = [], 0
        for begin in range(self._last_mark + 1):
            end = max(end, begin)
            while end < self._last_mark and self._time(chunk, begin, end + 1) <= bound:
                end += 1
            fits = self._time(chunk, begin, end) <= bound
            least = begin + self._fewest
            reach.append((1 << end + 1) - (1 << least) if fits and end >= least else 0)
        return reach

    def _reached(self, reach: list[list[int]]) -> list[int]:
        """The marks where each chunk may begin, and those where the last one may end."""
        reached = [1]
        for of_chunk in reach:
            reached.append(
                functools.reduce(operator.or_, map(of_chunk.__getitem__, _bits(reached[-1])), 0)
            )
        return reached

    def _useful(self, reach: list[list[int]]) -> list[int]:
        """As ``_reached``, without the marks from which the last one can't be reached."""
        useful = self._reached(reach)
        useful[-1] &= 1 << self._last_mark
        for chunk in reversed(range(self._chunks)):
            ends = useful[chunk + 1]
            useful[chunk] = sum(1 << m for m in _bits(useful[chunk]) if reach[chunk][m] & ends)
        return useful

    def _slowest(self, useful: list[int], reach: list[list[int]], bound: float) -> Iterator[bool]:
        """Whether each chunk of the remaining splits can take ``bound``."""
        for chunk in range(self._chunks):
            for begin in _bits(useful[chunk]):
                for end in _bits(reach[chunk][begin] & useful[chunk + 1]):
                    yield self._time(chunk, begin, end) == bound

    def _split(self, entry: tuple) -> Split:
        marks = []
        while entry is not None:
            _, mark, entry = entry
            marks.append(mark)
        spans = list(itertools.pairwise(reversed(marks)))
        return Split(
            tuple(self._marks[end] - self._marks[begin] for begin, end in spans),
            tuple(self._time(chunk, *span) for chunk, span in enumerate(spans)),
        )


def _bits(mask: int) -> Iterator[int]:
    """The numbers of a set, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def nearest_split(schedule: IndexSchedule, sizes: Sequence[int]) -> list[int] | None:
    """A valid split into as many non-empty chunks as ``sizes`` has, as even as can be.

    One whose middle chunks are equal, as a user can say it with two numbers, wins a tie. None where
    the schedule has too few computing layers.
    """
    if len(sizes) > len(schedule.computing_layers):
        return None
    # Under a bound of layers the equal-middled splits need not be among the evenest few.
    simple = equal_middle_split(schedule, len(sizes))
    (best,) = best_splits(schedule, len(sizes))
    return simple if simple and max(simple) <= best.bottleneck else list(best.sizes)


def equal_middle_split(
    schedule: IndexSchedule, stages: int, any_layer: bool = False
) -> list[int] | None:
    """The most balanced valid split of the form first, middle, ..., middle, last, which
    ``num_layers_in_first_pipeline_stage`` and ``num_layers_in_last_pipeline_stage`` can say.
    ``any_layer`` as of ``best_splits``."""
    total = schedule.num_layers
    starts = set(range(total)) if any_layer else {n - 1 for n in schedule.computing_layers}
    candidates = []
    for first in starts - {0}:
        for middle in range(1, (total - first) // (stages - 2) + 1) if stages > 2 else (0,):
            cuts = [first + i * middle for i in range(stages - 1)]
            last = total - cuts[-1] if cuts else 0
            if last >= 1 and starts.issuperset(cuts):
                split = [first] + [middle] * (stages - 2) + [last]
                # The last stage also has the output layer: of two equal splits, the lighter last.
                candidates.append((max(split), max(split) - min(split), last, split))
    return min(candidates)[-1] if candidates else None


def _suggestion(schedule: IndexSchedule, sizes: Sequence[int]) -> str:
    split = nearest_split(schedule, sizes)
    if split is None:
        return (
            f"{len(schedule.computing_layers)} computing layers can't start {len(sizes)} "
            "pipeline stages: use fewer stages"
        )
    return (
        f"nearest valid split of {schedule.num_layers} layers over {len(sizes)} stages: "
        f"{','.join(map(str, split))}"
    )
