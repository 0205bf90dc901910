"""Stacks of GLM-5 layers, built as programs on top of megatron-core build them."""

from __future__ import annotations

import inspect

import pytest
import torch

from glm5_patch.attention.local_backend import LocalNorm, local_spec_provider
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.patching.imports import is_there
from glm5_patch.tools.verify import randomize
from tests.tiny import hf_config, megatron_config

LAYERS = 8
MODES = {
    "uniform_1": dict(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    ),
    "block_3": dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=3),
    "core_attn": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
}


def config(**overrides):
    """Of a GLM-5.2 with eight layers, four of which compute their top-k."""
    return megatron_config(HFConfig(hf_config().to_dict()), **overrides)


def layer_spec(config, core_attention=None, without_norm=None):
    """A layer of attention alone.

    Args:
        config: of the model.
        core_attention: a class in the place of that of the spec.
        without_norm: which norm of a latent is left out.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    attention = specs.get_experimental_attention_variant_module_spec(
        config=config, backend=local_spec_provider()
    )
    if core_attention is not None:
        attention.submodules.core_attention.module = core_attention
    if without_norm is not None:
        from megatron.core.transformer.identity_op import IdentityOp

        setattr(attention.submodules, without_norm, IdentityOp)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LocalNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
        ),
    )


def randomized(model):
    torch.manual_seed(0)
    randomize(model)
    return model


def block(config, block_class=None, **spec):
    """A ``TransformerBlock``, or a client's subclass of it."""
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        TransformerBlockSubmodules,
    )

    layers = [layer_spec(config, **spec)] * LAYERS
    block_class = block_class or TransformerBlock
    built = block_class(config, TransformerBlockSubmodules(layers), post_layer_norm=False)
    return randomized(built)


def hybrid_stage(config, first: int, last: int):
    """What a pipeline stage has of a ``HybridStack``: the layers of these numbers."""
    if not is_there("megatron.core.models.hybrid.hybrid_block"):
        pytest.skip("a MambaStack takes its layers from the pipeline's process groups")
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.process_groups_config import ProcessGroupCollection

    return HybridStack(
        config,
        HybridStackSubmodules(dsa_layer=layer_spec(config)),
        pre_process=first == 1,
        layer_type_list=["D"] * (last - first + 1),
        pp_layer_offset=first - 1,
        post_layer_norm=False,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def glm5_stage(first: int, last: int, **overrides):
    """What a pipeline stage has of a GLM-5's ``HybridModel``: these of its 16 layers."""
    if not is_there("megatron.core.models.hybrid.hybrid_block"):
        pytest.skip("no HybridModel before megatron-core 0.18")
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from glm5_patch.attention.hybrid import hybrid_stack_spec
    from glm5_patch.config.hybrid import layer_pattern

    hf = HFConfig(hf_config().to_dict())
    config = megatron_config(hf, hybrid=True, **overrides)
    stage = build_module(
        hybrid_stack_spec(config),
        config,
        pre_process=first == 1,
        layer_type_list=list(layer_pattern(hf)[first - 1 : last]),
        pp_layer_offset=first - 1,
        post_layer_norm=False,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return randomized(stage)


def hybrid_stack(config, **spec):
    """``HybridStack``, or what it was called before megatron-core 0.18."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    kwargs = dict(
        post_layer_norm=False, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    if is_there("megatron.core.models.hybrid.hybrid_block"):
        from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules

        submodules = HybridStackSubmodules(dsa_layer=layer_spec(config, **spec))
        return randomized(HybridStack(config, submodules, layer_type_list=["D"] * LAYERS, **kwargs))
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules

    submodules = MambaStackSubmodules(attention_layer=layer_spec(config, **spec))
    if "layer_type_list" in inspect.signature(MambaStack.__init__).parameters:
        pytest.skip("MambaStack of megatron-core 0.17 hands MLA an argument that MLA refuses")
    stack = MambaStack(config, submodules, hybrid_override_pattern="*" * LAYERS, **kwargs)
    return randomized(stack)


def causal_mask(length: int) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)


def outputs(stack, mask):
    """Of two microbatches of different data, forward before either backward."""
    made = []
    for seed in (1, 2):
        hidden = torch.randn(48, 2, 64, generator=torch.Generator().manual_seed(seed))
        made.append(stack(hidden.requires_grad_(), mask))
    return made


def gradients(stack, mask=None) -> torch.Tensor:
    """Of both microbatches, in one vector."""
    stack.train().zero_grad()
    losses = [output.pow(2).sum() for output in outputs(stack, mask)]
    for loss in losses:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in stack.parameters() if p.grad is not None])
