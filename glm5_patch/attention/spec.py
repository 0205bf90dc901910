"""The attention spec of a GLM-5 layer, made from the host's own DSA spec."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

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
        GLM5PatchError: the host's attention is none that ours could stand in for.
    """
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


def _given_submodules(submodules) -> dict[str, Any]:
    """The modules that a spec names; megatron-core's dev branch has fields that it leaves unset."""
    values = (
        (field.name, getattr(submodules, field.name)) for field in dataclasses.fields(submodules)
    )
    return {name: value for name, value in values if value is not None}
