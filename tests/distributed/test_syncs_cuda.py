"""A training step never makes the host wait for the GPU: what waits can't run ahead."""

import pytest
import torch

from tests.distributed import run


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_no_layer_waits_for_the_gpu(ranks, tmp_path):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA device{'s' if ranks > 1 else ''}")
    found = run.world(ranks, tmp_path, "tests.distributed.syncs")
    assert found == [{}] * ranks
