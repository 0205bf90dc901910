"""What runs beside a gather, and what its graph keeps."""

import time
import weakref

import pytest
import torch

from glm5_patch.ops.gathering import Gathering, Order
from tests.tiny import Operations


@pytest.fixture
def alone(world):
    """A process group of this process."""
    return torch.distributed.group.WORLD


def test_gradients_are_summed_beside_the_backward_of_what_ran_beside_the_gather(alone):
    places = torch.tensor([2, 0, 3, 1])
    x = torch.randn(4, 3, requires_grad=True)
    beside = torch.randn(4, 3, requires_grad=True)
    gathering = Gathering(x * 2, alone, Order(places, places.argsort()))
    sine = beside.sin()
    gathered = gathering.wait()
    assert torch.equal(gathered, (x * 2)[places])
    weight = torch.randn(4, 3)
    with Operations() as operations:
        (gathered * weight + sine).sum().backward()
    assert torch.equal(x.grad, 2 * weight[places.argsort()])
    assert torch.equal(beside.grad, beside.detach().cos())
    names = operations.names
    assert names.index("c10d::_reduce_scatter_base_") < names.index("aten::cos")
    assert not any("index_add" in name or "index_put" in name for name in names)


def test_what_was_gathered_is_not_kept_by_the_graph(alone):
    x = torch.randn(4, requires_grad=True)
    gathering = Gathering(x, alone, Order(*2 * [torch.arange(4)]))
    whole = weakref.ref(gathering._tensor)
    result = gathering.wait()
    deadline = time.monotonic() + 10  # gloo's thread may hold it a moment longer
    while whole() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert whole() is None and result.requires_grad
