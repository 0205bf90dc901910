"""``gpt_layer_specs``: programs that ask for a decoder's or MTP's layers get a GLM-5's."""

from __future__ import annotations

import inspect

from ....config.fields import is_glm5
from ....patching.imports import is_there
from ....patching.patch import Finding, Patch, argument
from ...probes import names_read_by

VARIANT_SPECS = "megatron.core.models.gpt.experimental_attention_variant_module_specs"


class _LayerSpecs:
    module = "megatron.core.models.gpt.gpt_layer_specs"
    upstream = "none: megatron-core 0.19.0 refuses where 0.16 to 0.18 build dense attention"
    remove_when = "gpt_layer_specs builds experimental attention variants"

    def needed(self, module) -> Finding:
        if not is_there(VARIANT_SPECS):
            return Finding(False, "this release has no experimental attention variants")
        builds = names_read_by(getattr(module, self.attribute))
        if any("experimental_attention_variant_spec" in name for name in builds):
            return Finding(False, "the host's layers have the attention of the configuration")
        return Finding(True, "the host's layers have dense attention")


class DecoderLayerSpecs(_LayerSpecs, Patch):
    id = "decoder_layer_specs"
    attribute = "get_gpt_decoder_layer_specs"
    why = "The decoder's layers have dense attention, or an assertion fails."

    def apply(self, module, seams) -> None:
        seams.wrap(module, self.attribute, _layers, reads=("config",))


class MTPBlockSpec(_LayerSpecs, Patch):
    id = "mtp_block_spec"
    attribute = "get_gpt_mtp_block_spec"
    why = "The MTP layer has dense attention, or none can be built without Transformer Engine."

    def apply(self, module, seams) -> None:
        def build(wrapped, instance, args, kwargs):
            return _mtp_block(module, wrapped, args, kwargs)

        seams.wrap(module, self.attribute, build, reads=("config", "spec"))

    def guards(self, config) -> bool:
        return bool(config.mtp_num_layers)


def _layers(wrapped, instance, args, kwargs):
    config = argument(wrapped, args, kwargs, "config")
    return layer_specs(config) if is_glm5(config) else wrapped(*args, **kwargs)


def layer_specs(config) -> list:
    """The spec of every layer of the decoder, of all stages."""
    from importlib import import_module

    specs = import_module(VARIANT_SPECS)
    build = specs.get_transformer_block_with_experimental_attention_variant_spec
    virtual = config.virtual_pipeline_model_parallel_size
    found = []
    for vp_stage in range(virtual) if virtual else (None,):
        for pp_rank in range(config.pipeline_model_parallel_size):
            found += build(config, vp_stage=vp_stage, pp_rank=pp_rank).layer_specs
    return found


def _mtp_block(module, wrapped, args, kwargs):
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    config, spec = call.arguments["config"], call.arguments["spec"]
    if not is_glm5(config):
        return wrapped(*args, **kwargs)
    layers = getattr(spec, "layer_specs", [spec])
    if not layers or not _selects_keys(layers[-1]):
        # The stage has no decoder layer, or the program made a layer without the variant.
        call.arguments["spec"] = layer_specs(config)[-1]
    if config.transformer_impl != "local":
        return wrapped(*call.args, **call.kwargs)
    from ....attention.local_backend import local_spec_provider  # imports torch and the host

    del call.arguments["use_transformer_engine"]
    build = module.get_gpt_mtp_block_spec_for_backend
    return build(**call.arguments, backend=local_spec_provider())


def _selects_keys(layer_spec) -> bool:
    """Whether a layer has sparse attention with an indexer."""
    attention = layer_spec.submodules.self_attention
    core = getattr(getattr(attention, "submodules", None), "core_attention", None)
    return hasattr(getattr(core, "submodules", None), "indexer")
