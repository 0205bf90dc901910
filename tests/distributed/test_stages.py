"""Stages that start on a skip layer: the gradients of one process, bit for bit."""

import pytest

from tests.distributed import run
from tests.distributed.stage_cases import CASES, FILES, SOME, STALE
from tests.distributed.test_parallel import check_files, shortcomings


def found_by(cases, folder):
    """Case -> what each rank found."""
    run.write_cases(folder, list(cases))
    with run.Worlds(folder) as worlds:
        worlds.run(1)
        ranks = {size: worlds.run(size) for size in sorted({case.world for case in cases})}
    return {case.name: [rank[case.name] for rank in ranks[case.world]] for case in cases}


@pytest.mark.nightly  # tests/distributed/test_parallel.py has splits without the switch
def test_any_split_loads_what_any_other_saved(tmp_path):
    check_files(FILES, run.everything(tmp_path, [], FILES), tmp_path)


@pytest.mark.parametrize(
    "cases",
    [pytest.param(SOME, id="some"), pytest.param(CASES, id="all", marks=pytest.mark.nightly)],
)
def test_any_split_equals_one_process(cases, tmp_path):
    """The top-k of another microbatch gives wrong gradients: so the comparison can fail."""
    found = found_by([*cases, STALE], tmp_path)
    assert max(rank["gradients"] for rank in found.pop(STALE.name)) > 0.01
    wrong = {}
    for case in cases:
        ranks = found[case.name]
        for rank in ranks:  # a rank holds the indexers of its own layers
            if "computing" in rank:
                rank["computing"] = sorted({n for one in ranks for n in one.get("computing", ())})
        wrong[case.name] = "; ".join(filter(None, (shortcomings(case, one) for one in ranks)))
    assert {name: text for name, text in wrong.items() if text} == {}
