"""``GlmMoeDsaConfig`` read from a checkpoint: where config.json is spoilt, the weights decide."""

from __future__ import annotations

import os

from ...patching.patch import Finding, Patch


class GlmMoeDsaConfigWeights(Patch):
    id = "hf_config_weights"
    module = "transformers.models.glm_moe_dsa.configuration_glm_moe_dsa"
    attribute = "GlmMoeDsaConfig.from_dict"
    why = "A config.json saved by transformers 5.8 says that the rope width is 192, which is wrong."
    upstream = "none: the file is wrong, not its reader"
    remove_when = "no such file is in use"

    def needed(self, module) -> Finding:
        return Finding(True, "no release looks at the weights")

    def apply(self, module, seams) -> None:
        config_class = module.GlmMoeDsaConfig
        inherited = super(config_class, config_class)

        # AutoConfig comes in here and names the directory; it has read the file by another class.
        def from_dict(cls, config_dict, **kwargs):
            directory = kwargs.get("name_or_path")
            return inherited.from_dict.__func__(cls, _believe(config_dict, directory), **kwargs)

        # GlmMoeDsaConfig.from_pretrained and the models come in here.
        def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
            get = inherited.get_config_dict.__func__
            config_dict, rest = get(cls, pretrained_model_name_or_path, **kwargs)
            return _believe(config_dict, pretrained_model_name_or_path), rest

        for method in (from_dict, get_config_dict):
            seams.add(config_class, method.__name__, classmethod(method))

    def guards(self, config) -> bool:
        return False  # a Megatron configuration was made from it already, or not at all


def _believe(config_dict: dict, directory: str | os.PathLike | None) -> dict:
    """The weights, if ``directory`` is one that has any."""
    if directory is None or not os.path.isdir(directory):
        return config_dict
    from pathlib import Path

    from ...checkpoint.files import shapes_in  # here: `import torch` need not pay for it
    from ...config.huggingface import ROPE_WIDTH_TENSORS, HFConfig

    shapes = shapes_in(Path(directory), ROPE_WIDTH_TENSORS)
    return HFConfig(config_dict).agreeing_with(shapes, Path(directory) / "config.json").raw
