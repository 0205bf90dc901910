"""A recording of one process, replayed by splits: the losses of one process that replays it, and
the same bits with gradients and without."""

import json
from dataclasses import asdict

import pytest

from tests.distributed.cases import MTP, Case
from tests.distributed.replay.cases import CASES, SOME
from tests.distributed.run import Worlds

LOSS = 5e-6
"""Relative, of one token."""


def found_by(cases, folder):
    """Case -> what each rank found; and what the rollout says."""
    kinds: dict[tuple[bool, str], list[Case]] = {}
    for case in cases:
        kinds.setdefault((case.thd, case.model), []).append(case)
    alone = [
        Case(
            f"rollout, thd={thd}, {model}",
            thd=thd,
            even_packs=thd,
            microbatches=max(case.microbatches for case in of_kind),
            settings={n: v for n, v in of_kind[0].settings.items() if n in MTP},
        )
        for (thd, model), of_kind in kinds.items()
    ]
    worlds = {1: [asdict(case) for case in alone]}
    for case in cases:
        worlds.setdefault(case.world, []).append(asdict(case))
    (folder / "cases.json").write_text(json.dumps(worlds))
    found = {}
    with Worlds(folder, "tests.distributed.replay.worker") as run:
        (rollout,) = run.run(1)
        for size in sorted(set(worlds) - {1}):
            ranks = run.run(size)
            found |= {name: [rank[name] for rank in ranks] for name in ranks[0]}
    return found, rollout


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SOME, id="some"),
        pytest.param([c for c in CASES if c.world > 1], id="all", marks=pytest.mark.nightly),
    ],
)
def test_splits_replay_a_recording_bit_for_bit(cases, tmp_path):
    found, rollout = found_by(cases, tmp_path)
    for name, ranks in found.items():
        assert not any("error" in rank for rank in ranks), (name, ranks)
        assert [rank["wrong"] for rank in ranks] == [[]] * len(ranks), name
        assert sum(rank["outputs"] for rank in ranks) > 0, name
        assert max(rank["loss"] for rank in ranks) <= LOSS, (name, ranks)
    for shares in rollout.values():  # or nothing would be replaced
        assert max(shares["shares"].values()) < 0.9, shares
