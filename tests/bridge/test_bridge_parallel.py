"""Bridge between two real processes: what each split reads and writes, and the check of exports."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bridge.helpers import tensors_in, write_checkpoint
from tests.bridge.worker import SPLITS, WORLD

if importlib.util.find_spec("megatron.bridge") is None:
    pytest.skip("megatron-bridge is not installed", allow_module_level=True)


def test_every_split_gives_back_the_whole_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "source", "5.2")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.bridge.worker", str(rank), str(tmp_path)],
            cwd=Path(__file__).parents[2],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "RANK": str(rank),
                "WORLD_SIZE": str(WORLD),
            },
            stdout=(tmp_path / f"{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(WORLD)
    ]
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(WORLD)]
    assert codes == [0] * WORLD, "\n".join(log[-3000:] for log in logs)
    before = tensors_in(tmp_path / "source")
    for rank in range(WORLD):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == dict.fromkeys(SPLITS, len(before))
    for split in SPLITS:
        after = tensors_in(tmp_path / split)
        assert before.keys() == after.keys(), split
        assert all(torch.equal(before[name], after[name]) for name in before), split
    says = f"{len(before)} tensors read; 20 indexer tensors of skip layers rightly not there"
    assert logs[0].count(says) == len(SPLITS)
