"""A GLM-5 in the terms of megatron-core's ``HybridModel``, which numbers layers across kinds.

Attention and MLP are layers of their own there: decoder layer n of a GLM-5 is the layers 2 n - 1
(sparse attention) and 2 n (MLP or MoE).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .huggingface import HFConfig
from .schedule import MEGATRON_DEFAULT_OFFSET, NO_ATTENTION

ATTENTION, MLP, MOE = "D", "-", "E"
"""The letters of ``hybrid_layer_pattern``."""


def layer_pattern(hf: HFConfig, sizes: Sequence[int] = (), mtp_layers: int = 0) -> str:
    """The value of ``--hybrid-layer-pattern``.

    Args:
        hf: the published configuration.
        sizes: decoder layers of each pipeline chunk, in the order of the forward pass; none: one
            chunk.
        mtp_layers: depths of multi-token prediction.
    """
    layers = [ATTENTION + (MOE if is_moe else MLP) for is_moe in hf.moe_layers]
    chunks, first = [], 0
    for size in sizes or [len(layers)]:
        chunks.append("".join(layers[first : first + size]))
        first += size
    return "/".join(["|".join(chunks), *[ATTENTION + MOE] * mtp_layers])


def hybrid_kwargs(hf: HFConfig) -> dict[str, Any]:
    """The arguments of ``MLATransformerConfig`` that describe this model as a ``HybridModel``.

    As ``HFConfig.megatron_kwargs``, but for what counts layers.
    """
    return {
        **hf.megatron_kwargs(),
        "num_layers": 2 * hf.num_hidden_layers,
        "moe_layer_freq": [kind for is_moe in hf.moe_layers for kind in (0, is_moe)],
        "dsa_indexer_types": [kind for own in hf.schedule.types for kind in (own, NO_ATTENTION)],
        "dsa_indexer_topk_freq": 1,
        "dsa_indexer_skip_topk_offset": MEGATRON_DEFAULT_OFFSET,
    }
