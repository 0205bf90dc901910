"""Shared fixtures. The plugin is active in this process: importing torch loads it."""

from __future__ import annotations

import warnings

import pytest

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")


@pytest.fixture(scope="session")
def world():
    """megatron-core's model parallelism with one rank, on the CPU."""
    from glm5_patch.cpu_host import single_process

    with single_process("cpu"):
        yield
