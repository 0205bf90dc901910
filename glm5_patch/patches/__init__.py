"""The patches, in ``table``, and all that ``import torch`` needs to know of them: which imports
they wait for. Their files are read once such a module has been imported, or somebody asks."""

from __future__ import annotations

import pkgutil

from ..patching.machine import Machine

MODULES = (
    "megatron.core.transformer.transformer_config",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.experimental_attention_variant_module_specs",
    "megatron.core.transformer.multi_latent_attention",
    "megatron.core.transformer.experimental_attention_variant.absorbed_mla",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.moe.router",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.transformer_block",
    "megatron.core.models.common.embeddings.language_model_embedding",
    "megatron.core.models.hybrid.hybrid_block",
    "megatron.core.ssm.mamba_block",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.transformer.experimental_attention_variant.dsa",
    "megatron.core.tensor_parallel.random",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.distributed.data_parallel_base",
    "megatron.core.extensions.transformer_engine",
    "megatron.training.arguments",
    "megatron.training.checkpointing",
    "transformers.models.glm_moe_dsa.configuration_glm_moe_dsa",
    "megatron.bridge.models.glm_moe_dsa.glm5_bridge",
    "megatron.bridge.models.conversion.auto_bridge",
    "megatron.bridge.peft.utils",
    "mcore_bridge.model.gpts.glm_moe_dsa",
)
"""Every module that a patch changes."""

MACHINE = Machine(MODULES, lambda: pkgutil.resolve_name(f"{__name__}.table:PATCHES"))
"""The one of this process. The table goes by its name: patches ask the machine about others."""
