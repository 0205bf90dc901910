"""The build-time check through the host's own builder, for every way to split."""

import pytest
import torch
from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
from megatron.core.transformer.transformer_config import MLATransformerConfig

import glm5_patch
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.errors import GLM5PatchError, PipelineSplitError
from tests.config.test_schedule import published


def glm_5_2(pp, **fields):
    settings = dict(
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.bfloat16,
        transformer_impl="local",
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    kwargs = HFConfig(published("glm-5.2.json")).megatron_kwargs()
    return MLATransformerConfig(**{**kwargs, **settings, **fields})


def uneven(first, last):
    return dict(num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last)


GOOD = {
    "pp1": (1, {}),
    "pp2": (2, uneven(38, 40)),
    "pp3": (3, uneven(26, 24)),
    "pp4": (4, uneven(18, 20)),
    "pp8": (8, uneven(14, 16)),
    "pp16": (16, uneven(10, 12)),
    "vpp": (
        2,
        dict(
            virtual_pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout="Et*18|t*20|t*20|t*20,L",
        ),
    ),
    "empty chunk": (
        2,
        dict(
            virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_layout="E|t*38|t*40|L"
        ),
    ),
}
BAD = {
    "uniform pp2": (2, {}, "pipeline stage 1 holds layer 40.*layer 39.*stage 0; nearest.*38,40"),
    "uniform pp3": (3, {}, "26,28,24"),
    "first alone": (2, dict(num_layers_in_first_pipeline_stage=40), "38,40"),
    "layout": (2, dict(pipeline_model_parallel_layout="Et*37|t*41,L"), "pipeline stage 1"),
    "vpp": (
        2,
        dict(
            virtual_pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout="Et*18|t*20|t*21|t*19,L",
        ),
        "pipeline stage 1, virtual stage 1 holds layer 60",
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_valid_splits_build_every_layer_once(world, case, virtual_pipeline):
    pp, fields = GOOD[case]
    assert layers_built(pp, virtual_pipeline, **fields) == 78


def layers_built(pp, virtual_pipeline, **fields):
    """By all chunks of all ranks."""
    config = glm_5_2(pp, **fields)
    vp = config.virtual_pipeline_model_parallel_size
    virtual_pipeline(vp)
    layers = 0
    for pp_rank in range(pp):
        for vp_stage in range(vp) if vp else (None,):
            spec = specs.get_transformer_block_with_experimental_attention_variant_spec(
                config, vp_stage=vp_stage, pp_rank=pp_rank
            )
            layers += len(spec.layer_specs)
    return layers


@pytest.mark.parametrize("case", BAD)
def test_invalid_splits_raise_the_same_on_every_rank(world, case):
    pp, fields, says = BAD[case]
    config = glm_5_2(pp, **fields)
    vp = 0 if config.virtual_pipeline_model_parallel_size else None
    messages = set()
    for pp_rank in range(pp):
        with pytest.raises(PipelineSplitError, match=says) as error:
            specs.get_transformer_block_with_experimental_attention_variant_spec(
                config, vp_stage=vp, pp_rank=pp_rank
            )
        messages.add(str(error.value))
    (message,) = messages
    assert "Or set dsa_topk_across_stages=True (--dsa-topk-across-stages)" in message


@pytest.mark.parametrize("case", BAD)
def test_with_the_switch_every_split_builds_every_layer_once(world, case, virtual_pipeline):
    pp, fields, _ = BAD[case]
    assert layers_built(pp, virtual_pipeline, **fields, dsa_topk_across_stages=True) == 78


def test_the_hosts_own_check_by_freq_and_offset_is_left_out_too(world, virtual_pipeline):
    by_freq = dict(dsa_indexer_types=None, dsa_indexer_topk_freq=4, dsa_indexer_skip_topk_offset=3)
    assert layers_built(2, virtual_pipeline, **by_freq, dsa_topk_across_stages=True) == 78


def test_the_hosts_attention_shares_nothing_between_stages(world, monkeypatch):
    if glm5_patch.require()["index_share_carrier"].state != "applied":
        pytest.skip("this host's attention shares no top-k")
    monkeypatch.setenv("GLM5_PATCH_ATTENTION", "host")
    with pytest.raises(GLM5PatchError, match="dsa_topk_across_stages=True with GLM5_PATCH_ATT"):
        specs.get_transformer_block_with_experimental_attention_variant_spec(
            glm_5_2(2, dsa_topk_across_stages=True), pp_rank=0
        )


SERVED = dict(dsa_indexer_loss_coeff=0.1, dsa_indexer_loss_layers="served")


def test_an_indexer_learns_from_its_own_stage_alone(world, virtual_pipeline):
    messages = set()
    for pp_rank in range(2):
        with pytest.raises(PipelineSplitError) as error:
            specs.get_transformer_block_with_experimental_attention_variant_spec(
                glm_5_2(2, **SERVED, dsa_topk_across_stages=True), pp_rank=pp_rank
            )
        messages.add(str(error.value))
    (message,) = messages
    assert "holds layer 40, a skip layer whose source, layer 39," in message
    assert "dsa_indexer_loss_layers='source' (now 'served')" in message
    assert "38,40" in message
    without_loss = {**SERVED, "dsa_indexer_loss_coeff": None}
    for fields in ({**uneven(38, 40), **SERVED}, without_loss):
        assert layers_built(2, virtual_pipeline, **fields, dsa_topk_across_stages=True) == 78


def test_the_hosts_indexers_learn_from_their_own_layers_alone(world, monkeypatch):
    if glm5_patch.require()["index_share_carrier"].state != "applied":
        pytest.skip("this host's attention shares no top-k")
    monkeypatch.setenv("GLM5_PATCH_ATTENTION", "host")
    with pytest.raises(GLM5PatchError, match="dsa_indexer_loss_layers='served' with GLM5_PATCH_AT"):
        specs.get_transformer_block_with_experimental_attention_variant_spec(
            glm_5_2(1, **SERVED), pp_rank=0
        )
