"""``Attention.__init__``: checkpoints of cores that fuse the latent norms load too."""

from __future__ import annotations

from ....config.fields import is_glm5
from ....patching.patch import Finding, Patch, argument

FUSED_INTO = {"q_layernorm": "linear_q_up_proj", "kv_layernorm": "linear_kv_up_proj"}
"""The norm of a latent, and the linear layer that it may be fused into."""


class LatentNormNames(Patch):
    id = "latent_norm_names"
    module = "megatron.core.transformer.attention"
    attribute = "Attention.__init__"
    why = "A checkpoint with the latent norms fused into the up projections does not load."
    upstream = "none: megatron-core 0.19.0 changed the names"
    remove_when = "no checkpoint written by megatron-core 0.18 or older is in use"

    def needed(self, module) -> Finding:
        return Finding(True, "a right DSA spec keeps the norms apart, older checkpoints do not")

    def apply(self, module, seams) -> None:
        seams.wrap(module.Attention, "__init__", _init, reads=("config",))


def _init(wrapped, instance, args, kwargs):
    wrapped(*args, **kwargs)
    if is_glm5(argument(wrapped, args, kwargs, "config")):
        instance.register_load_state_dict_pre_hook(_unfuse)


def _unfuse(module, state_dict, prefix, *_) -> None:
    from torch.nn import Module

    for norm, linear in FUSED_INTO.items():
        fused, plain = f"{prefix}{linear}.layer_norm_weight", f"{prefix}{norm}.weight"
        if fused not in state_dict or plain in state_dict:
            continue
        state_dict[plain] = state_dict.pop(fused)
        layer = getattr(module, norm)
        if type(layer).get_extra_state is not Module.get_extra_state:
            # Transformer Engine's: a norm has no fp8 scales that could be lost.
            state_dict[f"{prefix}{norm}._extra_state"] = layer.get_extra_state()
