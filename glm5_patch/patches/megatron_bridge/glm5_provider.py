"""``GLM5Bridge.provider_bridge``: the model that config.json describes, on every release."""

from __future__ import annotations

from pathlib import Path

from ...patching.patch import Finding, Patch, argument
from ..probes.megatron_bridge import why_glm5_provider_is_wrong

_DESCRIBES_THE_MODEL = (
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "kv_channels",
    "rope_type",
    "rotary_base",
    "layernorm_epsilon",
    "num_moe_experts",
    "moe_layer_freq",
)
"""And everything of the indexer's; the rest of a provider is Bridge's choice, or the user's."""


class GLM5Provider(Patch):
    id = "bridge_provider"
    module = "megatron.bridge.models.glm_moe_dsa.glm5_bridge"
    attribute = "GLM5Bridge.provider_bridge"
    why = "The provider ignores the index schedule, or can't be made from this config.json."
    upstream = "Megatron-Bridge 0.6.0 knows freq and offset, and needs indexer_rope_interleave"
    remove_when = "Bridge reads a per-layer list of indexer types and has defaults"
    on_request = True

    def needed(self, module) -> Finding:
        reason = why_glm5_provider_is_wrong(module)
        return Finding(reason is not None, reason or "every setting of a small GLM-5.2 is right")

    def apply(self, module, seams) -> None:
        seams.wrap(module.GLM5Bridge, "provider_bridge", _provider_bridge, reads=("hf_pretrained",))


def _provider_bridge(wrapped, instance, args, kwargs):
    from ...config.huggingface import HFConfig

    hf_config = argument(wrapped, args, kwargs, "hf_pretrained").config
    hf = HFConfig(hf_config.to_dict())
    hf.validate(Path(hf_config.name_or_path or "config.json"))
    # Releases that read it have no default; it is taken away again, for it would be saved.
    lent = not hasattr(hf_config, "indexer_rope_interleave")
    if lent:
        hf_config.indexer_rope_interleave = hf.indexer_rope_interleave
    try:
        provider = wrapped(*args, **kwargs)
    finally:
        if lent:
            del hf_config.indexer_rope_interleave
    for name, value in hf.megatron_kwargs().items():
        if name in _DESCRIBES_THE_MODEL or name.startswith("dsa_"):
            setattr(provider, name, value)
    return provider
