"""The loss that trains the indexer: KL(attention || indexer), as megatron-core 0.19 defines it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..index_topk.reference import IndexerInputs, block_scores, score_blocks
from ..query_positions import selected_keys, visible_keys
from ..registry import backend
from ..sparse_attention.inputs import AttentionInputs
from ..sparse_attention.reference import block_logits, heads_first, keys_and_values

EPSILON = 1e-10
"""Below it a probability counts as this."""


class LossSettings(NamedTuple):
    """What the loss depends on beside its inputs."""

    index_scale: float
    """Of the products of the indexer's queries and keys."""
    loss_scale: float
    """Of the sum over the queries."""
    sparse: bool
    """Both distributions over the selected keys only, not over all visible ones."""
    tp_group: ProcessGroup | None = None
    """The ranks that share the attention's heads out; None: one rank has all."""


@backend("index_loss", name="torch")
def index_loss(inputs: IndexerInputs, attention: AttentionInputs, settings: LossSettings) -> Tensor:
    """The sum over the queries of KL(attention || indexer), times ``loss_scale``: a scalar.

    Args:
        inputs: the indexer's projections, with the graph of the parameters that the loss trains.
        attention: the target; no gradient flows into it.
        settings: of the loss.
    """
    key, _ = keys_and_values(attention)
    return _IndexLoss.apply(*inputs, key, attention, settings)


class _IndexLoss(torch.autograd.Function):
    """The loss is a scalar, so its gradients are found block by block in the forward pass and
    only scaled in the backward: one pass, and nothing of size s x s outlives its block."""

    @staticmethod
    def forward(ctx, index_query, index_key, weights, key, attention, settings):
        query, queries, topk_indices = attention.query, attention.queries, attention.topk_indices
        q, k = heads_first(query), heads_first(key)
        leaves = [t.detach().requires_grad_() for t in (index_query, index_key, weights)]
        inputs = IndexerInputs(*leaves)
        grads = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
        total = torch.zeros((), dtype=torch.float32, device=query.device)
        for block in score_blocks(inputs):
            end = queries.end(block)
            valid = visible_keys(block, queries)[None]
            if settings.sparse:
                valid = selected_keys(block, queries, topk_indices) & valid
            valid = valid.expand(query.shape[1], -1, -1)
            target = _target(
                q[:, :, block], k[:, :, :end], valid, attention.softmax_scale, settings
            )
            with torch.enable_grad():
                scores = block_scores(inputs, block, end, settings.index_scale)
                loss = _kl(target, scores, valid) * settings.loss_scale
            for grad, part in zip(grads, torch.autograd.grad(loss, leaves)):
                grad += part
            total += loss.detach()
        ctx.save_for_backward(*(g.to(leaf.dtype) for g, leaf in zip(grads, leaves)))
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grads = (grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None)


def _target(q: Tensor, k: Tensor, valid: Tensor, softmax_scale: float, settings) -> Tensor:
    """Attention probabilities of a block, averaged over all heads: [b, block, end]."""
    target = block_logits(q, k, valid, softmax_scale).softmax(-1).sum(1)
    sum_over_ranks(target, settings.tp_group)
    return target / target.sum(-1, keepdim=True).clamp_min(EPSILON)


def sum_over_ranks(target: Tensor, tp_group: ProcessGroup | None) -> None:
    """Add up, in place, what the heads of each tensor-parallel rank attend to."""
    if tp_group is not None and tp_group.size() > 1:
        torch.distributed.all_reduce(target, group=tp_group)


def _kl(target: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Sum over the rows of KL(target || softmax(scores))."""
    log_predicted = scores.masked_fill(~valid, float("-inf")).log_softmax(-1)
    log_predicted = log_predicted.masked_fill(~valid, 0.0)
    return (target * (target.clamp_min(EPSILON).log() - log_predicted)).sum()
