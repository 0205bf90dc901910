"""HybridModel: a GLM-5 of its layers is right, and each forward of its stack has its own top-k."""

import itertools
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

from glm5_patch import record_topk, replay_topk, topk_from_array
from glm5_patch.attention.build import (
    HF_LATENT_NORM_EPSILON,
    gpt_model,
    set_latent_norm_epsilon,
)
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.checkpoint.writer import save
from glm5_patch.errors import GLM5PatchError, MissingTopkError, PipelineSplitError, ScheduleError
from glm5_patch.patches.built import Owner, attentions_of
from glm5_patch.patches.megatron_core import carrying
from glm5_patch.patching.imports import is_there
from glm5_patch.tools.verify import forward
from glm5_patch.topk.carrier import current_carrier
from tests.clients.parity import assert_equals_hugging_face, assert_recomputes
from tests.clients.stacks import (
    MODES,
    causal_mask,
    config,
    glm5_stage,
    gradients,
    hybrid_stack,
    hybrid_stage,
    outputs,
)
from tests.distributed import run
from tests.tiny import add_mtp_layer, megatron_config, megatron_model, relative, saved, tokens

HAS_HYBRID_MODEL = pytest.mark.skipif(
    find_spec("megatron.core.models.hybrid") is None, reason="no HybridModel before 0.18"
)


def build(checkpoint: HFCheckpoint, **overrides):
    """The whole model, loaded."""
    from glm5_patch.attention.hybrid import hybrid_model

    config = megatron_config(checkpoint.config, hybrid=True, **overrides)
    model = hybrid_model(checkpoint.config, config)
    set_latent_norm_epsilon(model, HF_LATENT_NORM_EPSILON)
    checkpoint.load_into(model)
    return model


@HAS_HYBRID_MODEL
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2))])
def test_a_model_is_right(world, tmp_path, seed):
    assert_equals_hugging_face(build, tmp_path / "hf", seed)
    assert_recomputes(build, tmp_path / "hf", seed)


@HAS_HYBRID_MODEL
def test_its_layers_are_the_plugin_s_and_numbered_across_kinds(world, tmp_path):
    model = build(saved(tmp_path / "hf"))
    found = attentions_of(model)
    assert {attention.owner for attention in found} == {Owner.PLUGIN}
    assert [attention.layer_number for attention in found] == list(range(1, 17, 2))
    assert [a.layer_number for a in found if a.core.indexer is not None] == [1, 3, 5, 13]
    assert [a.core.topk_source.source for a in found] == [1, 3, 5, 5, 5, 5, 13, 13]


@HAS_HYBRID_MODEL
def test_its_mtp_layer_is_that_of_a_gpt_model(world, tmp_path):
    saved(tmp_path / "hf")
    add_mtp_layer(tmp_path / "hf")
    checkpoint = HFCheckpoint(tmp_path / "hf")
    settings = dict(mtp_num_layers=1)
    gpt = gpt_model(checkpoint.config, megatron_config(checkpoint.config, **settings))
    checkpoint.load_into(gpt)
    set_latent_norm_epsilon(gpt, HF_LATENT_NORM_EPSILON)
    hybrid = build(checkpoint, **settings)
    ids = tokens(0, 2, 48)
    for model in (gpt, hybrid):
        model.train()
        model(ids, torch.arange(48).expand_as(ids), None, labels=ids).sum().backward()
    for name in ("embedding.word_embeddings", "mtp.layers.0.eh_proj", "output_layer"):
        ours, theirs = (m.get_submodule(name).weight.grad for m in (hybrid, gpt))
        assert relative(ours, theirs) <= 1e-6, name


@HAS_HYBRID_MODEL
def test_it_is_saved_as_it_was_loaded(world, tmp_path):
    saved(tmp_path / "hf")
    add_mtp_layer(tmp_path / "hf")
    checkpoint = HFCheckpoint(tmp_path / "hf")
    save(build(checkpoint, mtp_num_layers=1), checkpoint.config, tmp_path / "out")
    again = HFCheckpoint(tmp_path / "out")
    assert again.shapes == checkpoint.shapes
    assert all(torch.equal(again.read(n), checkpoint.read(n)) for n in checkpoint.shapes)


@HAS_HYBRID_MODEL
def test_it_replays_what_a_gpt_model_recorded(world, tmp_path):
    """And what a server did, which numbers decoder layers."""
    checkpoint = saved(tmp_path / "hf")
    hybrid, ids = build(checkpoint), tokens(0, 1, 48)
    with record_topk() as recorder:
        forward(megatron_model(checkpoint), ids)
    with record_topk() as again, replay_topk(recorder.recordings, report=True) as report:
        forward(hybrid, ids)
    assert again.recordings == recorder.recordings
    assert report.shares == dict.fromkeys((1, 2, 3, 7), 1.0)
    (recording,) = recorder.recordings
    schedule, topk = checkpoint.config.schedule, checkpoint.config.index_topk
    array = np.full((48, schedule.num_layers, topk), -1, dtype=np.int32)
    for number in range(1, schedule.num_layers + 1):
        positions, keys = recording.keys(schedule.source(number))
        array[positions, number - 1] = keys
    assert topk_from_array(array, hybrid.config) == recording


@HAS_HYBRID_MODEL
def test_attention_that_a_program_puts_there_stays(host_attention, monkeypatch):
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention

    monkeypatch.delenv("GLM5_PATCH_ATTENTION")
    own = type("Own", (DSAttention,), {"__module__": "a.program"})
    stack = hybrid_stack(config(), core_attention=own)
    assert {attention.owner for attention in attentions_of(stack)} == {Owner.CLIENT_ON_HOST}


@HAS_HYBRID_MODEL
def test_a_source_without_attention_is_refused(world):
    """Two of them: as a GPTModel's schedule would have it."""
    numbers = dict(dsa_indexer_types="FFFFSSSFFFFFSSSF")
    with pytest.raises(ScheduleError, match="layer 5 .*source, layer 4, has no attention.*'none'"):
        glm5_stage(1, 16, **numbers)


def test_a_top_k_is_freed_after_its_last_reader(world):
    held = []
    stage = glm5_stage(1, 16)
    for layer in stage.layers:
        layer.register_forward_hook(lambda *_: held.append(current_carrier().held_layers))
    stage(torch.randn(48, 2, 64), None)
    # Layers 1 and 3 have no readers, 5 is read by 7, 9 and 11, and 13 by 15.
    assert held == [(), (), (), (), *[(5,)] * 6, (), (), (13,), (13,), (), ()]


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
    ranks = run.world(2, tmp_path, "tests.clients.hybrid.worker")
    assert [rank["layers"] for rank in ranks] == [list(range(1, 8)), list(range(8, 17))]
    assert [rank["differ"] for rank in ranks] == [[], []]


@pytest.mark.parametrize("cuts", [(12,), (6, 9), (13,)], ids=str)
def test_stages_of_a_model_may_start_on_any_layer(world, cuts):
    """On a computing layer; on a skip layer and an MLP behind one; on an MLP before one."""
    settings = dict(dsa_topk_across_stages=True)
    whole = glm5_stage(1, 16).train()
    bounds = list(itertools.pairwise((0, *cuts, 16)))
    stages = [glm5_stage(begin + 1, end, **settings).train() for begin, end in bounds]
    for stage, (begin, end) in zip(stages, bounds):
        for ours, layer in zip(stage.layers, whole.layers[begin:end], strict=True):
            ours.load_state_dict(layer.state_dict())
    hidden = torch.randn(48, 2, 64, generator=torch.Generator().manual_seed(1))
    expected = run_stages([whole], hidden.clone().requires_grad_(), narrow=False)
    found = run_stages(stages, hidden.clone().requires_grad_(), narrow=False)
    assert torch.equal(found, expected)
    sent = stages[0](hidden, None).shape[-1] - 64
    assert sent == (0 if cuts == (12,) else 5)  # 9 keys of 16 bits


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
