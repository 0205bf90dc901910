"""``HybridStack``'s ``dsa_layer``: that of ``hybrid_layer_specs`` becomes a GLM-5's.

The host's has no latent norms of its own, and megatron-core's ``DSAttention``. Attention that a
program puts there is left alone.
"""

from __future__ import annotations

import dataclasses
import inspect

from ....config.fields import is_glm5
from ....patching.patch import argument
from ...built import HOST_ATTENTION
from .gate import gated
from .gpt_layer_specs import VARIANT_SPECS


def with_glm5_layers(wrapped, instance, args, kwargs):
    """Build a stack of a GLM-5 from layers with the attention that its configuration asks for."""
    config = argument(wrapped, args, kwargs, "config")
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    submodules = call.arguments["submodules"]
    if is_glm5(config) and _is_hosts(getattr(submodules, "dsa_layer", None)):
        call.arguments["submodules"] = dataclasses.replace(
            submodules, dsa_layer=_glm5_layer(submodules.dsa_layer, config)
        )
    return gated(wrapped, instance, call.args, call.kwargs)


def _is_hosts(layer) -> bool:
    """Whether the sparse attention of a layer's spec is megatron-core's own."""
    attention = getattr(getattr(layer, "submodules", None), "self_attention", None)
    core = getattr(getattr(attention, "submodules", None), "core_attention", None)
    return getattr(getattr(core, "module", None), "__module__", None) == HOST_ATTENTION


def _glm5_layer(layer, config):
    from importlib import import_module

    specs = import_module(VARIANT_SPECS)
    attention = specs.get_experimental_attention_variant_module_spec(config=config)
    submodules = dataclasses.replace(layer.submodules, self_attention=attention)
    return dataclasses.replace(layer, submodules=submodules)
