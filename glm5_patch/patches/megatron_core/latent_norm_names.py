"""``Attention.__init__``: checkpoints of cores that fuse the latent norms load too."""

from __future__ import annotations

from ...core.host import is_dsa
from ...core.patch import Finding, Patch, argument

_FUSED = {
    "linear_q_up_proj.layer_norm_weight": "q_layernorm.weight",
    "linear_kv_up_proj.layer_norm_weight": "kv_layernorm.weight",
}


class LatentNormNames(Patch):
    id = "latent_norm_names"
    module = "megatron.core.transformer.attention"
    attribute = "Attention.__init__"
    why = "A checkpoint whose latent norms are fused into the up projections does not load."
    upstream = "none: megatron-core 0.19.0 changed the names"
    remove_when = "no checkpoint written by megatron-core 0.18 or older is in use"

    def needed(self, module) -> Finding:
        return Finding(True, "a right DSA spec keeps the norms apart, older checkpoints do not")

    def apply(self, module, seams) -> None:
        seams.wrap(module.Attention, "__init__", _init, reads=("config",))


def _init(wrapped, instance, args, kwargs):
    wrapped(*args, **kwargs)
    if is_dsa(argument(wrapped, args, kwargs, "config")):
        instance.register_load_state_dict_pre_hook(_unfuse)


def _unfuse(module, state_dict, prefix, *_) -> None:
    for fused, plain in _FUSED.items():
        if prefix + fused in state_dict and prefix + plain not in state_dict:
            state_dict[prefix + plain] = state_dict.pop(prefix + fused)
