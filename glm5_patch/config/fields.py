"""GLM-5's settings of a ``TransformerConfig``, by megatron-core 0.19's names where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .schedule import MEGATRON_DEFAULT_OFFSET

ZIGZAG, CONTIGUOUS = CONTEXT_PARALLEL_ORDERS = ("zigzag", "contiguous")
"""Which tokens a rank of context parallelism holds. zigzag is megatron-core's own: the whole, or in
a pack each document, is cut into ``2 * size`` chunks, and rank r holds chunk r and chunk
``2 * size - 1 - r``, so that all ranks see equally many keys. contiguous: rank r holds the r-th of
``size`` equal parts of the whole, wherever documents end."""


@dataclass
class GLM5Fields:
    """The fields, with GLM-5's values as defaults; a host that has one keeps its own default."""

    dsa_indexer_topk_freq: int = 1
    """Every freq-th layer computes its top-k, the others reuse it."""
    dsa_indexer_skip_topk_offset: int = MEGATRON_DEFAULT_OFFSET
    """The first layers, that many but at least one, all compute."""
    dsa_indexer_types: list[str] | str | None = None
    """'full' or 'shared' for each layer, or a string of F and S; beats freq and offset."""
    dsa_indexer_rope_interleaved: bool = True
    """The indexer's rope pairs (0, 1), (2, 3), ... and not the two halves."""
    dsa_indexer_rotate_activation: bool = False
    """Hadamard rotation of the indexer's query and key, as in DeepSeek-V3.2."""
    dsa_indexer_k_norm_epsilon: float | None = 1e-6
    """Epsilon of the indexer's k_norm; None: layernorm_epsilon."""
    dsa_context_parallel_order: str = ZIGZAG
    """One of ``CONTEXT_PARALLEL_ORDERS``: how the batch was cut."""
    dsa_index_topk_freq: int | None = None
    """Another spelling of dsa_indexer_topk_freq."""
    dsa_index_skip_topk_offset: int | None = None
    """Another spelling of dsa_indexer_skip_topk_offset."""


ALIASES = {
    "dsa_index_topk_freq": "dsa_indexer_topk_freq",
    "dsa_index_skip_topk_offset": "dsa_indexer_skip_topk_offset",
}


def is_dsa(config: Any) -> bool:
    """Whether a Megatron configuration is of a model with DeepSeek sparse attention."""
    return getattr(config, "experimental_attention_variant", None) == "dsa"
