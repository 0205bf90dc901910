import itertools
import random

import pytest

from glm5_patch.config.pipeline_split import (
    best_splits,
    check_split,
    equal_middle_split,
    nearest_split,
)
from glm5_patch.config.schedule import IndexSchedule
from glm5_patch.errors import PipelineSplitError

GLM_5_2 = IndexSchedule.from_freq(78, 4, 3)

# Pipeline size -> first, middle and last stage.
KNOWN = {
    2: (38, 0, 40),
    3: (26, 28, 24),
    4: (18, 20, 20),
    6: (14, 12, 16),
    8: (14, 8, 16),
    13: (18, 4, 16),
    16: (10, 4, 12),
}


def check(schedule, sizes):
    ends = list(itertools.accumulate(sizes))
    chunks = [range(end - size + 1, end + 1) for end, size in zip(ends, sizes)]
    check_split(schedule, chunks, [f"pipeline stage {i}" for i in range(len(sizes))])


def valid(schedule, sizes):
    """Whether every chunk that is not empty starts on a computing layer."""
    starts = [end - size for size, end in zip(sizes, itertools.accumulate(sizes)) if size]
    return all(schedule.types[start] == "full" for start in starts)


@pytest.mark.parametrize("seed", range(5))
def test_a_split_is_refused_unless_every_chunk_starts_on_a_computing_layer(seed):
    schedule = random_schedule(random.Random(seed), most=8)
    layers = schedule.num_layers
    for cuts in itertools.combinations_with_replacement(range(layers + 1), 2):
        sizes = [b - a for a, b in itertools.pairwise((0, *cuts, layers))]
        if valid(schedule, sizes):
            check(schedule, sizes)
        else:
            with pytest.raises(PipelineSplitError):
                check(schedule, sizes)


@pytest.mark.parametrize("stages", KNOWN)
def test_known_splits_of_glm_5_2_are_valid(stages):
    first, middle, last = KNOWN[stages]
    sizes = [first, *[middle] * (stages - 2), last]
    assert sum(sizes) == 78 and valid(GLM_5_2, sizes)
    check(GLM_5_2, sizes)


@pytest.mark.parametrize("stages", [2, 3, 6, 13])
def test_uniform_splits_of_glm_5_2_are_refused_with_a_valid_one(stages):
    with pytest.raises(PipelineSplitError) as error:
        check(GLM_5_2, [78 // stages] * stages)
    suggestion = str(error.value).rsplit(": ", 1)[1]
    assert valid(GLM_5_2, [int(size) for size in suggestion.split(",")])


def test_the_message_names_stage_layer_source_and_split():
    with pytest.raises(PipelineSplitError) as error:
        check(GLM_5_2, [18, 20, 21, 19])
    assert str(error.value) == (
        "pipeline stage 3 holds layer 60, a skip layer whose source, layer 59, is on pipeline "
        "stage 2; nearest valid split of 78 layers over 4 stages: 18,20,20,20"
    )


def test_too_many_stages_are_told_so():
    with pytest.raises(PipelineSplitError, match="21 computing layers can't start 26"):
        check(GLM_5_2, [3] * 26)


def random_schedule(rng, most):
    layers = rng.randint(4, most)
    types = "F" + "".join(rng.choice("FS") for _ in range(layers - 1))
    return IndexSchedule.from_types(types, layers)


@pytest.mark.parametrize("seed", range(20))
def test_nearest_split_is_valid_and_as_balanced_as_any(seed):
    schedule = random_schedule(random.Random(seed), most=14)
    layers = schedule.num_layers
    for stages in range(1, 5):
        cuts = itertools.combinations(range(1, layers), stages - 1)
        splits = [[b - a for a, b in itertools.pairwise((0, *c, layers))] for c in cuts]
        good = [split for split in splits if valid(schedule, split)]
        found = nearest_split(schedule, [layers // stages] * stages)
        assert (found is None) == (not good)
        if good:
            assert found in good
            assert max(found) == min(max(split) for split in good)


def rank(times):
    return round(max(times), 6), round(sum(t * t for t in times), 6)


def every_split(schedule, chunks):
    """Sizes of all valid splits; with empty chunks where there are too few computing layers."""
    ends = [layer - 1 for layer in schedule.computing_layers[1:]] + [schedule.num_layers]
    may_be_empty = chunks > len(ends)

    def after(sizes):
        done = sum(sizes)
        if len(sizes) == chunks:
            return [sizes] if done == schedule.num_layers else []
        following = [end - done for end in ends if end > done]
        return [split for size in [0] * may_be_empty + following for split in after([*sizes, size])]

    return after([])


@pytest.mark.parametrize("seed", range(40))
def test_best_splits_are_the_best_of_all_in_order(seed):
    rng = random.Random(seed)
    schedule = random_schedule(rng, most=9)
    costs = [rng.choice([1.0, 2.0, 3.5]) for _ in range(schedule.num_layers)]
    before, after = rng.choice([0.0, 0.5]), rng.choice([0.0, 2.0, 9.0])
    for chunks in range(1, 8):
        ranked = []
        for sizes in every_split(schedule, chunks):
            ends = [0, *itertools.accumulate(sizes)]
            times = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
            times[0] += before
            times[-1] += after
            ranked.append(rank(times))
        found = best_splits(schedule, chunks, costs, before=before, after=after, count=7)
        assert [rank(split.times) for split in found] == sorted(ranked)[:7]
        assert len({split.sizes for split in found}) == len(found)
        assert all(valid(schedule, split.sizes) for split in found)


@pytest.mark.parametrize("seed", range(10))
def test_free_splits_are_those_of_a_model_whose_layers_all_compute(seed):
    rng = random.Random(seed)
    schedule = random_schedule(rng, most=9)
    every_layer = IndexSchedule.from_freq(schedule.num_layers, 1, 0)
    for chunks in range(1, 12):
        free = best_splits(schedule, chunks, count=7, any_layer=True)
        assert free == best_splits(every_layer, chunks, count=7)
        assert equal_middle_split(schedule, chunks, any_layer=True) == equal_middle_split(
            every_layer, chunks
        )


def test_the_search_ends_where_few_splits_exist():
    """78 computing layers in 78 chunks: one way, however many are asked for."""
    schedule = IndexSchedule.from_freq(78, 1, 0)
    (split,) = best_splits(schedule, 78, count=20)
    assert split.sizes == (1,) * 78


def test_more_chunks_than_the_search_takes_are_refused():
    with pytest.raises(PipelineSplitError, match="129 chunks .* use at most 128"):
        best_splits(GLM_5_2, 129)


@pytest.mark.parametrize("chunks", [22, 26, 104])
def test_more_chunks_than_computing_layers_leave_some_empty(chunks):
    (split,) = best_splits(GLM_5_2, chunks)
    assert len(split.sizes) == chunks and sum(split.sizes) == 78
    assert split.bottleneck == 4
    check(GLM_5_2, split.sizes)


@pytest.mark.parametrize("stages", KNOWN)
def test_no_known_split_is_faster_than_the_ones_found(stages):
    first, middle, last = KNOWN[stages]
    known = [first, *[middle] * (stages - 2), last]
    found = equal_middle_split(GLM_5_2, stages)
    check(GLM_5_2, found)
    # For 8 stages 2,12,...,12,4 beats 14,8,...,8,16; everywhere else they are the same.
    assert max(found) < max(known) if stages == 8 else found == known
    (best,) = best_splits(GLM_5_2, stages)
    assert best.bottleneck <= max(found)
