"""A GLM-5 as megatron-core's ``HybridModel``."""

from __future__ import annotations

import dataclasses

import torch

from ..config.huggingface import HFConfig
from ..config.hybrid import layer_pattern
from ..errors import GLM5PatchError
from .build import check_environment
from .local_backend import LocalNorm, local_spec_provider


def hybrid_model(
    hf: HFConfig,
    config,
    *,
    pattern: str | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
):
    """The ``HybridModel`` of this rank, on the GPU if there is one.

    Args:
        hf: the published configuration.
        config: made by ``transformer_config(hf, hybrid=True)``.
        pattern: ``hybrid_layer_pattern``, where it cuts the model into pipeline stages; see
            ``config.hybrid.layer_pattern``.
        pre_process: whether this pipeline stage has the embedding.
        post_process: whether this pipeline stage has the output layer.
        vp_stage: the virtual pipeline stage.

    Raises:
        GLM5PatchError: this megatron-core has no ``HybridModel``, or as of ``gpt_model``.
    """
    check_environment(config)
    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ModuleNotFoundError as error:
        raise GLM5PatchError(
            f"this megatron-core has no HybridModel ({error}); use 0.18 or later"
        ) from error

    model = HybridModel(
        config=config,
        hybrid_stack_spec=hybrid_stack_spec(config),
        vocab_size=hf.vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        hybrid_layer_pattern=pattern or layer_pattern(hf, mtp_layers=config.mtp_num_layers or 0),
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="none",
        vp_stage=vp_stage,
    )
    if not torch.cuda.is_available() or config.use_cpu_initialization:
        return model
    return model.cuda()


def hybrid_stack_spec(config):
    """The spec of the stack: the host's, or with ``transformer_impl='local'`` one like it.

    The host's ``dsa_layer`` becomes a GLM-5's when the stack is built (patch ``hybrid_carrier``).
    """
    from megatron.core.models.hybrid import hybrid_layer_specs

    if config.transformer_impl != "local":
        return hybrid_layer_specs.hybrid_stack_spec
    return _local_stack_spec(hybrid_layer_specs.hybrid_stack_spec.submodules, config)


def _local_stack_spec(host, config):
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionBlock,
        MultiTokenPredictionBlockSubmodules,
        get_mtp_layer_spec_for_backend,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    backend = local_spec_provider()

    class LocalHybridStack(HybridStack):
        """The host's final norm is Transformer Engine's."""

        def __init__(self, config, *args, post_layer_norm: bool = True, **kwargs) -> None:
            super().__init__(config, *args, post_layer_norm=False, **kwargs)
            if post_layer_norm and self.post_process:
                self.post_layer_norm = True
                self.final_norm = LocalNorm(
                    config, config.hidden_size, eps=config.layernorm_epsilon
                )

    def mlp_layer(host_layer, experts: int | None):
        return ModuleSpec(
            module=host_layer.module,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=LocalNorm,
                mlp=get_mlp_module_spec_for_backend(
                    backend, num_experts=experts, moe_grouped_gemm=config.moe_grouped_gemm
                ),
                mlp_bda=get_bias_dropout_add,
            ),
        )

    attention = dataclasses.replace(host.dsa_layer.submodules, input_layernorm=LocalNorm)
    mtp_layer = get_mtp_layer_spec_for_backend(mtp_model_layer_spec=None, backend=backend)
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(
            dsa_layer=dataclasses.replace(host.dsa_layer, submodules=attention),
            mlp_layer=mlp_layer(host.mlp_layer, None),
            moe_layer=mlp_layer(host.moe_layer, config.num_moe_experts),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[mtp_layer]),
            ),
        ),
    )
