"""``GlmMoeDsaLoader``: mcore-bridge builds a GLM-5 on cores that share no top-k (0.16 to 0.18)."""

from __future__ import annotations

from typing import ClassVar

from ...patching.patch import Finding, Patch


class GLM5Layers(Patch):
    id = "mcore_bridge_layers"
    module = "mcore_bridge.model.gpts.glm_moe_dsa"
    attribute = "GlmMoeDsaLoader.get_transformer_layer_spec"
    why = "mcore-bridge asks for megatron-core's main branch, or selects keys by its own indexer."
    upstream = "megatron-core 0.19.0 shares top-k, and mcore-bridge 1.6.5 builds on that"
    remove_when = "no supported megatron-core is without index sharing"
    on_request: ClassVar[bool] = True
    distribution: ClassVar[str] = "mcore-bridge"

    def needed(self, module) -> Finding:
        if hasattr(module.DSAttention, "_HOLDER_ATTR"):
            return Finding(False, "megatron-core's attention shares its top-k")
        return Finding(True, "megatron-core's attention shares no top-k")

    def apply(self, module, seams) -> None:
        seams.wrap(module.GlmMoeDsaLoader, "get_transformer_layer_spec", _layers)


def _layers(wrapped, instance, args, kwargs):
    return layer_specs(instance.config, *args, **kwargs)


def layer_specs(config, vp_stage: int | None = None):
    """This package's layers, which take no rotary embedding from mcore-bridge's model."""
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

    from ...attention.mla import CrossLayerMLASelfAttention

    class Attention(CrossLayerMLASelfAttention):
        """It rotates by itself, as MLA does; the model's own embedding has the same frequencies."""

        def forward(self, *args, rotary_pos_emb=None, **kwargs):
            return super().forward(*args, **kwargs)

    config.dsa_is_glm5, config.apply_rope_fusion = True, False
    build = specs.get_transformer_block_with_experimental_attention_variant_spec
    block = build(config, vp_stage=vp_stage)
    for layer in block.layer_specs:
        layer.submodules.self_attention.module = Attention
    return block
