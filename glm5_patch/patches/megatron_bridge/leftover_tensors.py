"""``AutoBridge.save_hf_weights``: a checkpoint with tensors that its model does not have."""

from __future__ import annotations

import functools

from ...patching.patch import Finding, Patch, argument


class LeftoverTensors(Patch):
    id = "bridge_leftovers"
    module = "megatron.bridge.models.conversion.auto_bridge"
    attribute = "AutoBridge.save_hf_weights"
    why = "A file is not written if the model lacks one of its tensors (MTP, a skip layer's wq_b)."
    upstream = "Megatron-Bridge 0.6.0 leaves out the MTP layer"
    remove_when = "Bridge writes every tensor of the model, also if the source has more"
    on_request = True

    def needed(self, module) -> Finding:
        return Finding(True, "a file is written once every tensor of its source has come")

    def apply(self, module, seams) -> None:
        seams.wrap(module.AutoBridge, "save_hf_weights", _save, reads=("model",))


def _save(wrapped, instance, args, kwargs):
    from ...checkpoint.bridge_report import refuse_saving_beside_float8, report

    config = getattr(instance.hf_pretrained, "config", None)  # it may be a configuration itself
    source = getattr(getattr(instance.hf_pretrained, "state", None), "source", None)
    is_glm5 = getattr(config, "model_type", None) == "glm_moe_dsa"
    if not is_glm5 or not hasattr(source, "save_generator"):
        return wrapped(*args, **kwargs)
    refuse_saving_beside_float8(instance.hf_pretrained)
    survey = report(instance, argument(wrapped, args, kwargs, "model"))
    leftover = (*survey.mtp, *survey.dropped, *survey.unexpected)
    save = source.save_generator

    @functools.wraps(save)
    def save_generator(*args, ignored_source_key_prefixes=None, **kwargs):
        ignored = (*(ignored_source_key_prefixes or ()), *leftover)
        return save(*args, ignored_source_key_prefixes=ignored, **kwargs)

    source.save_generator = save_generator
    try:
        return wrapped(*args, **kwargs)
    finally:
        del source.save_generator
