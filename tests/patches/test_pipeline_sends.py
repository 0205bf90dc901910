"""What a stage sends is not what its schedule takes the data out of: of a GLM-5 alone."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import P2PCommunicator

from glm5_patch.patches.megatron_core.running.stage_sends import PipelineSends
from tests.distributed import run

DSA = dict(experimental_attention_variant="dsa", timers=None)


@pytest.fixture
def patched(needs_patch):
    needs_patch("pipeline_sends")


def sent(config, output, by_name: bool):
    """What goes to the next stage, and what the schedule gets back."""
    communicator = P2PCommunicator.__new__(P2PCommunicator)
    communicator.config, found = SimpleNamespace(**config), []
    communicator._communicate = lambda **asked: (found.append(asked), (None, None, {}))[1]
    asked = dict(recv_prev=False, tensor_shape=(4, 1, 2), overlap_p2p_comm=True)
    if by_name:
        communicator.send_forward_recv_forward(output_tensor=output, **asked)
    else:
        communicator.send_forward_recv_forward(output, **asked)
    return found[0]["tensor_send_next"]


@pytest.mark.parametrize("by_name", [False, True])
def test_the_data_of_an_output_stay_with_what_is_sent(patched, by_name):
    output = torch.randn(4, 1, 2, requires_grad=True) * 2
    expected = output.detach().clone()
    found = sent({**DSA, "dsa_is_glm5": True}, output, by_name)
    assert found.data_ptr() == output.data_ptr() and found.grad_fn is None
    output.data = torch.empty(1)
    assert torch.equal(found, expected)
    assert sent({**DSA, "dsa_is_glm5": True}, None, by_name) is None


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("config", [dict(timers=None), {**DSA, "dsa_is_glm5": False}], ids=str)
def test_another_model_sends_its_own_tensor(patched, config, by_name):
    output = torch.randn(4, 1, 2)
    assert sent(config, output, by_name) is output


def test_an_output_arrives_though_it_is_freed_while_it_is_sent(patched, tmp_path):
    assert run.world(2, tmp_path, "tests.distributed.sending") == [[True] * 4] * 2


@pytest.mark.parametrize(
    ("stages", "overlaps", "frees", "guards"),
    [
        (2, True, True, True),
        (1, True, True, False),
        (2, False, True, False),
        (2, True, False, False),
    ],
)
def test_only_models_whose_outputs_are_freed_need_it(stages, overlaps, frees, guards):
    config = SimpleNamespace(
        pipeline_model_parallel_size=stages,
        overlap_p2p_comm=overlaps,
        deallocate_pipeline_outputs=frees,
    )
    assert bool(PipelineSends().guards(config)) is guards
