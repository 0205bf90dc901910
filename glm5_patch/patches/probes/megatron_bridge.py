"""What a Megatron-Bridge release can do: shapes, never versions."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

from . import names_read_by

_PROBE_GLM5 = dict(num_hidden_layers=8, index_topk_freq=4, index_skip_topk_offset=3)


def why_glm5_provider_is_wrong(bridge: ModuleType) -> str | None:
    """What Megatron-Bridge's GLM-5 bridge makes of a small GLM-5.2, if it is not that model."""
    config = bridge.GlmMoeDsaForCausalLM.config_class(**_PROBE_GLM5)
    try:
        provider = bridge.GLM5Bridge().provider_bridge(SimpleNamespace(config=config))
    except AttributeError as error:  # a field that this transformers does not set
        return f"AttributeError: {error}"
    if getattr(provider, "dsa_indexer_types", None) is None:
        return "the provider has no list of indexer types"
    return None


def unmapped_glm5_parameters(bridge: ModuleType) -> list[str]:
    """Which parts of a GLM-5 have parameters that Megatron-Bridge does not convert."""
    glm5 = bridge.GLM5Bridge()
    glm5.hf_config = SimpleNamespace(num_nextn_predict_layers=1, **_PROBE_GLM5)
    registry = glm5.mapping_registry()
    examples = {
        "experts one by one": "decoder.layers.3.mlp.experts.local_experts.0.linear_fc2.weight",
        "the MTP layer": "mtp.layers.0.mtp_model_layer.self_attention.linear_proj.weight",
    }
    return [part for part, name in examples.items() if not registry.megatron_to_hf_lookup(name)]


def knows_only_named_linears(peft_utils: ModuleType) -> bool:
    """Whether Megatron-Bridge's LoRA takes a whole linear layer only of a class it knows."""
    names = names_read_by(peft_utils.get_adapter_attributes_from_linear)
    return "TELinear" in names and "tensor_model_parallel" not in names
