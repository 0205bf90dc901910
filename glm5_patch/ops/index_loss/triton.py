"""The indexer's loss over the selected keys in Triton, with its gradients, in one pass over them.

Nothing larger than the top-k itself is kept: the attention's probabilities summed over the heads,
and the index scores, are [b, s, k]. The kernels are imported inside the functions: they need
triton, this record of them does not.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..index_topk.reference import IndexerInputs
from ..needs import Needs, Width
from ..query_positions import visible_topk
from ..registry import backend
from ..sparse_attention.absorption import absorbed_inputs
from ..sparse_attention.inputs import AbsorbedInputs, AttentionInputs
from ..sparse_attention.reference import LOG2_E
from ..sparse_attention.triton import TRITON, add_in_order, heads_of_a_program, precision
from .reference import EPSILON, LossSettings, SelectedKeys, sum_over_ranks

MOST_HEADS = 64
"""Attention heads of a rank whose probabilities a program sums; more would be several programs,
whose sums would have to meet."""


def load() -> None:
    importlib.import_module(".triton_kernels", __package__)


ATTENTION_WIDTHS = {**TRITON.widths, "heads": Width(at_most=MOST_HEADS)}
INDEXER_WIDTHS = {
    "dsa_indexer_n_heads": Width(power_of_two=True, at_least=16),
    "dsa_indexer_head_dim": Width(power_of_two=True, at_least=16),
}


def _needs(widths: dict[str, Width], **sizes: Width) -> Needs:
    return Needs(
        package="triton",
        device="cuda",
        interpretable=True,
        dtypes=TRITON.dtypes,
        capability=TRITON.capability,
        widths=widths,
        sizes=sizes,
    )


@backend(
    "index_loss",
    name="triton",
    rank=1,
    needs=_needs({**ATTENTION_WIDTHS, **INDEXER_WIDTHS}, sparse=Width(one_of=(1,))),
    load=load,
    optional=True,
)
def index_loss(inputs: IndexerInputs, attention: AttentionInputs, settings: LossSettings) -> Tensor:
    """As ``reference.index_loss``, over the selected keys."""
    if attention.topk_indices is None:
        topk_indices = visible_topk(attention.queries, attention.query.shape[1])
        attention = attention._replace(topk_indices=topk_indices)
    return selected_loss(inputs, absorbed_inputs(attention), settings)


def selected_loss(
    inputs: IndexerInputs, absorbed: AbsorbedInputs, settings: LossSettings
) -> Tensor:
    """As ``index_loss``, of queries that are absorbed already."""
    target = _summed_over_heads(absorbed)
    sum_over_ranks(target, settings.tp_group)
    selected = absorbed.topk_indices, absorbed.starts, absorbed.positions
    return _SelectedLoss.apply(
        *inputs, target, *selected, settings.index_scale, settings.loss_scale
    )


@backend(
    "index_loss.target",
    name="triton",
    rank=1,
    needs=_needs(ATTENTION_WIDTHS),
    load=load,
    optional=True,
)
def attention_target(attention: AttentionInputs, tp_group: ProcessGroup | None) -> Tensor:
    """As ``reference.attention_target``."""
    target = _summed_over_heads(absorbed_inputs(attention))
    sum_over_ranks(target, tp_group)
    return target.div_(target.sum(-1, keepdim=True).clamp_min_(EPSILON))


@backend(
    "index_loss.of_target",
    name="triton",
    rank=1,
    needs=_needs(INDEXER_WIDTHS),
    load=load,
    optional=True,
)
def loss_of_target(
    inputs: IndexerInputs, keys: SelectedKeys, target: Tensor, settings: LossSettings
) -> Tensor:
    """As ``reference.loss_of_target``."""
    selected = keys.topk_indices.contiguous(), *keys.queries.spans()
    return _SelectedLoss.apply(
        *inputs, target, *selected, settings.index_scale, settings.loss_scale
    )


def _summed_over_heads(absorbed: AbsorbedInputs) -> Tensor:
    """Attention probabilities over the selected keys, summed over the heads, fp32 [b, s, k]; places
    without a key get 0."""
    from . import triton_kernels as kernels

    query, latent, topk_indices, starts, positions, latent_dim, softmax_scale = absorbed
    s, b, heads, width = query.shape
    target = torch.zeros(topk_indices.shape, dtype=torch.float32, device=query.device)
    block = heads_of_a_program(heads, MOST_HEADS)
    kernels.target[(s * b,)](
        query, latent, topk_indices, starts, positions, target,
        s, b, heads, topk_indices.shape[-1], softmax_scale * LOG2_E,
        LATENT=latent_dim, ROPE=width - latent_dim, HEADS=block, KEYS=64,
        PRECISION=precision(query.dtype), num_warps=8 if block > 32 else 4,
    )  # fmt: skip
    return target


class _SelectedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, weights, target, topk_indices, starts, positions, index_scale, loss_scale
    ):
        from . import triton_kernels as kernels

        s, b, heads, dim = query.shape
        k = topk_indices.shape[-1]
        query, key, weights = (tensor.contiguous() for tensor in (query, key, weights))
        scores = torch.empty(target.shape, dtype=torch.float32, device=query.device)
        loss = torch.empty((b, s), dtype=torch.float32, device=query.device)
        d_query, d_key, d_weights = (
            torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
            for tensor in (query, key, weights)
        )
        deterministic = torch.are_deterministic_algorithms_enabled()

        def launch(first: int, end: int, keys: Tensor) -> None:
            kernels.loss[((end - first) * b,)](
                query, key, weights, topk_indices, starts, positions, target, scores, loss,
                d_query, keys, d_weights,
                first, end, s, b, k, index_scale, loss_scale,
                HEADS=heads, DIM=dim, KEYS=64, ATOMIC=not deterministic,
                PRECISION=precision(query.dtype), EPS=EPSILON, num_warps=4,
            )  # fmt: skip

        if deterministic:
            add_in_order(launch, topk_indices, starts, d_key, groups=1)
        else:
            launch(0, s, d_key)
        grads = (d_query, query), (d_key, key), (d_weights, weights)
        ctx.save_for_backward(*(grad.to(like.dtype) for grad, like in grads))
        return loss.sum() * loss_scale

    @staticmethod
    def backward(ctx, grad_output):
        grads = (grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None, None, None)
