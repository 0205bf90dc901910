"""What any transformers release makes of a published config.json; needs no megatron-core."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GlmMoeDsaConfig

from glm5_patch.config.huggingface import ROPE_WIDTH_TENSORS, HFConfig
from glm5_patch.config.schedule import IndexSchedule

CONFIGS = Path(__file__).parents[1] / "configs"
GLM_5_2 = IndexSchedule.from_types("FF" + "FSSS" * 19, 78)


def published(name="glm-5.2.json", **changes):
    raw = {**json.loads((CONFIGS / name).read_text()), **changes}
    return {key: value for key, value in raw.items() if value is not ...}


def parsed(raw, tmp_path):
    """Read as ``from_pretrained`` reads it."""
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("absent", [{}, {"indexer_types": ...}], ids=["with list", "freq only"])
def test_glm_5_2_keeps_rope_width_experts_and_schedule(tmp_path, absent):
    config = parsed(published(**absent), tmp_path)
    assert type(config) is GlmMoeDsaConfig
    assert (config.qk_rope_head_dim, config.qk_head_dim, config.head_dim) == (64, 256, 64)
    assert config.n_routed_experts == getattr(config, "num_experts", 256) == 256
    assert tuple(config.indexer_types) == GLM_5_2.types
    assert (config.index_topk_freq, config.index_skip_topk_offset) == (4, 3)
    assert config.indexer_rope_interleave is True
    assert config.rope_parameters["rope_theta"] == 8e6


def test_glm_5_1_computes_everywhere(tmp_path):
    config = parsed(published("glm-5.1.json"), tmp_path)
    if hasattr(GlmMoeDsaConfig(), "indexer_types"):
        assert tuple(config.indexer_types) == ("full",) * 78
    else:  # this release has no schedules, and GLM-5.1's config.json says none
        assert not hasattr(config, "indexer_types")
    assert config.rope_parameters["rope_theta"] == 1e6


def test_a_pruned_model_keeps_its_expert_count(tmp_path):
    config = parsed(published(n_routed_experts=128), tmp_path)
    assert config.n_routed_experts == getattr(config, "num_experts", 128) == 128


def test_a_flat_theta_is_found(tmp_path):
    raw = published(rope_parameters=..., rope_theta=8e6)
    assert parsed(raw, tmp_path).rope_parameters["rope_theta"] == 8e6
    assert HFConfig(raw).megatron_kwargs()["rotary_base"] == 8e6


def test_layer_types_of_another_release_are_no_obstacle(tmp_path):
    for name in ("indexed_attention", "deepseek_sparse_attention"):
        config = parsed(published(layer_types=[name] * 78), tmp_path)
        assert tuple(config.indexer_types) == GLM_5_2.types


def test_what_is_saved_is_read_back_the_same(tmp_path):
    config = parsed(published(), tmp_path)
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    for name in ("qk_rope_head_dim", "n_routed_experts", "indexer_types", "index_topk_freq"):
        assert getattr(again, name) == getattr(config, name)
    assert HFConfig(json.loads((tmp_path / "again/config.json").read_text())).schedule == GLM_5_2


def with_weights(directory, raw, shards):
    """A checkpoint of one attention layer in GLM-5.2's shape, in one file or in two."""
    shapes = dict(zip(ROPE_WIDTH_TENSORS, [(512 + 64, 1), (64 * 256, 1)]))
    parts = [shapes] if shards == 1 else [{name: shape} for name, shape in shapes.items()]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number}-of-{shards}.safetensors"
        save_file({name: torch.zeros(shape) for name, shape in part.items()}, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        index = {"weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("reader", [AutoConfig, GlmMoeDsaConfig])
def test_where_transformers_5_8_spoilt_the_file_the_weights_decide(tmp_path, reader, shards):
    raw = published("glm-5.2-saved-by-transformers-5.8.1.json")
    assert raw["qk_rope_head_dim"] == 192
    with_weights(tmp_path, raw, shards)
    with pytest.warns(UserWarning, match="qk_rope_head_dim is 192, but the weights have 64"):
        config = reader.from_pretrained(tmp_path)
    assert (config.qk_rope_head_dim, config.qk_head_dim, config.head_dim) == (64, 256, 64)
    assert tuple(config.indexer_types) == GLM_5_2.types


def test_a_width_that_one_tensor_alone_contradicts_is_kept(tmp_path):
    """Then the weights are of another shape altogether, which is for the loader to report."""
    with_weights(tmp_path, published(kv_lora_rank=500), 1)
    assert AutoConfig.from_pretrained(tmp_path).qk_rope_head_dim == 64


def test_a_file_that_transformers_5_23_saved_is_read_by_every_release(tmp_path):
    raw = published("glm-5.2-saved-by-transformers-5.23.0.json")
    assert raw["layer_types"][0] == "indexed_attention"
    config = parsed(raw, tmp_path)
    assert (config.qk_rope_head_dim, config.n_routed_experts) == (64, 256)
    assert tuple(config.indexer_types) == GLM_5_2.types


def test_the_megatron_configuration_is_that_of_the_raw_file():
    kwargs = HFConfig(published()).megatron_kwargs()
    assert kwargs["rope_type"] == "rope"
    assert kwargs["rotary_base"] == 8e6
    assert kwargs["qk_pos_emb_head_dim"] == 64 and kwargs["qk_head_dim"] == 192
    assert kwargs["num_moe_experts"] == 256
    assert sum(kwargs["moe_layer_freq"]) == 75
    assert kwargs["dsa_indexer_types"] == list(GLM_5_2.types)
    assert kwargs["dsa_indexer_rope_interleaved"] is True
