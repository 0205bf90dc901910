"""Pipeline splits: every stage must start on a computing layer. The one home of that rule."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PipelineSplitError
from .schedule import IndexSchedule


def check_split(
    schedule: IndexSchedule, chunks: Sequence[Sequence[int]], labels: Sequence[str]
) -> None:
    """Insist that each layer finds its source in its own pipeline chunk.

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
    """How messages and plans call a chunk; without virtual stages, ``vp_stage`` is None."""
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
) -> list[Split]:
    """The best valid splits, exactly: by the slowest chunk, then by how even the others are.

    Chunks stay empty only where there are more of them than computing layers.

    Args:
        schedule: the model's index schedule.
        chunks: pipeline size times virtual stages.
        costs: time of each layer; 1 each by default.
        before: time of the embedding, on the first chunk.
        after: time of the output layer (and multi-token prediction), on the last chunk.
        count: how many splits to return at most.
    """
    costs = [1.0] * schedule.num_layers if costs is None else costs
    until = [0.0, *itertools.accumulate(costs)]
    starts = [n - 1 for n in schedule.computing_layers]
    ends = [*starts[1:], schedule.num_layers]
    empty = chunks > len(starts)

    def time_of(chunk: int, begin: int, end: int) -> float:
        # The same sum wherever a chunk is timed: bounds are compared for equality.
        extra = before * (chunk == 0) + after * (chunk == chunks - 1)
        return until[end] - until[begin] + extra

    bounds = {
        time_of(chunk, begin, end)
        for chunk in {0, 1, chunks - 1}
        for begin in starts
        for end in ends
        if begin < end and chunk < chunks
    }
    found: list[Split] = []
    for bound in sorted(bounds):
        # Those found under a lower bound come back, and must not crowd out the new ones.
        wanted = count + len(found)
        for sizes in _evenest(starts, ends, chunks, bound, time_of, empty, wanted):
            cuts = [0, *itertools.accumulate(sizes)]
            times = tuple(time_of(i, *cut) for i, cut in enumerate(itertools.pairwise(cuts)))
            if max(times) == bound:
                found.append(Split(sizes, times))
        if len(found) >= count:
            break
    return found[:count]


def _evenest(starts, ends, chunks, bound, time_of, empty, count) -> list[tuple[int, ...]]:
    """The splits without a chunk above ``bound``, by their sum of squared times.

    Dynamic programming over (chunk, first layer not yet placed), keeping the best few of each.
    """
    total = ends[-1]
    best: dict[int, list[tuple[float, tuple[int, ...]]]] = {0: [(0.0, ())]}
    for chunk in range(chunks):
        grown: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
        for begin, partial in best.items():
            for end in [begin] * empty + [end for end in ends if end > begin]:
                time = time_of(chunk, begin, end)
                if time > bound:
                    break
                grown.setdefault(end, []).extend(
                    (squares + time * time, (*sizes, end - begin)) for squares, sizes in partial
                )
        best = {end: heapq.nsmallest(count, options) for end, options in grown.items()}
    return [sizes for _, sizes in best.get(total, [])]


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


def equal_middle_split(schedule: IndexSchedule, stages: int) -> list[int] | None:
    """The most balanced valid split of the form first, middle, ..., middle, last, which
    ``num_layers_in_first_pipeline_stage`` and ``num_layers_in_last_pipeline_stage`` can say."""
    starts, total = {n - 1 for n in schedule.computing_layers}, schedule.num_layers
    candidates = []
    for first in starts - {0}:
        for middle in range(1, total) if stages > 2 else (0,):
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
