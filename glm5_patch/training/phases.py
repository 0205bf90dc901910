"""Which parameters of a GLM-5 train: an audit, and the phases of sparse-attention training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..config.fields import DENSE_WARMUP, FROZEN_INDEXER, INDEXER_WARMUP, PHASE, why_not_phase
from ..errors import GLM5PatchError

KINDS = ("indexer", "latent", "experts", "adapters", "rest")


_BIAS_RATE = "_glm5_patch_moe_router_bias_update_rate"
"""Where a configuration keeps the rate that was asked for, while the trunk is frozen."""


class Share(NamedTuple):
    """The parameters of one kind on this rank."""

    kind: str
    trainable: int
    frozen: int
    """How many numbers, not tensors."""


def kind_of(name: str) -> str:
    """One of KINDS, by a parameter's name.

    ``latent`` is multi-latent attention: its projections and latent norms. An adapter on an indexer
    is of kind ``adapters`` too.
    """
    if ".adapter." in name or ".adapters." in name or ".lora_" in name:
        return "adapters"
    if ".indexer." in name:
        return "indexer"
    if ".self_attention." in name:
        return "latent"
    return "experts" if ".experts." in name else "rest"


def audit(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[Share]:
    """Count the trainable and frozen numbers of each kind that has parameters.

    Args:
        model: a Megatron model, or its chunks.
    """
    counts = {kind: {True: 0, False: 0} for kind in KINDS}
    for name, parameter in _parameters(model):
        counts[kind_of(name)][parameter.requires_grad] += parameter.numel()
    return [Share(kind, n[True], n[False]) for kind, n in counts.items() if any(n.values())]


def set_phase(model: torch.nn.Module | Sequence[torch.nn.Module], phase: str) -> list[Share]:
    """Set what trains and how it attends; make the optimizer afterwards.

    ``requires_grad`` of every parameter is set, and ``dsa_training_phase`` of the configuration. A
    training from a model with dense attention goes through these phases in order
    (DeepSeek-V3.2-Exp, section 2.1):

    - ``dense_warmup``: only the indexers train, by their loss over all visible keys. Every layer
      attends to all visible keys, and none selects.
    - ``indexer_warmup``: only the indexers train, and the attention is sparse. In both warm-ups the
      routers' biases stay as they are too.
    - ``joint``: everything trains, and the attention is sparse.
    - ``frozen_indexer``: everything except the indexers trains.

    Args:
        model: a Megatron model, or its chunks. If it has adapters, all else stays frozen.
        phase: one of these.

    Returns:
        The audit.

    Raises:
        GLM5PatchError: the phase is unknown, it trains indexers and they have no loss, or it is
            dense and the attention is megatron-core's own.
    """
    chunks = model if isinstance(model, Sequence) else [model]
    configs = {id(config): config for chunk in chunks for config in _configs(chunk)}.values()
    reason = why_not_phase(phase, chunks[0].config.dsa_indexer_loss_coeff)
    if reason:
        raise GLM5PatchError(f"phase={reason}")
    if phase == DENSE_WARMUP:
        _require_own_attention(chunks)
    adapted = any(kind_of(name) == "adapters" for name, _ in _parameters(model))
    for name, parameter in _parameters(model):
        of_indexer = ".indexer." in name
        if phase in (DENSE_WARMUP, INDEXER_WARMUP):
            trains = of_indexer
        else:
            trains = of_indexer or not adapted or kind_of(name) == "adapters"
            trains &= not (of_indexer and phase == FROZEN_INDEXER)
        parameter.requires_grad_(trains)
    for config in configs:
        setattr(config, PHASE, phase)
        _balance_experts(config, phase not in (DENSE_WARMUP, INDEXER_WARMUP))
    return audit(model)


def _balance_experts(config: Any, balances: bool) -> None:
    """Let the host move the routers' biases, which no gradient does, or keep them as they are."""
    rate = getattr(config, "moe_router_bias_update_rate", 0.0)
    asked = vars(config).setdefault(_BIAS_RATE, rate)
    config.moe_router_bias_update_rate = asked if balances else 0.0


def _configs(chunk: torch.nn.Module) -> Iterator[Any]:
    """Each configuration of a model's modules: MTP layers may have copies."""
    for module in chunk.modules():
        if hasattr(getattr(module, "config", None), "dsa_indexer_loss_coeff"):
            yield module.config


def _require_own_attention(chunks: Sequence[torch.nn.Module]) -> None:
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention

    for chunk in chunks:
        if any(isinstance(module, DSAttention) for module in chunk.modules()):
            raise GLM5PatchError(
                f"phase={DENSE_WARMUP!r}: megatron-core's own sparse attention is never dense; "
                "build the model with GLM5_PATCH_ATTENTION=plugin"
            )


def _parameters(model) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for chunk in model if isinstance(model, Sequence) else [model]:
        yield from chunk.named_parameters()
