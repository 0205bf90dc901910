import pytest
import torch

from glm5_patch import env


@pytest.fixture
def virtual_pipeline(world):
    """Sets what ``initialize_model_parallel`` sets on every rank of an interleaved pipeline."""
    from megatron.core import parallel_state  # not every test here has megatron-core

    yield parallel_state.set_virtual_pipeline_model_parallel_world_size
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)


@pytest.fixture
def lower_position_first(monkeypatch):
    """Equal scores fall alike in rows of different length only in a fixed order, which
    megatron-core's own attention never asks for."""
    if env.attention() == "host":
        monkeypatch.setattr(torch, "topk", _stable_topk)
        monkeypatch.setattr(torch.Tensor, "topk", _stable_topk)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _stable_topk(scores, k, dim=-1, largest=True, sorted=True):
    values, indices = scores.sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))
