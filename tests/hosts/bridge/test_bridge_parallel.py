"""Bridge between two real processes: what each split reads and writes, and the check of exports."""

import importlib.util

import pytest
import torch

from tests.distributed.run import world
from tests.hosts.bridge.helpers import tensors_in, write_checkpoint
from tests.hosts.bridge.worker import SPLITS

if importlib.util.find_spec("megatron.bridge") is None:
    pytest.skip("megatron-bridge is not installed", allow_module_level=True)


def test_every_split_gives_back_the_whole_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "source", "5.2")
    ranks = world(2, tmp_path, "tests.hosts.bridge.worker")
    before = tensors_in(tmp_path / "source")
    for found, layers in zip(ranks, ([1, 2, 3, 4], [5, 6, 7, 8])):
        assert found.pop("gradients") == {"differ": [], "layers": layers}
        assert found.keys() == SPLITS.keys()
        assert all(found[split]["yields"] == len(before) for split in SPLITS)
    for split in SPLITS:
        after = tensors_in(tmp_path / split)
        assert before.keys() == after.keys(), split
        assert all(torch.equal(before[name], after[name]) for name in before), split
        says = f"{len(before)} tensors read; 20 indexer tensors of skip layers absent as expected"
        assert sum(says in line for line in ranks[0][split]["says"]) == 1
