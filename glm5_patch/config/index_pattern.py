"""Which layers should keep their indexer, by how alike the layers select."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import ScheduleError
from .schedule import FULL, SHARED, IndexSchedule


class Pattern(NamedTuple):
    """A schedule, and how much of its own selection each layer finds in that of its source."""

    schedule: IndexSchedule
    overlaps: tuple[float, ...]
    """Of each layer, from the first; 1.0 of a computing layer that keeps its indexer."""

    @property
    def mean_overlap(self) -> float:
        """Over all layers."""
        return sum(self.overlaps) / len(self.overlaps)


def best_pattern(schedule: IndexSchedule, overlap: Sequence[Sequence[float]], keep: int) -> Pattern:
    """The pattern with the highest mean overlap among those that keep so many indexers, exactly.

    IndexCache (arXiv 2603.12201) removes indexers one after the other instead.

    Args:
        schedule: the model's, without layers that have no attention. A skip layer has no indexer to
            keep; it stands for what its source selects.
        overlap: of two layers, [layers][layers]: the share of the first one's keys that the second
            selects too.
        keep: how many layers keep their indexer.

    Raises:
        ScheduleError: fewer than one are to be kept, or more than there are.
    """
    computing, layers = schedule.computing_layers, schedule.num_layers
    if not 1 <= keep <= len(computing):
        raise ScheduleError(f"keep={keep} indexers must be at least 1 and at most {len(computing)}")
    # best[n] of so many kept: the last one is computing[n], and the layers before it are served.
    ends = [*computing[1:], layers + 1]
    served = [
        [sum(overlap[l - 1][source - 1] for l in range(source, end)) for end in ends]  # noqa: E741
        for source in computing
    ]
    best = {0: (0.0, ())}
    for _ in range(keep - 1):
        best = {
            n: max(
                (total + served[m][n - 1], (*kept, m)) for m, (total, kept) in best.items() if m < n
            )
            for n in range(1, len(computing))
            if any(m < n for m in best)
        }
    _, kept = max((total + served[n][-1], (*kept, n)) for n, (total, kept) in best.items())
    sources = {computing[n] for n in kept}
    found = IndexSchedule(tuple(FULL if n in sources else SHARED for n in range(1, layers + 1)))
    overlaps = (overlap[n - 1][found.source(n) - 1] for n in range(1, layers + 1))
    return Pattern(found, tuple(overlaps))
