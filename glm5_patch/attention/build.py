"""A GLM-5 ``GPTModel`` from a Hugging Face configuration, through the host's public builders."""

from __future__ import annotations

from typing import Any

import torch

from ..config.huggingface import HFConfig


def transformer_config(hf: HFConfig, **overrides: Any):
    """The ``MLATransformerConfig`` of a GLM-5 model.

    Args:
        hf: the published configuration.
        overrides: parallelism, precision, recompute, ``transformer_impl``, ...; they win.
    """
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    return MLATransformerConfig(**{**hf.megatron_kwargs(), **overrides})


def gpt_model(hf: HFConfig, config, *, pre_process: bool = True, post_process: bool = True):
    """The model of this rank, as a Megatron user builds it; needs initialised model parallelism."""
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.models.gpt.gpt_model import GPTModel

    spec = specs.get_transformer_block_with_experimental_attention_variant_spec(config)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=hf.vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="none",
        mtp_block_spec=mtp_block_spec(config, spec),
    )
    if not torch.cuda.is_available() or config.use_cpu_initialization:
        return model
    return model.cuda()


def mtp_block_spec(config, spec, vp_stage: int | None = None):
    """Multi-token-prediction layers like the last decoder layer; None of a model without any.

    Args:
        config: ``mtp_num_layers`` of it counts.
        spec: of this stage's decoder layers.
        vp_stage: the virtual pipeline stage.
    """
    if not config.mtp_num_layers:
        return None
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.models.gpt import gpt_layer_specs

    from .local_backend import local_spec_provider

    if not spec.layer_specs:  # as Megatron-LM does: the layer is that of another stage
        build = specs.get_transformer_block_with_experimental_attention_variant_spec
        spec = build(config, vp_stage=vp_stage, pp_rank=0)
    if config.transformer_impl == "transformer_engine":
        return gpt_layer_specs.get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=True, vp_stage=vp_stage
        )
    return gpt_layer_specs.get_gpt_mtp_block_spec_for_backend(
        config, spec, backend=local_spec_provider()(), vp_stage=vp_stage
    )


HF_LATENT_NORM_EPSILON = 1e-6
"""What ``GlmMoeDsaAttention`` gives its latent norms, whatever ``rms_norm_eps`` says."""


def set_latent_norm_epsilon(model: torch.nn.Module, epsilon: float) -> None:
    """Give the norms of the query and key-value latents an epsilon of their own.

    By default they have ``layernorm_epsilon``, the config.json's ``rms_norm_eps``, as every trainer
    and serving engine has it. Hugging Face alone has 1e-6 there. The difference is nothing for
    latents of variance 1 and large for small ones.

    Raises:
        ValueError: the model has no latent norms.
    """
    norms = [
        m for name, m in model.named_modules() if name.endswith(("q_layernorm", "kv_layernorm"))
    ]
    if not norms:
        raise ValueError("the model has no q_layernorm or kv_layernorm")
    for norm in norms:
        norm.eps = epsilon
