"""``GlmMoeDsaConfig``: what config.json says is what the configuration holds."""

from __future__ import annotations

from ...patching.patch import Finding, Patch
from ..probes.transformers import what_hf_config_spoils


class GlmMoeDsaConfigValues(Patch):
    id = "hf_config_values"
    module = "transformers.models.glm_moe_dsa.configuration_glm_moe_dsa"
    attribute = "GlmMoeDsaConfig.__init__"
    why = "The rope width, the expert count or the index schedule of config.json is lost."
    upstream = "transformers 5.13.0"
    remove_when = "no supported transformers is older than 5.13"

    def needed(self, module) -> Finding:
        spoilt = what_hf_config_spoils(module.GlmMoeDsaConfig)
        return Finding(bool(spoilt), "; ".join(spoilt) or "every probed value survives")

    def apply(self, module, seams) -> None:
        seams.wrap(module.GlmMoeDsaConfig, "__init__", _init)

    def guards(self, config) -> bool:
        return False  # a Megatron configuration was made from it already, or not at all


def _init(wrapped, instance, args, kwargs):
    if "num_hidden_layers" not in kwargs:
        return wrapped(
            *args, **kwargs
        )  # defaults only: transformers builds such configs to compare
    from ...config.huggingface import HFConfig  # here: `import torch` need not pay for it

    raw = HFConfig(kwargs)
    kwargs = dict(kwargs)
    # Every layer is of one type; its name changed between releases, each refusing the other's.
    kwargs.pop("layer_types", None)
    wrapped(*args, **kwargs)
    instance.qk_rope_head_dim = raw.qk_rope_head_dim
    instance.head_dim = raw.qk_rope_head_dim
    instance.qk_head_dim = raw.qk_nope_head_dim + raw.qk_rope_head_dim
    instance.n_routed_experts = raw.n_routed_experts
    if hasattr(instance, "num_experts"):
        instance.num_experts = raw.n_routed_experts
    instance.rope_parameters = {**(instance.rope_parameters or {}), **raw.rope_parameters}
    instance.indexer_types = list(raw.schedule.types)
    for name in ("index_topk_freq", "index_skip_topk_offset", "indexer_rope_interleave"):
        if name in kwargs:
            setattr(instance, name, kwargs[name])
