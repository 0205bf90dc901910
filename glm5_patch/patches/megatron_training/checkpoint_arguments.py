"""``load_args_from_checkpoint``: ``--use-checkpoint-args`` restores all that a GLM-5 is made of."""

from __future__ import annotations

from ...config.arguments import model_names
from ...patching.patch import Finding, Patch
from ..megatron_core.building.transformer_config import is_meant_as_glm5
from ..probes import strings_in
from .launcher import LauncherPatch


class CheckpointArguments(LauncherPatch, Patch):
    id = "checkpoint_arguments"
    module = "megatron.training.checkpointing"
    attribute = "load_args_from_checkpoint"
    why = "--use-checkpoint-args leaves out sparse attention and the index schedule: KeyError."
    upstream = "none"
    remove_when = "--use-checkpoint-args restores every field of TransformerConfig"

    def needed(self, module) -> Finding:
        left_out = {"experimental_attention_variant", "dsa_indexer_types"} - set(
            strings_in(module.load_args_from_checkpoint)
        )
        return Finding(bool(left_out), f"it restores no {', '.join(sorted(left_out))}")

    def apply(self, module, seams) -> None:
        seams.wrap(module, self.attribute, _load)


def _load(wrapped, instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    if isinstance(result, tuple):  # otherwise there is no checkpoint, or it has no arguments
        namespace, saved = result
        if is_meant_as_glm5(saved):
            _restore(namespace, saved)
    return result


def _restore(namespace, saved) -> None:
    for name in model_names():
        if not hasattr(saved, name):
            continue
        value = getattr(saved, name)
        # A checkpoint without an MTP layer can be trained on with one.
        if name != "mtp_num_layers" or value is not None:
            setattr(namespace, name, value)
