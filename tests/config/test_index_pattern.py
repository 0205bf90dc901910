"""The best pattern against every pattern there is."""

import itertools
import random

import pytest

from glm5_patch.config.index_pattern import best_pattern
from glm5_patch.config.schedule import IndexSchedule
from glm5_patch.errors import ScheduleError


def mean_overlap(schedule, overlap):
    numbers = range(1, schedule.num_layers + 1)
    return sum(overlap[n - 1][schedule.source(n) - 1] for n in numbers) / schedule.num_layers


@pytest.mark.parametrize("letters", ["FFFFFFF", "FFSFSSFF"])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_pattern_is_better(letters, seed):
    draw = random.Random(seed)
    schedule = IndexSchedule.from_types(letters, len(letters))
    layers, computing = range(len(letters)), schedule.computing_layers
    overlap = [[1.0 if i == j else draw.random() for j in layers] for i in layers]
    for keep in range(1, len(computing) + 1):
        found = best_pattern(schedule, overlap, keep)
        assert found.schedule.letters.count("F") == keep
        assert set(found.schedule.computing_layers) <= set(computing)
        assert found.mean_overlap == pytest.approx(mean_overlap(found.schedule, overlap))
        others = (
            IndexSchedule.from_types(
                "".join("F" if n + 1 in (1, *kept) else "S" for n in layers), len(letters)
            )
            for kept in itertools.combinations(computing[1:], keep - 1)
        )
        best = max(mean_overlap(other, overlap) for other in others)
        assert found.mean_overlap == pytest.approx(best)


@pytest.mark.parametrize("keep", [0, 4])
def test_as_many_are_kept_as_there_are(keep):
    schedule = IndexSchedule.from_types("FSFF", 4)
    with pytest.raises(ScheduleError, match="at least 1 and at most 3"):
        best_pattern(schedule, [[1.0] * 4] * 4, keep)
