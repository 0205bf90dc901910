"""Attention over the selected keys, in blocks of queries: memory linear in the sequence length.

For one block the logits of all keys up to it are computed and the unselected ones masked; only the
log-sum-exp is kept, and the backward pass computes the probabilities again (FlashAttention,
arXiv 2205.14135, with an explicit mask). Accumulation is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..query_positions import QueryPositions, query_blocks, selected_keys


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    queries: QueryPositions,
    softmax_scale: float,
) -> Tensor:
    """Softmax attention of each query over the keys that its top-k names.

    Args:
        query: [s, b, n, d].
        key: [t, b, n, d]; t is s, or more under context parallelism.
        value: [t, b, n, dv].
        topk_indices: int32 [b, s, k], see ``blocks.selected_keys``.
        queries: where the queries stand among the keys.
        softmax_scale: factor of the logits.

    Returns:
        [s, b, n * dv], of the value's dtype. A query without any key gets zeros.
    """
    output = _SparseAttention.apply(query, key, value, topk_indices, queries, softmax_scale)
    return output.flatten(2)


def heads_first(tensor: Tensor) -> Tensor:
    """[s, b, n, d] -> fp32 [b, n, s, d]."""
    return tensor.permute(1, 2, 0, 3).float()


def block_logits(query: Tensor, key: Tensor, mask: Tensor, softmax_scale: float) -> Tensor:
    """Logits of one block, -inf where ``mask`` [b, rows, t] is False.

    Args:
        query: fp32 [b, n, rows, d].
        key: fp32 [b, n, t, d].
    """
    logits = torch.matmul(query, key.transpose(-1, -2)).mul_(softmax_scale)
    return logits.masked_fill_(~mask[:, None], float("-inf"))


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, topk_indices, queries, softmax_scale):
        s, b, n, _ = query.shape
        q, k, v = heads_first(query), heads_first(key), heads_first(value)
        out = torch.empty((b, n, s, v.shape[-1]), dtype=torch.float32, device=query.device)
        lse = torch.empty((b, n, s), dtype=torch.float32, device=query.device)
        for block in query_blocks(s, b * n * queries.keys * 4):
            end = queries.end(block)
            mask = selected_keys(block, queries, topk_indices)
            logits = block_logits(q[:, :, block], k[:, :, :end], mask, softmax_scale)
            # exp(-inf - 0) is 0 for a query without keys; exp(-inf + inf) would be nan.
            block_lse = logits.logsumexp(-1)
            block_lse.masked_fill_(block_lse == float("-inf"), 0.0)
            lse[:, :, block] = block_lse
            out[:, :, block] = logits.sub_(block_lse[..., None]).exp_() @ v[:, :, :end]
        output = out.permute(2, 0, 1, 3).to(value.dtype)
        ctx.save_for_backward(query, key, value, topk_indices, output, lse)
        ctx.queries, ctx.softmax_scale = queries, softmax_scale
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, topk_indices, output, lse = ctx.saved_tensors
        queries = ctx.queries
        s, b, n, _ = query.shape
        q, k, v = heads_first(query), heads_first(key), heads_first(value)
        d_out = heads_first(grad_output)
        # [b, n, s]: sum over the value dimension, the softmax backward's row term.
        delta = (d_out * heads_first(output)).sum(-1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in query_blocks(s, b * n * queries.keys * 4):
            end = queries.end(block)
            mask = selected_keys(block, queries, topk_indices)
            logits = block_logits(q[:, :, block], k[:, :, :end], mask, ctx.softmax_scale)
            probs = logits.sub_(lse[:, :, block, None]).exp_()
            dv[:, :, :end] += probs.transpose(-1, -2) @ d_out[:, :, block]
            d_probs = d_out[:, :, block] @ v[:, :, :end].transpose(-1, -2)
            d_logits = d_probs.sub_(delta[:, :, block, None]).mul_(probs).mul_(ctx.softmax_scale)
            dq[:, :, block] = d_logits @ k[:, :, :end]
            dk[:, :, :end] += d_logits.transpose(-1, -2) @ q[:, :, block]
        d_query, d_key, d_value = (
            grad.permute(2, 0, 1, 3).to(like.dtype)
            for grad, like in ((dq, query), (dk, key), (dv, value))
        )
        return d_query, d_key, d_value, None, None, None
