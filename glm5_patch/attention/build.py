"""A GLM-5 ``GPTModel`` from a Hugging Face configuration, through the host's public builders."""

from __future__ import annotations

from typing import Any

import torch

from ..config.fields import ALIASES
from ..config.huggingface import HFConfig
from ..config.hybrid import hybrid_kwargs
from ..errors import GLM5PatchError

_REPEATED = "mtp_use_repeated_layer"


def transformer_config(hf: HFConfig, *, hybrid: bool = False, **overrides: Any):
    """The ``MLATransformerConfig`` of a GLM-5 model.

    Args:
        hf: the published configuration.
        hybrid: for a ``HybridModel``, whose layers are numbered across kinds, and not a
            ``GPTModel``.
        overrides: any other field, such as parallelism, precision, recompute or
            ``transformer_impl``. They replace what the configuration says.

    Raises:
        GLM5PatchError: the host's class lacks a field of GLM-5, so the plugin is not active; or it
            can't apply an MTP layer several times.
    """
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    fields = hybrid_kwargs(hf) if hybrid else hf.megatron_kwargs()
    numbers = {"dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset", *ALIASES}
    if numbers & overrides.keys():
        fields["dsa_indexer_types"] = None  # a list would beat them
    try:
        return MLATransformerConfig(**{**fields, **overrides})
    except TypeError as error:
        if f"'{_REPEATED}'" in str(error):
            raise GLM5PatchError(
                f"{_REPEATED}={overrides[_REPEATED]}: this megatron-core applies each MTP layer "
                f"once; use 0.17 or later, or mtp_num_layers=1 without {_REPEATED}"
            ) from error
        unknown = [name for name in fields if f"'{name}'" in str(error)]
        if not unknown:
            raise
        raise GLM5PatchError(
            f"MLATransformerConfig has no field {unknown[0]}: the plugin is not active in this "
            "process; glm5-patch doctor says why"
        ) from error


def gpt_model(hf: HFConfig, config, *, pre_process: bool = True, post_process: bool = True):
    """The ``GPTModel`` of this rank, on the GPU if there is one.

    Args:
        hf: the published configuration.
        config: made by ``transformer_config``.
        pre_process: whether this pipeline stage has the embedding.
        post_process: whether this pipeline stage has the output layer.

    Raises:
        GLM5PatchError: Transformer Engine, a device or model parallelism is missing; the message
            names the field or the call that supplies it.
    """
    check_environment(config)
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


def check_environment(config) -> None:
    """Raises GLM5PatchError if a model of this configuration can't be built in this process."""
    from megatron.core import parallel_state

    if config.transformer_impl == "transformer_engine":
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError as error:
            raise GLM5PatchError(
                f"transformer_impl='transformer_engine' needs Transformer Engine ({error}); "
                "install it, or set transformer_impl='local'"
            ) from error
    if not parallel_state.model_parallel_is_initialized():
        raise GLM5PatchError(
            "model parallelism is not initialised: call parallel_state.initialize_model_parallel, "
            "or build the model inside glm5_patch.single_process"
        )
    if torch.cuda.is_available():
        return
    try:
        device = torch.cuda.current_device()  # megatron-core asks for it, whatever the device
    except (AssertionError, RuntimeError) as error:
        raise GLM5PatchError(
            f"no CUDA device ({str(error).splitlines()[0]}); on a CPU build and run the model "
            "inside glm5_patch.single_process('cpu')"
        ) from error
    if not config.use_cpu_initialization and device != torch.device("meta"):
        raise GLM5PatchError(
            "use_cpu_initialization=False needs a CUDA device; set use_cpu_initialization=True"
        )


def mtp_block_spec(config, spec, vp_stage: int | None = None):
    """Multi-token-prediction layers like the last decoder layer; None of a model without any.

    Args:
        config: ``mtp_num_layers`` of it counts.
        spec: of this stage's decoder layers.
        vp_stage: the virtual pipeline stage.
    """
    if not config.mtp_num_layers:
        return None
    from megatron.core.models.gpt import gpt_layer_specs

    from .local_backend import local_spec_provider

    if not spec.layer_specs:
        spec = _of_last_decoder_layer(config)
    if config.transformer_impl == "transformer_engine":
        return gpt_layer_specs.get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=True, vp_stage=vp_stage
        )
    return gpt_layer_specs.get_gpt_mtp_block_spec_for_backend(
        config, spec, backend=local_spec_provider(), vp_stage=vp_stage
    )


def _of_last_decoder_layer(config):
    """The layers of the last stage that has any: the first stages may end on a dense layer."""
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

    build = specs.get_transformer_block_with_experimental_attention_variant_spec
    stages = config.virtual_pipeline_model_parallel_size
    for vp_stage in reversed(range(stages)) if stages else (None,):
        for pp_rank in reversed(range(config.pipeline_model_parallel_size)):
            spec = build(config, vp_stage=vp_stage, pp_rank=pp_rank)
            if spec.layer_specs:
                return spec


HF_LATENT_NORM_EPSILON = 1e-6
"""What ``GlmMoeDsaAttention`` gives its latent norms, whatever ``rms_norm_eps`` says."""


def set_latent_norm_epsilon(model: torch.nn.Module, epsilon: float) -> None:
    """Set the epsilon of the norms of the query and key-value latents.

    The default is ``layernorm_epsilon``, which is ``rms_norm_eps`` in config.json, as in trainers
    and serving engines. Hugging Face uses 1e-6. The difference is negligible for latents of
    variance 1 and large for small ones.

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
