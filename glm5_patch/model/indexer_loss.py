"""The loss that trains the indexer: KL(attention || indexer), as megatron-core 0.19 defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Rows, selected_keys, visible_keys
from .indexer import IndexerInputs, LightningIndexer
from .sparse_attention import block_logits, heads_first

_EPS = 1e-10


def indexer_loss(
    indexer: LightningIndexer,
    inputs: IndexerInputs,
    query: Tensor,
    key: Tensor,
    topk_indices: Tensor,
    rows: Rows,
    *,
    softmax_scale: float,
    coefficient: float,
    sparse: bool,
    per_token: bool,
) -> Tensor:
    """Scaled KL divergence of the indexer's distribution from the attention's, a scalar.

    The target is the attention probability summed over all heads of all tensor-parallel ranks and
    normalised; no gradient flows into it. DeepSeek-V3.2-Exp, section 2.1.

    Args:
        indexer: whose parameters the loss trains.
        inputs: the indexer's projections, with their graph.
        query: [s, b, n, d] of this rank's heads.
        key: [t, b, n, d].
        topk_indices: int32 [b, s, k].
        rows: where the queries stand among the keys.
        softmax_scale: of the attention.
        coefficient: ``dsa_indexer_loss_coeff``.
        sparse: both distributions over the selected keys only, not over all visible ones.
        per_token: the sum over the rows instead of their mean (``calculate_per_token_loss``).
    """
    s, b = query.shape[:2]
    scale = coefficient if per_token else coefficient / (s * b)
    return _IndexerLoss.apply(
        indexer, *inputs, query, key, topk_indices, rows, softmax_scale, scale, sparse
    )


class _IndexerLoss(torch.autograd.Function):
    """The loss is a scalar, so its gradients are found block by block in the forward pass and
    only scaled in the backward: one pass, and nothing of size s x s outlives its block."""

    @staticmethod
    def forward(
        ctx,
        indexer,
        index_query,
        index_key,
        weights,
        query,
        key,
        topk_indices,
        rows,
        softmax_scale,
        scale,
        sparse,
    ):
        q, k = heads_first(query), heads_first(key)
        leaves = [t.detach().requires_grad_() for t in (index_query, index_key, weights)]
        inputs = IndexerInputs(*leaves)
        grads = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
        total = torch.zeros((), dtype=torch.float32, device=query.device)
        for block in indexer.blocks(inputs):
            visible = visible_keys(block, rows)[None]
            valid = selected_keys(block, rows, topk_indices) & visible if sparse else visible
            valid = valid.expand(query.shape[1], -1, -1)
            target = _target(
                q[:, :, block], k[:, :, : rows.end(block)], valid, softmax_scale, indexer
            )
            with torch.enable_grad():
                scores = indexer.block_scores(inputs, block, rows.end(block))
                loss = _kl(target, scores, valid) * scale
            for grad, part in zip(grads, torch.autograd.grad(loss, leaves)):
                grad += part
            total += loss.detach()
        ctx.save_for_backward(*(g.to(leaf.dtype) for g, leaf in zip(grads, leaves)))
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grads = (grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors)
        return (None, *grads, None, None, None, None, None, None, None)


def _target(q: Tensor, k: Tensor, valid: Tensor, softmax_scale: float, indexer) -> Tensor:
    """Attention probabilities of a block, averaged over all heads: [b, rows, end]."""
    target = block_logits(q, k, valid, softmax_scale).softmax(-1).sum(1)
    tp_group = indexer.pg_collection.tp
    if tp_group.size() > 1:
        torch.distributed.all_reduce(target, group=tp_group)
    return target / target.sum(-1, keepdim=True).clamp_min(_EPS)


def _kl(target: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Sum over the rows of KL(target || softmax(scores))."""
    log_predicted = scores.masked_fill(~valid, float("-inf")).log_softmax(-1)
    log_predicted = log_predicted.masked_fill(~valid, 0.0)
    return (target * (target.clamp_min(_EPS).log() - log_predicted)).sum()
