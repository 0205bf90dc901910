"""The patches, in ``table``, and all that ``import torch`` needs to know of them: which imports
they wait for. Their files are read once such a module has been imported, or somebody asks."""

from __future__ import annotations

MODULES = (
    "megatron.core.transformer.transformer_config",
    "megatron.core.models.gpt.experimental_attention_variant_module_specs",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.moe.router",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.experimental_attention_variant.dsa",
    "megatron.core.tensor_parallel.random",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.extensions.transformer_engine",
    "transformers.models.glm_moe_dsa.configuration_glm_moe_dsa",
    "megatron.bridge.models.glm_moe_dsa.glm5_bridge",
    "megatron.bridge.models.conversion.auto_bridge",
    "megatron.bridge.peft.utils",
)
"""Every module that a patch changes."""


def __getattr__(name: str):
    if name == "PATCHES":
        from .table import PATCHES

        return PATCHES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
