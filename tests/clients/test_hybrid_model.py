"""A HybridModel's stack of DSA layers: forward as the host's, recompute as without recompute."""

import itertools
from importlib.util import find_spec

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

from glm5_patch.errors import GLM5PatchError, MissingTopkError, PipelineSplitError
from glm5_patch.patches.megatron_core import carrying
from glm5_patch.patching.imports import is_there
from tests.clients.stacks import (
    MODES,
    causal_mask,
    config,
    gradients,
    hybrid_stack,
    hybrid_stage,
    outputs,
)
from tests.distributed import run
from tests.tiny import relative


@pytest.mark.parametrize("mask", [None, causal_mask(48)], ids=["no mask", "one mask"])
@pytest.mark.parametrize("mode", MODES)
def test_recompute_gives_the_gradients_of_no_recompute(world, mode, mask):
    plain = gradients(hybrid_stack(config()), mask)
    assert relative(gradients(hybrid_stack(config(**MODES[mode])), mask), plain) == 0


def test_where_no_carrier_is_open_the_host_s_own_answer_stands(host_attention, monkeypatch):
    """Its forward is right; its recompute is what the carrier is for."""
    mask = causal_mask(48)
    ours = outputs(hybrid_stack(config()), mask)
    plain = gradients(hybrid_stack(config()))
    monkeypatch.setattr(carrying, "carries", lambda stack: False)
    for our, theirs in zip(ours, outputs(hybrid_stack(config()), causal_mask(48))):
        assert torch.equal(our, theirs)
    wrong = gradients(hybrid_stack(config(**MODES["uniform_1"])))
    assert relative(wrong, plain) > 0.01


def run_stages(stages, hidden, narrow):
    """Forward and backward as a pipeline's schedule, without a process for each stage.

    Returns:
        The gradient of the input.
    """
    inputs, outputs = [], []
    for stage in stages:
        if not stage.pre_process:
            inputs.append(outputs[-1].detach().clone().requires_grad_())
            stage.set_input_tensor(inputs[-1])
        outputs.append(stage(hidden, None))
    outputs[-1].pow(2).sum().backward()
    for received, output in zip(reversed(inputs), reversed(outputs[:-1])):
        deallocate_output_tensor(output, narrow)
        backward = custom_backward if narrow else torch.autograd.backward
        backward(output, received.grad)
    return hidden.grad


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("narrow", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize("cuts", [(3,), (4,), (5,), (3, 4, 5)], ids=str)
def test_stages_that_start_on_a_skip_layer_are_as_one_stack(world, cuts, narrow, mode):
    """Layers 1, 2, 3 and 7 of 8 compute."""
    settings = dict(dsa_topk_across_stages=True, deallocate_pipeline_outputs=narrow)
    whole = hybrid_stack(config())
    bounds = list(itertools.pairwise((0, *cuts, 8)))
    stages = [
        hybrid_stage(config(**settings, **MODES.get(mode, {})), begin + 1, end).train()
        for begin, end in bounds
    ]
    for stage, (begin, end) in zip(stages, bounds):
        for ours, layer in zip(stage.layers, whole.layers[begin:end], strict=True):
            assert ours.layer_number == layer.layer_number
            ours.load_state_dict(layer.state_dict())
    hidden = torch.randn(48, 2, 64, generator=torch.Generator().manual_seed(1))
    expected = run_stages([whole.train()], hidden.clone().requires_grad_(), narrow)
    found = run_stages(stages, hidden.clone().requires_grad_(), narrow)
    assert torch.equal(found, expected)
    for stage, (begin, end) in zip(stages, bounds):
        for ours, layer in zip(stage.layers, whole.layers[begin:end]):
            theirs = dict(layer.named_parameters())
            for name, parameter in ours.named_parameters():
                assert same(parameter.grad, theirs[name].grad), f"{ours.layer_number}: {name}"


@pytest.mark.nightly  # the same stages in one process are above
@pytest.mark.skipif(
    not is_there("megatron.core.models.hybrid.hybrid_model"), reason="this core has no HybridModel"
)
def test_a_pipeline_of_two_processes_has_the_gradients_of_the_whole_model(tmp_path):
    """Its second stage starts on an MLP, between a source and its skip layers."""
    ranks = run.world(2, tmp_path, "tests.clients.hybrid_worker")
    assert [rank["layers"] for rank in ranks] == [list(range(1, 8)), list(range(8, 17))]
    assert [rank["differ"] for rank in ranks] == [[], []]


@pytest.mark.parametrize(("last", "length", "width"), [(6, 48, 64), (5, 9, 64), (5, 48, 69)])
def test_only_what_is_needed_is_sent(world, last, length, width):
    """9 keys of 16 bits are 5 columns of fp32. Nothing goes to a computing layer, or where every
    key is selected."""
    stage = hybrid_stage(config(dsa_topk_across_stages=True), 1, last)
    assert stage(torch.randn(length, 2, 64), None).shape == (length, 2, width)


def same(one, other):
    """Of two gradients, or of none."""
    return one is other is None or torch.equal(one, other)


def test_a_stage_that_starts_on_a_skip_layer_needs_the_switch(world):
    with pytest.raises(
        PipelineSplitError, match="layer 5 .*layer 3, .*dsa_topk_across_stages=True"
    ):
        hybrid_stage(config(), 5, 8)
    hybrid_stage(config(), 7, 8)


@pytest.mark.parametrize("narrow", [False, True], ids=["kept", "freed"])
def test_without_the_top_k_of_the_stage_before_a_skip_layer_raises(world, narrow):
    settings = dict(dsa_topk_across_stages=True, deallocate_pipeline_outputs=narrow)
    stage = hybrid_stage(config(**settings), 5, 8)
    stage.set_input_tensor(torch.zeros(48, 2, 64, requires_grad=True))
    with pytest.raises(MissingTopkError, match="layer 5 is a skip layer and reuses .* layer 3"):
        stage(None, None)


# From megatron-core 0.19 on the host puts a latent norm in where a spec leaves it out.
PUTS_NORMS_IN = find_spec("megatron.core.transformer.mla_qk_norm_config") is not None
NORMS = pytest.mark.parametrize("norm", ["q_layernorm", "kv_layernorm"])


@pytest.mark.skipif(PUTS_NORMS_IN, reason="this host puts the norm in")
@NORMS
def test_a_layer_without_its_latent_norm_is_refused(world, norm):
    """As ``dsa_layer`` of the host's own hybrid spec has it."""
    with pytest.raises(
        GLM5PatchError, match=f"layer 1 .*qk_layernorm=True, but {norm} .*dsa_layer"
    ):
        hybrid_stack(config(), without_norm=norm)
    hybrid_stack(config(qk_layernorm=False), without_norm=norm)


@pytest.mark.skipif(not PUTS_NORMS_IN, reason="this host builds what the spec says")
@NORMS
def test_a_latent_norm_that_the_host_puts_in_is_there(world, norm):
    layer = hybrid_stack(config(), without_norm=norm).layers[0]
    assert getattr(layer.self_attention, norm).weight.numel() > 0
