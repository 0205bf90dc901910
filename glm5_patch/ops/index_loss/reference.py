"""The loss that trains the indexer: KL(attention || indexer), as megatron-core 0.19 defines it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..index_topk.reference import IndexerInputs, index_scores_of, score_windows
from ..query_positions import QueryPositions, Window, sequences, windows
from ..registry import backend
from ..sparse_attention.inputs import AbsorbedInputs, AttentionInputs
from ..sparse_attention.reference import (
    gathered,
    gathered_blocks,
    keys_and_values,
    log2_logits,
    window_logits,
)

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


class SelectedKeys(NamedTuple):
    """The keys that the queries of a layer attend to."""

    topk_indices: Tensor
    """int32 [b, s, k], see ``selected_keys``."""
    queries: QueryPositions
    """Where the queries stand among the keys."""


@backend("index_loss", name="torch")
def index_loss(inputs: IndexerInputs, attention: AttentionInputs, settings: LossSettings) -> Tensor:
    """The sum over the queries of KL(attention || indexer), times ``loss_scale``: a scalar.

    Args:
        inputs: the indexer's projections, with the graph of the parameters that the loss trains.
        attention: the target; no gradient flows into it.
        settings: of the loss.
    """
    key, _ = keys_and_values(attention)
    selected = attention.topk_indices if settings.sparse else None

    def target(window: Window, batch: slice, valid: Tensor) -> Tensor:
        q, k = window.of_queries(attention.query[:, batch]), window.of_keys(key[:, batch])
        return _target(q, k, valid, attention.softmax_scale, settings.tp_group)

    return _IndexLoss.apply(*inputs, target, selected, attention.queries, settings)


@backend("index_loss.target", name="torch")
def attention_target(attention: AttentionInputs, tp_group: ProcessGroup | None) -> Tensor:
    """Attention probabilities averaged over all heads, of the selected keys.

    Args:
        attention: with a top-k.
        tp_group: of the ranks that share the heads out; None: one rank has all.

    Returns:
        fp32 [b, s, k], 0 in places without a key.
    """
    query, topk_indices = attention.query, attention.topk_indices
    key, _ = keys_and_values(attention)
    found = torch.zeros(topk_indices.shape, dtype=torch.float32, device=query.device)
    for window in windows(attention.queries, query.shape[2] * 4):
        for batch in sequences(query.shape[1], query.device):
            q, k = window.of_queries(query[:, batch]), window.of_keys(key[:, batch])
            valid = window.selected(topk_indices[batch])
            target = _target(q, k, valid, attention.softmax_scale, tp_group)
            chosen = topk_indices[batch].index_select(1, window.rows).long()  # [b, rows, k]
            probs = target[:, window.slots].gather(-1, chosen.clamp_min(0))
            found[batch, window.rows] = probs.masked_fill(chosen < 0, 0.0)
    return found


@torch.no_grad()
def attention_mass(
    attention: AttentionInputs, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The share of each query's attention over all visible keys, averaged over all heads, that its
    selected keys have; and the most that so many keys could have. Both fp32 [b, s].

    Args:
        attention: of one layer.
        tp_group: of the ranks that share the heads out; None: one rank has all.
    """
    query, topk_indices = attention.query, attention.topk_indices
    s, b = query.shape[:2]
    kept = torch.ones((b, s), dtype=torch.float32, device=query.device)
    best = kept.clone()
    if topk_indices is None:
        return kept, best
    key, _ = keys_and_values(attention)
    for window in windows(attention.queries, query.shape[2] * 4):
        for batch in sequences(b, query.device):
            q, k = window.of_queries(query[:, batch]), window.of_keys(key[:, batch])
            visible = window.visible.expand(q.shape[1], -1, -1)
            probs = _target(q, k, visible, attention.softmax_scale, tp_group)  # [b, size, width]
            count = min(topk_indices.shape[-1], window.width)
            most = probs.topk(count, sorted=False)[0].sum(-1)
            probs = probs.masked_fill_(~window.selected(topk_indices[batch]), 0.0).sum(-1)
            kept[batch, window.rows] = probs[:, window.slots]
            best[batch, window.rows] = most[:, window.slots]
    return kept, best


@backend("index_loss.head_sums", name="torch")
def head_sums(absorbed: AbsorbedInputs, lse: Tensor | None) -> Tensor:
    """Attention probabilities of absorbed queries over the selected keys, summed over the heads.

    Args:
        absorbed: what the attention is computed from.
        lse: see ``AttentionInputs.lse``; not read here.

    Returns:
        fp32 [b, s, k], 0 in places without a key.
    """
    sums = torch.zeros_like(absorbed.topk_indices, dtype=torch.float32)
    for block in gathered_blocks(absorbed):
        _, latent, valid = gathered(absorbed, block)
        logits = log2_logits(absorbed, block, latent, valid) * math.log(2)  # [block, b, n, k]
        # A query without keys has no logit but -inf.
        sums[:, block] = logits.softmax(-1).nan_to_num_(0.0).sum(2).transpose(0, 1)
    return sums


@backend("index_loss.of_target", name="torch")
def loss_of_target(
    inputs: IndexerInputs, keys: SelectedKeys, target: Tensor, settings: LossSettings
) -> Tensor:
    """As ``index_loss`` over the selected keys, with a target that is there already.

    Args:
        inputs: the indexer's projections.
        keys: the keys that the target is of.
        target: fp32 [b, s, k], as of ``attention_target``.
        settings: of the loss.
    """
    topk_indices, queries = keys

    def in_window(window: Window, batch: slice, valid: Tensor) -> Tensor:
        chosen = topk_indices[batch].index_select(1, window.rows).long()  # [b, rows, k]
        columns = torch.where(chosen < 0, window.width, chosen)  # one more takes the empty places
        rows = target.new_zeros((len(chosen), len(window.rows), window.width + 1))
        rows.scatter_(-1, columns, target[batch].index_select(1, window.rows))
        placed = target.new_zeros(valid.shape)
        placed[:, window.slots] = rows[..., : window.width]
        return placed

    return _IndexLoss.apply(*inputs, in_window, topk_indices, queries, settings)


class _IndexLoss(torch.autograd.Function):
    """The loss is a scalar, so its gradients are found window by window in the forward pass and
    only scaled in the backward: one pass, and nothing of size s x s outlives its window."""

    @staticmethod
    def forward(
        ctx,
        index_query: Tensor,
        index_key: Tensor,
        weights: Tensor,
        target: Callable[[Window, slice, Tensor], Tensor],
        topk_indices: Tensor | None,
        queries: QueryPositions,
        settings: LossSettings,
    ):
        b, device = index_query.shape[1], index_query.device
        leaves = index_query, index_key, weights
        grads = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
        inputs = IndexerInputs(*(leaf.detach() for leaf in leaves))
        total = torch.zeros((), dtype=torch.float32, device=device)
        for window in score_windows(inputs, queries):
            for batch in sequences(b, device):
                chosen = None if topk_indices is None else topk_indices[batch]
                valid = window.selected(chosen) & window.visible[None]
                valid = valid.expand(len(range(b)[batch]), -1, -1)  # [b, size, width]
                parts = [
                    window.of_queries(inputs.query[:, batch]),
                    window.of_keys(inputs.key[:, batch]),
                    window.of_queries(inputs.weights[:, batch]),
                ]
                probabilities = target(window, batch, valid)
                with torch.enable_grad():
                    parts = [part.requires_grad_() for part in parts]
                    scores = index_scores_of(*parts, settings.index_scale)
                    loss = _kl(probabilities, scores, valid).sum() * settings.loss_scale
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
        return (*grads, None, None, None, None)


def _target(
    query: Tensor,
    key: Tensor,
    valid: Tensor,
    softmax_scale: float,
    tp_group: ProcessGroup | None,
) -> Tensor:
    """Attention probabilities of a window, averaged over all heads: [b, size, width].

    Args:
        query: [size, b, n, d].
        key: [width, b, n, d].
        valid: bool [b, size, width].
        softmax_scale: factor of the logits.
        tp_group: of the ranks that share the heads out.
    """
    logits = window_logits(query, key, valid, softmax_scale)
    # A place without a query has no valid key: exp(-inf + inf) would be nan.
    target = logits.softmax(-1).nan_to_num_(0.0).sum(1)
    sum_over_ranks(target, tp_group)
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
