"""Sparse attention over the key-value latent of multi-latent attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..fallback import compute
from ..registry import choose
from .inputs import AttentionInputs
from .reference import keys_and_values


def sparse_attention(attention: AttentionInputs) -> Tensor:
    """Softmax attention of each query over the keys that its top-k names.

    Returns:
        [s, b, n * value], of the query's dtype. A query without any key gets zeros.

    Raises:
        GLM5PatchError: ``GLM5_PATCH_KERNELS`` asks for a backend that can't compute it.
    """
    queries, topk_indices = attention.queries, attention.topk_indices
    k = None if topk_indices is None else topk_indices.shape[-1]
    if queries.is_one_sequence and (k is None or queries.all_fit(k)):
        return _causal(attention)
    call = attention.call
    if queries.is_one_sequence and choose("sparse_attention", call).name != "torch":
        # The first queries have no more keys than the top-k holds: dense attention is faster.
        rest = compute("sparse_attention", call, attention.after(k))
        return torch.cat([_causal(attention.first(k)), rest])
    return compute("sparse_attention", call, attention)


def _causal(attention: AttentionInputs) -> Tensor:
    """Dense causal attention of one sequence, [s, b, n * value]."""
    key, value = keys_and_values(attention)
    # [s, b, n, d] -> [b, n, s, d]
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (attention.query, key, value))
    scale = attention.softmax_scale
    output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return output.permute(2, 0, 1, 3).flatten(2)
