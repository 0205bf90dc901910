"""Which parameters of a GLM-5 train: an audit, and the phases of sparse-attention training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..errors import GLM5PatchError

PHASES = ("indexer_warmup", "joint", "frozen_indexer")
KINDS = ("indexer", "latent", "experts", "adapters", "rest")


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
    """Set ``requires_grad`` of every parameter; make the optimizer afterwards.

    Args:
        model: a Megatron model, or its chunks. If it has adapters, all else stays frozen.
        phase: ``indexer_warmup`` trains only the indexers, by their loss (DeepSeek-V3.2-Exp,
            section 2.1). ``joint`` trains everything. ``frozen_indexer`` trains everything except
            the indexers.

    Returns:
        The audit.

    Raises:
        GLM5PatchError: the phase is unknown, or it trains indexers and they have no loss.
    """
    if phase not in PHASES:
        raise GLM5PatchError(f"phase={phase!r} must be one of {', '.join(PHASES)}")
    chunks = model if isinstance(model, Sequence) else [model]
    coefficient = chunks[0].config.dsa_indexer_loss_coeff
    if phase != "frozen_indexer" and not coefficient:
        raise GLM5PatchError(
            f"phase={phase!r} trains the indexers, which get a gradient only from their loss, but "
            f"dsa_indexer_loss_coeff is {coefficient}; set it (to 0.001, for example), or use "
            "phase='frozen_indexer'"
        )
    adapted = any(kind_of(name) == "adapters" for name, _ in _parameters(model))
    for name, parameter in _parameters(model):
        of_indexer = ".indexer." in name
        if phase == "indexer_warmup":
            trains = of_indexer
        else:
            trains = of_indexer or not adapted or kind_of(name) == "adapters"
            trains &= not (of_indexer and phase == "frozen_indexer")
        parameter.requires_grad_(trains)
    return audit(model)


def _parameters(model) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for chunk in model if isinstance(model, Sequence) else [model]:
        yield from chunk.named_parameters()
