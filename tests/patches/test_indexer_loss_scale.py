"""The scale that the host's schedules give the indexer loss of a microbatch."""

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler

from glm5_patch.tools.verify import forward
from tests.tiny import megatron_model, relative, saved, tokens


@pytest.fixture
def unscaled():
    DSAIndexerLossAutoScaler.main_loss_backward_scale = None
    yield
    DSAIndexerLossAutoScaler.main_loss_backward_scale = None


def indexer_gradient(checkpoint, num_microbatches, **settings):
    """As a pipeline schedule runs one microbatch; the main loss has no way into the indexer."""
    model = megatron_model(checkpoint, dsa_indexer_loss_coeff=0.1, **settings).train()
    output, _ = forward_step_calc_loss(
        model,
        forward(model, tokens(0, 1, 40)),
        lambda logits: (logits.sum() * 0, {}),
        model.config,
        vp_stage=None,
        collect_non_loss_data=False,
        num_microbatches=num_microbatches,
        forward_data_store=[],
        cp_group_size=1,
        is_last_stage=True,
    )
    output.backward()
    indexers = [p.grad for name, p in model.named_parameters() if ".indexer." in name]
    return torch.cat([gradient.flatten() for gradient in indexers])


@pytest.mark.parametrize(
    ("num_microbatches", "settings", "factor"),
    [
        (4, {}, 1 / 4),
        (4, {"grad_scale_func": lambda loss: loss * 8}, 2),
        (4, {"calculate_per_token_loss": True}, 40),  # a sum over 40 tokens instead of their mean
    ],
    ids=["microbatches", "grad scale", "per token"],
)
def test_gradients_are_those_of_the_main_loss(
    world, unscaled, tmp_path, num_microbatches, settings, factor
):
    checkpoint = saved(tmp_path / "hf")
    alone = indexer_gradient(checkpoint, 1)
    scaled = indexer_gradient(checkpoint, num_microbatches, **settings)
    assert alone.any()
    assert relative(scaled, alone * factor) < 1e-5
