"""The attention spec of a GLM-5 layer, made from the host's own DSA spec."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from ..config.arguments import CONFIG_ARGUMENT, check_arguments
from ..config.fields import CONTIGUOUS, WITHOUT_GRAPHS, captured_attention
from ..config.huggingface import HFConfig
from ..errors import GLM5PatchError
from .attention import CrossLayerDSAttention
from .indexer import LightningIndexer
from .mla import CrossLayerMLASelfAttention


def glm5_attention_spec(host_spec: ModuleSpec, config, backend) -> ModuleSpec:
    """The host's spec with what is wrong for GLM-5 put right.

    The latent norms are modules of their own, because the indexer's query input is the
    *normalised* latent; the core attention shares its top-k; the indexer is ours. Every other
    module stays the host's, of the host's backend.

    Raises:
        GLM5PatchError: the host's attention is none that ours could stand in for, or CUDA graphs
            would capture it.
    """
    captured = captured_attention(config)
    if captured is not None:
        raise GLM5PatchError(
            f"{captured} captures attention. Layers share their top-k, and recorded keys are "
            f"replayed, in Python, which a replayed graph skips: {WITHOUT_GRAPHS}"
        )
    known = {field.name for field in dataclasses.fields(MLASelfAttentionSubmodules)}
    given = _given_submodules(host_spec.submodules)
    if not known >= given.keys():
        raise GLM5PatchError(
            f"this megatron-core builds a DSA layer's attention as {host_spec.module.__name__}, "
            "which glm5-patch does not know; report it with `glm5-patch doctor`"
        )
    host = host_spec.submodules
    latent_norm = IdentityOp
    if config.qk_layernorm:
        rms_norm = config.normalization == "RMSNorm"
        latent_norm = backend.layer_norm(rms_norm=rms_norm, for_qk=True)
    indexer = host.core_attention.submodules.indexer
    submodules = dataclasses.replace(
        MLASelfAttentionSubmodules(**given),
        linear_q_up_proj=backend.column_parallel_linear(),
        linear_kv_up_proj=backend.column_parallel_linear(),
        q_layernorm=latent_norm,
        kv_layernorm=latent_norm,
        core_attention=ModuleSpec(
            module=CrossLayerDSAttention,
            submodules=dataclasses.replace(
                host.core_attention.submodules,
                indexer=ModuleSpec(module=LightningIndexer, submodules=indexer.submodules),
            ),
        ),
    )
    return ModuleSpec(
        module=CrossLayerMLASelfAttention,
        params=host_spec.params,
        submodules=submodules,
        metainfo={**host_spec.metainfo, "fuse_input_layernorm": False},
    )


def get_glm5_spec(args, config, vp_stage: int | None = None):
    """The layers of a GLM-5, for programs that take a spec function by its name.

    slime and miles do: ``--spec glm5_patch.attention.spec get_glm5_spec`` puts this package's
    attention in the place of theirs. What their command lines lack (the indexer, its schedule, the
    rope's type) is read from the config.json of ``args.hf_checkpoint``, or of ``--glm5-config``;
    what they have must agree with it. The settings are written into ``config``, from which the
    program builds the model. ``--allgather-cp`` means context parallelism in contiguous parts.

    Args:
        args: the program's namespace.
        config: its ``TransformerConfig``, made from ``args``.
        vp_stage: the virtual pipeline stage.

    Raises:
        GLM5PatchError: the command line contradicts the config.json; each flag is named.
    """
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

    directory = getattr(args, CONFIG_ARGUMENT, None) or args.hf_checkpoint
    hf = HFConfig.from_directory(directory)
    settings = {name: v for name, v in hf.megatron_kwargs().items() if _is_attention(name)}
    unset = {name: v for name, v in settings.items() if not _was_given(args, config, name)}
    check_arguments(SimpleNamespace(**{**vars(args), **unset}), hf, f"{directory}/config.json")
    if config.context_parallel_size > 1:
        settings["cp_comm_type"] = "allgather"
        if getattr(args, "allgather_cp", False):
            settings["dsa_context_parallel_order"] = CONTIGUOUS
    validated = dataclasses.replace(config, **settings)
    for name in settings:
        setattr(config, name, getattr(validated, name))
    build = specs.get_transformer_block_with_experimental_attention_variant_spec
    return build(config, vp_stage=vp_stage)


def _is_attention(name: str) -> bool:
    """Whether a program that has its own attention leaves this field of the configuration alone."""
    others = ("experimental_attention_variant", "rope_type", "apply_rope_fusion")
    return name.startswith("dsa_") or name in others


def _was_given(args, config, name: str) -> bool:
    """Whether an argument has another value than the configuration's default."""
    default = type(config).__dataclass_fields__[name].default
    return getattr(args, name, None) not in (None, default) and name.startswith("dsa_")


def _given_submodules(submodules) -> dict[str, Any]:
    """The modules that a spec names; megatron-core's dev branch has fields that it leaves unset."""
    values = (
        (field.name, getattr(submodules, field.name)) for field in dataclasses.fields(submodules)
    )
    return {name: value for name, value in values if value is not None}
