"""Shared fixtures. The plugin is active in this process: importing torch loads it."""

from __future__ import annotations

import warnings

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|cuda_graph_scope|core_attn is from).*")


@pytest.fixture(scope="session")
def world():
    """megatron-core's model parallelism with one rank, on the CPU."""
    from glm5_patch.cpu_host import single_process

    with single_process("cpu"):
        yield
