import pytest
import torch


@pytest.fixture
def virtual_pipeline(world):
    """Sets what ``initialize_model_parallel`` sets on every rank of an interleaved pipeline."""
    from megatron.core import parallel_state  # not every test here has megatron-core

    yield parallel_state.set_virtual_pipeline_model_parallel_world_size
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)


@pytest.fixture
def lower_position_first():
    """Equal scores fall alike in rows of different length only in a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
