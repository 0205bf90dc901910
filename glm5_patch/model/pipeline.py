"""Pipeline splits: every stage must start on a computing layer. The one home of that rule."""

from __future__ import annotations

from collections.abc import Sequence

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


def nearest_split(schedule: IndexSchedule, sizes: Sequence[int]) -> list[int] | None:
    """The valid split into ``len(sizes)`` non-empty chunks that keeps the pipeline balanced.

    A split whose middle chunks are equal, as ``num_layers_in_first_pipeline_stage`` and
    ``num_layers_in_last_pipeline_stage`` can say it, wins a tie; then the one that moves the
    fewest layers away from ``sizes``. None where the schedule has too few computing layers.
    """
    stages, total = len(sizes), schedule.num_layers
    starts = {n - 1 for n in schedule.computing_layers} | {total}
    # best[end] = (largest chunk, moved layers, sizes) over the splits of the first `end` layers.
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for stage in range(stages):
        grown: dict[int, tuple[int, int, list[int]]] = {}
        for begin, (largest, moved, split) in best.items():
            for end in starts:
                size = end - begin
                if size < 1 or (end == total) != (stage == stages - 1):
                    continue
                option = (max(largest, size), moved + abs(size - sizes[stage]), split + [size])
                if end not in grown or option < grown[end]:
                    grown[end] = option
        best = grown
    if total not in best:
        return None
    largest, _, split = best[total]
    simple = _equal_middles(starts, total, stages)
    return simple if simple and max(simple) <= largest else split


def _equal_middles(starts: set[int], total: int, stages: int) -> list[int] | None:
    """The most balanced valid split of the form first, middle, ..., middle, last."""
    if stages < 2:
        return None
    candidates = []
    for first in starts - {0, total}:
        for middle in range(1, total) if stages > 2 else (0,):
            cuts = [first + i * middle for i in range(stages - 1)]
            last = total - cuts[-1]
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
