"""The loss that trains the indexer: KL(attention || indexer), as megatron-core 0.19 defines it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..index_topk.reference import IndexerInputs, index_scores_of, score_windows
from ..query_positions import sequences
from ..registry import backend
from ..sparse_attention.inputs import AttentionInputs
from ..sparse_attention.reference import keys_and_values, window_logits

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
    """The loss is a scalar, so its gradients are found window by window in the forward pass and
    only scaled in the backward: one pass, and nothing of size s x s outlives its window."""

    @staticmethod
    def forward(ctx, index_query, index_key, weights, key, attention, settings):
        query, topk_indices = attention.query, attention.topk_indices
        leaves = index_query, index_key, weights
        grads = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
        inputs = IndexerInputs(*(leaf.detach() for leaf in leaves))
        total = torch.zeros((), dtype=torch.float32, device=query.device)
        for window in score_windows(inputs, attention.queries):
            for batch in sequences(query.shape[1], query.device):
                valid = window.visible[None]
                if settings.sparse:
                    chosen = None if topk_indices is None else topk_indices[batch]
                    valid = window.selected(chosen) & valid
                q, k = window.of_queries(query[:, batch]), window.of_keys(key[:, batch])
                valid = valid.expand(q.shape[1], -1, -1)  # [b, size, width]
                target = _target(q, k, valid, attention.softmax_scale, settings)
                parts = [
                    window.of_queries(inputs.query[:, batch]),
                    window.of_keys(inputs.key[:, batch]),
                    window.of_queries(inputs.weights[:, batch]),
                ]
                with torch.enable_grad():
                    parts = [part.requires_grad_() for part in parts]
                    scores = index_scores_of(*parts, settings.index_scale)
                    loss = _kl(target, scores, valid).sum() * settings.loss_scale
                d_query, d_key, d_weights = torch.autograd.grad(loss, parts)
                grads[0][window.rows, batch] += d_query[window.slots]
                seen = window.keys.stop - window.keys.start
                grads[1][window.keys, batch] += d_key[:seen]
                grads[2][window.rows, batch] += d_weights[window.slots]
                total += loss.detach()
        ctx.save_for_backward(*(g.to(leaf.dtype) for g, leaf in zip(grads, leaves)))
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grads = (grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None)


def _target(query: Tensor, key: Tensor, valid: Tensor, softmax_scale: float, settings) -> Tensor:
    """Attention probabilities of a window, averaged over all heads: [b, size, width].

    Args:
        query: [size, b, n, d].
        key: [width, b, n, d].
        valid: bool [b, size, width].
        softmax_scale: factor of the logits.
        settings: of the loss.
    """
    logits = window_logits(query, key, valid, softmax_scale)
    # A place without a query has no valid key: exp(-inf + inf) would be nan.
    target = logits.softmax(-1).nan_to_num_(0.0).sum(1)
    sum_over_ranks(target, settings.tp_group)
    return target / target.sum(-1, keepdim=True).clamp_min(EPSILON)


def sum_over_ranks(target: Tensor, tp_group: ProcessGroup | None) -> None:
    """Add up, in place, what the heads of each tensor-parallel rank attend to."""
    if tp_group is not None and tp_group.size() > 1:
        torch.distributed.all_reduce(target, group=tp_group)


def _kl(target: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """KL(target || softmax(scores)) of each row; all [..., t]."""
    none = ~valid.any(-1, keepdim=True)
    log_predicted = scores.masked_fill(~valid & ~none, float("-inf")).log_softmax(-1)
    log_predicted = log_predicted.masked_fill(~valid, 0.0)
    return (target * (target.clamp_min(EPSILON).log() - log_predicted)).sum(-1)
