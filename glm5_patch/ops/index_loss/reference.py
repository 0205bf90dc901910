"""The loss that trains the indexer: KL(attention || indexer), as megatron-core 0.19 defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..index_topk.reference import IndexerInputs, index_scores, score_blocks
from ..query_positions import QueryPositions, selected_keys, visible_keys, visible_topk
from ..registry import LOSS_HEADS, use_triton
from ..sparse_attention.operation import MLADims, keys_and_values
from ..sparse_attention.reference import block_logits, heads_first

_EPS = 1e-10


def indexer_loss(
    inputs: IndexerInputs,
    query: Tensor,
    latent: Tensor,
    up: Tensor,
    topk_indices: Tensor | None,
    queries: QueryPositions,
    dims: MLADims,
    *,
    softmax_scale: float,
    index_scale: float,
    coefficient: float,
    sparse: bool,
    per_token: bool,
    tp_group=None,
) -> Tensor:
    """Scaled KL divergence of the indexer's distribution from the attention's, a scalar.

    The target is the attention probability summed over all heads of all tensor-parallel ranks and
    normalised; no gradient flows into it. DeepSeek-V3.2-Exp, section 2.1.

    Args:
        inputs: the indexer's projections, with the graph of the parameters that the loss trains.
        query, latent, up, topk_indices, queries, dims: as of ``sparse_mla``.
        softmax_scale: of the attention.
        index_scale: of the products of the indexer's queries and keys.
        coefficient: ``dsa_indexer_loss_coeff``.
        sparse: both distributions over the selected keys only, not over all visible ones.
        per_token: the sum over the rows instead of their mean (``calculate_per_token_loss``).
        tp_group: of the ranks that share the attention's heads out; None: one rank has all.
    """
    s, b = query.shape[:2]
    scale = coefficient if per_token else coefficient / (s * b)
    query, latent, up = query.detach(), latent.detach(), up.detach()
    if sparse and _fits_triton(inputs, query, dims):
        from .triton import attention_target, sparse_indexer_loss  # imports triton

        if topk_indices is None:
            topk_indices = visible_topk(queries, b).contiguous()
        target = attention_target(query, latent, up, topk_indices, queries, dims, softmax_scale)
        _sum_over_ranks(target, tp_group)
        return sparse_indexer_loss(inputs, target, topk_indices, queries, index_scale, scale)
    key, _ = keys_and_values(latent, up, dims)
    return _IndexerLoss.apply(
        *inputs,
        query,
        key,
        topk_indices,
        queries,
        softmax_scale,
        index_scale,
        scale,
        sparse,
        tp_group,
    )


def _fits_triton(inputs: IndexerInputs, query: Tensor, dims: MLADims) -> bool:
    heads = query.shape[2]
    index_heads, index_dim = inputs.query.shape[2:]
    return use_triton(
        query,
        kv_lora_rank=dims.latent,
        qk_pos_emb_head_dim=dims.rope,
        dsa_indexer_head_dim=index_dim,
        dsa_indexer_n_heads=index_heads,
    ) and (heads <= LOSS_HEADS and index_heads >= 16)


class _IndexerLoss(torch.autograd.Function):
    """The loss is a scalar, so its gradients are found block by block in the forward pass and
    only scaled in the backward: one pass, and nothing of size s x s outlives its block."""

    @staticmethod
    def forward(
        ctx,
        index_query,
        index_key,
        weights,
        query,
        key,
        topk_indices,
        queries,
        softmax_scale,
        index_scale,
        scale,
        sparse,
        tp_group,
    ):
        q, k = heads_first(query), heads_first(key)
        leaves = [t.detach().requires_grad_() for t in (index_query, index_key, weights)]
        inputs = IndexerInputs(*leaves)
        grads = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
        total = torch.zeros((), dtype=torch.float32, device=query.device)
        for block in score_blocks(inputs):
            visible = visible_keys(block, queries)[None]
            valid = selected_keys(block, queries, topk_indices) & visible if sparse else visible
            valid = valid.expand(query.shape[1], -1, -1)
            target = _target(
                q[:, :, block], k[:, :, : queries.end(block)], valid, softmax_scale, tp_group
            )
            with torch.enable_grad():
                scores = index_scores(inputs, block, queries.end(block), index_scale)
                loss = _kl(target, scores, valid) * scale
            for grad, part in zip(grads, torch.autograd.grad(loss, leaves)):
                grad += part
            total += loss.detach()
        ctx.save_for_backward(*(g.to(leaf.dtype) for g, leaf in zip(grads, leaves)))
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grads = (grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None, None, None, None, None, None)


def _target(q: Tensor, k: Tensor, valid: Tensor, softmax_scale: float, tp_group) -> Tensor:
    """Attention probabilities of a block, averaged over all heads: [b, rows, end]."""
    target = block_logits(q, k, valid, softmax_scale).softmax(-1).sum(1)
    _sum_over_ranks(target, tp_group)
    return target / target.sum(-1, keepdim=True).clamp_min(_EPS)


def _sum_over_ranks(target: Tensor, tp_group) -> None:
    """Add up, in place, what the heads of each tensor-parallel rank attend to."""
    if tp_group is not None and tp_group.size() > 1:
        torch.distributed.all_reduce(target, group=tp_group)


def _kl(target: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Sum over the rows of KL(target || softmax(scores))."""
    log_predicted = scores.masked_fill(~valid, float("-inf")).log_softmax(-1)
    log_predicted = log_predicted.masked_fill(~valid, 0.0)
    return (target * (target.clamp_min(_EPS).log() - log_predicted)).sum()
