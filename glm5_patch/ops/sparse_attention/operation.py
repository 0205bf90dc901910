"""Sparse attention over the key-value latent of multi-latent attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..query_positions import QueryPositions
from ..registry import use_triton
from .reference import sparse_attention


class MLADims(NamedTuple):
    """Widths of one head, and of the latent that all heads share."""

    latent: int
    """``kv_lora_rank``."""
    nope: int
    """``qk_head_dim``: the part of a query without rotary position."""
    rope: int
    """``qk_pos_emb_head_dim``."""
    value: int
    """``v_head_dim``."""

    @classmethod
    def of(cls, config) -> MLADims:
        return cls(
            config.kv_lora_rank, config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
        )


def sparse_mla(
    query: Tensor,
    latent: Tensor,
    up: Tensor,
    topk_indices: Tensor | None,
    queries: QueryPositions,
    dims: MLADims,
    softmax_scale: float,
) -> Tensor:
    """Softmax attention of each query over the keys that its top-k names.

    Args:
        query: [s, b, n, nope + rope].
        latent: [t, b, 1, latent + rope]; t is s, or more under context parallelism.
        up: makes keys and values of the latent, [latent, n * (nope + value)].
        topk_indices: int32 [b, s, k], see ``blocks.selected_keys``, with every visible key of a
            query that has no more than k; None: every visible key of all queries.
        queries: where the queries stand among the keys.
        dims: widths.
        softmax_scale: factor of the logits.

    Returns:
        [s, b, n * value], of the query's dtype. A query without any key gets zeros.
    """
    causal = queries.is_one_sequence and (
        topk_indices is None or queries.all_fit(topk_indices.shape[-1])
    )
    widths = dict(kv_lora_rank=dims.latent, qk_pos_emb_head_dim=dims.rope)
    if not causal and use_triton(query, **widths):
        from .absorption import absorbed_attention  # imports triton

        if not queries.is_one_sequence:
            return absorbed_attention(query, latent, up, topk_indices, queries, dims, softmax_scale)
        # The first queries have no more keys than the top-k holds: dense attention is faster.
        k = topk_indices.shape[-1]
        first = _causal(query[:k], *keys_and_values(latent[:k], up, dims), softmax_scale)
        rest = (query[k:], latent, up, topk_indices[:, k:], queries.after(k), dims, softmax_scale)
        return torch.cat([first, absorbed_attention(*rest)])
    key, value = keys_and_values(latent, up, dims)
    if causal:
        return _causal(query, key, value, softmax_scale)
    return sparse_attention(query, key, value, topk_indices, queries, softmax_scale)


def keys_and_values(latent: Tensor, up: Tensor, dims: MLADims) -> tuple[Tensor, Tensor]:
    """Keys [t, b, n, nope + rope] and values [t, b, n, value] of every head."""
    compressed, rope = latent.squeeze(2).split([dims.latent, dims.rope], dim=-1)
    per_head = torch.matmul(compressed, up).unflatten(-1, (-1, dims.nope + dims.value))
    nope, value = per_head.split([dims.nope, dims.value], dim=-1)
    rope = rope.unsqueeze(2).expand(-1, -1, nope.shape[2], -1)
    return torch.cat([nope, rope], dim=-1), value


def _causal(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Tensor:
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale)
    return output.permute(2, 0, 1, 3).flatten(2)
